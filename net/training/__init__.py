"""One training run: flags, recipe, step, checkpoints, evaluation, and the folder that holds it."""
