"""What notebook 04 measures: norms of convolutions, power iteration, spectra of layers, γ, and residual blocks."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, svds
from torch import Generator, Tensor, nn
from torch.func import jacrev
from torch.nn.grad import conv2d_input
from torch.nn.utils import parametrize

from .. import data
from ..curvature import channel_slopes, evaluating, geometry
from ..nn import (
    CenteredSoftplus,
    LipschitzBatchNorm2d,
    centered_softplus,
    conv_norm,
    norms_once_a_step,
    spectral_normalize,
)
from ..nn.spectral_norm import Shape
from ..training import Recipe, accuracy, build, learning_rate, make_optimizer, training_step
from .curvature import layer_calls

BLOCKS = {  # residual blocks: (branches are averaged, with γ-BatchNorm)
    "sum": (False, False),
    "average": (True, False),
    "average + γ-BatchNorm": (True, True),
}
STATISTICS = ("as trained", "measured again")  # of the BatchNorms, when γ is changed


@torch.no_grad()
def conv_matrix(conv: nn.Conv2d, input_shape: Shape) -> Tensor:
    """The matrix of a convolution on images of ``input_shape`` (C, H, W), a column a pixel: (C'·H'·W', C·H·W)."""
    basis = torch.eye(math.prod(input_shape)).to(conv.weight).view(-1, *input_shape)
    return F.conv2d(basis, conv.weight, None, conv.stride, conv.padding).flatten(1).mT


def sparse_norm(conv: nn.Conv2d, input_shape: Shape) -> float:
    """The largest singular value of a convolution with float64 weights, by ARPACK, without its matrix."""
    weight, shape = conv.weight.detach(), (1, *input_shape)
    convolve = lambda x: F.conv2d(x.view(shape), weight, None, conv.stride, conv.padding)
    output_shape = convolve(weight.new_zeros(shape)).shape
    adjoint = lambda y: conv2d_input(shape, weight, y.view(output_shape), conv.stride, conv.padding)
    operator = LinearOperator(
        (output_shape.numel(), math.prod(shape)),
        matvec=lambda x: convolve(torch.as_tensor(x)).flatten(),
        rmatvec=lambda y: adjoint(torch.as_tensor(y)).flatten(),
        dtype=np.float64,
    )
    start = np.random.default_rng(0).standard_normal(min(operator.shape))
    return float(svds(operator, 1, v0=start, tol=1e-10, return_singular_vectors=False)[0])


def norms_frame(sizes: Iterable[int], kernels: int) -> pd.DataFrame:
    """Estimates of the norm of random 3×3 convolutions, 2 channels to 2, beside the true one (:func:`sparse_norm`).
    Columns: stride, size (side of the image), kernel, estimate, norm, true, ratio. ``scaled`` is the reshaped kernel's
    norm times √(number of windows that see a pixel), ⌈3/stride⌉ along each side: a bound (Y. Tsuzuku et al., NeurIPS
    2018, arXiv:1802.04034)."""
    rows = []
    for stride, size, seed in itertools.product((1, 2), sizes, range(kernels)):
        conv, shape = random_conv(2, 2, seed, stride=stride), (2, size, size)
        true = sparse_norm(conv, shape)
        reshaped = torch.linalg.matrix_norm(conv.weight.flatten(1), 2).item()
        norms = {
            "reshaped": reshaped,
            "power": conv_norm(conv, shape, "power", 15).item(),
            "bound": conv_norm(conv, shape, "bound").item(),
            "scaled": reshaped * math.ceil(3 / stride),
        }
        rows += [(stride, size, seed, name, norm, true, norm / true) for name, norm in norms.items()]
    return pd.DataFrame(rows, columns=["stride", "size", "kernel", "estimate", "norm", "true", "ratio"])


def layer_name(name: str) -> str:
    """What a module of ``nn.resnet`` is: "stem", "block 2 conv 1", "block 2 shortcut", "classifier"."""
    block, *path = name.split(".")
    if not path:
        return "stem" if block == "0" else "classifier"
    first = path == ["branch", "0"]
    part = "shortcut" if path[0] == "shortcut" else "conv 1" if first else "conv 2"
    return f"block {int(block) - 2} {part}"


def norm_errors(model: nn.Module) -> pd.DataFrame:
    """True norm of each spectrally normalised layer of a ``nn.resnet`` as it is now: columns layer, norm, error.
    The norm is σ_true/σ, at least 1; ``error`` is 1 − σ/σ_true, how much too small σ is (at least 1e-7)."""
    rows = []
    with evaluating(model), torch.no_grad():  # in eval mode, where looking at a weight does not move its v
        for name, layer in model.named_modules():
            if parametrize.is_parametrized(layer, "weight"):
                shape = layer.parametrizations.weight[0].input_shape
                matrix = conv_matrix(layer, shape) if len(shape) == 3 else layer.weight
                norm = torch.linalg.matrix_norm(matrix.double(), 2).item()
                rows.append((layer_name(name), norm, max(1 - 1 / norm, 1e-7)))
    return pd.DataFrame(rows, columns=["layer", "norm", "error"])


def training_norms(recipe: Recipe, every: int) -> tuple[nn.Module, pd.DataFrame]:
    """Train as ``fit`` does, on the CPU, and look every few steps at the running σ that the weights are divided by.
    Returns the model in eval mode, its norms not refreshed, and columns step, layer, norm, error."""
    model, images = build(recipe).train(), data.load(recipe.dataset, "train")
    optimizer, _ = make_optimizer(recipe, model)
    generator, frames = Generator().manual_seed(recipe.seed), []
    steps = len(images) // recipe.batch_size  # in an epoch
    with norms_once_a_step(model) as advance:
        for epoch in range(recipe.epochs):
            batches = data.batches(images, recipe.batch_size, generator=generator, drop_last=True)
            for batch, (x, y) in enumerate(batches):
                rate = learning_rate(recipe, (epoch + batch / steps) / recipe.epochs)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                advance()
                step = epoch * steps + batch
                if step % every == 0:
                    frames.append(norm_errors(model).assign(step=step))
                training_step(recipe, model, optimizer, x, y)
            advance()  # as fit does, before it measures
    return model.eval(), pd.concat(frames, ignore_index=True)


def conv_layers(model: nn.Module, x: Tensor) -> dict[str, tuple[nn.Conv2d, nn.Module, Shape]]:
    """By name, each convolution of a ``nn.resnet``, the BatchNorm after it, and its input's shape for images x."""
    names = {module: name for name, module in model.named_modules()}
    calls = layer_calls(model, x[:1], (nn.Conv2d, nn.BatchNorm2d, LipschitzBatchNorm2d))
    layers = {}
    for (conv, images, _), (norm, _, _) in zip(calls[::2], calls[1::2], strict=True):
        _, channels, height, width = images.shape
        layers[layer_name(names[conv])] = (conv, norm, (channels, height, width))
    return layers


def slopes_of(norm: nn.Module) -> Tensor:
    """Slopes (C,) of a BatchNorm's channels in eval mode, cut off at γ where it has one."""
    slopes = channel_slopes(norm)
    assert slopes is not None, f"{norm} is no BatchNorm"
    return slopes


def spectra_frame(models: dict[str, nn.Module], x: Tensor) -> pd.DataFrame:
    """Singular values of each convolution, alone and followed by its BatchNorm, for images like x (N, C, H, W).
    Columns: method, layer, operator, share (of the singular values that are at least as large), value."""
    parts = []
    for method, model in models.items():
        for layer, (conv, norm, shape) in conv_layers(model, x).items():
            with evaluating(model):
                matrix = conv_matrix(conv, shape).double()
            slopes = slopes_of(norm)
            scaled = matrix * slopes.repeat_interleave(len(matrix) // len(slopes))[:, None]
            for operator, a in (("convolution", matrix), ("convolution, then BatchNorm", scaled)):
                values = torch.linalg.svdvals(a).numpy()
                columns = {"share": (1 + torch.arange(len(values))) / len(values), "value": values}
                parts.append(pd.DataFrame({"method": method, "layer": layer, "operator": operator} | columns))
    return pd.concat(parts, ignore_index=True)


@torch.no_grad()
def with_gamma(model: nn.Module, gamma: float, images: Tensor | None = None, variances: bool = True) -> nn.Module:
    """A copy of ``model`` in eval mode whose γ-BatchNorms have the slope limit ``gamma``.
    With ``images`` (N, C, H, W) their statistics, or without ``variances`` only their means, are measured again on
    these, from the first layer to the last; otherwise they stay as they were."""
    model, hooks = copy.deepcopy(model).eval(), []

    def measure(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        var, mean = torch.var_mean(inputs[0], (0, 2, 3))
        norm.get_buffer("running_mean").copy_(mean)
        if variances:
            norm.get_buffer("running_var").copy_(var)

    for layer in model.modules():
        if isinstance(layer, LipschitzBatchNorm2d):
            layer.gamma = gamma
            hooks.append(layer.register_forward_pre_hook(measure))
    if images is not None:
        model(images)
    for hook in hooks:
        hook.remove()
    return model


def gamma_frame(
    models: dict[str, nn.Module], gammas: Iterable[float], test: tuple[Tensor, Tensor], train: Tensor, images: int
) -> pd.DataFrame:
    """What a common γ does to trained nets with γ-BatchNorms, with their statistics and with those of ``train`` images.
    Columns: method, statistics (of STATISTICS), gamma, layer, slope (of that BatchNorm); accuracy on ``test`` (x, y);
    curvature, grad_norm: medians of the margin's C and ‖∇f‖ over its first ``images``."""
    x, y = test
    parts = []
    for (method, model), gamma, statistics in itertools.product(models.items(), gammas, STATISTICS):
        net = with_gamma(model, gamma, None if statistics == "as trained" else train)
        slopes = {layer: slopes_of(norm).max().item() for layer, (_, norm, _) in conv_layers(net, x).items()}
        g = geometry(net, x[:images], y[:images], scalar="margin", tol=0.05)
        values = dict(curvature=g.curvature.median().item(), grad_norm=g.grad_norm.median().item())
        values |= dict(gamma=gamma, accuracy=accuracy(net, x, y))
        frame = pd.DataFrame({"layer": list(slopes), "slope": list(slopes.values())} | values)
        parts.append(frame.assign(method=method, statistics=statistics))
    return pd.concat(parts, ignore_index=True)


def random_conv(c_in: int, c_out: int, seed: int, *, stride: int = 1) -> nn.Conv2d:
    """A 3×3 convolution without bias, padding 1, float64 weights N(0, 1/fan-in) drawn from ``seed``."""
    conv = nn.utils.skip_init(nn.Conv2d, c_in, c_out, 3, stride, 1, bias=False, dtype=torch.float64)
    weight = torch.randn(conv.weight.shape, generator=Generator().manual_seed(seed), dtype=torch.float64)
    conv.weight.data = weight / math.sqrt(c_in * 3**2)
    return conv


def random_branch(shape: Shape, seed: int, batchnorm: bool) -> nn.Sequential:
    """The branch F of a residual block for inputs of ``shape`` (C, H, W): conv – φ – conv of norm 1, or with a
    γ-BatchNorm after each convolution, whose statistics are those of the last batch in training mode."""
    layers: list[nn.Module] = []
    for index in range(2):
        layers.append(spectral_normalize(random_conv(shape[0], shape[0], seed + index), shape, 100))
        if batchnorm:
            layers.append(LipschitzBatchNorm2d(shape[0], momentum=1.0).double())
        layers.append(CenteredSoftplus(5.0, trainable=False))
    return nn.Sequential(*layers[:-1])


def residual_block(branch: nn.Module, average: bool, z: Tensor) -> Tensor:
    """φ(F(z) + z), or the authors' φ(½(F(z/√2) + z/√2)); φ has β = 5."""
    if not average:
        return centered_softplus(branch(z) + z, 5.0)
    z = z / math.sqrt(2)
    return centered_softplus((branch(z) + z) / 2, 5.0)


def residual_frame(depth: int, seeds: Sequence[int], shape: Shape = (4, 6, 6)) -> pd.DataFrame:
    """Stacks of random residual blocks with β = 5: how slope and signal change.
    Columns: block (of BLOCKS), seed, blocks, slope (‖Jacobian‖₂ of the stack at a random x), signal ‖z‖/‖x‖, bound (on
    the slope; nan with BatchNorm)."""
    rows = []
    for (name, (average, batchnorm)), seed in itertools.product(BLOCKS.items(), seeds):
        x = torch.randn(32, *shape, generator=Generator().manual_seed(seed), dtype=torch.float64)
        z, jacobian = x, torch.eye(x[0].numel(), dtype=torch.float64)
        for n in range(1, depth + 1):
            branch = random_branch(shape, 1000 * seed + 2 * n, batchnorm)
            block = functools.partial(residual_block, branch, average)
            block(z)  # in training mode: BatchNorm takes the statistics of this batch
            branch.eval()
            derivative = jacrev(lambda sample: block(sample[None])[0])(z[0]).detach()  # noqa: B023
            jacobian = derivative.reshape(jacobian.shape) @ jacobian
            z = block(z).detach()
            bound = {"sum": 2.0**n, "average": 2 ** (-n / 2)}.get(name, math.nan)
            slope = torch.linalg.matrix_norm(jacobian, 2).item()
            rows.append((name, seed, n, slope, (z[0].norm() / x[0].norm()).item(), bound))
    return pd.DataFrame(rows, columns=["block", "seed", "blocks", "slope", "signal", "bound"])
