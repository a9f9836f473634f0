"""A walk through a network that notes every layer's slope and how far each activation reaches: the floor of ``bounds``.

The forward is traced (torch.fx), so that sums and concatenations written in Python are seen too, and then run on places
instead of tensors. What can't be bounded raises a ValueError that names it.
"""

from __future__ import annotations

import copy
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchvision.transforms import Normalize

from ..lab import double
from ..nn import CenteredSoftplus, LipschitzBatchNorm2d, conv_norm
from ..nn.convert import trace
from .hessian import evaluating

CURVED = (CenteredSoftplus, nn.Softplus)
DIAGONAL = (*CURVED, LipschitzBatchNorm2d, nn.BatchNorm1d, nn.BatchNorm2d, Normalize)  # their Jacobians are
SAME = (nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout2d, nn.ZeroPad2d)  # slope 1 in eval mode
POOLS = (nn.AvgPool2d, nn.AdaptiveAvgPool2d)
KNOWN = (nn.Linear, nn.Conv2d, *DIAGONAL, *SAME, *POOLS)
RESHAPES = (torch.flatten, "flatten", "view", "reshape", "contiguous", "squeeze")


def _averaging(pool: nn.Module, size: int, axis: int) -> Tensor:
    """The matrix of average pooling along one axis; that of the image is the Kronecker product of both axes."""
    eye = torch.eye(size, dtype=torch.float64, device="cpu")[:, None]
    one = lambda value: value[axis] if isinstance(value, tuple) else value
    if isinstance(pool, nn.AdaptiveAvgPool2d):
        return F.adaptive_avg_pool1d(eye, one(pool.output_size) or size)[:, 0]
    options: Any = (one(pool.kernel_size), one(pool.stride), one(pool.padding), pool.ceil_mode, pool.count_include_pad)
    return F.avg_pool1d(eye, *options)[:, 0]


def _conv_slope(conv: nn.Conv2d, shape: Sequence[int], certified: bool) -> float:
    shape = (shape[0], shape[1], shape[2])
    if not certified:
        return conv_norm(conv, shape).item()
    inputs, outputs = math.prod(shape), conv.out_channels * math.prod(shape[1:]) // math.prod(conv.stride)
    if inputs * max(inputs // 64, outputs) > 2**18:
        return conv_norm(conv, shape, "bound").item()
    limits, norm = torch.finfo(conv.weight.dtype), conv_norm(conv, shape, "exact").item()  # small: tighter
    return norm * (1 + 2 * limits.eps) + (norm > 0) * limits.tiny * limits.eps


def channel_slopes(module: nn.Module) -> Tensor | None:
    """The slope of each channel of a BatchNorm in eval mode, (C,) float64; None for any other layer."""
    if isinstance(module, LipschitzBatchNorm2d):
        return double(module.channel_slopes().detach())
    if not isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) or module.running_var is None:
        return None
    scale = (double(module.running_var) + module.eps).rsqrt()
    return scale if module.weight is None else scale * double(module.weight.detach())


def _linear(weight: Tensor) -> tuple[float, float]:
    """Largest singular value and largest column norm of a matrix."""
    return torch.linalg.matrix_norm(weight, 2).item(), weight.norm(dim=0).max().item()


def _check(module: nn.Module, name: str) -> None:
    """Raise for a layer that only looks like one whose bound is known."""
    kind = next((k for k in KNOWN if isinstance(module, k)), None)
    problem = ""
    if kind and getattr(module.forward, "__func__", None) is not kind.forward:
        problem = "it has a forward of its own"
    elif module._forward_hooks or module._forward_pre_hooks:
        problem = "it has hooks: remove them"
    elif isinstance(module, nn.Softplus) and not (module.beta > 0 and module.threshold >= 20):
        problem = "beta > 0 and threshold >= 20 are needed"  # below, it jumps visibly at threshold/β
    if problem:
        raise ValueError(f"no bound is known for {name} = {module}: {problem}")
    values = [v for v in (*module.parameters(), *module.buffers()) if v.is_floating_point()]
    if not all(bool(v.isfinite().all()) for v in values):
        raise ValueError(f"{name} = {module} holds NaN or infinity: training diverged, or the checkpoint is broken")


def _slopes(module: nn.Module, name: str, shape: Sequence[int], certified: bool) -> tuple[float, float]:
    """‖J‖₂, the Lipschitz constant of a layer in eval mode at inputs of ``shape``, and a bound of J's column norms."""
    if isinstance(module, (*SAME, *CURVED)):
        return 1.0, 1.0
    if isinstance(module, nn.Linear):
        return _linear(double(module.weight.detach()))
    if isinstance(module, nn.Conv2d):
        slope, weight = _conv_slope(module, shape, certified), double(module.weight.detach())
        taps = weight.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(2)  # all that read a channel
        return slope, min(slope, taps.norm(dim=2).max().item())
    if isinstance(module, POOLS) and not getattr(module, "divisor_override", None):
        sides = [_linear(_averaging(module, size, axis).mT) for axis, size in enumerate(shape[-2:])]
        return sides[0][0] * sides[1][0], sides[0][1] * sides[1][1]
    scale = channel_slopes(module)
    if isinstance(module, Normalize):
        scale = 1 / double(torch.as_tensor(module.std, device="cpu"))
    if scale is not None:
        return (scale.abs().max().item(),) * 2
    raise ValueError(
        f"no bound is known for {name} = {module}: replace kinks (ReLU, max-pooling) by models.to_low_curvature, "
        "average pooling; linear, convolution, BatchNorm, softplus, average pooling, flatten, sums and cat are known"
    )


@dataclass
class Reach:
    """Of an activation's output z, seen from a later place: sup of ‖∂place/∂z_k‖₂ over its units k."""

    norm: float = 1.0
    diagonal: bool = True  # no layer has mixed the units yet


@dataclass
class Place:
    """A place in the net: its value for one input, the slope of x ↦ value, and the reach of each activation's row."""

    value: Tensor
    slope: float = 1.0
    reach: dict[int, Reach] = field(default_factory=dict)
    linear: tuple[Place, Tensor] | None = None  # where a linear layer made it: its input and weight

    def then(self, value: Tensor, slope: float, column: float | None = None, diagonal: bool = True) -> Place:
        column = slope if column is None else column
        pass_on = lambda r: Reach(r.norm * (column if r.diagonal else slope), r.diagonal and diagonal)
        return Place(value, self.slope * slope, {row: pass_on(r) for row, r in self.reach.items()})


def _join(value: Tensor, places: list[Place], add: Callable[[float, float], float]) -> Place:
    joined = Place(value, 0.0)
    for place in places:
        joined.slope = add(joined.slope, place.slope)
        for row, reach in place.reach.items():
            norm = joined.reach[row].norm if row in joined.reach else 0.0
            joined.reach[row] = Reach(add(norm, reach.norm), diagonal=False)
    return joined


def _spread(place: Place, value: Tensor) -> Place:
    """As broadcast to the shape of ``value``: n copies of an entry have √n times its norm."""
    return place.then(place.value, math.sqrt(value.numel() / place.value.numel()))


class Walk(fx.Interpreter):
    """Runs a net on a ``Place`` instead of a tensor and notes a row for every layer it meets."""

    def __init__(self, model: nn.Module, certified: bool, norms: bool) -> None:
        model = copy.copy(model) if any(model.children()) else nn.Sequential(model)  # tracing leaves attributes on it
        graph = trace(model, type(model).__name__)
        super().__init__(model, graph=graph)  # no GraphModule: it compiles code, slowly, and never frees it
        self.extra_traceback = False
        self.certified, self.norms, self.rows = certified, norms, list[dict[str, Any]]()

    def call_module(self, target: Any, args: tuple, kwargs: dict) -> Place:
        module = self.fetch_attr(target)
        if len(args) != 1 or kwargs or not isinstance(args[0], Place):
            raise ValueError(
                f"no bound is known for {target} = {module} as it is called: give it one input, by position"
            )
        at = args[0]
        _check(module, target)
        value = module(at.value)  # first: weights that a pre-hook makes are made now
        scale = channel_slopes(module)
        if at.linear is not None and scale is not None and at.value.dim() == 2:  # linear, BatchNorm: one matrix
            before, weight = at.linear[0], scale[:, None] * at.linear[1]
            out = before.then(value, *_linear(weight), diagonal=False)
            out.linear = before, weight
        else:
            skip = isinstance(module, nn.Linear | nn.Conv2d) and not self.norms
            slopes = (math.nan,) * 2 if skip else _slopes(module, target, at.value.shape[1:], self.certified)
            out = at.then(value, *slopes, diagonal=isinstance(module, (*DIAGONAL, *SAME)))
        curved = isinstance(module, CURVED)
        if curved:
            out.reach[len(self.rows)] = Reach()
        if isinstance(module, nn.Linear):
            out.linear = at, double(module.weight.detach())
        self.rows.append(
            dict(
                layer=target, kind=type(module).__name__.removeprefix("Parametrized"),
                slope=out.slope / at.slope if at.slope else 0.0,
                beta=float(module.beta) if curved else math.nan,
                before=at.slope, lipschitz=out.slope, module=module, size=at.value[0].numel(),
            )
        )  # fmt: skip
        return out

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        name = getattr(target, "__name__", target)
        if target is torch.cat and all(isinstance(a, Place) for a in args[0]):
            return _join(target([at.value for at in args[0]], *args[1:], **kwargs), args[0], math.hypot)
        places = [a for a in args if isinstance(a, Place)]
        values = [a.value if isinstance(a, Place) else a for a in args]
        everywhere: list[Place] = []
        fx.node.map_aggregate([args, kwargs], lambda a: everywhere.append(a) if isinstance(a, Place) else a)  # type: ignore[arg-type,func-returns-value]
        if not everywhere or (target is getattr and args[1] == "shape"):
            return target(*values, **kwargs)
        if target in RESHAPES and len(everywhere) == len(places) == 1:
            return places[0].then(target(*values, **kwargs), 1.0)
        if name in ("add", "iadd", "sub", "isub") and not kwargs:
            value = target(*values)
            return _join(value, [_spread(place, value) for place in places], operator.add)
        if name in ("mul", "imul", "truediv", "itruediv", "div") and not kwargs and len(places) == 1:
            divided = "div" in name
            if places[0] is args[0] or not divided:
                factor = double(torch.as_tensor(values[places[0] is args[0]], device="cpu")).abs()
                value = target(*values)
                return _spread(places[0], value).then(value, (1 / factor.min() if divided else factor.max()).item())
        raise ValueError(f"no bound is known for {name} as a forward calls it: use sums, multiples, cat and flatten")

    def call_method(self, target: Any, args: tuple, kwargs: dict) -> Any:
        if not isinstance(args[0], Place) or target in ("size", "dim"):
            at, *rest = args
            return getattr(at.value if isinstance(at, Place) else at, target)(*rest, **kwargs)
        if target in RESHAPES:
            return args[0].then(getattr(args[0].value, target)(*args[1:], **kwargs), 1.0)
        raise ValueError(f"no bound is known for the method {target}, called in a forward")


def walk_through(
    model: nn.Module, input_shape: Sequence[int], certified: bool, norms: bool = True
) -> tuple[Walk, Place]:
    """Walk ``model`` in eval mode at inputs of ``input_shape``; returns the walk with its rows, and the output."""
    if not all(isinstance(n, int) and n > 0 for n in input_shape):
        raise ValueError(f"input_shape is {tuple(input_shape)}: give the sizes of one input, (C, H, W) or (d,)")
    model = model.module if isinstance(model, nn.DataParallel) else model
    floating = (b for b in model.buffers() if b.is_floating_point())
    parameter = next(itertools.chain(model.parameters(), floating), torch.zeros((), device="cpu"))
    x = torch.rand((2, *input_shape), generator=torch.Generator().manual_seed(0), device="cpu").to(parameter)
    with evaluating(model), torch.no_grad():
        walk = Walk(model, certified, norms)
        try:
            out = walk.run(Place(x))
            same = not isinstance(out, Place) or torch.allclose(out.value, model(x), rtol=1e-3, equal_nan=True)
        except (RuntimeError, IndexError, TypeError) as error:
            raise ValueError(f"the model does not take inputs of shape {tuple(input_shape)}: {error}") from None
    if not isinstance(out, Place):
        raise ValueError(f"the model must give logits of shape (N, K), got a {type(out).__name__}")
    if not same:
        raise ValueError("the forward does something else than its trace: hooks, tensors changed in place, or chance")
    if len(out.value) != 2 or out.value.dim() != 2 or out.value.shape[1] < 2:
        raise ValueError(f"the model must give logits of shape (N, K) with K >= 2, got {tuple(out.value.shape)}")
    return walk, out
