"""From text to token ids and back: cleaning, byte-level BPE, the file formats around it, and chat templates."""
