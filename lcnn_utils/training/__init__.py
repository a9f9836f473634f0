"""Training: recipes, objectives, ``fit``, and the state on disk."""

from .checkpoint import run_name, state_path
from .fit import accuracy, build, fit, learning_rate, make_optimizer, training_step
from .objectives import OBJECTIVES
from .recipe import DATASETS, INPUTS, METHODS, MODELS, ONLY, Recipe
from .scales import SCALES, recipe
from .splits import TRAINING, measured_split, samples, steps_an_epoch

__all__ = [
    "DATASETS",
    "INPUTS",
    "METHODS",
    "MODELS",
    "OBJECTIVES",
    "ONLY",
    "SCALES",
    "TRAINING",
    "Recipe",
    "accuracy",
    "build",
    "fit",
    "learning_rate",
    "make_optimizer",
    "measured_split",
    "recipe",
    "run_name",
    "samples",
    "state_path",
    "steps_an_epoch",
    "training_step",
]
