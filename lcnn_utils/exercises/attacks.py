"""The exercises of notebook 07; :mod:`lcnn_utils.exercises.engine` checks them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .engine import choice_of, exercise, randn

norms = lambda v: v.flatten(1).norm(dim=1).clamp(min=1e-30).view(-1, *[1] * (v.dim() - 1))  # of each sample
shortened = lambda step, eps, length: step * (eps / length).clamp(max=1)


@exercise(
    inputs=[
        (torch.tensor([0.2, 0.8, 1.4, 2.0]).view(4, 1, 1, 1) * randn(0, 4, 1, 3, 3), 1.0),
        (0.2 * randn(1, 1, 5), 0.3),
        (randn(2, 6, 2), 2.0),
        (torch.zeros(2, 3, dtype=torch.float64), 0.5),
    ],
    mistakes={
        "steps inside the ball stay as they are: only longer ones are shortened": lambda s, eps: s * eps / norms(s),
        "the length of each sample's own step, not of the whole batch": lambda s, eps: shortened(s, eps, s.norm()),
        "this is the ball of L∞: L2 keeps the direction of a step": lambda s, eps: s.clamp(-eps, eps),
        "the length is a whole sample's": lambda s, eps: shortened(s, eps, s.norm(dim=-1, keepdim=True)),
        "divide by the length, not by its square": lambda s, eps: shortened(s, eps, norms(s).square()),
    },
    wild="a step of length 0 must stay 0: keep the length that you divide by above 0",
)
def project(step: Tensor, eps: float) -> Tensor:
    """f(step, eps) → the nearest step of L2 length at most ε for each sample: step (N, …), eps a number.
    Solution: ``lcnn_utils.attacks.project``."""
    return shortened(step, eps, norms(step))


within = lambda step, eps: shortened(step, eps, norms(step))
image = lambda x: x.clamp(0, 1)
unit = lambda gradient: gradient / norms(gradient)


def attacked(seed: int, n: int, length: float, eps: float) -> tuple:
    """Images, points near them, gradients, and both numbers."""
    x = image(0.5 + 0.5 * randn(seed, n, 1, 3, 3))
    x_adv = image(x + 0.1 * randn(seed + 10, n, 1, 3, 3))
    return x, x_adv, 3 * randn(seed + 20, n, 1, 3, 3), length, eps


@exercise(
    inputs=[attacked(0, 4, 0.3, 0.5), attacked(1, 1, 0.05, 0.4), attacked(2, 3, 1.0, 0.3), attacked(3, 2, 0.2, 2.0)],
    mistakes={
        "clamp to [0, 1]: it must be an image": lambda x, x_adv, g, n, eps: x + within(x_adv + n * unit(g) - x, eps),
        "the ball first, then [0, 1]": lambda x, x_adv, g, n, eps: x + within(image(x_adv + n * unit(g)) - x, eps),
        "the ball is around x, not x_adv": lambda x, x_adv, g, n, eps: image(x_adv + within(n * unit(g), eps)),
        "divide the gradient by its norm": lambda x, x_adv, g, n, eps: image(x + within(x_adv + n * g - x, eps)),
        "uphill: the loss shall grow": lambda x, x_adv, g, n, eps: image(x + within(x_adv - n * unit(g) - x, eps)),
        "project onto the ball, or many steps leave it": lambda x, x_adv, g, n, eps: image(x_adv + n * unit(g)),
        "signs are for L∞: go along g": lambda x, x_adv, g, n, eps: image(x + within(x_adv + n * g.sign() - x, eps)),
        "start from x_adv, not from x": lambda x, x_adv, g, n, eps: image(x + within(n * unit(g), eps)),
    },
)
def pgd_step(x: Tensor, x_adv: Tensor, gradient: Tensor, length: float, eps: float) -> Tensor:
    """f(x, x_adv, gradient, length, eps) → the next point: from x_adv go ``length`` along the gradient's direction (of
    L2 length 1), come back to the L2 ball of radius ε around x, then into [0, 1]. All tensors (N, C, H, W).
    Solution: the loop of ``lcnn_utils.attacks.ascend``."""
    return image(x + within(x_adv + length * unit(gradient) - x, eps))


own = lambda z, y: z.gather(1, y[:, None]).squeeze(1)  # each sample's z_y
others = lambda z, y: z.masked_fill(F.one_hot(y, z.shape[1]).bool(), -torch.inf)  # z without z_y
margin = lambda z, y: others(z, y).amax(1) - own(z, y)


@exercise(
    inputs=[(2 * randn(n, n, k), torch.arange(n) * 7 % k) for n, k in [(6, 4), (1, 2), (9, 10)]]
    + [(randn(8, 5, 6) - 9, torch.arange(5))],
    mistakes={
        "the largest of the *others*: leave the label's own logit out": lambda z, y: z.amax(1) - own(z, y),
        "the attacker's sign: it grows when the network gets worse": lambda z, y: -margin(z, y),
        "logits, not probabilities: those saturate": lambda z, y: margin(z.softmax(1), y),
        "a number a sample: don't sum or average over the batch": lambda z, y: margin(z, y).mean(),
        "the largest other logit, not their mean": lambda z, y: (z.sum(1) - own(z, y)) / (len(z[0]) - 1) - own(z, y),
    },
)
def margin_loss(logits: Tensor, y: Tensor) -> Tensor:
    """f(logits, y) → max_{j≠y} z_j − z_y of each sample, (N,): positive exactly where the network is wrong. logits (N,
    K), labels y (N,). Solution: minus ``lcnn_utils.curvature.scalar_of(logits, y, "margin")``."""
    return margin(logits, y)


use = choice_of(margin_loss, project, pgd_step)
