"""How curved a network is at a sample: ‖∇f‖, ‖∇²f‖₂ and C_f = ‖∇²f‖₂ / (‖∇f‖₂ + ε).

In eval mode the samples of a batch don't touch each other, so the Hessian of the batch's sum has one block a sample:
one Hessian-vector product of the batch is one for each sample, and all iterations run on the whole batch at once.

References: S. Srinivas et al., NeurIPS 2022 (the measure); B. Pearlmutter, Neural Computation 6 (1994) (the products);
B. Parlett, *The Symmetric Eigenvalue Problem*, ch. 11 and 13 (Lanczos, Ritz values and their residuals).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..lab import check_choice, double
from .premises import SCALARS, measuring, prepare, scalar_of

LARGEST = 4096  # inputs of a dense Hessian
CONFIRM = 4  # products after the residual is small: it tells of an eigenvalue nearby, now and then not of the largest
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Geometry:
    """Per-sample results, each of shape (N,) but for ``direction``; units are those of f over those of x."""

    grad_norm: Tensor  # ‖∇f(x)‖₂
    hessian_norm: Tensor  # ‖∇²f(x)‖₂, the spectral norm
    curvature: Tensor  # C_f(x) = hessian_norm / (grad_norm + ε)
    direction: Tensor  # like x: the unit eigenvector of hessian_norm; along it the gradient changes fastest
    iterations: Tensor  # Hessian-vector products used
    residual: Tensor  # estimated relative error of hessian_norm; ∞ where the gradient is too short for its dtype


def gradient_and_hvp(model: nn.Module, x: Tensor, y: Tensor, scalar: str = "loss") -> tuple[Tensor, Product]:
    """Per-sample gradient of f, and the function v ↦ ∇²f·v for every sample of the batch (both shaped like ``x``).

    The model must stay in eval mode while the products are used. ∇²f is symmetric, so a product is reverse over reverse
    on a graph that is kept: cheaper than forward over reverse. RuntimeError: a part has no second derivative.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile, whose code has no second derivatives
    f, gradient, product = _differentiate(model, x, y, scalar)
    if not _has_own_functions(f):
        return gradient, product
    # An autograd function may leave out a part of its second derivative (``once_differentiable``, something detached),
    # and torch passes over it in silence: compare a product with a difference of gradients, in float64.
    exact, x64, y64 = copy.deepcopy(model).cpu().double(), x[:2].cpu().double(), y[:2].cpu()
    v, step = _random_unit(x64, None).view_as(x64), 1e-6
    slope, hvp = _differentiate(exact, x64, y64, scalar)[1:]
    ahead, behind = (_differentiate(exact, x64 + sign * step * v, y64, scalar)[1] for sign in (1, -1))
    change = (ahead - behind) / (2 * step)
    if bool((length(hvp(v) - change) > 0.1 * length(change) + 1e-6 * length(slope)).any()):
        raise RuntimeError("the backward of an autograd function of its own can't be differentiated")
    return gradient, product


def _differentiate(model: nn.Module, x: Tensor, y: Tensor, scalar: str) -> tuple[Tensor, Tensor, Product]:
    """Σf, its gradient at x, and v ↦ ∇²f·v."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        f = scalar_of(model(x), y, scalar).sum()
        (gradient,) = torch.autograd.grad(f, x, create_graph=True)

    def product(v: Tensor) -> Tensor:
        if not gradient.requires_grad:  # it is the same everywhere
            return torch.zeros_like(x)
        return torch.autograd.grad(gradient, x, v, retain_graph=True, materialize_grads=True)[0]

    return f, gradient.detach(), product


def _has_own_functions(f: Tensor) -> bool:
    """Whether a ``torch.autograd.Function`` that is neither torch's nor ours had a part in f."""
    seen, nodes = set[Any](), set[Any]([f.grad_fn])
    while nodes:
        seen |= nodes
        nodes = {before for node in nodes for before, _ in node.next_functions if before} - seen
    modules = {getattr(getattr(node, "_forward_cls", None), "__module__", "torch") for node in seen}
    return not {module.partition(".")[0] for module in modules} <= {"torch", "lcnn_utils"}


def length(v: Tensor, norm: str = "l2") -> Tensor:
    """Norm of each sample, (N, …) → (N,); squares of 1e-25 would vanish in float32."""
    largest = torch.linalg.vector_norm(v.flatten(1), math.inf, dim=1)
    if norm == "linf":
        return largest
    unit = torch.where(largest > 0, largest, 1)
    return unit * torch.linalg.vector_norm(v.flatten(1) / unit[:, None], dim=1)


def _random_unit(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """A random unit vector for each sample, (N, d)."""
    generator = generator or torch.Generator().manual_seed(0)
    v = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=generator.device).to(x.device).flatten(1)
    return v * (1 / length(v))[:, None]


# The three methods: products H·v of vectors (N, d), a unit start v, tolerance, most products →
# (norm (N,), eigenvector (N, d), products used, estimated relative error (N,)).
def _lanczos(hvp: Product, v: Tensor, tol: float, max_iter: int) -> tuple[Tensor, Tensor, int, Tensor]:
    """Lanczos with full reorthogonalisation: the matrix in the basis v, Hv, H²v, … is tridiagonal.

    A Ritz pair (θ, z) has ‖Hz − θz‖ = b_k |s_k|: an eigenvalue lies that close to θ (Parlett, thm. 4.5.1).
    """
    tiny, eps = torch.finfo(v.dtype).tiny, torch.finfo(v.dtype).eps
    basis, diagonal, off, agreed = [v], list[Tensor](), list[Tensor](), 0
    largest = torch.zeros_like(v[:, 0])
    for k in range(1, min(max_iter, v.shape[1]) + 1):
        w = hvp(basis[-1])
        diagonal.append((w * basis[-1]).sum(1))
        largest = torch.maximum(largest, length(w))
        stack = torch.stack(basis, 1)  # (N, k, d)
        for _ in range(2):  # orthogonal to all before: twice is enough
            w = w - torch.einsum("nkd,nk->nd", stack, torch.einsum("nkd,nd->nk", stack, w))
        left = length(w)  # rounding alone, where the space found is invariant: a basis of that would be none
        off.append(torch.where(left > 100 * eps * largest, left, 0))
        basis.append(torch.where(off[-1][:, None] > 0, w / left.clamp(min=tiny)[:, None], 0))
        side = torch.stack(off, 1)[:, :-1]
        tridiagonal = torch.stack(diagonal, 1).diag_embed() + side.diag_embed(1) + side.diag_embed(-1)
        values, vectors = torch.linalg.eigh(double(tridiagonal))
        top = values.abs().argmax(1, keepdim=True)
        theta = values.gather(1, top).squeeze(1).abs()
        combination = vectors.gather(2, top[:, None].expand(-1, k, 1)).squeeze(2)  # (N, k)
        error = double(off[-1]) * combination[:, -1].abs() / (theta + tiny)
        agreed = agreed + 1 if k > 2 and bool((error <= tol).all()) else 0
        if agreed > CONFIRM:
            break
    return theta.to(v), torch.einsum("nkd,nk->nd", stack, combination.to(v)), k, error.to(v)


def _power(hvp: Product, v: Tensor, tol: float, max_iter: int) -> tuple[Tensor, Tensor, int, Tensor]:
    """Power iteration reading ‖Hv‖, which never decreases and is right for ± ties too.

    ‖H²v − n²v‖/n² with n = ‖Hv‖ bounds the relative distance of n² from an eigenvalue of H², hence half of it for n.
    """
    w, tiny, k, agreed = hvp(v), torch.finfo(v.dtype).tiny, 1, 0
    norm = length(w)
    error = torch.full_like(norm, torch.inf)
    while k < max_iter and agreed <= CONFIRM:
        previous, v = v, torch.where(norm[:, None] > 0, w * (1 / (norm + tiny))[:, None], v)  # H v = 0: keep v
        w, k = hvp(v), k + 1
        error = length(w - previous * norm[:, None]) / (2 * norm + tiny)
        norm = torch.maximum(norm, length(w))
        agreed = agreed + 1 if bool((error <= tol).all()) else 0
    return norm, v, k, error


def _exact(hvp: Product, v: Tensor, tol: float, max_iter: int) -> tuple[Tensor, Tensor, int, Tensor]:
    """The eigenvalues of the dense matrix."""
    n, d = v.shape
    unit = torch.eye(d, dtype=v.dtype, device=v.device)
    hessian = torch.stack([hvp(e.expand(n, d)) for e in unit], 2)  # (N, d, d), a column a product
    values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
    norm, top = values.abs().max(1)
    return norm, vectors.gather(2, top[:, None, None].expand(n, d, 1)).squeeze(2), d, torch.zeros_like(norm)


METHODS = {"lanczos": _lanczos, "power": _power, "exact": _exact}


def geometry(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    *,
    scalar: str = "loss",
    method: str = "lanczos",
    tol: float = 1e-2,
    max_iter: int = 100,
    generator: torch.Generator | None = None,
    eps: float = 1e-6,
    batch_size: int = 512,
) -> Geometry:
    """Gradient norm, Hessian norm and normalised curvature of each sample, to relative tolerance ``tol``.

    Args:
        model: maps x to logits (N, K); measured in eval mode and left as it was.
        x: (N, C, H, W) images in [0, 1], or (N, d) points.
        y: labels (N,), int64; default: the predicted classes.
        scalar: what f is: ``loss`` (as in the paper's tables), ``margin`` or ``logit`` of the label.
        method: ``lanczos``, ``power`` (what the paper used), or ``exact`` (a dense d × d matrix a sample).
        tol: stop when every sample's estimated relative error is below it (and a few products more confirm it), or
            after ``max_iter`` products; ``residual`` is what was reached.
        generator: of the random start (default: seed 0). eps: ε of the definition; 1e-6 as in the authors' code.
        batch_size: samples measured at once (memory); it does not change what is measured.

    ValueError: bad images or labels, half precision, a network unfit for second derivatives (see ``premises``).
    """
    check_choice(scalar, SCALARS, "scalar")
    solve = METHODS[check_choice(method, tuple(METHODS), "method")]
    if not 0 < tol < 1 or max_iter < 1 or batch_size < 1:
        raise ValueError(f"use 0 < tol < 1, max_iter and batch_size >= 1: got {tol}, {max_iter}, {batch_size}")
    parts = []
    with measuring(model):
        x, y = prepare(model, x, y, precise=True)
        if method == "exact" and x[0].numel() > LARGEST:
            raise ValueError(f"a dense Hessian of {x[0].numel()} inputs is too large: use method='lanczos'")
        for xs, ys in zip(x.split(batch_size), y.split(batch_size), strict=True):
            try:
                gradient, hvp = gradient_and_hvp(model, xs, ys, scalar)
                flat_hvp = lambda v, xs=xs, hvp=hvp: hvp(v.view_as(xs)).flatten(1)
                norm, v, products, residual = solve(flat_hvp, _random_unit(xs, generator), tol, max_iter)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise ValueError(f"the network cannot be differentiated twice here: {error}") from error
            direction = (v * (1 / length(v))[:, None]).view_as(xs)
            parts.append((length(gradient), norm, direction, torch.full_like(ys, products), residual))
    grad_norm, hessian_norm, direction, iterations, residual = (torch.cat(part) for part in zip(*parts, strict=True))
    limits = torch.finfo(x.dtype)
    residual[(grad_norm > 0) & (grad_norm < limits.tiny / limits.eps)] = torch.inf
    return Geometry(grad_norm, hessian_norm, hessian_norm / (grad_norm + eps), direction, iterations, residual)
