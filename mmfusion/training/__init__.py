"""Many members at once: trainer, objective, recipe."""
