"""Many ranks: how they start, where each sits, how they talk, and every way to split a model over them."""
