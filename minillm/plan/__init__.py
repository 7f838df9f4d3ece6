"""What a run will cost, before running it: devices, memory, time."""
