"""Fine-tuning a small part: low-rank changes, soft prompts, prefixes, bottlenecks, gated prefixes, biases; all from outside the model."""
