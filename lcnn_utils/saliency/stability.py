"""How steady are a network's explanations when the input hardly moves (the paper's figure on gradient robustness)?

``maps`` makes the explanations; here two of them are compared: at x and at x + η, with η random or the worst that
ascent finds, at the lengths of the paper's figure. For the gradient of a scalar f and a short step the relative change
is at most about ‖η‖·C_f(x), with C_f the normalised curvature; a random η among d dimensions meets far less of it.

References: S. Srinivas et al., NeurIPS 2022; J. Adebayo et al., NeurIPS 2018 (networks with random weights as a
control); A. Ghorbani et al., AAAI 2019 (top-k overlap, worst-case noise); C.-K. Yeh et al., NeurIPS 2019 (sensitivity
and infidelity).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..attacks.balls import Box, _direction, _folded, _moved, _scaled
from ..curvature import measuring
from ..curvature.hessian import _prepare
from ..data import Images, floats
from ..lab import check_choice
from ..nn import refresh_norms
from .attribution import explain
from .steadiness import captum_scores, compare
from .worst import curved_ways, worst_step

LENGTHS = (1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 1e-1)  # ‖η‖₂ of the paper's figure
NOISE = ("random", "worst")


def stability(
    model: nn.Module,
    images: Images | tuple[Tensor, Tensor],
    eps_grid: Iterable[float] = LENGTHS,
    methods: Sequence[str] = ("gradient",),
    *,
    scalar: str = "loss",
    noise: Sequence[str] = NOISE,
    control: bool = False,
    perturbations: int = 0,
    box: Box = (0.0, 1.0),
    worst_steps: int = 3,
    batch_size: int = 256,
    seed: int = 0,
    **options,
) -> pd.DataFrame:
    """How much maps change between x and x + η: a row an image, method, kind of noise and length.

    Only images that the network gets right are used, and the same ones for the control. The random η of an image points
    in the same direction at every length, for every method and every network (same seed, same images). The worst η is
    sought for the *gradient* of the scalar and then used for every method.

    Args:
        images: a split as ``data.load`` gives it, on the model's device, or (x, y).
        eps_grid: lengths ‖η‖₂ in units of x.
        methods: of :func:`maps.explain`.
        scalar: what the maps explain; ``loss`` as in the paper.
        noise: ``random``, uniform among the directions, and ``worst``, of :func:`worst.worst_step`.
        control: measure also a copy with shuffled weights (:func:`randomized`), which has learnt nothing.
        perturbations: random η a length for Captum's ``sensitivity_max`` and ``infidelity``; 0 leaves them out.
        box: smallest and largest value that x + η may have: entries of a random η that would leave it change their
            sign, so that its length stays; a worst η is cut off. Points (N, d) may lie anywhere.
        worst_steps: of the ascent.
        batch_size: samples evaluated at once (memory).
        seed: of the noise and the control.
        **options: of :func:`maps.explain`.

    Returns:
        Columns image (its index in ``images``), weights (``trained``, ``random``), noise, eps, method,
        :data:`MEASURES`, and where asked for sensitivity_max and infidelity (of the random η).

    Raises:
        ValueError: bad samples, labels, lengths, kinds of noise or methods; no image is classified rightly; half
            precision, and networks that :func:`curvature.geometry` refuses.
    """
    lengths = sorted({float(e) for e in eps_grid})
    if not lengths or not all(0 < e < np.inf for e in lengths):
        raise ValueError(f"eps_grid must hold lengths, finite and above 0, in units of x; got {lengths}")
    for kind in noise:
        check_choice(kind, NOISE, "kind of noise")
    if not noise or perturbations < 0 or batch_size < 1:
        raise ValueError(f"{noise=}, {perturbations=}, {batch_size=}: use a kind or more, 0 or more, 1 or more")
    if not methods or isinstance(methods, str):
        raise ValueError(f"methods must be a sequence of at least one name, got {methods!r}")
    with measuring(model):
        x, y = _prepare(model, *floats(images), precise=True)
        with torch.no_grad():
            right = (torch.cat([model(part) for part in x.split(batch_size)]).argmax(1) == y).nonzero().squeeze(1)
    if not len(right):
        raise ValueError("the network is wrong about all of these images: there is nothing to explain")
    if control and len(right) < 2:
        raise ValueError("the control needs two images that the network gets right: there is one (control=False)")
    drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu")
    x, y, box = x[right], y[right], box if x.dim() == 4 else None
    options |= {"scalar": scalar, "batch_size": batch_size, "seed": seed}
    nets = {"trained": model} | ({"random": randomized(model, x, seed)} if control else {})
    direction = _direction(drawn[right.cpu()].to(x), "l2")
    direction = _folded(x, lengths[-1] * direction, box) / lengths[-1]
    parts = []
    for weights, net in nets.items():
        start = {method: explain(net, x, y, method, **options) for method in methods}
        ways = curved_ways(net, x, y, scalar=scalar, batch_size=batch_size) if "worst" in noise else ()
        eta = torch.zeros_like(x)
        for eps in lengths:
            length = x.new_full((len(x),), eps)
            steps = {"random": _scaled(direction, length)} if "random" in noise else {}
            if "worst" in noise:
                steps["worst"] = eta = worst_step(net, x, y, eps, scalar=scalar, steps=worst_steps, box=box,
                                                  starts=(*ways, eta), batch_size=batch_size)[0]  # fmt: skip
            for kind, step in steps.items():
                moved = _moved(x, step, box)
                for method in methods:
                    values = compare(start[method], explain(net, moved, y, method, **options))
                    if perturbations and kind == "random":
                        values |= captum_scores(net, x, y, method, eps, perturbations, start[method], box, **options)
                    about = dict(image=right.cpu(), weights=weights, noise=kind, eps=eps, method=method)
                    parts.append(pd.DataFrame(about | values))
    return pd.concat(parts, ignore_index=True)


def randomized(model: nn.Module, x: Tensor, seed: int = 0) -> nn.Module:
    """A copy that has learnt nothing: the entries of every weight shuffled, BatchNorm's statistics taken again from x.

    Sizes, β and γ stay, so that only what the weights had learnt is lost. Dropout is off, as in eval mode.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False):  # which would make weights that have no gradients
        copied = copy.deepcopy(model).eval()
    norms = [m for m in copied.modules() if isinstance(getattr(m, "running_mean", None), Tensor)]  # of either kind
    with torch.no_grad():
        for p in copied.parameters():
            if p.dim() > 1:
                p.copy_(p.flatten()[torch.randperm(p.numel(), generator=generator).to(p.device)].view_as(p))
        refresh_norms(copied)
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0  # type: ignore[assignment]  # nothing is left of what was
        for part in (*norms, *(m for m in copied.modules() if isinstance(m, parametrize.ParametrizationList))):
            part.train()  # and nothing else: dropout stays off
        copied(x)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return copied.eval()
