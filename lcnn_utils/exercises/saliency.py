"""The exercises of notebook 06; :mod:`lcnn_utils.exercises.engine` checks them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.linalg import eigvalsh

from .engine import choice_of, exercise, randn


def network(seed: int, classes: int) -> nn.Module:
    """One of images of 12 values."""
    layers = [nn.utils.skip_init(nn.Linear, *sizes, dtype=torch.float64) for sizes in [(12, 7), (7, classes)]]
    for i, parameter in enumerate([*layers[0].parameters(), *layers[1].parameters()]):
        parameter.data = randn(seed + i, *parameter.shape)
    return nn.Sequential(nn.Flatten(), layers[0], nn.Softplus(), layers[1])


def gradient(model: nn.Module, x: Tensor, y: Tensor, scalar: str = "logit") -> Tensor:
    x.requires_grad_()
    logits = model(x)
    value = logits.gather(1, y[:, None]).sum() if scalar == "logit" else F.cross_entropy(logits, y, reduction="sum")
    return torch.autograd.grad(value, x)[0]


@exercise(
    inputs=[
        (network(0, 5), torch.sigmoid(randn(50, 4, 3, 2, 2)), torch.arange(4)),
        (network(10, 2), torch.sigmoid(randn(51, 1, 1, 3, 4)), torch.tensor([0])),
        (network(20, 3), torch.sigmoid(randn(52, 6, 1, 4, 3)), torch.arange(6) % 3),
    ],
    mistakes={
        "keep the sign: for or against is half of the map": lambda model, x, y: gradient(model, x, y).abs(),
        "of the label's logit, not of the loss": lambda model, x, y: gradient(model, x, y, "loss"),
        "of the label's logit, not of the prediction's": lambda model, x, y: gradient(model, x, model(x).argmax(1)),
        "sum the logits over the samples, don't average": lambda model, x, y: gradient(model, x, y) / len(x),
        "the gradient alone: times x it is another method": lambda model, x, y: gradient(model, x, y) * x,
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
        "relative to the map before, not to the one after": lambda before, after: size(after - before) / size(after),
        "a number a sample: norms over C, H and W": lambda before, after: (after - before).norm() / before.norm(),
        "divide the norms, don't take the norm of a ratio": lambda before, after: size((after - before) / before),
        "of the map, not of its length": lambda before, after: (size(after) - size(before)).abs() / size(before),
        "relative: divide by the size of the map before": lambda before, after: size(after - before),
        "norms, not their squares": lambda before, after: size(after - before) ** 2 / size(before) ** 2,
    },
)
def relative_change(before: Tensor, after: Tensor) -> Tensor:
    """f(before, after) → ‖after − before‖₂ / ‖before‖₂ of each sample's map, (N,): maps (N, C, H, W).
    Solution: ``lcnn_utils.saliency.compare``."""
    return size(after - before) / size(before)


symmetric = lambda matrix: matrix + matrix.T


@exercise(
    inputs=[(symmetric(randn(d, d, d)),) for d in (4, 9, 1, 16)]
    + [(torch.tensor([3.0, -3.0, 1.0, 0.0, 0.0]).double().diag(),)],
    mistakes={
        "the worst direction: a random one meets all eigenvalues alike": lambda hessian: eigvalsh(hessian).abs().max(),
        "u has length 1, so each of its d entries has mean square 1/d": lambda hessian: hessian.norm(),
        "divide by √d, not by d": lambda hessian: hessian.norm() / len(hessian),
        "the mean of squares comes before the root": lambda hessian: eigvalsh(hessian).abs().mean(),
        "eigenvalues of both signs count: square them first": lambda hessian: eigvalsh(hessian).mean().abs(),
    },
)
def random_meets(hessian: Tensor) -> Tensor:
    """f(hessian) → the root mean square of ‖Hu‖ over random directions u of length 1, ‖H‖_F/√d, a number: hessian is
    symmetric, (d, d). Solution: notebook 06, the hints below it."""
    return hessian.norm() / len(hessian) ** 0.5


use = choice_of(saliency, relative_change, random_meets)
