"""The exercises of notebook 07; :mod:`lcnn_utils.exercises.engine` checks them."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .engine import choice_of, exercise, randn

own = lambda z, y: z.gather(1, y[:, None]).squeeze(1)  # each sample's z_y
labelled = lambda z, y: F.one_hot(y, z.shape[1]).bool()  # where z_y stands
margin = lambda z, y: z.masked_fill(labelled(z, y), -torch.inf).amax(1) - own(z, y)
gap_of_two = lambda z: z.topk(2).values.diff().squeeze(1)  # second − first


@exercise(
    inputs=[(torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0]], dtype=torch.float64), torch.tensor([0, 1]))]
    + [(2 * randn(n, n, k), torch.arange(n) * 7 % k) for n, k in [(6, 4), (1, 2), (9, 10)]]
    + [(randn(8, 5, 6) - 9, torch.arange(5))],
    mistakes={
        "the largest of the *others*: leave the label's own logit out": lambda z, y: z.amax(1) - own(z, y),
        "the attacker's sign: it grows when the network gets worse": lambda z, y: -margin(z, y),
        "this does not look at y: it has the same sign, right or wrong": lambda z, y: gap_of_two(z),
        "right or wrong decides the sign, so y must come in": lambda z, y: -gap_of_two(z),
        "logits, not probabilities: those saturate": lambda z, y: margin(z.softmax(1), y),
        "a number a sample: don't sum over the batch, or average": lambda z, y: margin(z, y).mean(),
        "the largest other logit, not their mean": lambda z, y: (z.sum(1) - own(z, y)) / (len(z[0]) - 1) - own(z, y),
        "0 may be larger than all the others: what is smaller than any number?": lambda z, y: (
            z.masked_fill(labelled(z, y), 0).amax(1) - own(z, y)
        ),
        "one logit from each row: logits[:, y] takes a whole column for each label": lambda z, y: (
            z.masked_fill(labelled(z, y), -torch.inf).amax(1) - z[:, y]
        ),
        "(N,) less (N, 1) is (N, N): give both the same shape": lambda z, y: (
            margin(z, y) + own(z, y) - own(z, y)[:, None]
        ),
        "a number a sample, (N,): a dimension of size 1 is left over": lambda z, y: margin(z, y)[:, None],
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
        (0.2 * randn(1, 1, 1, 5, 1), 0.3),
        (randn(2, 6, 3, 2, 2), 2.0),
        (torch.zeros(2, 1, 3, 3, dtype=torch.float64), 0.5),
    ],
    mistakes={
        "which steps may stay as they are?": lambda s, eps: s * eps / norms(s),
        "the length of each sample's own step, not of the whole batch": lambda s, eps: shortened(s, eps, s.norm()),
        "this is the ball of L∞; in L2 a step keeps its direction": lambda s, eps: s.clamp(-eps, eps),
        "the length is a whole image's, not a row's": lambda s, eps: shortened(s, eps, s.norm(dim=-1, keepdim=True)),
        "the square of a length is no length": lambda s, eps: shortened(s, eps, norms(s).square()),
        "which norm? the sum of absolute values is L1": lambda s, eps: shortened(s, eps, s.abs().sum((1, 2, 3), True)),
        "a length a sample, (N,), meets the columns of the images: it needs further dimensions of size 1": (
            lambda s, eps: shortened(s, eps, norms(s).flatten())
        ),
        "a length a sample needs as many dimensions as step has, not (N, 1)": (
            lambda s, eps: shortened(s, eps, norms(s).view(-1, 1))
        ),
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


def uphill(x: Tensor, x_adv: Tensor, gradient: Tensor, length: float, eps: float) -> Tensor:
    return image(x + within(x_adv + length * unit(gradient) - x, eps))


def attacked(seed: int, n: int, length: float, eps: float) -> tuple:
    """Images, points near them, gradients, the first of them 0, and both numbers."""
    x = image(0.5 + 0.5 * randn(seed, n, 1, 3, 3))
    x_adv = image(x + 0.1 * randn(seed + 10, n, 1, 3, 3))
    gradient = 3 * randn(seed + 20, n, 1, 3, 3)
    gradient[0] = 0
    return x, x_adv, gradient, length, eps


SMALL = (images([0.5, 0.9], [0.3, 0.4]), images([0.6, 0.7], [0.1, 0.5]), images([3.0, 4.0], [-2.0, 0.5]), 0.3, 0.25)


@exercise(
    inputs=[SMALL, attacked(0, 4, 0.3, 0.5), attacked(1, 2, 0.05, 0.4), attacked(2, 3, 1.0, 0.3)],
    mistakes={
        "is it still an image?": lambda x, x_adv, g, n, eps: x + within(x_adv + n * unit(g) - x, eps),
        "first the ball, then [0, 1]": lambda x, x_adv, g, n, eps: x + within(image(x_adv + n * unit(g)) - x, eps),
        "whose ball is it, that of x or of x_adv?": lambda x, x_adv, g, n, eps: image(x_adv + within(n * unit(g), eps)),
        "how long is this step? only the gradient's direction counts": lambda x, x_adv, g, n, eps: uphill(
            x, x_adv, g * norms(g), n * norms(g), eps
        ),
        "uphill: the loss shall grow": lambda x, x_adv, g, n, eps: uphill(x, x_adv, -g, n, eps),
        "many such steps leave the ball: where do you come back?": lambda x, x_adv, g, n, eps: image(
            x_adv + n * unit(g)
        ),
        "signs are for L∞: in L2, what has the gradient's direction and length 1?": lambda x, x_adv, g, n, eps: image(
            x + within(x_adv + n * g.sign() - x, eps)
        ),
        "it begins at x_adv, not at x": lambda x, x_adv, g, n, eps: uphill(x, x, g, n, eps),
        "each sample's own gradient has length 1, not that of the batch": lambda x, x_adv, g, n, eps: uphill(
            x, x_adv, g, n * norms(g) / g.norm(), eps
        ),
        "clamped to ±eps it is in the ball of L∞: who takes care of that of L2?": lambda x, x_adv, g, n, eps: image(
            x + (x_adv + n * unit(g) - x).clamp(-eps, eps)
        ),
        "project takes steps, not points: from where to where?": lambda x, x_adv, g, n, eps: image(
            within(x_adv + n * unit(g), eps)
        ),
        "project answers with a step: where does it begin?": lambda x, x_adv, g, n, eps: image(
            within(x_adv + n * unit(g) - x, eps)
        ),
        "the projected step is the whole step from x: don't add it to x_adv": lambda x, x_adv, g, n, eps: image(
            x_adv + within(x_adv + n * unit(g) - x, eps)
        ),
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
    step: Callable = uphill, kept: float = 0,
) -> Tensor:  # fmt: skip
    """The attack; ``kept``: the share of the gradients before that is added to each."""
    x_adv, gradient = x, torch.zeros_like(x)
    for length in lengths:
        x_adv.requires_grad_()
        gradient = kept * gradient + torch.autograd.grad(loss(model(x_adv), y).sum(), x_adv)[0]
        x_adv = step(x, x_adv, gradient, length, eps).detach()
    return x_adv


def along_the_first(model: nn.Module, x: Tensor, y: Tensor, eps: float, lengths: Sequence[float]) -> Tensor:
    (gradient,) = torch.autograd.grad(margin(model(x.requires_grad_()), y).sum(), x)
    return climb(model, x, y, eps, lengths, step=lambda x, x_adv, g, *rest: uphill(x, x_adv, gradient, *rest))


def network(seed: int, pixels: int, classes: int) -> nn.Module:
    """A small curved network, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 20), nn.Tanh(), nn.Linear(20, classes))
    for parameter in net.parameters():
        parameter.data.mul_(4)
    return net.double().eval()


@exercise(
    inputs=[
        (network(0, 2, 3), images([0.5, 0.8], [0.3, 0.4]), torch.tensor([0, 2]), 0.5, [0.3, 0.2, 0.1]),
        (network(1, 9, 4), image(0.5 + 0.3 * randn(1, 5, 1, 3, 3)), torch.arange(5) % 4, 0.6, [0.5, 0.4, 0.1, 0.05]),
        (network(2, 9, 2), image(0.5 + 0.3 * randn(2, 3, 1, 3, 3)), torch.arange(3) % 2, 0.2, [0.05]),
    ],
    mistakes={
        "which loss? with cross-entropy, a network that is very sure has hardly a gradient": lambda *args: climb(
            *args, loss=lambda z, y: F.cross_entropy(z, y, reduction="none")
        ),
        "is the loss larger at the end than at x?": lambda *args: climb(*args, loss=lambda z, y: -margin(z, y)),
        "the margin loss wants logits, not probabilities": lambda *args: climb(
            *args, loss=lambda z, y: margin(z.softmax(1), y)
        ),
        "the gradient changes on the way: where do you take it?": along_the_first,
        "the ball's centre wanders along: which image stays where it is?": lambda *args: climb(
            *args, step=lambda x, x_adv, *rest: uphill(x_adv, x_adv, *rest)
        ),
        "every step begins at x again: where should it begin?": lambda m, x, y, eps, n: climb(m, x, y, eps, n[-1:]),
        "each step begins at x, though its gradient is that of x_adv": lambda *args: climb(
            *args, step=lambda x, x_adv, *rest: uphill(x, x, *rest)
        ),
        "each step has its own length, one of lengths": lambda m, x, y, eps, n: climb(m, x, y, eps, n[:1] * len(n)),
        "in which order does pgd_step take length and eps?": lambda *args: climb(
            *args, step=lambda x, x_adv, gradient, length, eps: uphill(x, x_adv, gradient, eps, length)
        ),
        "the loss does not depend on the point you differentiate by: which image does model see?": (
            lambda model, x, y, eps, lengths: torch.autograd.grad(margin(x.requires_grad_().flatten(1), y).sum(), +x)
        ),
        "one step for each of lengths: the last one is missing": lambda m, x, y, eps, n: climb(m, x, y, eps, n[:-1]),
        "return what comes after the last step, not the first": lambda m, x, y, eps, n: climb(m, x, y, eps, n[:1]),
        "backward adds to .grad what was there before: start each step without it": lambda *args: climb(*args, kept=1),
        ".grad is None of a point that was computed: detach x_adv, then let it require a gradient": (
            lambda model, x, y, eps, lengths: uphill(x, x, None, lengths[0], eps)  # type: ignore[arg-type]
        ),
    },
)
def attack(model: nn.Module, x: Tensor, y: Tensor, eps: float, lengths: Sequence[float]) -> Tensor:
    """f(model, x, y, eps, lengths) → where PGD ends, (N, C, H, W): from x, one ``pgd_step`` of each of the ``lengths``,
    along the gradient of the margin loss at the point where the step begins. x (N, C, H, W), labels y (N,).
    Solution: the loop of ``lcnn_utils.attacks.ascend``, which also keeps the best points and drops fooled samples."""
    return climb(model, x, y, eps, lengths)


use = choice_of(margin_loss, project, pgd_step, attack)
