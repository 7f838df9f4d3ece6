"""From bytes to token ids: cleaning, and byte-level BPE."""
