"""The parts of a transformer, one idea a file: norms, positions, masks, attention, feed-forward, block."""
