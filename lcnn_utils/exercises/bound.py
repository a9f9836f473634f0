"""The exercises of notebook 03; :mod:`lcnn_utils.exercises.engine` checks them."""

import torch
from torch import Tensor

from .engine import choice_of, exercise, randn, stacked


@exercise(
    inputs=[(randn(m, m, d), randn(m + 1, m), randn(d, m).abs()) for m, d in [(3, 2), (2, 3), (5, 5), (1, 4), (6, 1)]],
    mistakes={
        "g is missing: ∂f/∂z weighs the units": lambda A, g, bend: A.T @ bend.diag() @ A,
        "φ″ is missing: only curved units count": lambda A, g, bend: A.T @ g.diag() @ A,
        "A diag Aᵀ is over units, the Hessian, over inputs, is Aᵀ diag A": lambda A, g, b: A @ (g * b).diag() @ A.T,
        "this is one A only: the Hessian needs one on each side": lambda A, g, bend: (g * bend).diag() @ A,
        "the weight g ∘ φ″ enters once, not squared": lambda A, g, bend: A.T @ (g * bend).square().diag() @ A,
    },
)
def layer_term(jacobian: Tensor, g: Tensor, bend: Tensor) -> Tensor:
    """f(jacobian, g, bend) → one layer's part of ∇²f, Aᵀ diag(g ∘ φ″) A of shape (d, d), from A = ∂u/∂x (m, d), g =
    ∂f/∂z (m,) and bend = φ″(u) (m,). Solution: the docstring of ``lcnn_utils.curvature.bounds``."""
    return torch.einsum("ki,k,k,kj->ij", jacobian, g, bend, jacobian)


@exercise(
    inputs=[(2.0, 3.0, 5.0, 7.0), (0.5, 0.0, 2.0, 1.5), (1.0, 1.25, 0.3, 0.0), (3.0, 0.1, 1.0, 4.0)],
    mistakes={
        "curv_g meets the slope of h twice, once for each derivative": lambda g, cg, h, ch: (g * h, cg * h + g * ch),
        "the slope of g scales the curvature of h once": lambda g, cg, h, ch: (g * h, cg * h**2 + g**2 * ch),
        "the second term is missing: g also passes on the curvature of h": lambda g, cg, h, ch: (g * h, cg * h**2),
        "the first term is missing: g itself is curved": lambda g, cg, h, ch: (g * h, g * ch),
        "h comes first: it is curv_g that meets Lip_h²": lambda g, cg, h, ch: (g * h, ch * g**2 + h * cg),
        "swapped: Lip comes first": lambda g, cg, h, ch: (cg * h**2 + g * ch, g * h),
        "slopes multiply": lambda g, cg, h, ch: (g + h, cg * h**2 + g * ch),
    },
    call=stacked,
    compared="Lip and curv: ",
)
def composition(lip_g: float, curv_g: float, lip_h: float, curv_h: float) -> tuple[float, float]:
    """f(lip_g, curv_g, lip_h, curv_h) → the pair of numbers (Lip, curv) of g∘h: Lip bounds the slope ‖J‖, and curv the
    second derivative, ‖D²g[a, b]‖ ≤ curv_g‖a‖‖b‖. Solution: notebook 03, the hints below it."""
    return lip_g * lip_h, curv_g * lip_h**2 + lip_g * curv_h


root = lambda m, g, k: (g**2 + 2 * k * m.clamp(min=0)).sqrt()


@exercise(
    inputs=[(3 * randn(n, 6), randn(n + 1, 6).abs() + 0.1, k) for n, k in enumerate([4.0, 0.5, 100.0, 1e-9, 0.0])],
    mistakes={
        "where the sample is wrong (m ≤ 0) nothing is certified: 0": lambda m, g, k: 2 * m / (g + root(m, g, k)),
        "this ignores the curvature: m/‖∇m‖ holds for a linear margin only": lambda m, g, k: m.clamp(min=0) / g,
        "Taylor's remainder is K·r²/2: √(‖∇m‖² + 2Km)": lambda m, g, k: (root(m, g, 2 * k) - g) / (2 * k),
        "the other root: −‖∇m‖ + √(…), not ‖∇m‖ + √(…)": lambda m, g, k: (root(m, g, k) + g) / k,
        "the root is divided by K, not by 2K": lambda m, g, k: (root(m, g, k) - g) / (2 * k),
    },
    wild="0/0 at K = 0, or rounding at a tiny K: multiply by the conjugate",
)
def certified_radius(margin: Tensor, slope: Tensor, bound: float) -> Tensor:
    """f(margin, slope, bound) → the radius r (N,) up to which m − ‖∇m‖·r − K·r²/2 stays positive, for margins m and
    slopes ‖∇m‖, both (N,), and a number K ≥ 0 (``bound``); 0 where m ≤ 0.
    Solution: ``lcnn_utils.curvature.certified_radius``."""
    return 2 * margin.clamp(min=0) / (slope + root(margin, slope, bound))


use = choice_of(layer_term, composition, certified_radius)
