"""The exercises of notebook 07; :mod:`lcnn_utils.exercises.engine` checks them."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .engine import choice_of, exercise, network, randn

own = lambda z, y: z.gather(1, y[:, None]).squeeze(1)  # each sample's z_y
others = lambda z, y, instead=-torch.inf: z.masked_fill(F.one_hot(y, z.shape[1]).bool(), instead)  # z without z_y
margin = lambda z, y: others(z, y).amax(1) - own(z, y)


@exercise(
    inputs=[
        (torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0]], dtype=torch.float64), torch.tensor([0, 1])),
        (2 * randn(6, 6, 4), torch.arange(6) % 4),
        (randn(8, 5, 6) - 9, torch.arange(5)),
    ],
    mistakes={
        "the largest of the *others*: leave the label's own logit out": lambda z, y: z.amax(1) - own(z, y),
        "the attacker's sign: it grows when the network gets worse": lambda z, y: -margin(z, y),
        "this does not look at y: it has the same sign, right or wrong": lambda z, y: z.topk(2).values.diff()[:, 0],
        "logits, not probabilities: those saturate": lambda z, y: margin(z.softmax(1), y),
        "0 may be larger than all others: what is smaller than any?": lambda z, y: others(z, y, 0).amax(1) - own(z, y),
        "logits[:, y] takes a whole column for each label": lambda z, y: others(z, y).amax(1) - z[:, y],
        "(N,) less (N, 1) is (N, N): give both the same shape": lambda z, y: others(z, y).amax(1) - own(z, y)[:, None],
    },
    wild="−∞ is still in there: did you overwrite z_y before you took it?",
)
def margin_loss(logits: Tensor, y: Tensor) -> Tensor:
    """f(logits, y) → max_{j≠y} z_j − z_y of each sample, (N,): positive exactly where the network is wrong. logits (N,
    K), labels y (N,). Solution: minus ``lcnn_utils.curvature.scalar_of(logits, y, "margin")``."""
    return margin(logits, y)


norms = lambda v: v.flatten(1).norm(dim=1).clamp(min=1e-30).view(-1, 1, 1, 1)  # of each sample
shortened = lambda step, eps, length: step * (eps / length).clamp(max=1)
within = lambda step, eps: shortened(step, eps, norms(step))
images = lambda *rows: torch.tensor(rows, dtype=torch.float64)[:, None, None]  # of one row of pixels


@exercise(
    inputs=[
        (images([0.3, 0.4], [3.0, 4.0]), 1.0),
        (torch.tensor([0.2, 0.8, 1.4, 2.0]).view(4, 1, 1, 1) * randn(0, 4, 1, 3, 3), 1.0),
        (torch.zeros(2, 1, 3, 3, dtype=torch.float64), 0.5),
    ],
    mistakes={
        "which steps may stay as they are?": lambda s, eps: s * eps / norms(s),
        "each sample has a length, not the batch": lambda s, eps: shortened(s, eps, s.norm()),
        "the ball of L∞; in L2 a step keeps its direction": lambda s, eps: s.clamp(-eps, eps),
        "the length of a whole image, not of a row": lambda s, eps: shortened(s, eps, s.norm(dim=-1, keepdim=True)),
        "a length (N,) meets the images' columns: which shape?": lambda s, eps: shortened(s, eps, norms(s).flatten()),
        "which of ε and the length stands above the other?": lambda s, eps: s * (norms(s) / eps).clamp(max=1),
    },
    wild="a step of length 0 must stay 0: keep what you divide by above 0",
)
def project(step: Tensor, eps: float) -> Tensor:
    """f(step, eps) → the nearest step of L2 length at most ε for each sample: step (N, C, H, W), eps a number.
    Solution: ``lcnn_utils.attacks.project``."""
    return within(step, eps)


image = lambda x: x.clamp(0, 1)
unit = lambda gradient: gradient / norms(gradient)
uphill = lambda x, x_adv, gradient, length, eps: image(x + within(x_adv + length * unit(gradient) - x, eps))
START = image(0.5 + 0.5 * randn(2, 3, 1, 3, 3))


@exercise(
    inputs=[
        (images([0.5, 0.9], [0.3, 0.4]), images([0.6, 0.7], [0.1, 0.5]), images([3.0, 4.0], [-2.0, 0.5]), 0.3, 0.25),
        (START, image(START + 0.1 * randn(12, 3, 1, 3, 3)), 3 * randn(22, 3, 1, 3, 3), 1.0, 0.3),
        (START, image(START + 0.1 * randn(12, 3, 1, 3, 3)), torch.zeros_like(START), 0.3, 0.5),
    ],
    mistakes={
        "is it still an image?": lambda x, x_adv, g, n, eps: x + within(x_adv + n * unit(g) - x, eps),
        "first the ball, then [0, 1]": lambda x, x_adv, g, n, eps: x + within(image(x_adv + n * unit(g)) - x, eps),
        "whose ball is it, that of x or of x_adv?": lambda x, x_adv, g, n, eps: image(x_adv + within(n * unit(g), eps)),
        "how long is this step?": lambda x, x_adv, g, n, eps: image(x + within(x_adv + n * g - x, eps)),
        "many such steps leave the ball: what then?": lambda x, x_adv, g, n, eps: image(x_adv + n * unit(g)),
        "signs are for L∞": lambda x, x_adv, g, n, eps: image(x + within(x_adv + n * g.sign() - x, eps)),
        "project takes steps, not points": lambda x, x_adv, g, n, eps: image(within(x_adv + n * unit(g), eps)),
        "project answers with a step": lambda x, x_adv, g, n, eps: image(within(x_adv + n * unit(g) - x, eps)),
    },
    wild="a gradient of 0 has no direction: let the sample stay where it is, and divide by nothing that is 0",
)
def pgd_step(x: Tensor, x_adv: Tensor, gradient: Tensor, length: float, eps: float) -> Tensor:
    """f(x, x_adv, gradient, length, eps) → the next point: from x_adv go ``length`` along the gradient's direction (of
    L2 length 1), come back to the L2 ball of radius ε around x, then into [0, 1]. All tensors (N, C, H, W).
    Solution: the loop of ``lcnn_utils.attacks.ascend``."""
    return uphill(x, x_adv, gradient, length, eps)


def climb(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, lengths: Sequence[float], *, loss: Callable = margin,
    at: Callable = lambda x, x_adv: x_adv, step: Callable = uphill, kept: float = 0,
) -> Tensor:  # fmt: skip
    """The attack; ``at``: where the gradient is taken; ``kept``: how much of the gradient before is added to it."""
    x_adv, gradient = x, torch.zeros_like(x)
    for length in lengths:
        point = at(x, x_adv).detach().requires_grad_()
        gradient = kept * gradient + torch.autograd.grad(loss(model(point), y).sum(), point)[0]
        x_adv = step(x, x_adv, gradient, length, eps)
    return x_adv


@exercise(
    inputs=[
        (network(0, 2, 20, 3), images([0.5, 0.8], [0.3, 0.4]), torch.tensor([0, 2]), 0.5, [0.3, 0.2, 0.1]),
        (network(1, 9, 20, 4), image(0.5 + 0.3 * randn(1, 5, 1, 3, 3)), torch.arange(5) % 4, 0.6, [0.5, 0.4, 0.1]),
        (network(2, 9, 20, 2), image(0.5 + 0.3 * randn(2, 3, 1, 3, 3)), torch.arange(3) % 2, 0.2, [0.05]),
    ],
    mistakes={
        "which loss? Cross-entropy is flat where a network is sure": lambda *args: climb(*args, loss=F.cross_entropy),
        "is the loss larger at the end than at x?": lambda *args: climb(*args, loss=lambda z, y: -margin(z, y)),
        "where is the gradient taken? It changes on the way": lambda *args: climb(*args, at=lambda x, x_adv: x),
        "which image is the ball's centre?": lambda *args: climb(*args, step=lambda x, *rest: uphill(rest[0], *rest)),
        "every step begins at x again": lambda model, x, y, eps, lengths: climb(model, x, y, eps, lengths[-1:]),
        "each step has its own length": lambda m, x, y, eps, n: climb(m, x, y, eps, n[:1] * len(n)),
        "return what comes after the last step": lambda m, x, y, eps, n: climb(m, x, y, eps, n[:1]),
        "backward adds to .grad what was there before": lambda *args: climb(*args, kept=1),
    },
)
def attack(model: nn.Module, x: Tensor, y: Tensor, eps: float, lengths: Sequence[float]) -> Tensor:
    """f(model, x, y, eps, lengths) → where PGD ends, (N, C, H, W): from x, one ``pgd_step`` of each of the ``lengths``,
    along the gradient of the margin loss at the point where the step begins. x (N, C, H, W), labels y (N,).
    Solution: the loop of ``lcnn_utils.attacks.ascend``, which also keeps the best points and drops fooled samples."""
    return climb(model, x, y, eps, lengths)


use = choice_of(margin_loss, project, pgd_step, attack)
