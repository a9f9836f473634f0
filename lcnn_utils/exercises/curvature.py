"""The exercises of notebook 02; :mod:`lcnn_utils.exercises.engine` checks them."""

from collections.abc import Callable
from typing import Any

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
        "this is the gradient, the first derivative": lambda f, x, v: grad(f)(x),
        "this is the gradient times v, entry by entry: where is the second derivative?": lambda f, x, v: grad(f)(x) * v,
        "this is the slope along v, a number: how does it change with x?": lambda f, x, v: grad(f)(x) @ v,
        "this is the whole Hessian: only its product with v is asked for": lambda f, x, v: hessian(f)(x),
        "this is vᵀHv, a number: one product with v too many": lambda f, x, v: v @ hessian(f)(x) @ v,
        "this is ∇f (∇f·v): a product of two first derivatives": lambda f, x, v: grad(f)(x) * (grad(f)(x) @ v),
        "the gradient is in it, too: x.grad adds up what comes, as backward leaves it": lambda f, x, v: (
            hessian(f)(x) @ v + grad(f)(x)
        ),
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
    v = v / v.norm()
    for _ in range(steps - 1):
        v = hvp(v)
        v = v / v.norm()
    return v


def quotient(hvp: Callable, v: Tensor, steps: int) -> Tensor:
    u = iterated(hvp, v, steps)
    return u @ hvp(u)


SPECTRA: list[list[float]] = [[100, -70, 20, 5], [-50, 20, 10], [40, -40, 10, 1], [3e-3, 1e-3], [1e6, 95e4, 0, 0, 7]]


@exercise(
    inputs=[(product_with(eigenvalues), randn(9, len(eigenvalues)), 300) for eigenvalues in SPECTRA],
    mistakes={
        "here are eigenvalues +λ and −λ, and in uᵀHu they cancel: what else of Hu tells the size of λ?": (
            lambda hvp, v, steps: quotient(hvp, v, steps).abs()
        ),
        "the sign is that of a negative eigenvalue: its size is asked for": quotient,
        "this is λ², the size after two products": lambda hvp, v, steps: hvp(iterated(hvp, v, steps)).square().sum(),
        "this is 1 whatever H is: a length is lost where you normalise": lambda hvp, v, steps: iterated(
            hvp, v, steps
        ).norm(),
        "this is the eigenvector: the size of its eigenvalue is asked for": lambda hvp, v, steps: iterated(
            hvp, v, steps + 1
        ),
        "this is what the first product says: each step starts from the vector before": lambda hvp, v, steps: (
            hvp(v).norm() / v.norm()
        ),
        "this is λ times the length of v: from a unit vector?": lambda hvp, v, steps: (
            hvp(iterated(hvp, v, steps)).norm() * v.norm()
        ),
    },
    wild="Hᵏv grows like λᵏ: what keeps it within bounds?",
)
def power_iteration(hvp: Callable, v: Tensor, steps: int) -> Tensor:
    """f(hvp, v, steps) → the estimate of the largest |eigenvalue| of H after that many products; hvp(v) is Hv, v (n,).
    H is symmetric; the eigenvalue may be negative, or ±λ may tie. Solution: ``lcnn_utils.curvature.hessian._power``."""
    return hvp(iterated(hvp, v, steps)).norm()


def in_a_row(function: Callable, *arguments: Any) -> Any:
    """The three parts of a step in one tensor (a ``call`` of the exercise)."""
    answer = function(*arguments)
    if not isinstance(answer, tuple | list) or any(part is None or part is ... for part in answer):
        return answer
    return torch.cat([torch.as_tensor(part, dtype=torch.float64).reshape(-1) for part in answer])


def step(alpha: Tensor, rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return alpha, rest.norm(), rest / rest.norm()


def recurrence(hvp: Callable, v: Tensor, v_before: Tensor, beta: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    alpha = v @ hvp(v)
    return step(alpha, hvp(v) - alpha * v - beta * v_before)


def changed(change: Callable) -> Callable:
    """A step whose answer is changed by a function of that answer and of hvp(v)."""
    return lambda hvp, v, v_before, beta: change(*recurrence(hvp, v, v_before, beta), hvp(v))


def second_step(n: int, seed: int) -> tuple[Callable, Tensor, Tensor, Tensor]:
    """The arguments of a second step."""
    hvp, first = product_with(randn(seed, n).mul(3).tolist()), randn(seed + 1, n)
    first = first / first.norm()
    _, beta, v = recurrence(hvp, first, torch.zeros_like(first), 0.0)
    return hvp, v, first, beta


@exercise(
    inputs=[
        second_step(3, 1),
        (product_with([2, -1, 4, 3]), randn(3, 4) / randn(3, 4).norm(), torch.zeros(4, dtype=torch.float64), 0.0),
        second_step(12, 5),
    ],
    mistakes={
        "v_next isn't orthogonal to v_before": lambda hvp, v, v_before, beta: step(
            v @ hvp(v), hvp(v) - (v @ hvp(v)) * v
        ),
        "v_next isn't orthogonal to v": lambda hvp, v, v_before, beta: step(v @ hvp(v), hvp(v) - beta * v_before),
        "what lies along v_before is to go: with which sign?": lambda hvp, v, v_before, beta: step(
            v @ hvp(v), hvp(v) - (v @ hvp(v)) * v + beta * v_before
        ),
        "the second number is the beta of the step before": lambda hvp, v, v_before, beta: (
            v @ hvp(v),
            beta,
            recurrence(hvp, v, v_before, beta)[2],
        ),
        "v_next is no unit vector": changed(lambda alpha, length, unit, product: (alpha, length, length * unit)),
        "the second number is its square": changed(lambda alpha, length, unit, product: (alpha, length**2, unit)),
        "the second number is the length of all of Hv, not of what is left": changed(
            lambda alpha, length, unit, product: (alpha, product.norm(), unit)
        ),
        "alpha is no length: it may be negative": changed(
            lambda alpha, length, unit, product: (product.norm(), length, unit)
        ),
        "the order is alpha, beta_next, v_next": changed(lambda alpha, length, unit, product: (length, alpha, unit)),
    },
    wild="0/0? Nothing of Hv is left: is all of it taken out?",
    call=in_a_row,
    compared="alpha, beta_next and the entries of v_next: ",
)
def lanczos_step(hvp: Callable, v: Tensor, v_before: Tensor, beta: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """f(hvp, v, v_before, beta) → (alpha, beta_next, v_next): the diagonal entry vᵀHv, the entry vᵀHv_next > 0 beside
    it, and the next vector of the orthonormal basis, (n,). hvp(v) is Hv for a symmetric H; v, v_before (n,): the last
    two vectors of the basis; beta: v_beforeᵀHv. In the first step v_before and beta are 0.
    Solution: ``lcnn_utils.curvature.hessian._lanczos``, which also repairs what rounding does to a long basis."""
    return recurrence(hvp, v, v_before, beta)


def entries(hvp: Callable, v: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The diagonal (steps,) of Lanczos' matrix, and what its steps leave, (steps,)."""
    v_before, beta, numbers = torch.zeros_like(v), 0.0 * v[0], []
    for _ in range(steps):
        alpha, beta_next, v_next = recurrence(hvp, v, v_before, beta)
        numbers.append(torch.stack([alpha, beta_next]))
        v, v_before, beta = v_next, v, beta_next
    diagonal, left = torch.stack(numbers).T
    return diagonal, left


def tridiagonal(diagonal: Tensor, beside: Tensor) -> Tensor:
    return diagonal.diag() + beside.diag(1) + beside.diag(-1)


def ritz(hvp: Callable, v: Tensor, steps: int, length: float | Tensor = 0) -> Tensor:
    """The eigenvalues of Lanczos' matrix; ``length``: what the start is divided by, its own where 0."""
    diagonal, left = entries(hvp, v / (length or v.norm()), steps)
    return torch.linalg.eigvalsh(tridiagonal(diagonal, left[:-1]))


def shifted(hvp: Callable, v: Tensor, steps: int) -> Tensor:
    diagonal, left = entries(hvp, v / v.norm(), steps)
    return torch.linalg.eigvalsh(tridiagonal(diagonal, torch.cat([0 * left[:1], left[:-2]]))).abs().max()


def stuck(hvp: Callable, v: Tensor, steps: int) -> Tensor:
    """With a v_before that is 0 in every step."""
    v, beta, numbers = v / v.norm(), 0.0 * v[0], []
    for _ in range(steps):
        alpha, beta, v = recurrence(hvp, v, torch.zeros_like(v), beta)
        numbers.append(torch.stack([alpha, beta]))
    diagonal, left = torch.stack(numbers).T
    return torch.linalg.eigvalsh(tridiagonal(diagonal, left[:-1])).abs().max()


@exercise(
    inputs=[
        (product_with(eigenvalues), randn(7, len(eigenvalues)), steps)
        for eigenvalues, steps in [
            ([3.0, -7.0, 2.0, 1.0, -4.0], 3),
            ([40.0, -40.0, 10.0, 1.0, 25.0], 4),
            ([9.0, -4.0, 2.0], 1),
            (randn(8, 30).tolist(), 9),
        ]
    ],
    mistakes={
        "these are all eigenvalues: the size of the largest is asked for": ritz,
        "the largest in size may be the lowest eigenvalue": lambda hvp, v, steps: ritz(hvp, v, steps)[-1],
        "this is negative: the size is asked for": lambda hvp, v, steps: ritz(hvp, v, steps)[0],
        "the matrix seems to be diagonal: torch.linalg.eigvalsh reads the lower triangle alone": lambda hvp, v, steps: (
            entries(hvp, v / v.norm(), steps)[0].abs().max()
        ),
        "this is ‖Hu‖ of power iteration": power_iteration.reference,
        "the first vector of the basis is no unit vector": lambda hvp, v, steps: ritz(hvp, v, steps, 1).abs().max(),
        "the numbers beside the diagonal are one place off: which two vectors does each belong to?": shifted,
        "both v and v_before move on with each step": stuck,
        "this is the answer after a product more": lambda hvp, v, steps: ritz(hvp, v, steps + 1).abs().max(),
        "this is the answer after a product less": lambda hvp, v, steps: ritz(hvp, v, max(1, steps - 1)).abs().max(),
        "the last alpha is one entry of the matrix; what are its eigenvalues?": lambda hvp, v, steps: entries(
            hvp, v / v.norm(), steps
        )[0][-1].abs(),
    },
)
def lanczos(hvp: Callable, v: Tensor, steps: int) -> Tensor:
    """f(hvp, v, steps) → the largest |eigenvalue| of the tridiagonal matrix (steps, steps) of that many Lanczos steps,
    from the start v (n,), of any length; hvp(v) is Hv for a symmetric H; steps < n.
    Solution: ``lcnn_utils.curvature.hessian._lanczos``, for every sample of a batch."""
    return ritz(hvp, v, steps).abs().max()


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
        "this is p‖∇ℓ‖: ∇m is longer than ∇ℓ": lambda z, y, g: rest_margin(z, y).sigmoid() * g,
        "this is ‖∇m‖: the factor p is missing": lambda z, y, g: (1 + rest_margin(z, y).exp()) * g,
        "upside down: for a sure sample it is large": lambda z, y, g: (-rest_margin(z, y)).exp() * g,
        "p is that of the true label, not the largest": lambda z, y, g: rest_margin(z, z.argmax(1)).exp() * g,
        "this is p(1 − p)‖∇m‖², the Hessian's part: C divides it by ‖∇ℓ‖": lambda z, y, g: (
            rest_margin(z, y).exp() * g.square()
        ),
    },
    wild="of a sure sample 1 − p rounds to 0: what can be had from the logits without p?",
)
def softmax_part(logits: Tensor, y: Tensor, grad_norm: Tensor) -> Tensor:
    """f(logits, y, grad_norm) → p‖∇m‖ (N,) of each sample, for logits (N, K), labels y (N,) and the gradient norms of
    the loss, ‖∇ℓ‖ (N,). p: probability of the true label; m = log p/(1 − p), whose gradient is not given.
    Solution: e^m ‖∇ℓ‖, with the m of ``lcnn_utils.exercises.curvature.rest_margin``."""
    return rest_margin(logits, y).exp() * grad_norm


use = choice_of(hessian_vector_product, power_iteration, lanczos_step, lanczos, softmax_part)
