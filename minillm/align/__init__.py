"""From a model that writes on to one that answers: instructions, preferences, rewards."""
