"""Instant checks of the notebooks' exercises: ``from lcnn_utils.exercises import softplus as check``.

``check.derivatives(mine)`` calls the student's function on seeded random inputs, compares the results with independent
references, prints a verdict and returns True (✓), False (✗, with a hint) or None (·, not attempted yet); it raises for
nothing the student's code does. A likely mistake is named when it gives the student's very numbers.
"""

import inspect
import os
import traceback
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

_HERE = os.path.dirname(__file__)
_RAISED = {  # a part of an error's message: what it usually means
    "differentiated again": "take the gradient with create_graph=True",
    "does not require grad": "start from x.detach().requires_grad_(), and take the gradient with create_graph=True",
    "implicitly created only for scalar": "only a number can be differentiated backward: sum the values first",
    "converted to": "math's functions take single numbers: use torch's (torch.exp, torch.log, ...)",
}


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype)[6:]} " + (f"tensor of shape {tuple(value.shape)}" if value.dim() else "number")
    named = "None (is a `return` missing?)" if value is None else f"a {type(value).__name__}"
    return f"{value:g}" if isinstance(value, Real) else named


def _same(a: Any, b: Tensor) -> bool:
    if not isinstance(a, Tensor) or (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    near = 1e-4 * b.double().abs().nan_to_num(0, 0).max().item()
    return torch.allclose(a.double(), b.double(), rtol=0, atol=near, equal_nan=True)


def verdict(task: Callable, f: Callable, inputs: list, truth: Callable, mistakes: dict, wild: str = "", what: str = ""):
    """Compare f with ``truth`` up to the first input that fails; ``wild`` is the hint for nan and infinity."""
    name, stated, largest = task.__name__, " ".join((task.__doc__ or "").split("Solution:")[0].split()), 0.0
    for args in inputs:
        expected, named = truth(*args), dict(zip(inspect.signature(truth).parameters, args, strict=True))
        try:
            got = f(*(arg.clone() if isinstance(arg, Tensor) else arg for arg in args))
            got = torch.tensor(float(got)).to(expected) if isinstance(got, Real) and expected.dim() == 0 else got
            problem, hint = f"expected {_kind(expected)}, got {_kind(got)}", stated
        except (Exception, SystemExit) as error:  # quit() in a student's function is an answer, too
            frames = traceback.extract_tb(error.__traceback__)
            got, lines = [error], [at.line for at in frames if not at.filename.startswith(_HERE)]
            stub = bool(lines) and (lines[-1] or "raise").startswith("raise")  # torch raises NotImplementedError too
            got = ... if stub and isinstance(error, NotImplementedError) else got
            line = f", in the line `{lines[0]}`" if lines and lines[0] else ""
            problem = f"it raised {type(error).__name__}: {error}{line}"
            hint = next((hint for part, hint in _RAISED.items() if part in str(error)), stated)
        if args is inputs[0] and str(got) in ("None", "Ellipsis", "(None, None)", "(Ellipsis, Ellipsis)"):
            print(f"· {name}: not attempted yet: the rest uses lcnn_utils' version", end="")
            print(" (it returned None: once written, it needs a `return`)" if got is None else "")
            return None
        got = got.detach().cpu() if isinstance(got, Tensor) else got
        if isinstance(got, Tensor) and (got.shape, got.dtype) == (expected.shape, expected.dtype):
            gap = (got.double() - expected.double()).abs().nan_to_num(torch.inf).flatten()
            i, scale = int(gap.argmax()), expected.double().abs().max().item()
            if gap[i] <= (tol := scale * (2e-5 if got.dtype == torch.float32 else 1e-6)):
                largest = max(largest, gap[i].item())
                continue
            tensors = {f"at {key} =": v for key, v in named.items() if isinstance(v, Tensor)}
            shown = {key: v for key, v in tensors.items() if v.shape in ((), got.shape[got.dim() - v.dim() :])}
            shown = {key: v.expand(got.shape) for key, v in ({"expected": expected, "got": got} | shown).items()}
            entry = [(key, v.flatten()[i].item()) for key, v in shown.items()]
            problem = ", ".join(f"{key} {v if isinstance(v, bool) else format(v, '.6g')}" for key, v in entry)
            problem = f"{what}{problem} ({int((gap > tol).sum())} of {len(gap)} wrong)"
            near = "nearly right: float32 inside, a finite difference, too few steps?"
            hint = (near if gap[i] < scale / 99 else hint) if got.flatten()[i].isfinite() else wild or hint
        likely = (text for text, mistake in mistakes.items() if _same(got, w := mistake(*args)) > _same(expected, w))
        said = ", ".join(f"{key} = {_kind(arg)}" for key, arg in named.items())
        print(f"✗ {name}: for {said}:\n  {problem}\n  hint: {next(likely, hint)}")
        return False
    print(f"✓ {name}: correct on {len(inputs)} inputs (largest difference {largest:.1g})")
    return True


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
