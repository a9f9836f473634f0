"""Slopes of layers, and how far each activation reaches: a traced forward (torch.fx) run on places, not tensors."""

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
    basis = torch.eye(math.prod(shape[-2:]), dtype=torch.float64, device="cpu").view(-1, 1, *shape[-2:])
    return _matrix(pool(basis).flatten(1).mT)


def channel_slopes(module: nn.Module) -> Tensor | None:
    """Slope of each channel of a BatchNorm in eval mode or a Normalize, (C,) float64; None for any other layer."""
    if isinstance(module, LipschitzBatchNorm2d):
        return double(module.channel_slopes().detach())
    if isinstance(module, Normalize):
        return 1 / double(torch.as_tensor(module.std, device="cpu"))
    if not isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) or module.running_var is None:
        return None
    scale = (double(module.running_var) + module.eps).rsqrt()
    return scale if module.weight is None else scale * double(module.weight.detach())


CURVED = (CenteredSoftplus, nn.Softplus)
SAME = (*CURVED, nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout2d, nn.ZeroPad2d)  # slope 1 in eval mode
SCALES = (LipschitzBatchNorm2d, nn.BatchNorm1d, nn.BatchNorm2d, Normalize)  # neither these nor SAME mix units
KINDS: dict[type[nn.Module], Callable[[Any, Sequence[int], bool], Slopes]] = {
    nn.Linear: lambda linear, *_: _matrix(double(linear.weight.detach())),
    nn.Conv2d: _conv,
    nn.AvgPool2d: _pool,
    nn.AdaptiveAvgPool2d: _pool,
    **dict.fromkeys(SAME, lambda *_: (1.0, 1.0)),
    **dict.fromkeys(SCALES, lambda norm, *_: (channel_slopes(norm).abs().max().item(),) * 2),  # type: ignore[union-attr]
}


def _slopes(module: nn.Module, name: str, shape: Sequence[int], certified: bool) -> Slopes:
    """The slopes of a layer at inputs of ``shape``; ValueError: there is no bound for it, or it only looks known."""
    kind = next((kind for kind in KINDS if isinstance(module, kind)), None)
    own = getattr(module.forward, "__func__", None) is not getattr(kind, "forward", None)
    changed = own or bool(module._forward_hooks or module._forward_pre_hooks)
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
class Place:
    """A place in the net: its value for one input, the slope of x ↦ value, and the reach of each activation z."""

    value: Tensor
    slope: float = 1.0
    # by the row of z: sup of ‖∂value/∂z_k‖₂ over its units k, and whether no layer has mixed the units yet
    reach: dict[int, tuple[float, bool]] = field(default_factory=dict)
    linear: tuple[Place, Tensor] | None = None  # where a linear layer made it: its input and weight

    def then(self, value: Tensor, slope: float, column: float, mixes: bool = False) -> Place:
        through = lambda norm, diagonal: (norm * (column if diagonal else slope), diagonal and not mixes)
        return Place(value, self.slope * slope, {row: through(*reach) for row, reach in self.reach.items()})


def _join(value: Tensor, places: list[Place], add: Callable[[float, float], float]) -> Place:
    joined = Place(value, 0.0)
    for place in places:
        joined.slope = add(joined.slope, place.slope)
        for row, (norm, _) in place.reach.items():
            joined.reach[row] = add(joined.reach.get(row, (0.0, False))[0], norm), False
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
        module, place = self.fetch_attr(target), args[0]
        slope, column = _slopes(module, target, place.value.shape[1:], self.certified)
        value, scale = module(place.value), channel_slopes(module)
        if place.linear is not None and scale is not None and value.dim() == 2:  # linear, BatchNorm: one matrix
            before, weight = place.linear[0], scale[:, None] * place.linear[1]
            out = before.then(value, *_matrix(weight), mixes=True)
            out.linear = before, weight
        else:
            out = place.then(value, slope, column, mixes=not isinstance(module, SAME + SCALES))
        if isinstance(module, nn.Linear):
            out.linear = place, double(module.weight.detach())
        row = dict(layer=target, kind=type(module).__name__.removeprefix("Parametrized"))
        row |= dict(slope=out.slope / place.slope if place.slope else 0.0, beta=math.nan, before=place.slope)
        row |= dict(lipschitz=out.slope, module=module, size=place.value[0].numel())
        if isinstance(module, CURVED):
            out.reach[len(self.rows)] = 1.0, True
            row["beta"] = float(module.beta)
            self.curved.append(row)
        self.rows.append(row)
        return out

    def call_method(self, target: Any, args: tuple, kwargs: dict) -> Any:
        return self._call(target, lambda tensor, *rest, **named: getattr(tensor, target)(*rest, **named), args, kwargs)

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        return self._call(getattr(target, "__name__", str(target)), target, args, kwargs)

    def _call(self, name: str, function: Callable, args: tuple, kwargs: dict) -> Any:
        """A function or method of tensors, called in a forward."""
        places: list[Place] = []

        def tensor_of(argument: Any) -> Any:
            if isinstance(argument, Place):
                places.append(argument)
                return argument.value
            return argument

        values: Any = fx.node.map_aggregate(args, tensor_of)
        value = function(*values, **fx.node.map_aggregate(kwargs, tensor_of))  # type: ignore[arg-type]
        if not places or name in ("size", "dim") or (name == "getattr" and values[1] == "shape"):
            return value
        if name in ("cat", "concat"):
            return _join(value, places, math.hypot)
        if name in ("flatten", "view", "reshape", "contiguous", "squeeze"):
            return places[0].then(value, 1.0, 1.0)
        plain = not kwargs and all(place.value.shape == value.shape for place in places)  # nothing broadcast
        if name in ("add", "iadd", "sub", "isub") and plain:
            return _join(value, places, operator.add)
        multiple = name in ("mul", "imul") or (name in ("truediv", "itruediv", "div") and args[0] is places[0])
        if multiple and plain and len(places) == 1:
            ones = torch.ones_like(value, dtype=torch.float64, device="cpu")
            factor = function(*(ones if argument is places[0] else argument for argument in args)).abs().max().item()
            return places[0].then(value, factor, factor)
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
