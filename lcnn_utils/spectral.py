"""Layers divided by their spectral norm (paper §3.2): the real operator of a layer and power iteration on it.

References: Y. Yoshida, T. Miyato, arXiv:1705.10941 (power iteration in training).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight
from torch.nn.utils import parametrize

BRANCHES = 10  # streams that share the power iterations on a GPU, where one layer's keeps little of it busy

Shape = tuple[int, int, int]  # (C, H, W)
Layer = nn.Conv2d | nn.Linear


def _geometry(conv: nn.Module, input_shape: Shape | None) -> dict[str, Any]:
    """Stride, padding, dilation, groups of ``conv`` as keywords of ``F.conv2d``, or a ValueError with the way out."""
    if not isinstance(conv, nn.Conv2d):
        raise ValueError(f"expected an nn.Conv2d, got {type(conv).__name__}: see torch.linalg.matrix_norm for Linear")
    if conv.padding_mode != "zeros":
        raise ValueError(f"padding_mode={conv.padding_mode!r} is not supported: use padding_mode='zeros'")
    shape, padding = tuple(input_shape or ()), conv.padding
    if len(shape) != 3 or min(shape) < 1 or shape[0] != conv.in_channels:
        raise ValueError(f"input_shape={shape}: give (C, H, W) of this layer's input, with C = {conv.in_channels}")
    reach = [d * (k - 1) for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    if padding == "same" and any(r % 2 for r in reach):
        raise ValueError("padding='same' is lopsided with this kernel: put nn.ZeroPad2d before and use padding=0")
    if isinstance(padding, str):
        padding = (reach[0] // 2, reach[1] // 2) if padding == "same" else (0, 0)
    if any(n + 2 * p <= r for n, p, r in zip(shape[1:], padding, reach, strict=True)):
        raise ValueError(f"the kernel spans {[r + 1 for r in reach]} pixels: too many for input_shape={shape}, padded")
    return {"stride": conv.stride, "padding": padding, "dilation": conv.dilation, "groups": conv.groups}


def _apply(weight: Tensor, x: Tensor, geometry: dict[str, Any] | None) -> Tensor:
    """A x, the layer without its bias: a convolution, or a linear map when ``geometry`` is None."""
    return F.linear(x, weight) if geometry is None else F.conv2d(x, weight, **geometry)


def _adjoint(weight: Tensor, y: Tensor, shape: torch.Size, geometry: dict[str, Any] | None) -> Tensor:
    """Aᵀ y for inputs of ``shape``, right at any stride (``conv_transpose2d`` has to be told the output padding)."""
    return y @ weight if geometry is None else conv2d_input(shape, weight, y, **geometry)


@torch.no_grad()
def _power(weight: Tensor, v: Tensor, geometry: dict[str, Any] | None, iterations: int) -> Tensor:
    """``iterations`` times v ← AᵀAv / ‖AᵀAv‖, in float32 or wider. A zero or broken weight leaves v as it was."""
    if iterations < 1:
        raise ValueError(f"iterations={iterations}: at least 1 is needed")
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    v = v.to(weight)
    with torch.autocast(weight.device.type, enabled=False):
        for _ in range(iterations):
            new = _adjoint(weight, _apply(weight, v, geometry), v.shape, geometry)
            norm = torch.linalg.vector_norm(new)
            v = torch.where((norm > 0) & torch.isfinite(norm), new / norm, v)
    return v


def _random_unit(shape: tuple[int, ...], generator: Generator | None = None) -> Tensor:
    """A random direction in float64, always the same one unless a generator is given."""
    generator = generator or Generator().manual_seed(0)
    v = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float64)
    return v / torch.linalg.vector_norm(v)


class SpectralNorm(nn.Module):
    """Parametrisation W ↦ W/σ, with σ = ‖W v‖ and v kept near the top singular direction: see ``spectral_normalize``.

    Each use of the weight in training moves v one power iteration on (inside :func:`norms_once_a_step` each call of
    ``advance`` does instead); in eval v rests and σ still follows the weight.
    σ is differentiable in W with v fixed: its true gradient once v has converged.
    """

    v: Tensor

    def __init__(self, layer: Layer, input_shape: Shape | None, iterations: int) -> None:
        super().__init__()
        self.geometry = None if isinstance(layer, nn.Linear) else _geometry(layer, input_shape)
        self.input_shape = (layer.in_features,) if isinstance(layer, nn.Linear) else tuple(input_shape or ())
        v = _power(layer.weight, _random_unit((1, *self.input_shape)), self.geometry, iterations)
        self.register_buffer("v", v.to(layer.weight))
        self.slope: Tensor | None = None  # ∂σ/∂W, inside norms_once_a_step

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            w = weight.to(torch.promote_types(weight.dtype, torch.float32))
            if self.slope is not None:
                sigma = (w * self.slope).sum()  # Euler's theorem: σ is homogeneous in W
            else:
                if self.training:
                    self.v.copy_(_power(w, self.v, self.geometry, 1))
                v = self.v.to(w.dtype, copy=True)  # a copy: the buffer may move before the backward pass
                sigma = torch.linalg.vector_norm(_apply(w, v, self.geometry))
            return (w / sigma.clamp(min=1e-12)).to(weight.dtype)  # clamp: a zero weight stays zero

    @torch.no_grad()
    def advance(self, weight: Tensor) -> None:
        """One power iteration: u = Av/‖Av‖, v ← Aᵀu/‖Aᵀu‖; and ∂σ/∂W of σ = uᵀAv = ‖Aᵀu‖, kept in ``slope``."""
        w, v = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (weight, self.v))
        with torch.autocast(w.device.type, enabled=False):
            u = _apply(w, v, self.geometry)
            u = u / torch.linalg.vector_norm(u).clamp(min=1e-30)
            back = _adjoint(w, u, v.shape, self.geometry)
            norm = torch.linalg.vector_norm(back)
            v = torch.where((norm > 0) & torch.isfinite(norm), back / norm, v)
            slope = u.mT @ v if self.geometry is None else conv2d_weight(v, w.shape, u, **self.geometry)
        self.v.copy_(v)
        # in place: compiled code and a CUDA graph know its address
        self.slope = slope if self.slope is None else self.slope.copy_(slope)


def _normalised(model: nn.Module) -> list[tuple[SpectralNorm, Tensor]]:
    """Every spectral norm of a model, with the weight as it is before."""
    lists = (module for module in model.modules() if isinstance(module, parametrize.ParametrizationList))
    return [(entry[0], entry.original) for entry in lists if isinstance(entry[0], SpectralNorm)]


@contextlib.contextmanager
def norms_once_a_step(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Take power iteration out of the forward passes: yields the function that moves every layer one iteration on.

    To be called once before each step's forward passes, however many there are. σ and its gradient then cost an
    elementwise product instead of a convolution, and on a GPU the layers' iterations run side by side.
    """
    layers = _normalised(model)
    on_gpu = bool(layers) and layers[0][1].is_cuda
    streams = [torch.cuda.Stream() for _ in range(min(BRANCHES, len(layers)))] if on_gpu else []

    def advance() -> None:
        if not streams:
            for norm, weight in layers:
                norm.advance(weight)
            return
        main = torch.cuda.current_stream()
        for i, stream in enumerate(streams):
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                for norm, weight in layers[i :: len(streams)]:
                    norm.advance(weight)
        for stream in streams:
            main.wait_stream(stream)

    try:
        yield advance
    finally:
        for norm, _ in layers:
            norm.slope = None


def spectral_normalize(module: Layer, input_shape: Shape | None = None, iterations: int = 15) -> nn.Module:
    """Divide the weight of an ``nn.Conv2d`` or ``nn.Linear`` by its operator norm, in place; returns ``module``.

    ``input_shape`` (C, H, W) is a convolution's input; a linear layer needs none. Starts with ``iterations`` power
    iterations, then one each training pass: an estimate from below. Call :func:`refresh_norms` before measuring;
    ``conv_norm(…, "bound")`` is certain. Raises ValueError: another kind of layer or geometry, a layer done already.
    """
    if parametrize.is_parametrized(module, "weight"):
        raise ValueError("the weight is parametrised already: see torch.nn.utils.parametrize.remove_parametrizations")
    return parametrize.register_parametrization(module, "weight", SpectralNorm(module, input_shape, iterations))


def refresh_norms(model: nn.Module, iterations: int = 100) -> None:
    """Run power iterations for every spectrally normalised layer of ``model``: do so before evaluating or measuring."""
    for norm, weight in _normalised(model):
        norm.v.copy_(_power(weight, norm.v, norm.geometry, iterations))


@torch.no_grad()
def sigma_error(model: nn.Module, iterations: int = 20) -> float:
    """How far the worst layer's σ = ‖W v‖ falls short of its norm, as a share of it (0 where there is none).

    The norm is what ``iterations`` more power iterations find, so this errs a little on the small side; v stays.
    """
    worst = []
    for norm, weight in _normalised(model):
        directions = (norm.v, _power(weight, norm.v, norm.geometry, iterations))
        now, then = (torch.linalg.vector_norm(_apply(weight.float(), v.float(), norm.geometry)) for v in directions)
        worst.append(torch.where(then > 0, 1 - now / then, 0))
    return torch.stack(worst).max().clamp(min=0).item() if worst else 0.0
