"""Attacks: PGD, smallest successful steps, robustness curves, checks for masked gradients."""

from .masking import Headed, autoattack, masking_checks
from .pgd import ascend, direction, fgsm, margin_loss, mirror, move, perturb, pgd, project
from .robustness import PAPER_EPS, curve_of, first_success, minimal_radius, robustness_curve, wilson

__all__ = ["Headed", "autoattack", "masking_checks"]
__all__ += ["ascend", "direction", "fgsm", "margin_loss", "mirror", "move", "perturb", "pgd", "project"]
__all__ += ["PAPER_EPS", "curve_of", "first_success", "minimal_radius", "robustness_curve", "wilson"]
