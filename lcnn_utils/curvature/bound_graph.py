"""A walk through a network that notes every layer's slope and how far each activation reaches; ``bounds`` adds up.

The forward is traced (torch.fx), so that sums and concatenations written in Python are seen too, and then run on places
instead of tensors. What can't be bounded raises a ValueError that names it.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torchvision.transforms import Normalize

from ..lab import double
from ..nn import CenteredSoftplus, LipschitzBatchNorm2d, conv_norm
from ..nn.convert import trace
from .premises import check_logits, evaluating

Slopes = tuple[float, float]  # of a layer's Jacobian J in eval mode: ‖J‖₂, and a bound of the norms of its columns


def _matrix(weight: Tensor) -> Slopes:
    return torch.linalg.matrix_norm(weight, 2).item(), weight.norm(dim=0).max().item()


def _conv(conv: nn.Conv2d, shape: Sequence[int], certified: bool) -> Slopes:
    inputs, outputs = math.prod(shape), conv.out_channels * math.prod(shape[1:]) // math.prod(conv.stride)
    small = inputs * max(inputs // 64, outputs) <= 2**18
    method = ("exact" if small else "bound") if certified else "power"
    slope = conv_norm(conv, (shape[0], shape[1], shape[2]), method).item()
    if method == "exact":  # round outward, as the bound does
        slope *= 1 + 2 * torch.finfo(conv.weight.dtype).eps
    taps = double(conv.weight.detach()).unflatten(0, (conv.groups, -1)).transpose(1, 2).flatten(2)
    return slope, min(slope, taps.norm(dim=2).max().item())  # all taps that read a channel


def _pool(pool: nn.Module, shape: Sequence[int], certified: bool) -> Slopes:
    pixels = shape[-2] * shape[-1]
    basis = torch.eye(pixels, dtype=torch.float64, device="cpu").view(pixels, 1, *shape[-2:])
    return _matrix(pool(basis).flatten(1).mT)


def channel_slopes(module: nn.Module) -> Tensor | None:
    """The slope of each channel of a BatchNorm in eval mode, (C,) float64; None for any other layer."""
    if isinstance(module, LipschitzBatchNorm2d):
        return double(module.channel_slopes().detach())
    if not isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) or module.running_var is None:
        return None
    scale = (double(module.running_var) + module.eps).rsqrt()
    return scale if module.weight is None else scale * double(module.weight.detach())


def _per_channel(module: Any, shape: Sequence[int], certified: bool) -> Slopes:
    scale = channel_slopes(module)
    if scale is None:  # Normalize
        scale = 1 / double(torch.as_tensor(module.std, device="cpu"))
    return (scale.abs().max().item(),) * 2


CURVED = (CenteredSoftplus, nn.Softplus)
SAME = (*CURVED, nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout2d, nn.ZeroPad2d)  # slope 1 in eval mode
SCALES = (LipschitzBatchNorm2d, nn.BatchNorm1d, nn.BatchNorm2d, Normalize)  # neither these nor SAME mix units
KINDS: dict[type[nn.Module], Callable[[Any, Sequence[int], bool], Slopes]] = {
    nn.Linear: lambda linear, *_: _matrix(double(linear.weight.detach())),
    nn.Conv2d: _conv,
    nn.AvgPool2d: _pool,
    nn.AdaptiveAvgPool2d: _pool,
    **dict.fromkeys(SAME, lambda *_: (1.0, 1.0)),
    **dict.fromkeys(SCALES, _per_channel),
}


def _slopes(module: nn.Module, name: str, shape: Sequence[int], certified: bool) -> Slopes:
    """The slopes of a layer at inputs of ``shape``; ValueError: there is no bound for it, or it only looks known."""
    kind = next((kind for kind in KINDS if isinstance(module, kind)), None)
    changed = module._forward_hooks or module._forward_pre_hooks
    changed = changed or getattr(module.forward, "__func__", None) is not getattr(kind, "forward", None)
    no_statistics = getattr(module, "running_var", 0) is None
    jumps = isinstance(module, nn.Softplus) and not (module.beta > 0 and module.threshold >= 20)  # at threshold/β
    if kind is None or changed or no_statistics or jumps:
        raise ValueError(
            f"no bound is known for {name} = {module}: replace kinks (ReLU, max-pooling) by to_low_curvature; known "
            f"are {', '.join(kind.__name__ for kind in KINDS)}, without hooks or a forward of their own, BatchNorm "
            "with running statistics, Softplus with beta > 0 and threshold >= 20"
        )
    return KINDS[kind](module, shape, certified)


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


class Walk(fx.Interpreter):
    """Runs a net on a ``Place`` instead of a tensor and notes a row for every layer it meets."""

    def __init__(self, model: nn.Module, certified: bool) -> None:
        model = copy.copy(model) if any(model.children()) else nn.Sequential(model)  # tracing leaves attributes on it
        graph = trace(model, type(model).__name__)
        super().__init__(model, graph=graph)  # no GraphModule: it compiles code, slowly, and never frees it
        self.extra_traceback = False
        self.certified, self.rows, self.curved = certified, list[dict[str, Any]](), list[dict[str, Any]]()

    def call_module(self, target: Any, args: tuple, kwargs: dict) -> Place:
        module = self.fetch_attr(target)
        if len(args) != 1 or kwargs or not isinstance(args[0], Place):
            raise ValueError(f"no bound is known for {target} = {module} unless it gets one input, by position")
        at: Place = args[0]
        slope, column = _slopes(module, target, at.value.shape[1:], self.certified)
        value, scale = module(at.value), channel_slopes(module)
        if at.linear is not None and scale is not None and value.dim() == 2:  # linear, BatchNorm: one matrix
            before, weight = at.linear[0], scale[:, None] * at.linear[1]
            out = before.then(value, *_matrix(weight), diagonal=False)
            out.linear = before, weight
        else:
            out = at.then(value, slope, column, isinstance(module, SAME + SCALES))
        if isinstance(module, nn.Linear):
            out.linear = at, double(module.weight.detach())
        curved = isinstance(module, CURVED)
        if curved:
            out.reach[len(self.rows)] = Reach()
        row = dict(layer=target, kind=type(module).__name__.removeprefix("Parametrized"))
        row |= dict(slope=out.slope / at.slope if at.slope else 0.0, beta=float(module.beta) if curved else math.nan)
        row |= dict(before=at.slope, lipschitz=out.slope, module=module, size=at.value[0].numel())
        self.rows.append(row)
        self.curved += [row] if curved else []
        return out

    def call_method(self, target: Any, args: tuple, kwargs: dict) -> Any:
        return self._call(target, lambda tensor, *rest, **named: getattr(tensor, target)(*rest, **named), args, kwargs)

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        return self._call(getattr(target, "__name__", str(target)), target, args, kwargs)

    def _call(self, name: str, function: Callable, args: tuple, kwargs: dict) -> Any:
        """A function or method of tensors, called in a forward."""
        places: list[Place] = []

        def tensor_of(argument: Any) -> Any:
            if not isinstance(argument, Place):
                return argument
            places.append(argument)
            return argument.value

        values: Any = fx.node.map_aggregate(args, tensor_of)
        value = function(*values, **fx.node.map_aggregate(kwargs, tensor_of))  # type: ignore[arg-type]
        if not places or name in ("size", "dim") or (name == "getattr" and values[1] == "shape"):
            return value
        if name in ("cat", "concat"):
            return _join(value, places, math.hypot)
        if name in ("flatten", "view", "reshape", "contiguous", "squeeze"):
            return places[0].then(value, 1.0)
        plain = not kwargs and all(place.value.shape == value.shape for place in places)  # nothing broadcast
        if name in ("add", "iadd", "sub", "isub") and plain:
            return _join(value, places, operator.add)
        if name in ("mul", "imul") and plain and len(places) == 1:
            factor = double(torch.as_tensor(values[args[0] is places[0]], device="cpu"))
            return places[0].then(value, factor.abs().max().item())
        if name in ("truediv", "itruediv", "div") and plain and len(places) == 1 and args[0] is places[0]:
            divisor = double(torch.as_tensor(values[1], device="cpu"))
            return places[0].then(value, (1 / divisor.abs().min()).item())
        raise ValueError(f"no bound is known for {name} as a forward calls it: use sums, multiples, cat and flatten")


def walk_through(model: nn.Module, input_shape: Sequence[int], certified: bool = True) -> tuple[Walk, Place]:
    """Walk ``model`` in eval mode at inputs of ``input_shape``; returns the walk with its rows, and the output."""
    model = model.module if isinstance(model, nn.DataParallel) else model
    like, generator = next(model.parameters(), torch.zeros((), device="cpu")), torch.Generator().manual_seed(0)
    with evaluating(model), torch.no_grad():
        try:
            x = torch.rand((2, *input_shape), generator=generator, device="cpu").to(like)
            logits = model(x)
        except (RuntimeError, IndexError, TypeError) as error:
            raise ValueError(f"the model does not take inputs of shape {tuple(input_shape)}: {error}") from None
        check_logits(logits)
        walk = Walk(model, certified)
        out = walk.run(Place(x))
    if not torch.allclose(out.value, logits, rtol=1e-3):
        raise ValueError("the forward does something else than its trace: hooks, tensors changed in place, or chance")
    return walk, out
