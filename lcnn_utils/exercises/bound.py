"""Checks of notebook 03's exercises: ``from lcnn_utils.exercises import bounds as check``."""

from collections.abc import Callable
from typing import Any

import torch

from .engine import randn, verdict

__all__ = ["certified_radius", "composition", "layer_term"]


def layer_term(f: Callable) -> bool | None:
    """f(jacobian, g, bend) → one layer's part of ∇²f, Aᵀ diag(g ∘ φ″) A of shape (d, d), from A = ∂u/∂x (m, d), g =
    ∂f/∂z (m,) and bend = φ″(u) (m,). Solution: the docstring of ``lcnn_utils.curvature.bounds``."""
    sizes = ((3, 2), (2, 3), (5, 5), (1, 4), (6, 1))
    inputs = [(randn(m, m, d), randn(m + 1, m), randn(d, m).abs()) for m, d in sizes]
    truth = lambda jacobian, g, bend: torch.einsum("ki,k,k,kj->ij", jacobian, g, bend, jacobian)
    mistakes = {
        "g is missing: ∂f/∂z weighs the units": lambda a, g, b: a.mT @ b.diag() @ a,
        "φ″ is missing: only curved units count": lambda a, g, b: a.mT @ g.diag() @ a,
        "this is A diag Aᵀ, a matrix over units: the Hessian is over inputs, Aᵀ diag A": lambda a, g, b: (
            a @ a.mT * (g * b)[:, None] if a.shape[0] == a.shape[1] else a @ a.mT
        ),
        "this is one A only: the Hessian needs one on each side": lambda a, g, b: (g * b)[:, None] * a,
        "the weight g ∘ φ″ enters once, not squared": lambda a, g, b: a.mT @ (g * b).square().diag() @ a,
    }
    return verdict(layer_term, f, inputs, truth, mistakes)


def composition(f: Callable) -> bool | None:
    """f(lip_g, curv_g, lip_h, curv_h) → the pair of numbers (Lip, curv) of g∘h: Lip bounds the slope ‖J‖, and curv the
    second derivative, ‖D²g[a, b]‖ ≤ curv_g‖a‖‖b‖. Solution: Lip_g·Lip_h and curv_g·Lip_h² + Lip_g·curv_h."""

    def pair(*numbers: float) -> Any:
        got = f(*numbers)
        both = isinstance(got, tuple | list) and len(got) == 2 and not any(v is None or v is ... for v in got)
        return torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in got]) if both else got

    two = lambda a, b: torch.tensor([a, b], dtype=torch.float64)
    truth = lambda lip_g, curv_g, lip_h, curv_h: two(lip_g * lip_h, curv_g * lip_h**2 + lip_g * curv_h)
    mistakes = {
        "curv_g meets the slope of h twice, once for each derivative: Lip_h²": lambda g, cg, h, ch: two(
            g * h, cg * h + g * ch
        ),
        "the slope of g scales the curvature of h once": lambda g, cg, h, ch: two(g * h, cg * h**2 + g**2 * ch),
        "the second term is missing: g also passes on the curvature of h": lambda g, cg, h, ch: two(g * h, cg * h**2),
        "the first term is missing: g itself is curved": lambda g, cg, h, ch: two(g * h, g * ch),
        "h comes first: it is curv_g that meets Lip_h²": lambda g, cg, h, ch: two(g * h, ch * g**2 + h * cg),
        "swapped: Lip comes first": lambda lg, cg, lh, ch: two(cg * lh**2 + lg * ch, lg * lh),
        "slopes multiply": lambda lg, cg, lh, ch: two(lg + lh, cg * lh**2 + lg * ch),
    }
    inputs = [(2.0, 3.0, 5.0, 7.0), (0.5, 0.0, 2.0, 1.5), (1.0, 1.25, 0.3, 0.0), (3.0, 0.1, 1.0, 4.0)]
    return verdict(composition, pair, inputs, truth, mistakes, what="Lip and curv, stacked: ")


def certified_radius(f: Callable) -> bool | None:
    """f(margin, slope, bound) → the radius r (N,) up to which m − ‖∇m‖·r − K·r²/2 stays positive, for margins m and
    slopes ‖∇m‖, both (N,), and a number K ≥ 0 (``bound``); 0 where m ≤ 0.
    Solution: ``lcnn_utils.curvature.certified_radius``."""
    root = lambda m, g, k: (g**2 + 2 * k * m).clamp(min=0).sqrt()
    conjugate = lambda m, g, k: 2 * m / (g + root(m, g, k))
    truth = lambda margin, slope, bound: conjugate(margin.clamp(min=0), slope, bound)
    mistakes = {
        "where the sample is wrong already (m ≤ 0) nothing is certified: 0": conjugate,
        "this ignores the curvature: m/‖∇m‖ holds for a linear margin only": lambda m, g, k: m.clamp(min=0) / g,
        "Taylor's remainder is K·r²/2: √(‖∇m‖² + 2Km)": lambda m, g, k: truth(m, g, 2 * k),
        "the other root: −‖∇m‖ + √(…), not ‖∇m‖ + √(…)": lambda m, g, k: (g + root(m.clamp(min=0), g, k)) / (k or 1),
        "the root is divided by K, not by 2K": lambda m, g, k: (root(m.clamp(min=0), g, k) - g) / (2 * k or 1),
    }
    inputs = [(randn(n, 6) * 3, randn(n + 1, 6).abs() + 0.1, k) for n, k in enumerate((4.0, 0.5, 100.0, 1e-9, 0.0))]
    wild = "0/0 at K = 0, or rounding at a tiny K: multiply by the conjugate, 2m/(‖∇m‖ + √(‖∇m‖² + 2Km))"
    return verdict(certified_radius, f, inputs, truth, mistakes, wild)
