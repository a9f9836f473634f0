"""The exercises of notebook 03; :mod:`lcnn_utils.exercises.engine` checks them."""

import torch
from torch import Tensor, tensor

from .engine import choice_of, exercise, joined, randn


@exercise(
    inputs=[(randn(m, m, d), randn(m + 1, m), randn(d, m).abs()) for m, d in [(3, 2), (2, 3), (5, 5)]],
    mistakes={
        "g is not used: how much does f depend on each unit?": lambda A, g, bend: A.T @ bend.diag() @ A,
        "bend is not used: a unit without a bend adds nothing": lambda A, g, bend: A.T @ g.diag() @ A,
        "over units, (m, m): which side is transposed?": lambda A, g, bend: A @ (g * bend).diag() @ A.T,
        "jacobian enters once here: what of the other side?": lambda A, g, bend: (g * bend).diag() @ A,
        "this is the diagonal: what of two different inputs?": lambda A, g, bend: (g * bend) @ A**2,
        "no absolute values: units may cancel": lambda A, g, bend: A.T @ (g * bend).abs().diag() @ A,
        "a vector between two matrices sums too early": lambda A, g, bend: A.T @ (g * bend) @ A,
        "g and bend have an entry for each row of jacobian": lambda A, g, bend: A.T @ (g * bend * A),
    },
)
def layer_term(jacobian: Tensor, g: Tensor, bend: Tensor) -> Tensor:
    """f(jacobian, g, bend) → one layer's part of ∇²f, of shape (d, d), from jacobian = ∂u/∂x (m, d), g = ∂f/∂z (m,) and
    bend = φ″(u) (m,), for an activation z = φ(u). Solution: the docstring of ``lcnn_utils.curvature.bounds``."""
    return torch.einsum("ki,k,k,kj->ij", jacobian, g, bend, jacobian)


@exercise(
    inputs=[(2.0, 3.0, 5.0, 7.0), (0.5, 0.0, 2.0, 1.5), (3.0, 0.1, 1.0, 4.0)],
    mistakes={
        "curv: h stretches both directions of D²g": lambda g, cg, h, ch: (g * h, cg * h + g * ch),
        "curv: what does g do to the bend of h?": lambda g, cg, h, ch: (g * h, cg * h**2 + ch),
        "curv: h bends, too: a second term is missing": lambda g, cg, h, ch: (g * h, cg * h**2),
        "curv: g bends, too: a second term is missing": lambda g, cg, h, ch: (g * h, g * ch),
        "curv: which function comes first?": lambda g, cg, h, ch: (g * h, ch * g**2 + h * cg),
        "curv: bends meet slopes before they add up": lambda g, cg, h, ch: (g * h, cg + ch),
        "the order of the answer: Lip, then curv": lambda g, cg, h, ch: (cg * h**2 + g * ch, g * h),
        "Lip: do slopes in a row add up?": lambda g, cg, h, ch: (g + h, cg * h**2 + g * ch),
    },
    call=joined,
    compared="Lip and curv: ",
)
def composition(lip_g: float, curv_g: float, lip_h: float, curv_h: float) -> tuple[float, float]:
    """f(lip_g, curv_g, lip_h, curv_h) → the pair of numbers (Lip, curv) of g∘h: Lip bounds the slope ‖J‖, and curv the
    second derivative, ‖D²g[a, b]‖ ≤ curv_g‖a‖‖b‖. Solution: the notebook's, below the hints."""
    return lip_g * lip_h, curv_g * lip_h**2 + lip_g * curv_h


def folded(lips: Tensor, curvs: Tensor, lip: float = 1.0, curv: float = 0.0) -> tuple[Tensor, Tensor]:
    """The fold of :func:`composition`, from the (Lip, curv) of what lies before the first layer."""
    for slope, bend in zip(lips, curvs, strict=True):
        lip, curv = composition.reference(slope, bend, lip, curv)
    return torch.as_tensor(lip), torch.as_tensor(curv)


def overwritten(lips: Tensor, curvs: Tensor) -> tuple[Tensor, Tensor]:
    """A wrong fold, with the slope that includes the layer's own."""
    lip, curv = tensor(1.0), tensor(0.0)
    for slope, bend in zip(lips, curvs, strict=True):
        lip = slope * lip
        curv = bend * lip**2 + slope * curv
    return lip, curv


@exercise(
    inputs=[
        (tensor([2.0, 1.0, 3.0]).double(), tensor([0.0, 0.5, 0.25]).double()),
        *[(randn(n, n).abs() + 0.1, randn(n + 1, n).abs()) for n in (1, 9)],
    ],
    mistakes={
        "the order: which is g, and which is h?": lambda lips, curvs: folded(lips.flip(0), curvs.flip(0)),
        "before the first layer: which Lip has x ↦ x?": lambda lips, curvs: folded(lips, curvs, lip=0.0),
        "before the first layer: which curv has x ↦ x?": lambda lips, curvs: folded(lips, curvs, curv=1.0),
        "K: is the slope before the layer overwritten too early?": overwritten,
        "this is the first layer alone: is a return inside the loop?": lambda lips, curvs: folded(lips[:1], curvs[:1]),
        "K: one flat layer would make this 0: do bends multiply?": lambda lips, curvs: (lips.prod(), curvs.prod()),
        "K: each bend meets the slopes before and after it": lambda lips, curvs: (lips.prod(), curvs.sum()),
    },
    call=joined,
    compared="Lip and K: ",
)
def stack_bound(lips: Tensor, curvs: Tensor) -> tuple[Tensor, Tensor]:
    """f(lips, curvs) → the pair of numbers (Lip, K) of a stack of layers, from the Lip and the curv of each (L,), the
    layer at the input first. Solution: the sum (B) of ``lcnn_utils.curvature.bounds``, in its right-hand form."""
    return folded(lips, curvs)


root = lambda m, g, k: (g**2 + 2 * k * m.clamp(min=0)).sqrt()


@exercise(
    inputs=[(3 * randn(n, 6), randn(n + 1, 6).abs() + 0.1, k) for n, k in enumerate([4.0, 0.5, 1e-9, 0.0])],
    mistakes={
        "where margin ≤ 0 another class wins at the sample itself": lambda m, g, k: 2 * m / (g + root(m, g, k)),
        "bound is not used: this holds for a margin without curvature": lambda m, g, k: m.clamp(min=0) / g,
        "slope is not used": lambda m, g, k: (2 * m.clamp(min=0) / k) ** 0.5,
        "Taylor's second-order term has a factor ½": lambda m, g, k: (root(m, g, 2 * k) - g) / (2 * k),
        "a quadratic has two roots: which one is it?": lambda m, g, k: (root(m, g, k) + g) / k,
        "at a tiny bound this loses all digits": lambda m, g, k: (root(m, g, k) - g) / (k + 1e-12),
        "what is twice this quadratic's leading coefficient?": lambda m, g, k: (root(m, g, k) - g) / (2 * k),
    },
    wild="a root of a negative number where margin < 0? or 0/0 at bound = 0, where the conjugate helps?",
)
def certified_radius(margin: Tensor, slope: Tensor, bound: float) -> Tensor:
    """f(margin, slope, bound) → the radius r (N,) up to which m − ‖∇m‖·r − K·r²/2 stays positive, for margins m and
    slopes ‖∇m‖, both (N,), and a number K ≥ 0 (``bound``); 0 where m ≤ 0.
    Solution: ``lcnn_utils.curvature.certified_radius``."""
    return 2 * margin.clamp(min=0) / (slope + root(margin, slope, bound))


use = choice_of(layer_term, composition, stack_bound, certified_radius)
