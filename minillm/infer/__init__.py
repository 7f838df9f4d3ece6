"""Using a model: sampling, caches."""
