"""From text to token ids and back: cleaning, byte-level BPE, and the file formats around it."""
