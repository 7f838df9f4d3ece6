"""What training is made of: the loss, the optimizer, the schedule, precision and checkpoints."""
