"""Attacks: PGD, smallest successful steps, robustness curves, checks for masked gradients."""

from .curves import PAPER_EPS, curve_of, first_success, robustness_curve, wilson
from .masking import autoattack, masking_checks
from .pgd import fgsm, margin_loss, perturb, pgd
from .robustness import minimal_radius

__all__ = [
    "PAPER_EPS",
    "autoattack",
    "curve_of",
    "fgsm",
    "first_success",
    "margin_loss",
    "masking_checks",
    "minimal_radius",
    "perturb",
    "pgd",
    "robustness_curve",
    "wilson",
]
