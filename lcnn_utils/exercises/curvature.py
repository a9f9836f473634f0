"""The exercises of notebook 02; :mod:`lcnn_utils.exercises.engine` checks them."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, jacrev
from torch.linalg import eigvalsh

from ..curvature import scalar_of
from .engine import choice_of, exercise, joined, randn

quadratic = lambda matrix: lambda x: x @ matrix @ x + x.sum()
curved = lambda matrix: lambda x: (2 * x @ matrix).tanh().logsumexp(0)
hessian = lambda f: jacrev(grad(f))
unit = lambda v: v / v.norm()


@exercise(
    inputs=[
        (function(randn(n, n, n) / n**0.5), randn(n + 1, n), randn(n + 2, n))
        for n, function in [(3, quadratic), (3, curved), (8, curved)]
    ],
    mistakes={
        "this is the gradient alone: differentiate once more": lambda f, x, v: grad(f)(x),
        "this is the gradient times v: where is the second derivative?": lambda f, x, v: grad(f)(x) * v,
        "this is the slope along v: how does it change with x?": lambda f, x, v: grad(f)(x) @ v,
        "this is the whole Hessian: only its product with v is asked for": lambda f, x, v: hessian(f)(x),
        "this is vᵀHv: one product with v too many": lambda f, x, v: v @ hessian(f)(x) @ v,
        "x.grad adds up: the gradient is still in it": lambda f, x, v: hessian(f)(x) @ v + grad(f)(x),
    },
)
def hessian_vector_product(scalar_function: Callable, x: Tensor, v: Tensor) -> Tensor:
    """f(scalar_function, x, v) → ∇²f(x)·v of shape (n,), for x and v of shape (n,), scalar_function from x to a number.
    Solution: ``lcnn_utils.curvature.gradient_and_hvp``, which does it for every sample of a batch."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(scalar_function(x), x, create_graph=True)
        return torch.autograd.grad(gradient @ v, x)[0]


def product_with(eigenvalues: list[float]) -> Callable[[Tensor], Tensor]:
    """v → Hv for a symmetric H with these eigenvalues, in directions drawn at random."""
    n = len(eigenvalues)
    directions = torch.linalg.qr(randn(n, n, n)).Q
    matrix = directions @ torch.tensor(eigenvalues, dtype=torch.float64).diag() @ directions.T
    return lambda v: matrix @ v


def iterated(hvp: Callable, v: Tensor, steps: int) -> Tensor:
    """The unit vector before the last product of power iteration."""
    for _ in range(steps - 1):
        v = hvp(unit(v))
    return unit(v)


quotient = lambda hvp, v, steps: iterated(hvp, v, steps) @ hvp(iterated(hvp, v, steps))
SPECTRA: list[list[float]] = [[100, -70, 20, 5], [-50, 20, 10], [40, -40, 10, 1]]


@exercise(
    inputs=[(product_with(eigenvalues), randn(9, len(eigenvalues)), 300) for eigenvalues in SPECTRA],
    mistakes={
        "+λ and −λ cancel in uᵀHu: what else tells their size?": lambda hvp, v, n: quotient(hvp, v, n).abs(),
        "the eigenvalue is negative: its size is asked for": quotient,
        "this is λ², the size after two products": lambda hvp, v, n: hvp(iterated(hvp, v, n)).square().sum(),
        "this is 1 whatever H is: the length is lost where you normalise": lambda hvp, v, n: iterated(hvp, v, n).norm(),
        "this is the eigenvector: how large is its eigenvalue?": lambda hvp, v, n: iterated(hvp, v, n + 1),
        "this is the first product: each step starts from the vector before": lambda hvp, v, n: hvp(unit(v)).norm(),
    },
    wild="Hᵏv grows like λᵏ: what keeps it within bounds?",
)
def power_iteration(hvp: Callable, v: Tensor, steps: int) -> Tensor:
    """f(hvp, v, steps) → the estimate of the largest |eigenvalue| of H after that many products; hvp(v) is Hv, v (n,).
    H is symmetric; the eigenvalue may be negative, or ±λ may tie. Solution: ``lcnn_utils.curvature.hessian._power``."""
    return hvp(iterated(hvp, v, steps)).norm()


part = lambda alpha, rest: (alpha, rest.norm(), unit(rest))
step = lambda hvp, v, v_before, beta: part(v @ hvp(v), hvp(v) - (v @ hvp(v)) * v - beta * v_before)
changed = lambda change: lambda *arguments: change(*step(*arguments))

FIRST = (product_with([2, -1, 4, 3]), unit(randn(3, 4)), torch.zeros(4, dtype=torch.float64), 0.0)
SECOND = (FIRST[0], step(*FIRST)[2], FIRST[1], step(*FIRST)[1])


@exercise(
    inputs=[SECOND, FIRST],
    mistakes={
        "v_next isn't orthogonal to v_before": lambda hvp, v, v_before, beta: step(hvp, v, v_before, 0),
        "v_next isn't orthogonal to v": lambda hvp, v, v_before, beta: part(v @ hvp(v), hvp(v) - beta * v_before),
        "what lies along v_before is to go: which sign?": lambda hvp, v, v_before, beta: step(hvp, v, v_before, -beta),
        "the second number is the beta of the step before": lambda *a: (step(*a)[0], a[3], step(*a)[2]),
        "v_next is no unit vector": changed(lambda alpha, beta_next, v_next: (alpha, beta_next, beta_next * v_next)),
        "alpha is no length: it may be negative": lambda hvp, v, *rest: (hvp(v).norm(), *step(hvp, v, *rest)[1:]),
        "the order is alpha, beta_next, v_next": changed(lambda alpha, beta_next, v_next: (beta_next, alpha, v_next)),
    },
    call=joined,
    compared="alpha, beta_next and the entries of v_next: ",
)
def lanczos_step(hvp: Callable, v: Tensor, v_before: Tensor, beta: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """f(hvp, v, v_before, beta) → (alpha, beta_next, v_next): the diagonal entry vᵀHv, the entry vᵀHv_next > 0 beside
    it, and the next vector of the orthonormal basis, (n,). hvp(v) is Hv for a symmetric H; v, v_before (n,): the last
    two vectors of the basis; beta: v_beforeᵀHv. In the first step v_before and beta are 0.
    Solution: ``lcnn_utils.curvature.hessian._lanczos``, which also repairs what rounding does to a long basis."""
    product = hvp(v)
    alpha = v @ product
    rest = product - alpha * v - beta * v_before
    return alpha, rest.norm(), rest / rest.norm()


def entries(hvp: Callable, v: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The alphas and the betas of Lanczos' steps from a start of length 1, (steps,) each; the first beta is 0."""
    v_before, beta, alphas, betas = torch.zeros_like(v), torch.zeros_like(v[0]), [], []
    for _ in range(steps):
        betas.append(beta)
        alpha, beta, v_next = step(hvp, v, v_before, beta)
        alphas.append(alpha)
        v, v_before = v_next, v
    return torch.stack(alphas), torch.stack(betas)


def ritz(hvp: Callable, v: Tensor, steps: int, beside: slice = slice(1, None)) -> Tensor:
    """The eigenvalues of Lanczos' matrix; eigvalsh reads its lower triangle. ``beside``: the betas that it has."""
    alphas, betas = entries(hvp, v, steps)
    return eigvalsh(alphas.diag() + betas[beside].diag(-1))


SPECTRA_AND_STEPS = [([3.0, -7.0, 2.0, 1.0, -4.0], 3), ([9.0, -4.0, 2.0], 1), (randn(8, 30).tolist(), 9)]


@exercise(
    inputs=[(product_with(numbers), randn(7, len(numbers)), steps) for numbers, steps in SPECTRA_AND_STEPS],
    mistakes={
        "these are all eigenvalues: the largest size is asked for": lambda hvp, v, n: ritz(hvp, unit(v), n),
        "the largest in size may be the lowest": lambda hvp, v, n: ritz(hvp, unit(v), n)[-1],
        "only a diagonal? eigvalsh reads the lower triangle": lambda hvp, v, n: entries(hvp, unit(v), n)[0].abs().max(),
        "the first vector of the basis is no unit vector": lambda hvp, v, n: ritz(hvp, v, n).abs().max(),
        "which two vectors does each beta belong to?": lambda hvp, v, n: ritz(hvp, unit(v), n, slice(-1)).abs().max(),
        "a step too few": lambda hvp, v, n: ritz(hvp, unit(v), n - 1).abs().max(),
        "a step too many": lambda hvp, v, n: ritz(hvp, unit(v), n + 1).abs().max(),
    },
)
def lanczos(hvp: Callable, v: Tensor, steps: int) -> Tensor:
    """f(hvp, v, steps) → the largest |eigenvalue| of the tridiagonal matrix (steps, steps) of that many Lanczos steps,
    from the start v (n,), of any length; hvp(v) is Hv for a symmetric H; steps < n.
    Solution: ``lcnn_utils.curvature.hessian._lanczos``, for every sample of a batch."""
    return ritz(hvp, unit(v), steps).abs().max()


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
    inputs=[sharpened(0, 6, 3, 1), sharpened(4, 30, 10, 20)],  # the last: p rounds to 1
    mistakes={
        "m counts all other classes, not the strongest alone": lambda z, y, g: scalar_of(z, y, "margin").exp() * g,
        "this is p‖∇ℓ‖, but ∇m is longer than ∇ℓ": lambda z, y, g: rest_margin(z, y).sigmoid() * g,
        "this is ‖∇m‖: the factor p is missing": lambda z, y, g: (1 + rest_margin(z, y).exp()) * g,
        "upside down: for a sure sample it is large": lambda z, y, g: (-rest_margin(z, y)).exp() * g,
        "p is that of the true label, not the largest": lambda z, y, g: rest_margin(z, z.argmax(1)).exp() * g,
    },
    wild="of a sure sample 1 − p rounds to 0: what can be had from the logits without p?",
)
def softmax_part(logits: Tensor, y: Tensor, grad_norm: Tensor) -> Tensor:
    """f(logits, y, grad_norm) → p‖∇m‖ (N,) of each sample, for logits (N, K), labels y (N,) and the gradient norms of
    the loss, ‖∇ℓ‖ (N,). p: probability of the true label; m = log p/(1 − p), whose gradient is not given.
    Solution: e^m ‖∇ℓ‖, with the m of ``lcnn_utils.exercises.curvature.rest_margin``."""
    return rest_margin(logits, y).exp() * grad_norm


use = choice_of(hessian_vector_product, power_iteration, lanczos_step, lanczos, softmax_part)
