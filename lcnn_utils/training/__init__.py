"""Training: recipes, what each method minimises, ``fit``, and its state on disk."""

from .checkpoint import run_name, state_path
from .fit import TRAINING, accuracy, build, fit, learning_rate, make_optimizer, samples, steps_an_epoch, training_step
from .objectives import OBJECTIVES
from .recipe import DATASETS, INPUTS, METHODS, MODELS, ONLY, SCALES, Recipe, recipe

__all__ = [
    "DATASETS", "INPUTS", "METHODS", "MODELS", "OBJECTIVES", "ONLY", "SCALES", "TRAINING", "Recipe", "accuracy",
    "build", "fit", "learning_rate", "make_optimizer", "recipe", "run_name", "samples", "state_path", "steps_an_epoch",
    "training_step",
]  # fmt: skip
