"""Training: recipes, what each method minimises, ``fit``, and its state on disk."""

from .batches import TRAINING, samples, steps_an_epoch
from .checkpoint import run_name, state_path
from .fit import accuracy, build, fit, fit_recipe, learning_rate, make_optimizer, training_step
from .objectives import OBJECTIVES
from .recipe import DATASETS, INPUTS, METHODS, MODELS, ONLY, PAPER_METHODS, SCALES, Recipe, Training, recipe
