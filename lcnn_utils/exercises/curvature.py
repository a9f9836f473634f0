"""The exercises of notebook 02; :mod:`lcnn_utils.exercises.engine` checks them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import grad, jacrev

from .engine import exercise, randn

quadratic = lambda matrix: lambda x: x @ matrix @ x + x.sum()
network = lambda matrix: lambda x: (2 * x @ matrix).tanh().logsumexp(0)
hessian = lambda f: jacrev(grad(f))


@exercise(
    inputs=[
        (function(randn(n, n, n) / n**0.5), randn(n + 1, n), randn(n + 2, n))
        for n in (3, 8, 20)
        for function in (quadratic, network)
    ],
    mistakes={
        "this is the gradient: differentiate it once more": lambda f, x, v: grad(f)(x),
        "this is the gradient times v, entry by entry": lambda f, x, v: grad(f)(x) * v,
        "this is ∇f·v, the slope along v: differentiate it once more": lambda f, x, v: grad(f)(x) @ v,
        "this is the whole Hessian: multiply it by v": lambda f, x, v: hessian(f)(x),
        "this is vᵀHv, a number: leave out the last product": lambda f, x, v: v @ hessian(f)(x) @ v,
        "this is ∇f (∇f·v), a Gauss-Newton product": lambda f, x, v: grad(f)(x) * (grad(f)(x) @ v),
        "Hv + ∇f: x.grad accumulates; use torch.autograd.grad": lambda f, x, v: hessian(f)(x) @ v + grad(f)(x),
    },
)
def hessian_vector_product(scalar_function: Callable, x: Tensor, v: Tensor) -> Tensor:
    """f(scalar_function, x, v) → ∇²f(x)·v of shape (n,), for x and v of shape (n,), scalar_function from x to a number.
    Solution: ``lcnn_utils.curvature.gradient_and_hvp``, which does it for every sample of a batch."""
    return hessian(scalar_function)(x) @ v


def product_with(eigenvalues: list[float]) -> Callable[[Tensor], Tensor]:
    """v → Hv for a symmetric H with these eigenvalues, in directions drawn at random."""
    n = len(eigenvalues)
    directions = torch.linalg.qr(randn(n, n, n)).Q
    matrix = directions @ torch.tensor(eigenvalues, dtype=torch.float64).diag() @ directions.T
    return lambda v: matrix @ v


def iterated(hvp: Callable, v: Tensor, steps: int) -> Tensor:
    """The unit vector after power iteration."""
    for _ in range(steps):
        v = hvp(v) / hvp(v).norm()
    return v


def quotient(hvp: Callable, v: Tensor, steps: int) -> Tensor:
    u = iterated(hvp, v, steps)
    return u @ hvp(u)


SPECTRA: list[list[float]] = [[100, -70, 20, 5], [-50, 20, 10], [40, -40, 10, 1], [3e-3, 1e-3], [1e6, 95e4, 0, 0, 7]]


@exercise(
    inputs=[(product_with(eigenvalues), randn(9, len(eigenvalues)), 300) for eigenvalues in SPECTRA],
    mistakes={
        "+λ and −λ tie, and uᵀHu mixes them: read ‖Hu‖": lambda hvp, v, steps: quotient(hvp, v, steps).abs(),
        "the eigenvalue is negative, its size is asked for: read ‖Hu‖": quotient,
        "this is λ²: read ‖Hu‖ of a unit u": lambda hvp, v, steps: hvp(iterated(hvp, v, steps)).square().sum(),
        "a normalised vector has norm 1: read ‖Hu‖ before": lambda hvp, v, steps: iterated(hvp, v, steps).norm(),
        "this is ‖Hv‖/‖v‖ of the start: repeat v ← Hv/‖Hv‖": lambda hvp, v, steps: hvp(v).norm() / v.norm(),
    },
    wild="Hᵏv grows like λᵏ: normalise in each step, v ← Hv/‖Hv‖",
)
def power_iteration(hvp: Callable, v: Tensor, steps: int) -> Tensor:
    """f(hvp, v, steps) → the estimate of the largest |eigenvalue| of H after that many steps; hvp(v) is Hv, v (n,).
    H is symmetric; the eigenvalue may be negative, or ±λ may tie. Solution: ``lcnn_utils.curvature.hessian._power``."""
    return hvp(iterated(hvp, v, steps)).norm()


def lognormal(seed: int, n: int, scale: float, first: Sequence[float] = ()) -> Tensor:
    """Random after ``first``. Torch's median is the lower of two middle values, numpy's their mean: here both agree."""
    values = (scale * randn(seed, n)).exp().float()
    values[: len(first)] = torch.tensor(first)
    values[values.argsort()[n // 2]] = values.median()
    return values


top_tenth = lambda c: c >= c.quantile(0.9)
above = lambda c: c > c.quantile(0.9)
low = lambda g, h: g.median() - g > h - h.median()


@exercise(
    inputs=[(lognormal(n, n, 2), lognormal(n + 1, n, 1.5)) for n in (400, 1000, 250)]
    + [(lognormal(0, 60, 2, [0, 1e-10]), lognormal(1, 60, 1.5, [1e-6, 1e-6]))]  # vanishing gradients
    + [(lognormal(2, 40, 2, [1e-3] * 8), lognormal(3, 40, 1.5, [10] * 8))],  # eight with the largest C
    mistakes={
        "at *least* the quantile: ≥": lambda g, h: above(h / (g + 1e-6)) & low(g.log(), h.log()),
        "only the tenth of the largest C counts": lambda g, h: low(g.log(), h.log()),
        "compare logarithms, not raw values": lambda g, h: top_tenth(h / (g + 1e-6)) & low(g, h),
        "inverted: these owe it to H": lambda g, h: top_tenth(h / (g + 1e-6)) & ~low(g.log(), h.log()),
        "this is the whole top tenth: is it g or H that makes C large?": lambda g, h: top_tenth(h / (g + 1e-6)),
        "divide by g + 1e-6: g may be tiny, or 0": lambda g, h: top_tenth(h / g) & low(g.log(), h.log()),
        "the tenth is of C = H/(g + 1e-6), not of H": lambda g, h: top_tenth(h) & low(g.log(), h.log()),
    },
)
def why_curved(grad_norm: Tensor, hessian_norm: Tensor) -> Tensor:
    """f(grad_norm, hessian_norm) → bool (N,): which samples owe a large curvature to a vanishing gradient; both (N,).
    A sample does if its C = H/(g + 1e-6) is in the top tenth (at least the 0.9 quantile of C) and log g lies further
    below its median than log H lies above its own: median(log g) − log g > log H − median(log H).
    Solution: ``check.why_curved??``, in notebook 02."""
    return top_tenth(hessian_norm / (grad_norm + 1e-6)) & low(grad_norm.log(), hessian_norm.log())
