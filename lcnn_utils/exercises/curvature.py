"""The checks of notebook 02; see :mod:`lcnn_utils.exercises.engine`."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, jacrev

from .engine import randn, verdict

__all__ = ["hessian_vector_product", "power_iteration", "why_curved"]


def hessian_vector_product(f: Callable) -> bool | None:
    """f(scalar_function, x, v) → ∇²f(x)·v of shape (n,), for x and v of shape (n,), scalar_function from x to a number.
    Solution: ``lcnn_utils.curvature.gradient_and_hvp``, which does it for every sample of a batch."""
    quadratic, net = lambda a: lambda x: x @ a @ x + x.sum(), lambda a: lambda x: (2 * x @ a).tanh().logsumexp(0)
    kinds = [(kind, n) for n in (3, 8, 20) for kind in (quadratic, net)]
    inputs = [(kind(randn(n, n, n) / n**0.5), randn(n + 1, n), randn(n + 2, n)) for kind, n in kinds]
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
    return verdict(hessian_vector_product, f, inputs, truth, mistakes)


def power_iteration(f: Callable) -> bool | None:
    """f(hvp, v, steps) → the estimate of the largest |eigenvalue| of H after that many steps; hvp(v) is Hv, v (n,).
    H is symmetric; the eigenvalue may be negative, or ±λ may tie. Solution: ``lcnn_utils.curvature.hessian._power``."""
    spectra = ([100, -70, 20, 5], [-50, 20, 10], [40, -40, 10, 1], [3e-7, 1e-7], [1e6, 95e4, 0, 0, 7])
    product, rotation = lambda h: lambda v: h @ v, [torch.linalg.qr(randn(n, n, n)).Q for n in range(6)]
    pairs = [(rotation[len(spectrum)], torch.tensor(spectrum).double()) for spectrum in spectra]
    inputs = [(product(q @ values.diag() @ q.T), randn(9, len(q)), 300) for q, values in pairs]

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
    return verdict(
        power_iteration, f, inputs, truth, mistakes, "Hᵏv grows like λᵏ: normalise in each step, v ← Hv/‖Hv‖"
    )


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
    inputs = [((2 * randn(n, n)).exp().float(), (1.5 * randn(n + 1, n)).exp().float()) for n in (400, 1000, 250)]
    for values in [values for pair in inputs for values in pair]:  # so that torch's median, the lower one, is numpy's
        values[values.argsort()[len(values) // 2]] = values.median()
    return verdict(why_curved, f, inputs, truth, mistakes)
