"""A training run: flags, recipe, training step, evaluation, checkpoints and the run folder."""
