"""Small networks with known answers, their samples, and what every attack promises of them."""

import copy
import functools
import itertools
import math

import torch
from torch import nn

from lcnn_utils.curvature import evaluating, scalar_of
from lcnn_utils.data import Images, load
from lcnn_utils.nn import mlp, resnet

KINDS = {"lcnn": dict(lcnn=True), "standard": {}, "relu": dict(activation=nn.ReLU)}


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


class Once(torch.autograd.Function):
    """x³, whose backward can't be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


def length(step: torch.Tensor, norm: str) -> torch.Tensor:
    return torch.linalg.vector_norm(step.flatten(1), 2 if norm == "l2" else math.inf, dim=1)


def margin_loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with evaluating(model), torch.no_grad():
        return -scalar_of(model(x), y, "margin")


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    """Bit for bit, and of the same names."""
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def net(seed: int = 0, dtype=torch.float32) -> nn.Sequential:
    """An MLP on 12 numbers with enough slope that the samples below can be fooled."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise((12, 24, 24, 4)):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1], Scale(5.0)).to(dtype)


def cnn(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Softplus(10), nn.Dropout(0.5),
        nn.Conv2d(8, 8, 3, stride=2), nn.Softplus(10), nn.Flatten(), nn.Linear(72, 4),
    )  # fmt: skip
    model(torch.rand(64, 1, 8, 8))  # fills the running statistics
    return model


def predicted(model: nn.Module, *shape: int, dtype=torch.float32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples in [0, 1] and what the network says of them, taken for true."""
    x = torch.rand(*shape, generator=seeded(seed), dtype=dtype)
    with evaluating(model), torch.no_grad():
        return x, model(x).argmax(1)


def linear(shape: tuple[int, ...], dtype, norm: str):
    """A linear two-class network on images, samples, their labels and their exact distances from the boundary."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 2)).to(dtype)
    x, y = predicted(model, 12, *shape, dtype=dtype)
    w = (model[1].weight[0] - model[1].weight[1]).detach()
    return model, x, y, -margin_loss(model, x, y) / (w.norm() if norm == "l2" else w.abs().sum())


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def means_of_digits() -> tuple[nn.Module, Images]:
    """A linear network, the nearest class mean, and 60 test images, of which it gets some wrong."""
    train, test = load("digits", "train"), load("digits", "test", subset=60)
    means = torch.stack([train.float()[train.y == c].mean(0).flatten() for c in range(10)])
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    model[1].weight.data, model[1].bias.data = 2 * means, -means.square().sum(1)
    return model, test


@functools.cache
def _trained_like(kind: str, family: str) -> nn.Module:
    """Random weights, but running statistics that fit: without them the logits hardly depend on the image."""
    torch.manual_seed(0)
    if family == "mlp":
        net = mlp([64, 16, 16, 4], **KINDS[kind])
    else:
        net = resnet(10, num_classes=4, width=4, in_channels=1, image_size=8, ordinary=kind == "relu", **KINDS[kind])
    net = net.double().train()
    for _ in range(40):
        net(torch.rand(64, 1, 8, 8).double())
    return net.eval()


def case(kind: str = "lcnn", family: str = "resnet", n: int = 5) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A network of the lab, images, and labels of which most are not what the network says."""
    x = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    return copy.deepcopy(_trained_like(kind, family)), x, torch.arange(n) % 4


class Quadratic(nn.Module):
    """Logits (½ xᵀAx + b·x, 0) of an image's pixels, A symmetric: the gradient of logit 0 is Ax + b."""

    def __init__(self, matrix, slope=0.0):
        super().__init__()
        self.matrix, self.slope = matrix, slope

    def forward(self, x):
        x = x.flatten(1)
        value = torch.einsum("ni,ij,nj->n", x, self.matrix, x) / 2 + (x * self.slope).sum(1)
        return torch.stack([value, torch.zeros_like(value)], 1)
