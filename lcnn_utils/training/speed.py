"""How one training step runs: on a CPU as it is written, on a GPU in bfloat16, compiled, and recorded.

On a GPU the host is what holds a small network up: a step is some hundred launches. So the whole of it (power
iterations, forward and backward passes, optimiser) is recorded once as a CUDA graph and then replayed.
"""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .objectives import OBJECTIVES
from .recipe import INPUTS, Recipe

Step = Callable[[Tensor, Tensor], Tensor]  # a batch (x, y) → the terms to log, (T,)
SECOND_ORDER = ("gradreg", "lcnn_gradreg", "minimal", "cure")  # methods that penalise the input gradient
CHANGING = ("cure", "adversarial")  # methods whose step isn't the same each time: a schedule, a generator of the CPU


def autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """bfloat16 where a GPU computes in it; nothing elsewhere."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


def worth_compiling(recipe: Recipe, device: torch.device) -> bool:
    """Whether compiling pays: on a GPU, for a CNN, with no second derivatives (which compiled code doesn't have).

    On a CPU the layers' fused kernels are faster than what the compiler makes of them.
    """
    second = recipe.method in SECOND_ORDER and recipe.derivative == "exact"
    return device.type == "cuda" and recipe.model != "mlp" and not second


def worth_recording(recipe: Recipe, device: torch.device) -> bool:
    """Whether a step can be replayed: on an NVIDIA GPU, when each one does the same."""
    return device.type == "cuda" and recipe.method not in CHANGING


@contextlib.contextmanager
def compiled(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Let ``model`` run compiled, if ``wanted``; afterwards as before, so that it can be differentiated twice."""
    if not wanted:
        yield
        return

    def whole(*inputs: Any) -> Any:  # model.compile() passes over an nn.Sequential, and compiles its parts one by one
        return model._call_impl(*inputs)

    model._compiled_call_impl = torch.compile(whole, dynamic=False)
    try:
        yield
    finally:
        model._compiled_call_impl = None
        torch._dynamo.reset()  # the number of versions it keeps of a function is limited


@contextlib.contextmanager
def as_written(model: nn.Module) -> Iterator[None]:
    """Suspend :func:`compiled` for a while."""
    was, model._compiled_call_impl = model._compiled_call_impl, None
    try:
        yield
    finally:
        model._compiled_call_impl = was


def recorded(step: Step, x: Tensor, y: Tensor) -> Step:
    """``step`` as a CUDA graph for batches of the shape of (x, y); it is run three times for that.

    The graph reads and writes the same memory each time: all that the step uses, and copies of x and y, must live as
    long as the function returned.
    """
    x, y = x.clone(), y.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # lazy initialisations must be over before recording
        for _ in range(3):
            step(x, y)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        terms = step(x, y)

    def replay(new_x: Tensor, new_y: Tensor) -> Tensor:
        x.copy_(new_x)
        y.copy_(new_y)
        graph.replay()
        return terms.clone()

    return replay


@torch.no_grad()
def restore(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy each value into its tensor."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def fast_step(
    step: Step,
    x: Tensor,
    y: Tensor,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    generator: torch.Generator | None = None,
) -> Step:
    """``step`` for batches of the shape of (x, y), compiled where it pays, and on a GPU recorded.

    It is run a few times for that, and what it changes is put back. Where the compiler or the recording fails, a
    warning says so once, and training goes on without.
    """
    momenta = [state["momentum_buffer"] for state in optimizer.state.values()]
    keep = [*model.parameters(), *model.buffers(), *momenta]
    before = [tensor.detach().clone() for tensor in keep]
    random = generator.get_state() if generator is not None else None
    run = step
    try:
        step(x, y)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        _warn("torch.compile", error)
        model._compiled_call_impl = None
    restore(keep, before)
    if worth_recording(recipe, x.device):
        try:
            run = recorded(step, x, y)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            _warn("a CUDA graph", error)
        restore(keep, before)
    if generator is not None and random is not None:
        generator.set_state(random)
    return run


def _warn(what: str, error: Exception) -> None:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    warnings.warn(f"training goes on without {what}: {reason}", RuntimeWarning, stacklevel=4)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether ``error`` is a GPU's or a CPU's refusal of memory (the CPU's has no class of its own)."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def largest_batch(recipe: Recipe, model: nn.Module, device: torch.device) -> int:
    """The largest halving of ``recipe.batch_size`` that a step has memory for, down to 2; 0 if none."""
    shape, classes = INPUTS[recipe.dataset]
    size = recipe.batch_size // 2
    while size > 1:
        if device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            x, y = torch.rand(size, *shape, device=device), torch.arange(size, device=device) % classes
            with autocast(device):
                OBJECTIVES[recipe.method](model, x, y, recipe)[0].backward()
            return size
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold the tensors
            size //= 2
        finally:
            model.zero_grad(set_to_none=True)
    return 0


@contextlib.contextmanager
def memory(recipe: Recipe, model: nn.Module, device: torch.device) -> Iterator[None]:
    """Turn a lack of memory into a RuntimeError that says which batch size would fit."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
        fits = largest_batch(recipe, model, device)
        way_out = f"batch_size={fits} would fit" if fits else "no smaller batch fits either: use a smaller model"
        raise RuntimeError(
            f"there is not enough memory on {device} for batch_size={recipe.batch_size} with {recipe.model} of width "
            f"{recipe.width}: {way_out}, as in dataclasses.replace(recipe, …)"
        ) from None
