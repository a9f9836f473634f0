"""Upper bounds of ‖∇²f‖₂ and C_f, layer by layer, for nets whose only curved layers are elementwise activations.

With u_i the input of activation i, A_i = ∂u_i/∂x, d_i = ∂f/∂u_i and φ_i″ ≤ β_i φ_i′, φ_i″ ≤ β_i/4:

    ∇²f(x) = Σ_i A_iᵀ diag(∂f/∂z_i ∘ φ_i″(u_i)) A_i                                          (chain rule)
    (A)  ‖∇²f(x)‖ ≤ Σ_i β_i ‖d_i‖_∞ ‖A_i‖₂²                                                  ``local_bound``
    (B)  ‖∇²f(x)‖ ≤ Σ_i (β_i/4) Lip(x→u_i)² max over k and x of |∂f/∂z_ik|                 ``curvature_bound``
    (C)  C_f(x) ≤ Σ_i β_i κ_i(x) Lip(x→u_i),   κ_i = ‖d_i‖_∞ ‖A_i‖₂ / ‖∇f(x)‖₂               ``normalised_bound``

In a chain Lip(x→u_i) ≤ Π_{j≤i} ‖W_j‖ and |∂f/∂z_ik| ≤ max_k ‖W_{i+1} e_k‖ Π_{j>i+1} ‖W_j‖ ‖w‖: W_{i+1} meets one unit
at a time. A sum of branches adds slopes and curvatures. A relative of (B), smaller on notebook 03's MLPs: T. Entesari
et al., ICML 2024. The bound as printed on the poster (S. Srinivas et al., 2022) is (C) with κ = 1: ``published_bound``.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor, nn

from ..lab import check_choice, double
from .bound_graph import Place, Walk, walk_through
from .premises import measuring, prepare, scalar_of

SCALARS = ("margin", "logit")
LARGEST = 2**26  # entries of one sample's Jacobian


def _terms(walk: Walk, out: Place, scalar: str) -> dict[int, Tensor]:
    """Term of (B) of each activation's row: (K,) for logits, (K, K) for margins, entry (y, j) that of z_y − z_j."""
    place, weight = out.linear or (out, double(torch.eye(out.value.shape[1], device=out.value.device)))
    if check_choice(scalar, SCALARS, "scalar") == "margin":
        weight = weight[:, None] - weight
    largest, norm2, terms = weight.norm(torch.inf, dim=-1), weight.norm(2, dim=-1), {}
    for row, (reach, diagonal) in place.reach.items():
        curvature = walk.rows[row]["beta"] / 4 * walk.rows[row]["before"] ** 2
        terms[row] = curvature * reach * (largest if diagonal else norm2)
    return terms


def _worst(terms: dict[int, Tensor]) -> dict[int, float]:
    """The terms of the scalar whose sum is largest."""
    if not terms:
        return {}
    worst = torch.stack(list(terms.values())).sum(0).argmax()
    return {row: term.flatten()[worst].item() for row, term in terms.items()}


def curvature_bound(
    model: nn.Module, input_shape: Sequence[int], *, certified: bool = True, scalar: str = "margin"
) -> float:
    """(B): K ≥ ‖∇²f(x)‖₂ at every x and for every f, the margin of any two logits (default) or any single logit.

    The net, in eval mode, is made of known layers (``bound_graph.KINDS``), as in ``nn`` and by ``to_low_curvature``;
    ``input_shape`` is (C, H, W) or (d,). ``certified``: with upper bounds of the convolutions' norms, or with quicker
    estimates from below. ValueError: a layer or function that can't be bounded (named), a wrong shape.
    """
    walk, out = walk_through(model, input_shape, certified)
    return sum(_worst(_terms(walk, out, scalar)).values(), 0.0)


def published_bound(model: nn.Module, input_shape: Sequence[int], *, widths: bool = False) -> float:
    """Σ_i β_i Lip(x→u_i), the bound of C_f(x) at every x as printed on the authors' poster.

    It holds at x if every κ_i(x) ≤ 1, which nothing makes a net obey: s₀(x) + s₀(−x) has slope 0 and curvature β/2 at
    0. ``widths``: times the number of units of each i, a guess (the paper has a factor n_i, its place unknown to us).
    """
    curved = walk_through(model, input_shape)[0].curved
    return sum(row["beta"] * row["before"] * (row["size"] if widths else 1) for row in curved)


def _local(model: nn.Module, x: Tensor, y: Tensor, scalar: str) -> tuple[list[dict], Tensor, Tensor, Tensor, Tensor]:
    """Rows of the walk, β (L,), ‖d_i‖_∞ (N, L), ‖A_i‖₂ (N, L), κ (N, L): a row and a column for each activation."""
    check_choice(scalar, SCALARS, "scalar")
    units: list[Tensor] = []  # the inputs u_i of the activations in the last forward
    with measuring(model), contextlib.ExitStack() as hooks:
        x, y = prepare(model, x, y, precise=True)
        curved = walk_through(model, x.shape[1:])[0].curved
        if not curved:
            raise ValueError("the model has no curved activation: its margins are linear, and every bound is 0")
        d, widest = x[0].numel(), max(row["size"] for row in curved)
        if d * widest > LARGEST:
            raise ValueError(f"{widest} by {d} is too large for a Jacobian: use curvature_bound, or a smaller net")
        for module in {row["module"] for row in curved}:
            hooks.enter_context(module.register_forward_pre_hook(lambda _, args: units.append(args[0])))
        point = x.clone().requires_grad_()
        total = scalar_of(model(point), y, scalar).sum()
        gradient, *deltas = torch.autograd.grad(total, [point, *units], materialize_grads=True)
        parts = []
        for part in x.split(max(1, 2**22 // (d * widest))):
            basis = torch.eye(d, dtype=x.dtype, device=x.device).view(d, *x.shape[1:])
            repeated, basis = part.repeat_interleave(d, 0), basis.repeat(len(part), *[1] * (x.dim() - 1))
            units.clear()
            model(repeated.requires_grad_())
            weights = [torch.zeros_like(u, requires_grad=True) for u in units]  # A v is the gradient of wᵀA v in w
            (pulled,) = torch.autograd.grad(units, repeated, weights, create_graph=True)
            columns = torch.autograd.grad(pulled, weights, basis)
            jacobians = [double(c.detach().reshape(len(part), d, -1)) for c in columns]  # A_iᵀ
            grams = [a @ a.mT if d < a.shape[2] else a.mT @ a for a in jacobians]
            parts.append(torch.stack([torch.linalg.eigvalsh(gram)[:, -1].clamp(min=0).sqrt() for gram in grams], 1))
    largest = torch.stack([delta.flatten(1).abs().amax(1) for delta in deltas], 1)
    betas = x.new_tensor([row["beta"] for row in curved])
    norms = torch.cat(parts).to(x)
    kappa = largest * norms  # where it is 0 (even 0/0), a layer has no part in the gradient
    kappa = torch.where(kappa > 0, kappa / gradient.flatten(1).norm(dim=1, keepdim=True), kappa)
    return curved, betas, largest, norms, kappa


def local_bound(model: nn.Module, x: Tensor, y: Tensor, *, scalar: str = "margin") -> Tensor:
    """(A) at each sample: x (N, …), labels y (N,) → (N,); ValueError as above, or the Jacobians are too large."""
    _, betas, deltas, norms, _ = _local(model, x, y, scalar)
    return (deltas * norms**2) @ betas


def normalised_bound(model: nn.Module, x: Tensor, y: Tensor, *, scalar: str = "margin") -> tuple[Tensor, Tensor]:
    """(C) at each sample (N,), infinite where the gradient vanishes but κ doesn't, and κ (N, L) of each sample and
    activation; arguments as in :func:`local_bound`."""
    curved, beta, _, _, kappa = _local(model, x, y, scalar)
    lipschitz = beta.new_tensor([row["before"] for row in curved])
    return kappa @ (beta * lipschitz), kappa


def layer_terms(model: nn.Module, input_shape: Sequence[int], *, scalar: str = "margin") -> pd.DataFrame:
    """What each layer contributes to (B): the contributions add up to :func:`curvature_bound`.

    Columns, a row a layer: layer, kind, slope (its own; a BatchNorm's with the linear layer before), beta (NaN if not
    curved), before and lipschitz (Lip from x to its input and output), contribution.
    """
    walk, out = walk_through(model, input_shape)
    terms = _worst(_terms(walk, out, scalar))
    frame = pd.DataFrame(walk.rows).drop(columns=["module", "size"])
    return frame.assign(contribution=[terms.get(i, 0.0) for i in range(len(frame))])


def certified_radius(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """L2 radius around each x (N, …) within which no input is given another class than y (N,); 0 where x is not y.

    For every other class j the margin m = logit_y − logit_j has ‖∇²m‖ ≤ K_j by (B), so m > 0 at every step shorter than
    r_j = (−‖∇m‖ + √(‖∇m‖² + 2 K_j m))/K_j = 2m/(‖∇m‖ + √(‖∇m‖² + 2 K_j m)); the radius is the smallest r_j.
    In float64 on the CPU, rounded down; the pixel range is not used. Reference: S. Singla, S. Feizi, ICML 2020.
    """
    with measuring(model):
        x, y = prepare(model, x, y, precise=True)
        model, point, own = copy.deepcopy(model).cpu().double(), x.cpu().double().requires_grad_(), y.cpu()
        logits = model(point)
        gradient = lambda z: torch.autograd.grad(z.sum(), point, retain_graph=True)[0].flatten(1)
        mine = gradient(logits.gather(1, own[:, None]))
        slope = torch.stack([(mine - gradient(z)).norm(dim=1) for z in logits.unbind(1)], 1)
    terms = _terms(*walk_through(model, x.shape[1:]), "margin")
    curvature = sum(terms.values(), torch.zeros_like(logits[0]).expand(logits.shape[1], -1))[own]  # (N, K)
    margin = logits.detach().gather(1, own[:, None]) - logits.detach()
    radius = 2 * margin / (slope + (slope**2 + 2 * curvature * margin.clamp(min=0)).sqrt())
    radius = torch.where(margin > 0, radius, 0).scatter(1, own[:, None], torch.inf).amin(1)
    return (radius.detach() * (1 - max(1e-9, 2 * torch.finfo(x.dtype).eps))).to(x)
