"""The exercises of notebook 03; :mod:`lcnn_utils.exercises.engine` checks them."""

import torch
from torch import Tensor, tensor

from .engine import choice_of, exercise, randn, stacked


@exercise(
    inputs=[(randn(m, m, d), randn(m + 1, m), randn(d, m).abs()) for m, d in [(3, 2), (2, 3), (5, 5), (1, 4), (6, 1)]],
    mistakes={
        "g is not used: how much does f depend on each unit?": lambda A, g, bend: A.T @ bend.diag() @ A,
        "bend is not used: a unit without a bend adds nothing": lambda A, g, bend: A.T @ g.diag() @ A,
        "this is of shape (m, m), over units: which side of the weights is the transposed jacobian on?": (
            lambda A, g, bend: A @ (g * bend).diag() @ A.T
        ),
        "a second derivative meets the slope before it twice: jacobian enters on both sides": (
            lambda A, g, bend: (g * bend).diag() @ A
        ),
        "jacobian enters once here: what of the other side of the matrix?": lambda A, g, bend: A.T @ (g * bend).diag(),
        "this is the diagonal only: what of two different inputs?": lambda A, g, b: ((g * b)[:, None] * A**2).sum(0),
        "each unit has a weight of its own: don't sum the weights": lambda A, g, bend: A.T @ A * (g * bend).sum(),
        "each unit's weight enters once, not squared": lambda A, g, bend: A.T @ (g * bend).square().diag() @ A,
        "no absolute values: units may cancel": lambda A, g, bend: A.T @ (g * bend).abs().diag() @ A,
        "add up the units' matrices": lambda A, g, bend: torch.einsum("k,ki,kj->kij", g * bend, A, A),
        "a vector between two matrices sums over the units too early: make a matrix of the weights": (
            lambda A, g, bend: A.T @ (g * bend) @ A
        ),
        "g and bend have an entry for each row of jacobian: give them a second dimension": (
            lambda A, g, bend: A.T @ (g * bend * A)
        ),
    },
)
def layer_term(jacobian: Tensor, g: Tensor, bend: Tensor) -> Tensor:
    """f(jacobian, g, bend) → one layer's part of ∇²f, of shape (d, d), from jacobian = ∂u/∂x (m, d), g = ∂f/∂z (m,) and
    bend = φ″(u) (m,), for an activation z = φ(u). Solution: the docstring of ``lcnn_utils.curvature.bounds``."""
    return torch.einsum("ki,k,k,kj->ij", jacobian, g, bend, jacobian)


@exercise(
    inputs=[(2.0, 3.0, 5.0, 7.0), (0.5, 0.0, 2.0, 1.5), (1.0, 1.25, 0.3, 0.0), (3.0, 0.1, 1.0, 4.0)],
    mistakes={
        "curv: D²g is taken along two directions, and h stretches both": lambda g, cg, h, ch: (g * h, cg * h + g * ch),
        "curv: g passes the bend of h on once": lambda g, cg, h, ch: (g * h, cg * h**2 + g**2 * ch),
        "curv: a bend of h is seen through g: a second term is missing": lambda g, cg, h, ch: (g * h, cg * h**2),
        "curv: g bends, too: a second term is missing": lambda g, cg, h, ch: (g * h, g * ch),
        "curv: which function comes first? lip_h stands before the bend of g": (
            lambda g, cg, h, ch: (g * h, ch * g**2 + h * cg)
        ),
        "curv: bends don't multiply: differentiate g(h(x)) twice, the second time by the product rule": (
            lambda g, cg, h, ch: (g * h, cg * ch)
        ),
        "curv: before they add up, each bend meets the other function's slope": (lambda g, cg, h, ch: (g * h, cg + ch)),
        "curv: do the two terms of the product rule multiply?": lambda g, cg, h, ch: (g * h, cg * h**2 * g * ch),
        "the order of the answer: Lip, then curv": lambda g, cg, h, ch: (cg * h**2 + g * ch, g * h),
        "Lip: one slope after another: do they add up?": lambda g, cg, h, ch: (g + h, cg * h**2 + g * ch),
        "this is curv alone: the answer is a pair, Lip first": lambda g, cg, h, ch: cg * h**2 + g * ch,
    },
    call=stacked,
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
    slopes, curv = lips.cumprod(0), tensor(0.0)
    for lip, slope, bend in zip(slopes, lips, curvs, strict=True):
        curv = bend * lip**2 + slope * curv
    return slopes[-1], curv


before = lambda lips: lips.cumprod(0) / lips  # slope from the input to each layer
behind = lambda lips: lips.prod() / lips.cumprod(0)  # from each layer to the output


@exercise(
    inputs=[
        (tensor([2.0, 1.0, 3.0]).double(), tensor([0.0, 0.5, 0.25]).double()),
        (tensor([3.0, 1.0, 2.0, 1.0, 0.5]).double(), tensor([0.0, 1.25, 0.0, 0.5, 0.0]).double()),
        *[(randn(n, n).abs() + 0.1, randn(n + 1, n).abs()) for n in (1, 9)],
    ],
    mistakes={
        "this is K alone: the answer is a pair, Lip first": lambda s, c: folded(s, c)[1],
        "the order: of a layer and all that lies before it, which is g, and which is h?": (
            lambda s, c: folded(s.flip(0), c.flip(0))
        ),
        "before the first layer nothing is stretched: which Lip has x ↦ x?": lambda s, c: folded(s, c, lip=0.0),
        "before the first layer nothing is bent: which curv has x ↦ x?": lambda s, c: folded(s, c, curv=1.0),
        "K needs the slope before the layer: is it overwritten too early?": overwritten,
        "K: what comes after a layer passes its bend on": lambda s, c: (s.prod(), (c * before(s) ** 2).sum()),
        "K: what lies before a layer stretches both directions": (
            lambda s, c: (s.prod(), (c * before(s) * behind(s)).sum())
        ),
        "the slope before a layer is that of all layers before it": lambda s, c: (
            s.prod(),
            (c * torch.cat([s.new_ones(1), s[:-1]]) ** 2 * behind(s)).sum(),
        ),
        "composition takes numbers: go through the layers one by one": (
            lambda s, c: torch.stack([s, c * 1.0**2 + s * 0.0])
        ),
        "this is the first layer alone: is the return inside the loop?": lambda s, c: (s[0], c[0]),
        "K: a single flat layer would make this 0: do bends multiply?": lambda s, c: (s.prod(), c.prod()),
        "K: bends don't just add up: each meets the slopes before and after it": lambda s, c: (s.prod(), c.sum()),
    },
    call=stacked,
    compared="Lip and K: ",
)
def stack_bound(lips: Tensor, curvs: Tensor) -> tuple[Tensor, Tensor]:
    """f(lips, curvs) → the pair of numbers (Lip, K) of a stack of layers, from the Lip and the curv of each (L,), the
    layer at the input first. Solution: the sum (B) of ``lcnn_utils.curvature.bounds``, in its right-hand form."""
    return folded(lips, curvs)


root = lambda m, g, k: (g**2 + 2 * k * m.clamp(min=0)).sqrt()


@exercise(
    inputs=[(3 * randn(n, 6), randn(n + 1, 6).abs() + 0.1, k) for n, k in enumerate([4.0, 0.5, 100.0, 1e-9, 0.0])],
    mistakes={
        "where margin ≤ 0 another class wins at the sample itself": lambda m, g, k: 2 * m / (g + root(m, g, k)),
        "bound is not used: this holds for a margin without curvature": lambda m, g, k: m.clamp(min=0) / g,
        "slope is not used": lambda m, g, k: (2 * m.clamp(min=0) / k) ** 0.5,
        "Taylor's second-order term has a factor ½": lambda m, g, k: (root(m, g, 2 * k) - g) / (2 * k),
        "a quadratic has two roots: which is the step at which the margin is used up?": (
            lambda m, g, k: (root(m, g, k) + g) / k
        ),
        "at bound = 0 and at a tiny bound the usual formula is 0/0, or nearly so; a small number there doesn't help": (
            lambda m, g, k: (root(m, g, k) - g) / (k + 1e-12)
        ),
        "what is twice the leading coefficient of this quadratic?": lambda m, g, k: (root(m, g, k) - g) / (2 * k),
    },
    wild="a root of a negative number where margin < 0? or 0/0 at bound = 0, where the conjugate helps?",
)
def certified_radius(margin: Tensor, slope: Tensor, bound: float) -> Tensor:
    """f(margin, slope, bound) → the radius r (N,) up to which m − ‖∇m‖·r − K·r²/2 stays positive, for margins m and
    slopes ‖∇m‖, both (N,), and a number K ≥ 0 (``bound``); 0 where m ≤ 0.
    Solution: ``lcnn_utils.curvature.certified_radius``."""
    return 2 * margin.clamp(min=0) / (slope + root(margin, slope, bound))


use = choice_of(layer_term, composition, stack_bound, certified_radius)
