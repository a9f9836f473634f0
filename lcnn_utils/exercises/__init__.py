"""Instant checks of the notebooks' exercises: ``from lcnn_utils import exercises as check``.

``check.derivatives(mine)`` calls the student's function on seeded random inputs, compares the results with independent
references, prints a verdict and returns True (✓), False (✗, with a hint) or None (·, not attempted yet); it raises for
nothing the student's code does. A likely mistake is named when it gives the student's very numbers.
"""

import inspect
import math
import os
import traceback
from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, jacrev

from ..nn import softplus as activations

__all__ = ["beta_for_curvature", "centered_softplus", "derivatives"]  # notebook 01
__all__ += ["hessian_vector_product", "power_iteration", "why_curved"]  # notebook 02
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


def _check(task: Callable, f: Callable, inputs: list, truth: Callable, mistakes: dict, wild: str = "", what: str = ""):
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


def _randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def centered_softplus(f: Callable) -> bool | None:
    """f(x, beta) → (log(1 + e^{βx}) − log 2)/β, like x in shape and dtype, for a number β > 0 and however large x.
    Solution: ``lcnn_utils.nn.centered_softplus``."""
    settings = [(b, s, d) for b in (3.0, 0.5, 0.01, 1e3) for s in ((7,), (2, 3, 4), ()) for d in ("float32", "float64")]
    inputs: list = [((3 * _randn(0, *shape)).to(getattr(torch, dtype)), beta) for beta, shape, dtype in settings]
    inputs.append((torch.tensor([-500.0, -1.0, 0.0, 1.0, 500.0]), 100.0))
    plus, log2 = lambda t: torch.logaddexp(t, torch.zeros_like(t)), math.log(2)
    overflow = "e^{βx} overflows: use F.softplus, torch.logaddexp, or log1p of e^{−β|x|}"
    mistakes = {
        "not centred: too large by log 2/β everywhere; subtract the value at 0": lambda x, b: plus(b * x) / b,
        "the value at 0 is log 2/β, not log 2": lambda x, b: plus(b * x) / b - log2,
        "divide by β": lambda x, b: plus(b * x) - log2,
        "β is not used: this is the one of β = 1": lambda x, b: plus(x) - log2,
        "this is plain softplus of β = 1: neither β nor the centring is there": lambda x, b: plus(x),
        overflow: lambda x, b: ((b * x).exp() + 1).log() / b - log2 / b,
    }
    truth = lambda x, beta: ((plus(beta * x.double()) - log2) / beta).to(x.dtype)
    return _check(centered_softplus, f, inputs, truth, mistakes, overflow)


def derivatives(f: Callable) -> bool | None:
    """f(x, beta) → the pair (s₀′, s₀″) of the centered softplus, each like x (any shape), for a number β > 0.
    Solution: the first lines of ``lcnn_utils/nn/softplus.py``."""
    tensors = lambda got: isinstance(got, tuple | list) and all(isinstance(one, Tensor) for one in got)
    stacked = lambda x, b: torch.stack(list(got)) if tensors(got := f(x, b)) else got
    pair, s = lambda *both: torch.stack(both), torch.sigmoid
    mistakes = {
        "s₀″ lacks the β of the chain rule": lambda x, b: pair(s(b * x), s(b * x) * s(-b * x)),
        "swapped: s₀′ comes first": lambda x, b: pair(b * s(b * x) * s(-b * x), s(b * x)),
        "the slope is σ(βx), not σ(x)": lambda x, b: pair(s(x), b * s(x) * s(-x)),
        "the slope is σ(βx), not σ(x), so s₀″ has a factor β": lambda x, b: pair(s(x), s(x) * s(-x)),
        "s₀″ lacks the factor 1 − σ(βx)": lambda x, b: pair(s(b * x), b * s(b * x)),
        "β and 1/β cancel in s₀′: it is σ(βx)": lambda x, b: pair(b * s(b * x), b * b * s(b * x) * s(-b * x)),
    }
    first = grad(lambda x, b: activations.centered_softplus(x, b).sum())
    truth = lambda x, beta: pair(first(x, beta), grad(lambda x: first(x, beta).sum())(x))
    inputs = [(3 * _randn(1, *s) / w, b) for b in (3.0, 0.5, 0.01, 1e3) for s in ((7,), (2, 3)) for w in (1, b)]
    wild = "e^{βx} overflows: use torch.sigmoid(βx)"
    return _check(derivatives, stacked, inputs, truth, mistakes, wild, "s₀′ and s₀″, stacked: ")


def beta_for_curvature(f: Callable) -> bool | None:
    """f(c) → the number β at which the largest second derivative of the centered softplus is c > 0.
    That is measured, by differentiating at your β. Solution: the head of ``lcnn_utils.nn.softplus``, s₀″ ≤ β/4."""

    def peak(c: float) -> Any:
        if (got := f(c)) is None or got is ...:
            return got
        beta = float(torch.as_tensor(got).detach())
        x = torch.linspace(-5, 5, 1001).double() / (beta or math.nan)
        return grad(lambda x: torch.sigmoid(beta * x).sum())(x).max()

    truth = lambda c: torch.tensor(c, dtype=torch.float64)
    mistakes = {
        "at 0, s₀″ = β·½·½: a quarter of β is reached, so c itself is too small": lambda c: truth(c / 4),
        "inverted: multiply by 4 where you divide": lambda c: truth(c / 16),
        "at 0, s₀″ = βσ(1 − σ) is β/4, not β/2": lambda c: truth(c / 2),
    }
    inputs, wild = [(c,) for c in (2.5, 0.25, 1.0, 30.0, 0.01)], "β is a finite number above 0"
    return _check(beta_for_curvature, peak, inputs, truth, mistakes, wild, "largest s₀″ at your β: ")


def hessian_vector_product(f: Callable) -> bool | None:
    """f(scalar_function, x, v) → ∇²f(x)·v of shape (n,), for x and v of shape (n,), scalar_function from x to a number.
    Solution: ``lcnn_utils.curvature.gradient_and_hvp``, which does it for every sample of a batch."""
    quadratic, net = lambda a: lambda x: x @ a @ x + x.sum(), lambda a: lambda x: (2 * x @ a).tanh().logsumexp(0)
    kinds = [(kind, n) for n in (3, 8, 20) for kind in (quadratic, net)]
    inputs = [(kind(_randn(n, n, n) / n**0.5), _randn(n + 1, n), _randn(n + 2, n)) for kind, n in kinds]
    mistakes = {
        "this is the gradient: differentiate it once more": lambda f, x, v: grad(f)(x),
        "this is the gradient times v, entry by entry": lambda f, x, v: grad(f)(x) * v,
        "this is ∇f·v, the slope along v: differentiate it once more": lambda f, x, v: grad(f)(x) @ v,
        "this is the whole Hessian: multiply it by v": lambda f, x, v: jacrev(grad(f))(x),
        "this is vᵀHv, a number: leave out the last product": lambda f, x, v: v @ jacrev(grad(f))(x) @ v,
        "this is ∇f (∇f·v), a Gauss-Newton product": lambda f, x, v: grad(f)(x) * (grad(f)(x) @ v),
        "Hv + ∇f: x.grad accumulates; use torch.autograd.grad": lambda f, x, v: jacrev(grad(f))(x) @ v + grad(f)(x),
    }
    truth = lambda scalar_function, x, v: jacrev(grad(scalar_function))(x) @ v
    return _check(hessian_vector_product, f, inputs, truth, mistakes)


def power_iteration(f: Callable) -> bool | None:
    """f(hvp, v, steps) → the estimate of the largest |eigenvalue| of H after that many steps; hvp(v) is Hv, v (n,).
    H is symmetric; the eigenvalue may be negative, or ±λ may tie. Solution: ``lcnn_utils.curvature.hessian._power``."""
    spectra = ([100, -70, 20, 5], [-50, 20, 10], [40, -40, 10, 1], [3e-7, 1e-7], [1e6, 95e4, 0, 0, 7])
    product, rotation = lambda h: lambda v: h @ v, [torch.linalg.qr(_randn(n, n, n)).Q for n in range(6)]
    pairs = [(rotation[len(spectrum)], torch.tensor(spectrum).double()) for spectrum in spectra]
    inputs = [(product(q @ values.diag() @ q.T), _randn(9, len(q)), 300) for q, values in pairs]

    def quotient(hvp: Callable, v: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            v = hvp(v) / hvp(v).norm()
        return v @ hvp(v)

    truth = lambda hvp, v, steps: torch.linalg.matrix_norm(torch.stack([hvp(e) for e in torch.eye(len(v)).to(v)]), 2)
    mistakes = {
        "+λ and −λ tie, and uᵀHu mixes them: read ‖Hu‖": lambda h, v, k: quotient(h, v, k).abs(),
        "the eigenvalue is negative, its size is asked for: read ‖Hu‖": quotient,
        "this is λ²: read ‖Hu‖ of a unit u": lambda h, v, k: truth(h, v, k) ** 2,
        "a normalised vector has norm 1: read ‖Hu‖ before": lambda h, v, k: torch.ones_like(v[0]),
        "this is ‖Hv‖/‖v‖ of the start: repeat v ← Hv/‖Hv‖": lambda h, v, k: h(v).norm() / v.norm(),
        "this is ‖Hv‖ of the start: repeat v ← Hv/‖Hv‖": lambda h, v, k: h(v).norm(),
    }
    return _check(power_iteration, f, inputs, truth, mistakes, "Hᵏv grows like λᵏ: normalise in each step, v ← Hv/‖Hv‖")


def why_curved(f: Callable) -> bool | None:
    """f(grad_norm, hessian_norm) → bool (N,): which samples owe a large curvature to a vanishing gradient; both (N,).
    A sample does if its C = H/(g + 1e-6) is in the top tenth (at least the 0.9 quantile of C) and log g lies further
    below its median than log H lies above its own: median(log g) − log g > log H − median(log H). Solution: ``truth``
    in ``lcnn_utils.exercises.why_curved``, in numpy."""

    def truth(grad_norm: Tensor, hessian_norm: Tensor) -> Tensor:
        g, h = grad_norm.double().numpy(), hessian_norm.double().numpy()
        c, g, h = h / (g + 1e-6), np.log(g), np.log(h)
        return torch.from_numpy((c >= np.quantile(c, 0.9)) & (np.median(g) - g > h - np.median(h)))

    top, low = lambda c: c >= c.quantile(0.9), lambda g, h: g.median() - g > h - h.median()
    mistakes = {
        "only the tenth of the largest C counts": lambda g, h: low(g.log(), h.log()),
        "compare logarithms, not raw values": lambda g, h: top(h / (g + 1e-6)) & low(g, h),
        "inverted: these owe it to H": lambda g, h: top(h / (g + 1e-6)) & ~low(g.log(), h.log()),
        "this is the whole top tenth: is it g or H that makes C large?": lambda g, h: top(h / (g + 1e-6)),
        "the tenth is of C = H/(g + 1e-6), not of H": lambda g, h: top(h) & low(g.log(), h.log()),
    }
    inputs = [((2 * _randn(n, n)).exp().float(), (1.5 * _randn(n + 1, n)).exp().float()) for n in (400, 1000, 250)]
    for values in [values for pair in inputs for values in pair]:  # so that torch's median, the lower one, is numpy's
        values[values.argsort()[len(values) // 2]] = values.median()
    return _check(why_curved, f, inputs, truth, mistakes)
