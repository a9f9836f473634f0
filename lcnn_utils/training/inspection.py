"""Whether what somebody else sent is the state of a training: tried on a net, before it is put among ours."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from . import strict
from .checkpoint import State, read
from .fit import build, make_optimizer
from .recipe import Recipe
from .strict import require


def inspected(state: bytes) -> tuple[Recipe, int]:
    """The recipe and the epochs of a state's content, in which all is as ``state.save_state`` writes it.

    Raises:
        one of ``state.DAMAGE``: something is not.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "state")
        path.write_bytes(state)
        tensors, metadata = read(path)
    one, history = strict.recipe(strict.loads(metadata["recipe"])), strict.history(strict.loads(metadata["history"]))
    require(metadata["epoch"] == str(len(history)) and len(history) <= one.epochs, "its epochs are not its history's")
    about = strict.loads(metadata["about"])
    require(strict.plain(about) and strict.is_number(about["seconds"]), "its facts are no table of numbers and texts")
    require(all(strict.is_text(sitting["device"]) for sitting in about["made_on"]), "a device is no text")
    kind = one.dataset, one.method, one.model
    require(_size(*kind, one.width) <= sum(map(torch.numel, tensors.values())), "its net is larger than its file")
    model, momenta = _net(*kind, one.width)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "state")
        path.write_bytes(state)
        State(one, model, momenta, torch.Generator()).load(path)
    known = {"generator", *(f"momentum.{index}" for index in range(len(momenta)))}
    require(all(name.startswith("model.") or name in known for name in tensors), "it holds unknown tensors")
    return one, len(history)


@functools.lru_cache(maxsize=4)
def _net(dataset: str, method: str, model: str, width: int) -> tuple[nn.Module, list[Tensor]]:
    """A net to try weights on, and its momenta."""
    one = Recipe(dataset=dataset, method=method, model=model, width=width)
    net = build(one)
    return net, make_optimizer(one, net)[1]


@functools.cache
def _sizes(dataset: str, method: str, model: str) -> tuple[int, ...]:
    nets = (build(Recipe(dataset=dataset, method=method, model=model, width=width)) for width in (1, 2, 3))
    return tuple(sum(map(torch.numel, net.state_dict().values())) for net in nets)


def _size(dataset: str, method: str, model: str, width: int) -> int:
    """How many numbers a net holds, which isn't built for it: quadratic in its width."""
    one, two, three = _sizes(dataset, method, model)
    return one + (width - 1) * (two - one) + (width - 1) * (width - 2) // 2 * (three - 2 * two + one)
