"""From text to batches: corpora, duplicates, token shards, packing, the loader; tasks and instructions."""
