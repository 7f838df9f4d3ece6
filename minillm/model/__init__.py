"""Whole models: the transformer, its presets, checkpoints in Hugging Face's layout, and what a token costs."""
