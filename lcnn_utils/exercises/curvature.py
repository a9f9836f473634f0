"""The exercises of notebook 02; :mod:`lcnn_utils.exercises.engine` checks them."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, jacrev

from ..curvature import scalar_of
from .engine import choice_of, exercise, randn

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


def sharpened(seed: int, n: int, classes: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels of which a third are the least likely class, and gradients of the loss that are short where p is
    near 1: 1 − p times numbers around 1."""
    logits = (scale * randn(seed, n, classes)).float()
    y = logits.argmax(1)
    y[::3] = logits[::3].argmin(1)
    return logits, y, (-rest_margin(logits, y)).sigmoid() * randn(seed + 1, n).exp().float()


def rest_margin(logits: Tensor, y: Tensor) -> Tensor:
    """m = log p/(1 − p): the label's logit minus the logarithm of the sum of all others' exponentials."""
    own = torch.nn.functional.one_hot(y, logits.shape[1]).bool()
    return logits[own] - logits.masked_fill(own, -torch.inf).logsumexp(1)


@exercise(
    inputs=[sharpened(0, 6, 3, 1), sharpened(2, 50, 10, 1), sharpened(4, 30, 10, 20)],  # the last: p rounds to 1
    mistakes={
        "m counts *all* other classes, not the strongest alone": lambda z, y, g: scalar_of(z, y, "margin").exp() * g,
        "this is p‖∇ℓ‖: ‖∇m‖ is longer, as ‖∇ℓ‖ = (1 − p)‖∇m‖": lambda z, y, g: rest_margin(z, y).sigmoid() * g,
        "this is ‖∇m‖: multiply it by p": lambda z, y, g: (1 + rest_margin(z, y).exp()) * g,
        "upside down: p/(1 − p), not (1 − p)/p": lambda z, y, g: (-rest_margin(z, y)).exp() * g,
        "p is that of the true label, not the largest": lambda z, y, g: rest_margin(z, z.argmax(1)).exp() * g,
        "this is p(1 − p)‖∇m‖², the Hessian's part: C divides it by ‖∇ℓ‖": lambda z, y, g: (
            rest_margin(z, y).exp() * g.square()
        ),
    },
    wild="of a confident sample 1 − p rounds to 0: compute p/(1 − p) from the logits, it is an exponential",
)
def softmax_part(logits: Tensor, y: Tensor, grad_norm: Tensor) -> Tensor:
    """f(logits, y, grad_norm) → p‖∇m‖ (N,) of each sample, for logits (N, K), labels y (N,) and the gradient norms of
    the loss, ‖∇ℓ‖ (N,). p: probability of the true label; m = log p/(1 − p), whose gradient is not given.
    Solution: e^m ‖∇ℓ‖, with m of ``check.rest_margin??``, in notebook 02."""
    return rest_margin(logits, y).exp() * grad_norm


use = choice_of(hessian_vector_product, power_iteration, softmax_part)
