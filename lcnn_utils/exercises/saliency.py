"""The exercises of notebook 06; :mod:`lcnn_utils.exercises.engine` checks them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.linalg import eigvalsh

from .engine import choice_of, exercise, randn


def network(seed: int, classes: int, pixels: int = 12) -> nn.Module:
    layers = [nn.utils.skip_init(nn.Linear, *sizes, dtype=torch.float64) for sizes in [(pixels, 7), (7, classes)]]
    for i, parameter in enumerate([*layers[0].parameters(), *layers[1].parameters()]):
        parameter.data = randn(seed + i, *parameter.shape)
    return nn.Sequential(nn.Flatten(), layers[0], nn.Softplus(), layers[1])


def gradient(model: nn.Module, x: Tensor, y: Tensor, scalar: str = "logit") -> Tensor:
    x = x.detach().clone().requires_grad_()
    logits = model(x)
    value = logits.gather(1, y[:, None]).sum() if scalar == "logit" else F.cross_entropy(logits, y, reduction="sum")
    return torch.autograd.grad(value, x)[0]


@exercise(
    inputs=[
        (network(30, 3, 3), torch.sigmoid(randn(53, 2, 1, 1, 3)), torch.tensor([2, 0])),
        (network(0, 5), torch.sigmoid(randn(50, 4, 3, 2, 2)), torch.arange(4)),
        (network(10, 2), torch.sigmoid(randn(51, 1, 1, 3, 4)), torch.tensor([0])),
        (network(20, 3), torch.sigmoid(randn(52, 6, 1, 4, 3)), torch.arange(6) % 3),
    ],
    mistakes={
        "half of the map is missing: for the label, or against it?": lambda model, x, y: gradient(model, x, y).abs(),
        "this is the map of the loss": lambda model, x, y: gradient(model, x, y, "loss"),
        "this explains the prediction, not y": lambda model, x, y: gradient(model, x, model(x).argmax(1)),
        "each map is too small by the number of samples: did a mean come in?": lambda model, x, y: (
            gradient(model, x, y) / len(x)
        ),
        "the gradient alone: weighed by the pixel's value it is another method": lambda model, x, y: (
            gradient(model, x, y) * x
        ),
        "each sample has its own label: here every image explains the labels of the whole batch": (
            lambda model, x, y: torch.func.grad(lambda pixels: model(pixels)[:, y].sum())(x)
        ),
        "this is the gradient of all logits together": lambda model, x, y: torch.func.grad(
            lambda pixels: model(pixels).sum()
        )(x),
    },
)
def saliency(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """f(model, x, y) → the signed gradient of each sample's own logit z_y by its pixels, like x and detached: images x
    (N, C, H, W), labels y (N,). Solution: ``lcnn_utils.saliency.explain(model, x, y, "gradient")``."""
    return gradient(model, x, y)


size = lambda maps: maps.flatten(1).norm(dim=1)


@exercise(
    inputs=[
        (randn(n, n, *shape), randn(n, n, *shape) + 0.3 * randn(n + 30, n, *shape))
        for n, shape in [(3, (1, 4, 4)), (1, (3, 2, 2)), (5, (2, 3, 1))]
    ],
    mistakes={
        "relative to which of the two maps?": lambda before, after: size(after - before) / size(after),
        "a number for each sample is asked for, this is one for the batch": lambda before, after: (
            (after - before).norm() / before.norm()
        ),
        "pixel by pixel, those near 0 outweigh all others: a ratio of lengths is asked for": lambda before, after: size(
            (after - before) / before
        ),
        "the norm runs over C, H and W, not over one of them": lambda before, after: (
            (after - before).norm(dim=1) / before.norm(dim=1)
        ),
        "norm takes two dimensions at most: make a vector of each map first": lambda before, after: (
            (after - before).norm(dim=(1, 2, 3)) / before.norm(dim=(1, 2, 3))
        ),
        "how much did the map change? This is how much its length did": lambda before, after: (
            (size(after) - size(before)).abs() / size(before)
        ),
        "relative to what?": lambda before, after: size(after - before),
        "this is its square": lambda before, after: size(after - before) ** 2 / size(before) ** 2,
    },
)
def relative_change(before: Tensor, after: Tensor) -> Tensor:
    """f(before, after) → ‖after − before‖₂ / ‖before‖₂ of each sample's map, (N,): maps (N, C, H, W).
    Solution: ``lcnn_utils.saliency.compare``."""
    return size(after - before) / size(before)


def in_box(x: Tensor, noise: Tensor) -> Tensor:
    """x + η of each draw, (K, N, C, H, W), in [0, 1]."""
    return (x + noise).clamp(0, 1)


def changes(model: nn.Module, x: Tensor, y: Tensor, noisy: Tensor) -> Tensor:
    """The relative change of each sample's map for each draw, (K, N)."""
    before = gradient(model, x, y)
    return torch.stack([size(gradient(model, draw, y) - before) / size(before) for draw in noisy.detach()])


def other_labels(model: nn.Module, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    """With the maps of what the model says about the noisy images."""
    before = gradient(model, x, y)
    after = [gradient(model, draw, model(draw).argmax(1)) for draw in in_box(x, noise).detach()]
    return torch.stack([size(a - before) / size(before) for a in after]).mean(0)


def of_mean_map(model: nn.Module, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    before = gradient(model, x, y)
    after = torch.stack([gradient(model, draw, y) for draw in in_box(x, noise).detach()]).mean(0)
    return size(after - before) / size(before)


def relative_to_noisy(model: nn.Module, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    before = gradient(model, x, y)
    after = [gradient(model, draw, y) for draw in in_box(x, noise).detach()]
    return torch.stack([size(a - before) / size(a) for a in after]).mean(0)


@exercise(
    inputs=[
        (
            network(n, classes),
            torch.sigmoid(2 * randn(n + 60, n, 3, 2, 2)),
            torch.arange(n),
            0.4 * randn(n, k, n, 3, 2, 2),
        )
        for n, classes, k in [(3, 4, 2), (1, 2, 5), (5, 6, 3)]
    ],
    mistakes={
        "some pixels of your noisy images are below 0 or above 1": lambda model, x, y, noise: changes(
            model, x, y, x + noise
        ).mean(0),
        "this is the first draw's: noise holds several": lambda model, x, y, noise: changes(
            model, x, y, in_box(x, noise)
        )[0],
        "this is one number for each draw: over which dimension is the mean?": lambda model, x, y, noise: changes(
            model, x, y, in_box(x, noise)
        ).mean(1),
        "these are the changes for each draw: the mean is missing": lambda model, x, y, noise: changes(
            model, x, y, in_box(x, noise)
        ),
        "this is the sum over the draws": lambda model, x, y, noise: changes(model, x, y, in_box(x, noise)).sum(0),
        "this is the change of the mean map: averaging first hides what the noise does": of_mean_map,
        "averaged noise is hardly any noise: average the changes": lambda model, x, y, noise: changes(
            model, x, y, in_box(x, noise.mean(0, keepdim=True))
        )[0],
        "relative to the map of the noisy image? The one before is the measure": relative_to_noisy,
        "the same label is to be explained before and after": other_labels,
    },
)
def instability(model: nn.Module, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    """f(model, x, y, noise) → the relative change of each sample's map under noise, the mean over its K draws, (N,):
    images x (N, C, H, W) in [0, 1], where the noisy ones stay, too; labels y (N,); noise (K, N, C, H, W).
    Solution: ``lcnn_utils.saliency.stability``, with other maps and measures and the worst noise."""
    return changes(model, x, y, in_box(x, noise)).mean(0)


symmetric = lambda matrix: matrix + matrix.T


@exercise(
    inputs=[(symmetric(randn(d, d, d)),) for d in (4, 9, 1, 16)]
    + [(torch.tensor([3.0, -3.0, 1.0, 0.0, 0.0]).double().diag(),)],
    mistakes={
        "this is what the worst direction meets: a random one meets all eigenvalues alike": lambda hessian: (
            eigvalsh(hessian).abs().max()
        ),
        "not the largest eigenvalue alone: all of them count": lambda hessian: (
            eigvalsh(hessian).abs().max() / len(hessian) ** 0.5
        ),
        "u has length 1: how large are its d entries?": lambda hessian: hessian.norm(),
        "an entry of u has mean *square* 1/d": lambda hessian: hessian.norm() / len(hessian),
        "this is the mean square: the root is missing": lambda hessian: hessian.square().sum() / len(hessian),
        "the mean of the squares comes before the root": lambda hessian: eigvalsh(hessian).abs().mean(),
        "eigenvalues of both signs cancel: does the length of Hu care for signs?": lambda hessian: (
            eigvalsh(hessian).mean().abs()
        ),
    },
)
def random_meets(hessian: Tensor) -> Tensor:
    """f(hessian) → the root mean square of ‖Hu‖ over random directions u of length 1, a number: hessian is symmetric,
    (d, d). Solution: ‖H‖_F/√d, derived in notebook 06 below the exercise."""
    return hessian.norm() / len(hessian) ** 0.5


use = choice_of(saliency, relative_change, instability, random_meets)
