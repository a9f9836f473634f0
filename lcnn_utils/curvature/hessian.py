"""How curved a network is at a sample: ‖∇f‖, ‖∇²f‖₂ and C_f = ‖∇²f‖₂ / (‖∇f‖₂ + ε).

In eval mode the samples of a batch don't touch each other, so the Hessian of the batch's sum is block-diagonal, with
one block a sample: one Hessian-vector product of the batch is one for each sample, and all iterations below run on the
whole batch at once. The graph of the gradient is built once and reused for every product.

References: S. Srinivas et al., NeurIPS 2022 (the measure); B. Pearlmutter, Neural Computation 6 (1994) (the products);
C. Lanczos (1950), B. Parlett, *The Symmetric Eigenvalue Problem*, ch. 11 and 13 (Ritz values and their residuals).
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from ..data import check_images, check_labels
from ..lab import check_choice, double

SCALARS = ("loss", "margin", "logit")
METHODS = ("power", "lanczos", "exact")
CONFIRM = 4  # products after the residual is small: now and then a start holds next to nothing of the top eigenvector


@dataclass(frozen=True)
class Geometry:
    """Per-sample results, each of shape (N,); units are those of f over those of x.

    Attributes:
        grad_norm: ‖∇f(x)‖₂.
        hessian_norm: ‖∇²f(x)‖₂, the spectral norm.
        curvature: C_f(x) = hessian_norm / (grad_norm + ε).
        iterations: Hessian-vector products used.
        residual: estimated relative error of ``hessian_norm`` (0 for the exact method); infinite where the gradient is
            too short for its dtype, as that of the loss of a sample with a margin above 70 in float32.
    """

    grad_norm: Tensor
    hessian_norm: Tensor
    curvature: Tensor
    iterations: Tensor
    residual: Tensor


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Switch every module to eval mode, and put each back as it was.

    Meanwhile convolutions on an NVIDIA GPU compute with all of float32's 24 bits: by default they use TF32, with 11.
    """
    was = {module: module.training for module in model.modules()}
    model.eval()
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield model
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
        for module, training in was.items():
            module.training = training


@contextlib.contextmanager
def measuring(model: nn.Module) -> Iterator[nn.Module]:
    """:func:`evaluating`, with gradients on even where the caller has switched them off (``torch.no_grad``,
    ``torch.inference_mode``), and attention by the kernel that has second derivatives."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"the model is a {type(model).__name__}: wrap it in an nn.Module whose forward gives logits")
    with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), evaluating(model):
        yield model


def scalar_of(logits: Tensor, y: Tensor, scalar: str = "loss") -> Tensor:
    """The scalar f of each sample: logits (N, K) and labels (N,) → (N,).

    ``loss``: cross-entropy of the label y, written as z_m − z_y + log(1 + Σ_{j≠m} e^{z_j − z_m}) with the largest logit
    z_m, whose derivatives are exact even where p_m rounds to 1. ``margin``: z_y − max_{j≠y} z_j. ``logit``: z_y.
    """
    own = logits.gather(1, y[:, None]).squeeze(1)
    if check_choice(scalar, SCALARS, "scalar") == "logit":
        return own
    if scalar == "margin":
        return own - logits.masked_fill(F.one_hot(y, logits.shape[1]).bool(), -torch.inf).amax(1)
    best = logits.argmax(1, keepdim=True)
    top = logits.gather(1, best)
    rest = (logits - top).exp().scatter(1, best, 0.0).sum(1)
    return torch.where(best.squeeze(1) == y, 0.0, top.squeeze(1) - own) + rest.log1p()


def gradient_and_hvp(
    model: nn.Module, x: Tensor, y: Tensor, scalar: str = "loss"
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Per-sample gradient of f, and the function v ↦ ∇²f·v for every sample of the batch (both shaped like ``x``).

    The model must be in eval mode for as long as the products are used. ∇²f is symmetric, so the product is the
    transposed one (reverse over reverse) on a graph that is kept, which is cheaper than forward over reverse.
    RuntimeError: a part of the network has no second derivative.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile, whose code has no second derivatives
    f, at, grad = _gradient(model, x, y, scalar)
    if _has_own_functions(f):
        _check_twice(model, x[:2], y[:2], scalar)

    def product(v: Tensor) -> Tensor:
        if not grad.requires_grad:  # it is the same everywhere
            return torch.zeros_like(x)
        return torch.autograd.grad(grad, at, v, retain_graph=True, materialize_grads=True)[0]

    return grad.detach(), product


def _gradient(model: nn.Module, x: Tensor, y: Tensor, scalar: str) -> tuple[Tensor, Tensor, Tensor]:
    """Σf, the x that it was computed from, and its gradient there, which can be differentiated again."""
    with torch.enable_grad():
        at = x.detach().requires_grad_()
        f = scalar_of(model(at), y, scalar).sum()
        return f, at, torch.autograd.grad(f, at, create_graph=True)[0]


def _has_own_functions(f: Tensor) -> bool:
    """Whether a ``torch.autograd.Function`` that is neither torch's nor ours had a part in f."""
    nodes, seen = [f.grad_fn], set[object]()
    while nodes:
        if (node := nodes.pop()) is not None and node not in seen:
            made_by = getattr(type(node), "_forward_cls", None)
            if made_by is not None and made_by.__module__.partition(".")[0] not in ("torch", "lcnn_utils"):
                return True
            seen.add(node)
            nodes += [before for before, _ in node.next_functions]
    return False


def _check_twice(model: nn.Module, x: Tensor, y: Tensor, scalar: str) -> None:
    """Raise a RuntimeError where an autograd function leaves out a part of the second derivative, as torch passes over
    that in silence: a product is compared with a difference of gradients, in float64."""
    model, x, y = copy.deepcopy(model).cpu().double(), x.cpu().double(), y.cpu()
    v, step = _random_unit(x, None), 1e-6
    _, at, grad = _gradient(model, x, y, scalar)
    product = torch.zeros_like(x)
    if grad.requires_grad:
        (product,) = torch.autograd.grad(grad, at, v, materialize_grads=True)
    there, back = (_gradient(model, x + sign * step * v, y, scalar)[2].detach() for sign in (1, -1))
    change = (there - back) / (2 * step)
    if bool((_norm(product - change) > 0.1 * _norm(change) + 1e-6 * _norm(grad.detach())).any()):
        raise RuntimeError(
            "the backward of an autograd function of its own can't be differentiated (once_differentiable?)"
        )


def _length(step: Tensor, norm: str) -> Tensor:
    largest = torch.linalg.vector_norm(step.flatten(1), math.inf, dim=1)
    if norm == "linf":
        return largest
    unit = torch.where(largest > 0, largest, 1)  # squares of 1e-25 vanish in float32
    return unit * torch.linalg.vector_norm(step.flatten(1) / unit[:, None], dim=1)


def _norm(v: Tensor) -> Tensor:
    return _length(v, "l2")


def _scale(v: Tensor, by: Tensor) -> Tensor:
    return v * by.view(-1, *[1] * (v.dim() - 1))


def _random_unit(x: Tensor, generator: torch.Generator | None) -> Tensor:
    generator = generator or torch.Generator().manual_seed(0)
    v = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=generator.device).to(x.device)
    return _scale(v, 1 / _norm(v))


def _lanczos(hvp: Callable, v: Tensor, tol: float, max_iter: int) -> tuple[Tensor, ...]:
    """Largest |eigenvalue| by Lanczos with full reorthogonalisation: (norm, vector, products, relative residual).

    A Ritz pair (θ, z) has ‖Hz − θz‖ = b_k |s_k|: an eigenvalue lies that close to θ (Parlett, thm. 4.5.1), but not for
    certain the largest, of which a random start may hold little. So ``CONFIRM`` more products have to agree.
    """
    basis, diagonal, off, agreed = [v], [], [], 0
    tiny, eps = torch.finfo(v.dtype).tiny, torch.finfo(v.dtype).eps
    scale = torch.zeros_like(_norm(v))
    max_iter = min(max_iter, v[0].numel())
    for k in range(1, max_iter + 1):
        w = hvp(basis[-1])
        diagonal.append((w * basis[-1]).flatten(1).sum(1))
        stack = torch.stack(basis, 1).flatten(2)  # (N, k, d)
        flat = w.flatten(1)
        for _ in range(2):  # twice is enough
            flat = flat - torch.einsum("nkd,nk->nd", stack, torch.einsum("nkd,nd->nk", stack, flat))
        left, scale = _norm(flat), torch.maximum(scale, _norm(w))
        off.append(torch.where(left > 100 * eps * scale, left, 0))  # below: rounding; the space found is invariant
        basis.append(torch.where(off[-1][:, None] > 0, flat / left.clamp(min=tiny)[:, None], 0).view_as(v))
        if k < 3 and k < max_iter:
            continue
        side = torch.stack(off, 1)[:, :-1]
        tridiagonal = (
            torch.diag_embed(torch.stack(diagonal, 1)) + torch.diag_embed(side, 1) + torch.diag_embed(side, -1)
        )
        values, vectors = torch.linalg.eigh(double(tridiagonal))
        at = values.abs().argmax(1, keepdim=True)
        theta = values.gather(1, at)
        combination = vectors.gather(2, at[:, None].expand(-1, k, 1)).squeeze(2)  # (N, k)
        residual = double(off[-1]) * combination[:, -1].abs()
        error = residual / (theta.abs().squeeze(1) + tiny)
        agreed = agreed + 1 if bool((error <= tol).all()) else 0
        if k == max_iter or agreed > CONFIRM:
            break
    ritz = torch.einsum("nkd,nk->nd", stack, combination.to(v.dtype).to(v.device)).view_as(v)
    return theta.abs().squeeze(1).to(v), ritz, torch.full_like(off[-1], k).long(), error.to(v)


def _power(hvp: Callable, v: Tensor, tol: float, max_iter: int) -> tuple[Tensor, ...]:
    """Largest |eigenvalue| by power iteration reading ‖Hu‖, which never decreases and is right for ± ties too.

    ‖H²u − n²u‖/n² with n = ‖Hu‖ bounds the relative distance of n² from an eigenvalue of H², hence half of it for n:
    not for certain the largest, so ``CONFIRM`` more products have to agree.
    """
    tiny = torch.finfo(v.dtype).tiny
    w = hvp(v)
    norm = _norm(w)
    error = torch.full_like(norm, torch.inf)
    k, agreed = 1, 0
    while k < max_iter:
        flat = _scale(torch.ones_like(v), norm) == 0  # H u = 0: keep u
        previous, v = v, torch.where(flat, v, _scale(w, 1 / (norm + tiny)))
        w = hvp(v)
        k += 1
        error = _norm(w - _scale(previous, norm)) / (2 * norm + tiny)
        norm = torch.maximum(norm, _norm(w))
        agreed = agreed + 1 if bool((error <= tol).all()) else 0
        if agreed > CONFIRM:
            break
    return norm, v, torch.full_like(norm, k).long(), error


def _exact(hvp: Callable, x: Tensor) -> tuple[Tensor, ...]:
    size = x[0].numel()
    if size > 4096:
        raise ValueError(f"method='exact' builds a {size} x {size} Hessian a sample: use method='lanczos' above 4096")
    unit = torch.eye(size, dtype=x.dtype, device=x.device).view(size, 1, *x.shape[1:])
    hessian = torch.stack([hvp(e.expand_as(x)).flatten(1) for e in unit], 2)  # (N, d, d), a column a product
    values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
    at = values.abs().argmax(1)
    vector = vectors[torch.arange(len(x), device=x.device), :, at].view_as(x)
    norm = values.abs().amax(1)
    return norm, vector, torch.full_like(at, size), torch.zeros_like(norm)


def _solve(model, x, y, scalar, method, tol, max_iter, generator) -> tuple[Tensor, ...]:
    if not 0 < tol < 1 or max_iter < 1:
        raise ValueError(f"tol must lie between 0 and 1 and max_iter be at least 1, got tol={tol}, max_iter={max_iter}")
    check_choice(method, METHODS, "method")
    check_choice(scalar, SCALARS, "scalar")
    try:
        gradient, hvp = gradient_and_hvp(model, x, y, scalar)
        if method == "exact":
            return gradient, *_exact(hvp, x)
        return gradient, *(_power if method == "power" else _lanczos)(hvp, _random_unit(x, generator), tol, max_iter)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ValueError(f"the network cannot be differentiated twice here: {error}") from error


def _prepare(model: nn.Module, x: Tensor, y: Tensor | None, *, precise: bool = False) -> tuple[Tensor, Tensor]:
    """x and y (default: the predicted classes) of a model in eval mode, checked; see :func:`_check_model`."""
    if not isinstance(x, Tensor) or x.dim() == 0 or len(x) == 0:
        raise ValueError(
            f"x must be a tensor of at least one sample, got {type(x).__name__} of shape {getattr(x, 'shape', None)}: "
            "images are (N, C, H, W), points (N, d); torch.as_tensor(x) makes a tensor of an array"
        )
    if x.dim() == 4:
        check_images(x)
    elif not x.is_floating_point() or not bool(x.isfinite().all()):
        raise ValueError("inputs must be finite floating numbers: they hold NaN or infinity, or are integers")
    own = next(model.parameters(), x)
    if (own.dtype, own.device) != (x.dtype, x.device):
        raise ValueError(f"x is {x.dtype} on {x.device}, the model {own.dtype} on {own.device}: move one with .to()")
    x = x.detach().clone() if x.is_inference() else x.detach()
    logits = _check_model(model, x)
    if precise and torch.finfo(logits.dtype).bits < 32:
        raise ValueError(
            f"the logits are {logits.dtype}: derivatives of second order drown in its rounding. Use model.float() and "
            "x.float(), outside torch.autocast"
        )
    if y is None:
        with torch.no_grad():
            y = torch.cat([model(part).argmax(1) for part in x.split(512)])
    check_labels(y, len(x), logits.shape[1], device=x.device)
    return x, y.clone() if y.is_inference() else y


def _check_model(model: nn.Module, x: Tensor) -> Tensor:
    """Logits of two inputs, (2, K), the first sample of x and a random one. ValueError: no finite logits or gradient,
    chance, or either sample has a part in the other's logits, so that a batch's Hessian is not that of each sample."""
    if any(p.is_inference() for p in model.parameters()):
        raise ValueError("the model was made under torch.inference_mode(), which forbids gradients: make it outside")
    other = torch.rand(x[:1].shape, generator=torch.Generator().manual_seed(0), device="cpu").to(x)
    pair = torch.cat([x[:1], other]).requires_grad_()
    given, random_state = pair.clone(), _random_state(x.device)
    try:
        logits = model(given)
    except Exception as error:  # whatever a forward raises
        hint = "; a single sample needs x[None]" if x.dim() == 3 else ""
        raise ValueError(f"the model does not take inputs of shape {tuple(x.shape)}{hint}: {error}") from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != 2 or logits.shape[1] < 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the model must give logits of shape (N, K) with K >= 2, as one tensor, got {got}")
    if not torch.equal(given, pair):
        raise ValueError("the model changes its input in place: use inplace=False in its first layer")
    if not bool(logits.isfinite().all()):
        raise ValueError("the network's logits are not finite here: its weights or inputs are too large or NaN")
    eps, size, cross = torch.finfo(logits.dtype).eps, logits.detach().abs().max(), []
    drew = not torch.equal(_random_state(x.device), random_state)
    if drew or not bool((model(pair.clone()) - logits).abs().max() <= min(100 * eps, 1e-3) * size):
        raise ValueError("the network draws random numbers even in eval mode, or answers differently each time")
    weights = torch.linspace(1, 2, logits.shape[1], device="cpu").to(logits)
    for mine in (0, 1):
        try:
            slope = torch.autograd.grad(logits[mine] @ weights, pair, retain_graph=True, allow_unused=True)[0]
        except RuntimeError as error:
            if logits.requires_grad:
                raise ValueError(f"the network cannot be differentiated: {error}") from error
            slope = None
        if slope is None:
            raise ValueError(
                "the logits do not depend on x as far as autograd sees: the forward cuts the graph (torch.no_grad, "
                "detach, a comparison, numpy), and an absent gradient is not a gradient of zero"
            )
        if not bool(slope.isfinite().all()):
            raise ValueError("the gradient of the logits is not finite here: is there a root or a logarithm of 0?")
        cross.append(slope[1 - mine].abs().max())
    touching = max(cross) > 0
    if not bool(touching):  # statistics of the batch may be detached
        apart = torch.cat([model(pair[:1].clone()), model(pair[1:].clone())])
        tolerance = max(1e-3, 16 * eps) * (logits.amax() - logits.amin()) + 4 * eps * size
        touching = (apart - logits).abs().max() > tolerance
    if bool(touching):
        named = [name for name, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is None]
        raise ValueError(
            "the samples of a batch change each other's logits, even in eval mode"
            + (f": {', '.join(named[:3])} (BatchNorm) has no running statistics" if named else "")
        )
    return logits.detach()


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _check_finite(values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise ValueError("the network's derivatives are not finite here: its weights or inputs are too large or NaN")


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
        method: ``lanczos`` (default), ``power`` (what the paper used), or ``exact`` (dense, d ≤ 4096).
        tol: stop when every sample's estimated relative error is below it; ``iterations`` says when that was, and
            ``residual`` what was reached when ``max_iter`` came first. Lanczos adds a few products to confirm.
        generator: of the random start (default: seed 0).
        eps: ε of the definition, 0 or more; 1e-6 as in the authors' code.
        batch_size: samples measured at once (memory); it does not change what is measured.

    Raises:
        ValueError: bad images, labels, scalar, method, tolerance or ε; half precision; a network that gives no finite
            logits, cuts the graph, is random, changes x in place, has no second derivative, or whose samples change
            each other's logits.
    """
    if batch_size < 1 or not 0 <= eps < torch.inf:
        raise ValueError(f"batch_size must be at least 1 and eps finite and 0 or more: got {batch_size} and {eps}")
    with measuring(model):
        x, y = _prepare(model, x, y, precise=True)
        parts = []
        for xs, ys in zip(x.split(batch_size), y.split(batch_size), strict=True):
            gradient, norm, _, iterations, residual = _solve(model, xs, ys, scalar, method, tol, max_iter, generator)
            parts.append((_norm(gradient).detach(), norm.detach(), iterations, residual.detach()))
    grad_norm, hessian_norm, iterations, residual = (torch.cat(part) for part in zip(*parts, strict=True))
    _check_finite(grad_norm + hessian_norm)
    limits = torch.finfo(x.dtype)
    residual[(grad_norm > 0) & (grad_norm < limits.tiny / limits.eps)] = torch.inf
    return Geometry(grad_norm, hessian_norm, hessian_norm / (grad_norm + eps), iterations, residual)


def top_direction(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    *,
    scalar: str = "loss",
    method: str = "lanczos",
    tol: float = 1e-3,
    max_iter: int = 100,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """The unit direction in which the gradient changes fastest, and that rate: (eigenvector like ``x``, norm (N,)).

    Arguments and errors as in :func:`geometry`.
    """
    with measuring(model):
        x, y = _prepare(model, x, y, precise=True)
        _, norm, vector, _, _ = _solve(model, x, y, scalar, method, tol, max_iter, generator)
    _check_finite(norm)
    return _scale(vector, 1 / _norm(vector)).detach(), norm.detach()
