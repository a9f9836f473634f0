"""The checks of notebook 07; see :mod:`lcnn_utils.exercises.engine`."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..curvature import scalar_of
from .engine import randn, verdict

__all__ = ["margin_loss", "pgd_step", "project"]


def _norms(v: Tensor) -> Tensor:
    return v.flatten(1).norm(dim=1).view(-1, *[1] * (v.dim() - 1))


def project(f: Callable) -> bool | None:
    """f(step, eps) → the nearest step of L2 length at most ε for each sample: step (N, …), eps a number.
    Solution: ``lcnn_utils.attacks.project``."""
    shortened = lambda step, eps, length: step * (eps / length.clamp(min=1e-30)).clamp(max=1)
    truth = lambda step, eps: shortened(step, eps, _norms(step))
    mistakes = {
        "steps inside the ball stay as they are: only longer ones are shortened": lambda s, e: (
            s * (e / _norms(s).clamp(min=1e-30))
        ),
        "the length of each sample's own step, not of the whole batch": lambda s, e: shortened(s, e, s.norm()),
        "this is the ball of L∞: L2 shortens the step as a whole and keeps its direction": lambda s, e: s.clamp(-e, e),
        "the length is over all of a sample's entries, not over the last axis": lambda s, e: shortened(
            s, e, s.norm(dim=-1, keepdim=True)
        ),
        "divide by the length, not by its square": lambda s, e: shortened(s, e, _norms(s).square()),
    }
    shapes = [((4, 1, 3, 3), 1.0), ((1, 5), 0.3), ((6, 2), 2.0), ((3, 3, 2, 2), 4.0)]
    inputs = [(torch.linspace(0.2, 2, s[0]).view(-1, *[1] * (len(s) - 1)) * randn(i, *s), e)
              for i, (s, e) in enumerate(shapes)]  # fmt: skip
    inputs.append((torch.zeros(2, 3, dtype=torch.float64), 0.5))
    wild = "a step of length 0 must stay 0: keep the length that you divide by above 0"
    return verdict(project, f, inputs, truth, mistakes, wild)


def pgd_step(f: Callable) -> bool | None:
    """f(x, at, gradient, length, eps) → the next point: from ``at`` go ``length`` along the gradient's direction (of L2
    length 1), come back to the L2 ball of radius ε around x, then into [0, 1]. All tensors (N, C, H, W).
    Solution: the loop of ``lcnn_utils.attacks.pgd.ascend``."""
    image = lambda v: v.clamp(0, 1)
    within = lambda step, eps: step * (eps / _norms(step).clamp(min=1e-30)).clamp(max=1)
    ahead = lambda at, gradient, length: at + length * gradient / _norms(gradient).clamp(min=1e-30)
    truth = lambda x, at, gradient, length, eps: image(x + within(ahead(at, gradient, length) - x, eps))
    mistakes = {
        "clamp to [0, 1]: the sum must be an image": lambda x, at, g, n, e: x + within(ahead(at, g, n) - x, e),
        "the ball is around x, not around the last point": lambda x, at, g, n, e: image(
            at + within(ahead(at, g, n) - at, e)
        ),
        "the step has a length of its own: divide the gradient by its norm": lambda x, at, g, n, e: image(
            x + within(at + n * g - x, e)
        ),
        "uphill: the attacker wants the loss to grow": lambda x, at, g, n, e: image(
            x + within(ahead(at, -g, n) - x, e)
        ),
        "project back onto the ball, or many steps leave it": lambda x, at, g, n, e: image(ahead(at, g, n)),
        "sign steps belong to L∞: in L2 go along the gradient itself": lambda x, at, g, n, e: image(
            x + within(at + n * g.sign() - x, e)
        ),
        "start from `at`, the last point, not from x": lambda x, at, g, n, e: image(x + within(ahead(0, g, n), e)),
    }
    inputs = []
    for i, (n, length, eps) in enumerate([(4, 0.3, 0.5), (1, 0.05, 0.4), (3, 1.0, 0.3), (2, 0.2, 2.0)]):
        x = (0.5 + 0.5 * randn(i, n, 1, 3, 3)).clamp(0, 1)
        at = (x + 0.1 * randn(i + 10, n, 1, 3, 3)).clamp(0, 1)
        inputs.append((x, at, 3 * randn(i + 20, n, 1, 3, 3), length, eps))
    return verdict(pgd_step, f, inputs, truth, mistakes)


def margin_loss(f: Callable) -> bool | None:
    """f(logits, y) → max_{j≠y} z_j − z_y of each sample, (N,): positive exactly where the network is wrong. logits (N,
    K), labels y (N,). Solution: minus ``lcnn_utils.curvature.scalar_of(logits, y, "margin")``."""
    truth = lambda logits, y: -scalar_of(logits, y, "margin")
    own = lambda logits, y: logits.gather(1, y[:, None]).squeeze(1)
    mistakes = {
        "the largest of the *others*: leave the label's own logit out": lambda z, y: z.amax(1) - own(z, y),
        "the attacker's sign: it grows when the network gets worse": lambda z, y: scalar_of(z, y, "margin"),
        "logits, not probabilities: those saturate": lambda z, y: -scalar_of(z.softmax(1), y, "margin"),
        "a number a sample: don't sum or average over the batch": lambda z, y: -scalar_of(z, y, "margin").mean(),
        "the largest other logit, not their mean": lambda z, y: (z.sum(1) - own(z, y)) / (z.shape[1] - 1) - own(z, y),
    }
    shapes = [(6, 4), (1, 2), (9, 10), (3, 3)]
    inputs = [(2 * randn(i, n, k), (torch.arange(n) * 7 + i) % k) for i, (n, k) in enumerate(shapes)]
    inputs.append((randn(8, 5, 6) - 9, torch.arange(5)))
    return verdict(margin_loss, f, inputs, truth, mistakes)
