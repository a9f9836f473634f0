"""The measurements of notebook 03: do the bounds hold, how loose are they, and what do they certify?"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from ..attacks import minimal_radius
from ..curvature import (
    certified_radius,
    curvature_bound,
    evaluating,
    geometry,
    local_bound,
    normalised_bound,
    published_bound,
)
from ..experiments import plus_minus
from ..nn import CenteredSoftplus, LipschitzBatchNorm2d, mlp, refresh_norms
from ..training import Recipe, accuracy, fit_recipe, samples


def scramble(model: nn.Module, seed: int) -> nn.Module:
    """Give ``model`` random weights, β, γ and BatchNorm statistics (in place, float64, eval mode)."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    random = lambda like: torch.randn(like.shape, generator=generator, dtype=like.dtype)
    for name, p in model.named_parameters():
        width = 1 if name.endswith(("log_beta", "log_gamma")) else max(1, p[0].numel())
        p.data = random(p) / width**0.5
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.copy_(random(buffer) ** 2 + 0.1)
        if name.endswith("running_mean"):
            buffer.copy_(random(buffer) / 2)
        if name.endswith("weight.0.v"):  # spectral norm's direction, still that of the old weight
            buffer.copy_(random(buffer))
    refresh_norms(model)
    return model


def random_mlp(seed: int) -> nn.Sequential:
    """A small float64 MLP of random size (1 to 5 units, 2 to 4 hidden layers); β from 0.1 to 1000, an LCNN's random."""
    generator = torch.Generator().manual_seed(seed)
    depth = int(torch.randint(3, 6, (), generator=generator))
    sizes = torch.randint(1, 6, (depth,), generator=generator).tolist()
    beta = float(10 ** (seed % 5 - 1))
    model = mlp([*sizes, 2 + seed % 2], lcnn=seed % 3 == 0, beta=beta)
    scramble(model, seed)
    return model


def audit(model: nn.Module, x: Tensor, y: Tensor, scalar: str = "margin") -> pd.DataFrame:
    """Every bound beside the exact value, a row a sample of x (N, …) with label y (N,).
    Columns: gradient, hessian and curvature (exact); local (A), data_free (B), normalised (C); kappa (the largest over
    layers); published, published_widths (of the curvature, as printed on the poster)."""
    g = geometry(model, x, y, scalar=scalar, method="exact", eps=0.0)
    normalised, kappa = normalised_bound(model, x, y, scalar=scalar)
    values = dict(gradient=g.grad_norm, hessian=g.hessian_norm, curvature=g.curvature, normalised=normalised)
    values |= dict(local=local_bound(model, x, y, scalar=scalar), kappa=kappa.amax(1))
    shape = x.shape[1:]
    return pd.DataFrame({name: value.cpu().numpy() for name, value in values.items()}).assign(
        data_free=curvature_bound(model, shape, scalar=scalar),
        published=published_bound(model, shape),
        published_widths=published_bound(model, shape, widths=True),
    )


def audit_frame(nets: Iterable[int], points: int) -> pd.DataFrame:
    """:func:`audit` of random MLPs (one a seed in ``nets``), margins and single logits in turn; column net added.
    Points whose gradient is below 1e-100, so that the square of its norm is about to underflow, are left out."""
    parts = []
    for seed in nets:
        model, generator = random_mlp(seed), torch.Generator().manual_seed(seed + 1)
        x = torch.randn((points, model[1].in_features), generator=generator, dtype=torch.float64)  # type: ignore[arg-type]
        y = torch.arange(points) % 2
        parts.append(audit(model, x, y, ("margin", "logit")[seed % 2]).assign(net=seed))
    frame = pd.concat(parts, ignore_index=True)
    return frame[frame.gradient > 1e-100].reset_index(drop=True)


def certificate_recipe(method: str, seed: int = 0, *, penalty_weight: float = 1e-2, epochs: int = 20) -> Recipe:
    """Digits with an MLP 64–64–64–10, shallow enough for certificates; ``penalty_weight`` is λ_β = λ_γ (LCNN)."""
    penalty: dict[str, Any] = dict(lambda_beta=penalty_weight, lambda_gamma=penalty_weight)
    return Recipe(dataset="digits", method=method, model="mlp", width=64, seed=seed, epochs=epochs, **penalty)


def certificates(nets: dict[str, nn.Module], x: Tensor, y: Tensor, **attack: Any) -> pd.DataFrame:
    """Certified radius and PGD's smallest successful step, a row a sample of a net: columns net, certified, attacked.
    Both are 0 where the net is wrong; ``attacked`` is infinite where no attack succeeded. Unit: that of x.
    ``attack``: steps and restarts of PGD."""
    parts = []
    for name, net in nets.items():
        attacked, _ = minimal_radius(net, x, y, **attack)
        parts.append(pd.DataFrame(dict(net=name, certified=certified_radius(net, x, y).cpu(), attacked=attacked.cpu())))
    return pd.concat(parts, ignore_index=True)


def linear_net(x: Tensor, y: Tensor) -> nn.Module:
    """Logistic regression (scikit-learn's, C = 1) as a network: without curvature, so its certificate is exact."""
    fitted = LogisticRegression(max_iter=1000).fit(x.flatten(1).numpy(), y.numpy())
    net = mlp([x[0].numel(), len(fitted.classes_)]).eval()
    net[1].weight.data = torch.tensor(fitted.coef_).to(x)
    net[1].bias.data = torch.tensor(fitted.intercept_).to(x)
    return net


def certificate_study(seeds: Iterable[int], *, epochs: int = 20, images: int = 360, **attack: Any) -> pd.DataFrame:
    """:func:`certificates` of the first ``images`` test digits, column seed added.
    Nets: Standard, LCNNs of two λ, and :func:`linear_net`, which is the same for every seed."""
    parts = []
    for seed in seeds:
        recipes = {"Standard": certificate_recipe("standard", seed, epochs=epochs)}
        for weight in (0.01, 0.1):
            recipes[f"LCNN, λ = {weight:g}"] = certificate_recipe("lcnn", seed, penalty_weight=weight, epochs=epochs)
        nets = {name: fit_recipe(recipe, device="cpu", progress=False)[0] for name, recipe in recipes.items()}
        nets["Linear"] = linear_net(*samples(recipes["Standard"], "train"))
        x, y = samples(recipes["Standard"], "test")
        parts.append(certificates(nets, x[:images], y[:images], **attack).assign(seed=seed))
    return pd.concat(parts, ignore_index=True)


def certified_table(frame: pd.DataFrame, eps: Iterable[float]) -> pd.DataFrame:
    """A row a net: accuracy, then certified accuracy at each ε with PGD's upper bound of it, mean ± std over seeds.
    Takes the frame of :func:`certificate_study`; texts in per cent."""
    table = pd.DataFrame({"net": list(dict.fromkeys(frame.net))})
    for e in (0.0, *eps):
        shares = robust_accuracy(frame, [e]).groupby("net", sort=False)[["certified", "attacked"]].agg(["mean", "std"])
        texts = {}
        for name in ("certified", "attacked"):
            texts[name] = list(map(plus_minus, 100 * shares[name, "mean"], 100 * shares[name, "std"]))
        if e == 0:
            table["accuracy %"] = texts["attacked"]
        else:
            both = zip(texts["certified"], texts["attacked"], strict=True)
            table[f"certified at {e:g} (PGD leaves)"] = [f"{certified} ({left})" for certified, left in both]
    return table


def robust_accuracy(frame: pd.DataFrame, eps: Iterable[float]) -> pd.DataFrame:
    """Share of samples whose radius exceeds ε: columns net, seed, eps, certified, attacked."""
    parts = []
    for e in eps:
        exceeds = frame[["certified", "attacked"]] > e
        parts.append(exceeds.groupby([frame.net, frame.seed], sort=False).mean().assign(eps=e))
    return pd.concat(parts).reset_index()


def slope_scaled(model: nn.Module, layer: str, beta: float, factor: float) -> nn.Module:
    """A copy of an LCNN's ``mlp`` in which activation ``layer`` has the sharpness ``beta``, and the BatchNorm before it
    its channels' slopes times ``factor``. ValueError: ``layer`` is no activation after a γ-BatchNorm."""
    model = copy.deepcopy(model)
    norm, activation = model.get_submodule(str(int(layer) - 1)), model.get_submodule(layer)
    if not isinstance(norm, LipschitzBatchNorm2d) or not isinstance(activation, CenteredSoftplus):
        raise ValueError(f"layer {layer} is no activation after a γ-BatchNorm: take one of an LCNN's")
    norm.gamma = norm.gamma.item() * factor
    norm.running_var.copy_((norm.running_var + norm.eps) / factor**2 - norm.eps)
    activation.beta = beta  # type: ignore[assignment]
    return model


def layer_numbers(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """``bound`` (B), ``local`` (the largest (A) of the points), ``truth`` (their largest ‖∇²m‖) and ``accuracy``."""
    hessian = geometry(model, x, y, scalar="margin", method="exact").hessian_norm
    with evaluating(model):
        share = accuracy(model, x, y)
    bound, local = curvature_bound(model, x.shape[1:]), local_bound(model, x, y)
    return dict(bound=bound, local=local.max().item(), truth=hessian.max().item(), accuracy=share)
