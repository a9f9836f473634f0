"""What notebook 04 measures: norms of convolutions, power iteration, spectra of layers, γ, and residual blocks."""

from __future__ import annotations

import copy
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
from ..nn import CenteredSoftplus, LipschitzBatchNorm2d, conv_norm, norms_once_a_step, spectral_normalize
from ..nn.spectral_norm import Shape
from ..training import Recipe, accuracy, build, learning_rate, make_optimizer, training_step
from .curvature import passing

MERGES = ("sum", "average", "average + γ-BatchNorm")  # of the branches of a residual block
STATISTICS = ("as trained", "taken anew")  # of the BatchNorms, when γ is changed


@torch.no_grad()
def conv_matrix(conv: nn.Conv2d, input_shape: Shape) -> Tensor:
    """The matrix of a convolution on images of ``input_shape`` (C, H, W), a column a pixel: (C'·H'·W', C·H·W)."""
    basis = torch.eye(math.prod(input_shape)).to(conv.weight).view(-1, *input_shape)
    return F.conv2d(basis, conv.weight, None, conv.stride, conv.padding).flatten(1).mT


def sparse_norm(conv: nn.Conv2d, input_shape: Shape) -> float:
    """The largest singular value of a convolution with float64 weights, by ARPACK, without its matrix."""
    weight, stride, padding = conv.weight.detach(), conv.stride, (conv.kernel_size[0] // 2, conv.kernel_size[1] // 2)
    shape = (1, *input_shape)
    outputs = F.conv2d(weight.new_zeros(shape), weight, None, stride, padding).shape
    forward = lambda v: F.conv2d(torch.as_tensor(v).view(shape), weight, None, stride, padding).flatten()
    backward = lambda v: conv2d_input(shape, weight, torch.as_tensor(v).view(outputs), stride, padding).flatten()
    operator = LinearOperator((outputs.numel(), math.prod(shape)), forward, backward, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(min(operator.shape))
    return float(svds(operator, 1, v0=start, tol=1e-10, return_singular_vectors=False)[0])


def norms_frame(
    sizes: Sequence[int], strides: Sequence[int] = (1, 2), kernels: int = 10, channels: int = 2
) -> pd.DataFrame:
    """Estimates of the norm of random 3×3 convolutions beside the true one (``sparse_norm``).
    Columns: stride, size (side of the image), kernel, estimate, norm, true, ratio. ``scaled`` is the reshaped kernel's
    norm times √(number of windows that see a pixel), ⌈3/stride⌉ along each side: a bound (Y. Tsuzuku et al., NeurIPS
    2018, arXiv:1802.04034)."""
    rows = []
    for stride, size, seed in itertools.product(strides, sizes, range(kernels)):
        conv, shape = random_conv(channels, channels, seed, stride=stride), (channels, size, size)
        reshaped = torch.linalg.matrix_norm(conv.weight.flatten(1), 2).item()
        true = sparse_norm(conv, shape)
        norms = {"reshaped": reshaped, "power": conv_norm(conv, shape, "power", 15).item()}
        norms |= {"bound": conv_norm(conv, shape, "bound").item(), "scaled": reshaped * math.ceil(3 / stride)}
        rows += [(stride, size, seed, name, norm, true, norm / true) for name, norm in norms.items()]
    return pd.DataFrame(rows, columns=["stride", "size", "kernel", "estimate", "norm", "true", "ratio"])


def power_frame(iterations: Iterable[int], kernels: int = 20, channels: int = 4, size: int = 12) -> pd.DataFrame:
    """Power iteration on random 3×3 convolutions, from random starts: columns kernel, iterations, ratio."""
    rows, shape = [], (channels, size, size)
    for seed in range(kernels):
        conv = random_conv(channels, channels, seed)
        true = conv_norm(conv, shape, "exact").item()
        for k in iterations:
            start = Generator().manual_seed(1000 + seed)
            rows.append((seed, k, conv_norm(conv, shape, "power", k, start).item() / true))
    return pd.DataFrame(rows, columns=["kernel", "iterations", "ratio"])


def random_start_error(layer: nn.Module, starts: int = 1000) -> float:
    """Median over random starts of 1 − σ/σ_true after one power iteration on the weight of an ``nn.Linear``."""
    weight = layer.get_parameter("parametrizations.weight.original").detach().double()
    v = torch.randn(starts, weight.shape[1], generator=Generator().manual_seed(0), dtype=torch.float64)
    v = F.normalize(v @ weight.mT @ weight)
    return 1 - ((v @ weight.mT).norm(dim=1).median() / torch.linalg.matrix_norm(weight, 2)).item()


def layer_name(name: str) -> str:
    """What a module of ``nn.resnet`` is: "stem", "block 2 conv 1", "block 2 shortcut", "classifier"."""
    block, *path = name.split(".")
    if not path:
        return "stem" if block == "0" else "classifier"
    return f"block {int(block) - 2} " + ("shortcut" if path[0] == "shortcut" else f"conv {1 if path[1] == '0' else 2}")


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


def training_norms(recipe: Recipe, every: int = 4) -> tuple[nn.Module, pd.DataFrame]:
    """Train as ``fit`` does, on the CPU, and look at the running σ that every so manieth step divided by.
    Returns the model in eval mode, its norms not refreshed, and columns step, layer, norm, error."""
    model, images = build(recipe).train(), data.load(recipe.dataset, "train")
    optimizer, _ = make_optimizer(recipe, model)
    generator, frames = Generator().manual_seed(recipe.seed), []
    steps = len(images) // recipe.batch_size
    with norms_once_a_step(model) as advance:
        for epoch in range(recipe.epochs):
            epoch_batches = data.batches(images, recipe.batch_size, generator=generator, drop_last=True)
            for step, (x, y) in enumerate(epoch_batches):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(recipe, (epoch + step / steps) / recipe.epochs)
                advance()
                if (taken := epoch * steps + step) % every == 0:
                    frames.append(norm_errors(model).assign(step=taken))
                training_step(recipe, model, optimizer, x, y)
            advance()  # as fit does, before it measures
    return model.eval(), pd.concat(frames, ignore_index=True)


def _slopes(layer: nn.Module) -> Tensor:
    """Slopes (C,) of a BatchNorm in eval mode."""
    slopes = channel_slopes(layer)
    assert slopes is not None
    return slopes


def conv_layers(model: nn.Module, x: Tensor) -> dict[str, tuple[nn.Conv2d, nn.Module, Shape]]:
    """By name, each convolution of a ``nn.resnet``, the BatchNorm after it, and its input's shape for images x."""
    shapes: dict[nn.Module, Shape] = {}
    for layer, seen, _ in passing(model, x[:1], nn.Conv2d):
        shapes[layer] = (seen.shape[1], seen.shape[2], seen.shape[3])
    found = {}
    for name, parent in model.named_modules():
        if isinstance(parent, nn.Sequential):
            for (child, conv), norm in zip(parent.named_children(), list(parent)[1:], strict=False):
                if isinstance(conv, nn.Conv2d):
                    found[layer_name(f"{name}.{child}".lstrip("."))] = (conv, norm, shapes[conv])
    return found


def spectra_frame(models: dict[str, nn.Module], x: Tensor) -> pd.DataFrame:
    """Singular values of each convolution, alone and followed by its BatchNorm, for images like x (N, C, H, W).
    Columns: method, layer, operator, share (of the singular values that are at least as large), value."""
    parts = []
    for method, model in models.items():
        for layer, (conv, norm, shape) in conv_layers(model, x).items():
            with evaluating(model):
                matrix = conv_matrix(conv, shape).double()
            slopes = _slopes(norm)
            scaled = matrix * slopes.repeat_interleave(len(matrix) // len(slopes))[:, None]
            for operator, a in (("convolution", matrix), ("convolution, then BatchNorm", scaled)):
                values = torch.linalg.svdvals(a).numpy()
                columns = {"share": (1 + torch.arange(len(values))) / len(values), "value": values}
                parts.append(pd.DataFrame({"method": method, "layer": layer, "operator": operator} | columns))
    return pd.concat(parts, ignore_index=True)


def slopes_frame(models: dict[str, nn.Module], x: Tensor) -> pd.DataFrame:
    """1/σ_c of every BatchNorm's channels, before any clip: columns method, layer, slope, gamma (nan where none)."""
    parts = []
    for method, model in models.items():
        for layer, (_, norm, _) in conv_layers(model, x).items():
            gamma = norm.gamma.item() if isinstance(norm, LipschitzBatchNorm2d) else math.nan
            deviation = torch.sqrt(norm.get_buffer("running_var") + float(norm.eps))  # type: ignore[arg-type]
            columns = {"layer": layer, "slope": 1 / deviation, "gamma": gamma}
            parts.append(pd.DataFrame({"method": method} | columns))
    return pd.concat(parts, ignore_index=True)


@torch.no_grad()
def with_gamma(model: nn.Module, gamma: float, images: Tensor | None = None, variances: bool = True) -> nn.Module:
    """A copy of ``model`` in eval mode whose γ-BatchNorms have the slope limit ``gamma``.
    With ``images`` (N, C, H, W) their statistics, or without ``variances`` only their means, are taken anew from these,
    from the first layer to the last; otherwise they stay as they were."""
    model, hooks = copy.deepcopy(model).eval(), []

    def measure(layer: nn.Module, args: tuple[Tensor]) -> None:
        var, mean = torch.var_mean(args[0], (0, 2, 3))
        layer.get_buffer("running_mean").copy_(mean)
        if variances:
            layer.get_buffer("running_var").copy_(var)

    for layer in model.modules():
        if isinstance(layer, LipschitzBatchNorm2d):
            layer.gamma = gamma
            hooks.append(layer.register_forward_pre_hook(measure))
    if images is not None:
        model(images)
    for hook in hooks:
        hook.remove()
    return model


def input_spread(model: nn.Module, x: Tensor) -> Tensor:
    """β times the spread of each centered softplus's inputs for images x, in order of use: their standard deviation
    over images and pixels, averaged over channels. Far below 1, they span a piece on which the softplus is straight."""
    layers = passing(model, x, CenteredSoftplus)
    return torch.stack([layer.beta.detach() * seen.std((0, 2, 3)).mean() for layer, seen, _ in layers])


def gamma_frame(
    models: dict[str, nn.Module], gammas: Iterable[float], test: tuple[Tensor, Tensor], train: Tensor, images: int = 60
) -> pd.DataFrame:
    """What a common γ does to trained nets with γ-BatchNorms, with their statistics and with those of ``train`` images.
    Columns: method, statistics (of STATISTICS), gamma, layer, slope (of that BatchNorm); accuracy on ``test`` (x, y);
    curvature, grad_norm: medians of the margin's C and ‖∇f‖ over its first ``images``."""
    (x, y), parts = test, []
    for (method, model), gamma, statistics in itertools.product(models.items(), gammas, STATISTICS):
        net = with_gamma(model, gamma, None if statistics == STATISTICS[0] else train)
        slopes = {layer: _slopes(norm).max().item() for layer, (_, norm, _) in conv_layers(net, x).items()}
        g = geometry(net, x[:images], y[:images], scalar="margin", tol=0.05)
        values = {"curvature": g.curvature.median().item(), "grad_norm": g.grad_norm.median().item()}
        columns = {"layer": list(slopes), "slope": list(slopes.values()), "accuracy": accuracy(net, x, y)}
        parts.append(pd.DataFrame({"method": method, "statistics": statistics, "gamma": gamma} | columns | values))
    return pd.concat(parts, ignore_index=True)


def random_conv(c_in: int, c_out: int, seed: int, *, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias, padding ``kernel // 2``, float64 weights N(0, 1/fan-in) drawn from ``seed``."""
    conv = nn.utils.skip_init(nn.Conv2d, c_in, c_out, kernel, stride, kernel // 2, bias=False, dtype=torch.float64)
    weight = torch.randn(conv.weight.shape, generator=Generator().manual_seed(seed), dtype=torch.float64)
    conv.weight.data = weight / math.sqrt(c_in * kernel**2)
    return conv


class _Block(nn.Module):
    """z ↦ φ(F(z) + z), or the authors' φ(½(F(z/√2) + z/√2)); F is conv – φ – conv of norm 1, or with γ-BatchNorms."""

    def __init__(self, merge: str, shape: Shape, seed: int, beta: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(2):
            layers.append(spectral_normalize(random_conv(shape[0], shape[0], seed + index), shape, 100))
            if merge == MERGES[2]:
                layers.append(LipschitzBatchNorm2d(shape[0], momentum=1.0).double())  # running = last statistics
            layers.append(CenteredSoftplus(beta, trainable=False))
        self.average, self.branch, self.activation = merge != "sum", nn.Sequential(*layers[:-1]), layers[-1]

    def forward(self, z: Tensor) -> Tensor:
        z = z / math.sqrt(2) if self.average else z
        return self.activation((self.branch(z) + z) / (2 if self.average else 1))


def residual_frame(
    depth: int, seeds: Sequence[int], *, channels: int = 4, size: int = 6, beta: float = 5.0
) -> pd.DataFrame:
    """Stacks of residual blocks, conv – φ – conv of norm 1 beside an identity: how slope and signal change.
    Columns: block (of MERGES), seed, blocks, slope (‖Jacobian‖₂ of the stack at a random x), signal ‖z‖/‖x‖, bound (on
    the slope; nan with BatchNorm)."""
    rows, shape = [], (channels, size, size)
    for merge, seed in itertools.product(MERGES, seeds):
        z = torch.randn(32, *shape, generator=Generator().manual_seed(seed), dtype=torch.float64)
        start, jacobian = z[0].norm(), torch.eye(z[0].numel(), dtype=torch.float64)
        for n in range(1, depth + 1):
            block = _Block(merge, shape, 1000 * seed + 2 * n, beta)
            block(z)  # in training mode: BatchNorm takes the statistics of this batch
            block.eval()
            jacobian = jacrev(lambda x: block(x[None])[0])(z[0]).reshape(jacobian.shape).detach() @ jacobian  # noqa: B023
            z = block(z).detach()
            bound = {"sum": 2.0**n, "average": 2 ** (-n / 2)}.get(merge, math.nan)
            slope = torch.linalg.matrix_norm(jacobian, 2).item()
            rows.append((merge, seed, n, slope, (z[0].norm() / start).item(), bound))
    return pd.DataFrame(rows, columns=["block", "seed", "blocks", "slope", "signal", "bound"])
