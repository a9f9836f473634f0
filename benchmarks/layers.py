"""What an LCNN's layers cost, alone and in a whole training step, beside PyTorch's and the authors' as published.

`python benchmarks/layers.py`, some ten minutes on one CPU core; CIFAR's shapes with random images, so no dataset.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import published
import torch
import torch.nn.functional as F
from common import interleaved, write
from torch import Tensor, nn
from training import stepper

from lcnn_utils.lab import keep_memory, one_thread
from lcnn_utils.nn import CenteredSoftplus, LipschitzBatchNorm2d, conv_norm, spectral_normalize
from lcnn_utils.training import recipe

BETA = 5.0
SHAPES = ((128, 16, 32, 32), (128, 8, 8, 8))  # the first stage of CIFAR's ResNet-18 of width 16, and of digits' nets
COMMAND = "python benchmarks/layers.py"


def backward(function: Callable, x: Tensor, g: Tensor) -> Callable[[], Any]:
    """Forward and backward pass, to x and to the function's parameters."""
    leaf = x.clone().requires_grad_()  # keeps the layout
    parameters = [leaf, *function.parameters()] if isinstance(function, nn.Module) else [leaf]
    return lambda: torch.autograd.grad(function(leaf), parameters, g)


def softplus(x: Tensor) -> Tensor:
    return F.softplus(x, BETA)


def layers(channels: int) -> list[dict[str, Callable]]:
    """Two groups of layers; the yardstick of each comes first."""
    return [
        {
            "F.softplus, β fixed": softplus,
            "ReLU": nn.ReLU(),
            "CenteredSoftplus, β fixed": CenteredSoftplus(BETA, trainable=False),
            "CenteredSoftplus, β trained": CenteredSoftplus(BETA),
            "published, β trained": published.Softplus(BETA),
        },
        {
            "nn.BatchNorm2d": nn.BatchNorm2d(channels, affine=False),
            "LipschitzBatchNorm2d, nothing clipped": LipschitzBatchNorm2d(channels, 10.0),
            "LipschitzBatchNorm2d, all clipped": LipschitzBatchNorm2d(channels, 0.5),
            "published": published.BatchNorm(channels),
        },
    ]


def layer_rows() -> list[dict]:
    rows = []
    for shape in SHAPES:
        generator = torch.Generator().manual_seed(0)
        x, g = (torch.randn(shape, generator=generator).to(memory_format=torch.channels_last) for _ in range(2))
        for group in layers(shape[1]):
            for name, t in interleaved({n: backward(f, x, g) for n, f in group.items()}, 100, 15).items():
                spread = f"{t['low']:.2f} … {t['high']:.2f}"
                facts = {"ms": t["seconds"] * 1e3, "time / first": t["ratio"], "quartiles": spread, "best": t["best"]}
                rows.append({"shape": "×".join(map(str, shape)), "layer": name} | facts)
    return rows


def clipped(model: nn.Module) -> nn.Module:
    """γ = 1 everywhere, where training takes it: then most channels are clipped."""
    for module in model.modules():
        if isinstance(module, LipschitzBatchNorm2d):
            module.gamma = 1.0
    return model


def as_published(model: nn.Module) -> nn.Module:
    return published.as_published(clipped(model)).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def step_rows(net: str, dataset: str, each: int, seconds: float, **options: Any) -> list[dict]:
    """Steps of one kind of net, ``each`` of a contestant in turn; Standard is the yardstick."""
    of = lambda method, **more: recipe(dataset, method, **(options | more))
    nhwc = lambda model: as_published(model).to(memory_format=torch.channels_last)
    contestants = {
        "Standard": (of("standard"), clipped),
        "ReLU, ordinary net": (of("relu"), clipped),
        "LCNN": (of("lcnn"), clipped),
        "LCNN, published layers": (of("lcnn"), as_published),
        "LCNN, published layers, NHWC": (of("lcnn"), nhwc),
        "GradReg": (of("gradreg"), clipped),
        "LCNN + GradReg": (of("lcnn_gradreg"), clipped),
        "LCNN + GradReg, published layers": (of("lcnn_gradreg", derivative="exact"), as_published),
    }
    cpu = torch.device("cpu")
    with contextlib.ExitStack() as stack:
        steps = {name: stepper(one, cpu, stack, change=change)[0] for name, (one, change) in contestants.items()}
        some = {name: lambda step=step: [step() for _ in range(each)] for name, step in steps.items()}
        timed = interleaved(some, rounds=40, seconds=seconds)
    batch, relu = of("standard").batch_size, timed["ReLU, ordinary net"]["ratio"]
    rows = []
    for name, t in timed.items():
        row = {"net": net, "step": name, "ms an image": 1e3 * t["seconds"] / each / batch, "/ Standard": t["ratio"]}
        row |= {"quartiles": f"{t['low']:.2f} … {t['high']:.2f}", "best": t["best"], "/ ReLU": t["ratio"] / relu}
        rows.append(row | {"rounds": t["rounds"]})
    return rows


def check() -> None:
    """The published layers are what they are described to be, and ours computes the same where it should."""
    x = torch.randn(8, 4, 6, 6)
    torch.testing.assert_close(published.Softplus(BETA)(x), CenteredSoftplus(BETA)(x), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(published.BatchNorm(4, 1e6)(x), LipschitzBatchNorm2d(4, 1e6)(x), rtol=1e-4, atol=1e-5)
    for stride, size in ((1, 6), (2, 6), (2, 5)):
        conv = spectral_normalize(nn.Conv2d(4, 8, 3, stride, 1, bias=False), (4, size, size))
        published.as_published(nn.Sequential(conv))
        for _ in range(300):
            _ = conv.weight
        assert abs(conv_norm(conv, (4, size, size), "exact").item() - 1) < 1e-3


def main() -> None:
    one_thread()
    keep_memory()
    check()
    torch.manual_seed(0)
    notes = [
        "Forward and backward to x and the parameters; eager, float32, one thread, NHWC, standard normal inputs. "
        "`time / first` is relative to the first of each group; `best` the same of the fastest times.",
    ]
    write("layers", layer_rows(), COMMAND, 2**21, 0, notes)
    small = dict(scale="small", batch_size=128)
    rows = step_rows("digits, ResNet-10 of width 8, batch 128", "digits", 10, 120)
    rows += step_rows("32×32, ResNet-18 of width 16, batch 128", "cifar10", 1, 180, **small)
    rows += step_rows(
        "32×32, ResNet-18 of width 64, batch 32", "cifar10", 1, 240, **(small | dict(width=64, batch_size=32))
    )
    notes = [
        "Whole training steps on random images: power iterations, forward and backward passes, optimiser; float32, one "
        "thread, γ = 1 as in trained nets, so that most channels are clipped. n is the batch of the first two.",
        "They take turns (ten steps each on digits, one else); `/ Standard` is the median of the ratios within a "
        "round, `best` the ratio of the fastest.",
        "GradReg: exact on digits, by differences on 32×32; the published form is exact on both.",
        "The published layers (`benchmarks/published.py`) are written from their description, not the authors' code; "
        "they have this lab's optimiser and blocks.",
    ]
    write("layers_steps", rows, COMMAND, 128, 0, notes)


if __name__ == "__main__":
    main()
