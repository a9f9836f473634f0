"""Attacks: PGD, smallest successful steps, robustness curves, checks for masked gradients."""

from .masking import Headed, autoattack, masking_checks
from .pgd import ascend, direction, fgsm, margin_loss, mirror, move, perturb, pgd, project
from .robustness import PAPER_EPS, curve_of, first_success, minimal_radius, robustness_curve, wilson
