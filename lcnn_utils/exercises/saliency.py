"""The exercises of notebook 06; :mod:`lcnn_utils.exercises.engine` checks them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad
from torch.linalg import eigvalsh

from .engine import choice_of, exercise, network, randn


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(model(x).gather(1, y[:, None]).sum(), x)[0]


@exercise(
    inputs=[
        (network(30, 3, 7, 3), torch.sigmoid(randn(53, 2, 1, 1, 3)), torch.tensor([2, 0])),
        (network(0, 12, 7, 5), torch.sigmoid(randn(50, 4, 3, 2, 2)), torch.arange(4)),
        (network(20, 12, 7, 3), torch.sigmoid(randn(52, 6, 1, 4, 3)), torch.arange(6) % 3),
    ],
    mistakes={
        "half of the map is missing: for the label, or against it?": lambda model, x, y: gradient(model, x, y).abs(),
        "this is the map of the loss": lambda m, x, y: grad(lambda p: F.cross_entropy(m(p), y, reduction="sum"))(x),
        "this explains the prediction, not y": lambda model, x, y: gradient(model, x, model(x).argmax(1)),
        "each map is N times too small: a mean?": lambda model, x, y: gradient(model, x, y) / len(x),
        "weighed by the pixels' values it is another method": lambda model, x, y: gradient(model, x, y) * x,
        "each sample has its own label: did you use it?": lambda m, x, y: grad(lambda p: m(p)[:, y].sum())(x),
        "this is of all logits together": lambda m, x, y: grad(lambda p: m(p).sum())(x),
    },
)
def saliency(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """f(model, x, y) → the signed gradient of each sample's own logit z_y by its pixels, like x and detached: images x
    (N, C, H, W), labels y (N,). Solution: ``lcnn_utils.saliency.explain(model, x, y, "gradient")``."""
    return gradient(model, x, y)


size = lambda maps: maps.flatten(-3).norm(dim=-1)  # of each map (…, C, H, W)


@exercise(
    inputs=[
        (randn(n, n, *shape), randn(n, n, *shape) + 0.3 * randn(n + 30, n, *shape))
        for n, shape in [(3, (1, 4, 4)), (5, (2, 3, 1))]
    ],
    mistakes={
        "relative to which of the two maps?": lambda before, after: size(after - before) / size(after),
        "a number for each sample, not for the batch": lambda before, after: (after - before).norm() / before.norm(),
        "pixel by pixel, those near 0 outweigh all others": lambda before, after: size((after - before) / before),
        "how much its length changed; and the map?": lambda before, after: (size(after) / size(before) - 1).abs(),
        "relative to what?": lambda before, after: size(after - before),
        "this is its square": lambda before, after: (size(after - before) / size(before)) ** 2,
    },
)
def relative_change(before: Tensor, after: Tensor) -> Tensor:
    """f(before, after) → ‖after − before‖₂ / ‖before‖₂ of each sample's map, (N,): maps (N, C, H, W).
    Solution: ``lcnn_utils.saliency.compare``."""
    return size(after - before) / size(before)


in_box = lambda x, noise: (x + noise).clamp(0, 1)
maps = lambda model, draws, y: torch.stack([gradient(model, draw, y) for draw in draws])  # (K, N, C, H, W)
moved = lambda model, x, y, after: relative_change.reference(gradient(model, x, y), after)
changes = lambda model, x, y, noise: moved(model, x, y, maps(model, in_box(x, noise), y))  # (K, N)


def of_predictions(model: nn.Module, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    after = [gradient(model, draw, model(draw).argmax(1)) for draw in in_box(x, noise)]
    return moved(model, x, y, torch.stack(after)).mean(0)


@exercise(
    inputs=[
        (network(n, 12, 7, n + 1), torch.sigmoid(2 * randn(n + 60, n, 3, 2, 2)), torch.arange(n), 0.4 * noise)
        for n, noise in [(3, randn(3, 2, 3, 3, 2, 2)), (5, randn(5, 3, 5, 3, 2, 2))]
    ],
    mistakes={
        "some noisy pixels are below 0 or above 1": lambda m, x, y, n: moved(m, x, y, maps(m, x + n, y)).mean(0),
        "the mean over the draws is missing": changes,
        "this is the first draw's: noise holds several": lambda *arguments: changes(*arguments)[0],
        "over which dimension is the mean?": lambda *arguments: changes(*arguments).mean(1),
        "averaging the maps first hides the noise": lambda m, x, y, n: moved(m, x, y, maps(m, in_box(x, n), y).mean(0)),
        "averaged noise is hardly any": lambda m, x, y, n: changes(m, x, y, n.mean(0, keepdim=True))[0],
        "explain the same label before and after": of_predictions,
    },
)
def instability(model: nn.Module, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    """f(model, x, y, noise) → the relative change of each sample's map under noise, the mean over its K draws, (N,):
    images x (N, C, H, W) in [0, 1], where the noisy ones stay, too; labels y (N,); noise (K, N, C, H, W).
    Solution: ``lcnn_utils.saliency.stability``, with other maps and measures and the worst noise."""
    return changes(model, x, y, noise).mean(0)


symmetric = lambda matrix: matrix + matrix.T


@exercise(
    inputs=[(symmetric(randn(d, d, d)),) for d in (4, 9)],
    mistakes={
        "this is what the worst direction meets": lambda hessian: eigvalsh(hessian).abs().max(),
        "all eigenvalues count": lambda hessian: eigvalsh(hessian).abs().max() / len(hessian) ** 0.5,
        "u has length 1: how large are its d entries?": lambda hessian: hessian.norm(),
        "an entry of u has mean *square* 1/d": lambda hessian: hessian.norm() / len(hessian),
        "this is the mean square: the root is missing": lambda hessian: hessian.square().sum() / len(hessian),
        "the mean of the squares comes before the root": lambda hessian: eigvalsh(hessian).abs().mean(),
        "eigenvalues of both signs cancel; do lengths?": lambda hessian: eigvalsh(hessian).mean().abs(),
    },
)
def random_meets(hessian: Tensor) -> Tensor:
    """f(hessian) → the root mean square of ‖Hu‖ over random directions u of length 1, a number: hessian is symmetric,
    (d, d). Solution: ‖H‖_F/√d, derived in notebook 06 below the exercise."""
    return hessian.norm() / len(hessian) ** 0.5


use = choice_of(saliency, relative_change, instability, random_meets)
