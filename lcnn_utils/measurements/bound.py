"""The measurements of notebook 03: do the bounds hold, how loose are they, and what do they certify?"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from .. import nn as models
from ..attacks import minimal_radius
from ..curvature import (
    certified_radius,
    curvature_bound,
    evaluating,
    geometry,
    gradient_and_hvp,
    local_bound,
    normalised_bound,
    published_bound,
)
from ..experiments import plus_minus
from ..nn import CenteredSoftplus, LipschitzBatchNorm2d, refresh_norms
from ..training import Recipe, accuracy, fit, samples
from .curvature import moons_fields, moons_grid


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
    sizes = [*torch.randint(1, 6, (depth,), generator=generator).tolist(), 2 + seed % 2]
    return scramble(models.mlp(sizes, lcnn=seed % 3 == 0, beta=float(10 ** (seed % 5 - 1))), seed)  # type: ignore[return-value]


def random_cnn(seed: int) -> tuple[nn.Module, tuple[int, int, int]]:
    """A small ResNet, VGG or plain CNN with random weights in float64, and the shape of its input."""
    generator = torch.Generator().manual_seed(seed)
    channels, size = (int(torch.randint(*ends, (), generator=generator)) for ends in ((1, 3), (2, 5)))
    options: dict = dict(num_classes=3, width=1, in_channels=channels, image_size=size, lcnn=bool(seed % 2), beta=3.0)
    model: nn.Module = models.vgg11(**options) if seed % 4 == 2 else models.resnet(10, **options)
    if seed % 4 == 3:
        model = nn.Sequential(
            nn.Conv2d(channels, 4, 3, 2, 1, groups=channels), nn.BatchNorm2d(4), nn.Softplus(2.0), nn.ZeroPad2d(1),
            nn.AvgPool2d(2, 1, 1, count_include_pad=False), nn.Conv2d(4, 3, 2), LipschitzBatchNorm2d(3, affine=True),
            CenteredSoftplus(4.0, cap=1.0), nn.AdaptiveAvgPool2d((2, 1)), nn.Flatten(), nn.Linear(6, 3),
            nn.BatchNorm1d(3),
        )  # fmt: skip
    return scramble(model, seed), (channels, size, size)


def audit(model: nn.Module, x: Tensor, y: Tensor, scalar: str = "margin") -> pd.DataFrame:
    """Every bound beside the exact value, a row a sample of x (N, …) with label y (N,).
    Columns: gradient, hessian and curvature (exact); local (A), data_free (B), normalised (C); kappa (the largest over
    layers); published, published_widths (bounds of the curvature)."""
    g = geometry(model, x, y, scalar=scalar, method="exact", eps=0.0)
    c = normalised_bound(model, x, y, scalar=scalar)
    values = dict(gradient=g.grad_norm, hessian=g.hessian_norm, curvature=g.curvature, normalised=c.bound)
    values |= dict(local=local_bound(model, x, y, scalar=scalar), kappa=c.kappa.amax(1))
    shape = x.shape[1:]
    return pd.DataFrame({name: value.cpu().numpy() for name, value in values.items()}).assign(
        data_free=curvature_bound(model, shape, scalar=scalar),
        published=published_bound(model, shape),
        published_widths=published_bound(model, shape, widths=True),
    )


def audit_frame(nets: Iterable[int], points: int = 2) -> pd.DataFrame:
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


class Cancelling(nn.Module):
    """x ↦ (s₀(x) + s₀(−x), 0), x of shape (N, 1): at 0 the two slopes cancel and the two curvatures add up."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(1, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.activation = CenteredSoftplus(beta, trainable=False)
        self.inner.weight.data = torch.tensor([[1.0], [-1.0]])
        self.outer.weight.data = torch.tensor([[1.0, 1.0], [0.0, 0.0]])

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.activation(self.inner(x)))


def certificate_recipe(method: str, seed: int = 0, *, penalty: float = 1e-2, epochs: int = 20) -> Recipe:
    """Digits with an MLP 64–64–64–10, shallow enough for certificates; ``penalty`` is λ_β = λ_γ (LCNN)."""
    return Recipe(
        "digits", method, "mlp", width=64, seed=seed, epochs=epochs, lambda_beta=penalty, lambda_gamma=penalty
    )


def cancellation_frame(beta: float, x: Sequence[float]) -> pd.DataFrame:
    """:func:`audit` of :class:`Cancelling` along x > 0, column x added."""
    points = torch.tensor(x, dtype=torch.float64)[:, None]
    zeros = torch.zeros(len(points), dtype=torch.long)
    return audit(Cancelling(beta).double(), points, zeros, "logit").assign(x=x)


def depth_frame(depths: Sequence[int], seeds: Sequence[int], *, width: int = 16, points: int = 20) -> pd.DataFrame:
    """Random MLPs of growing depth: columns depth, seed, quantity, value (the largest over points of ‖∇²f‖ and of (A),
    and (B)). Weights are scaled so that the signal neither grows nor dies: variance 4/width, as the slope at 0 is ½."""
    rows = []
    for depth in depths:
        for seed in seeds:
            model = models.mlp([2, *[width] * depth, 2], beta=5.0).double().eval()
            generator = torch.Generator().manual_seed(seed)
            for p in model.parameters():
                fan = p.shape[-1]
                p.data = torch.randn(p.shape, generator=generator, dtype=p.dtype) * (2 / fan**0.5 if p.dim() > 1 else 0)
            x, y = torch.randn((points, 2), generator=generator, dtype=torch.float64), torch.zeros(points).long()
            frame = audit(model, x, y)
            values = {"largest ‖∇²f‖ of the points": frame.hessian, "(A), its largest": frame.local}
            rows += [(depth, seed, name, value.max()) for name, value in values.items()]
            rows.append((depth, seed, "(B), at every x", frame.data_free[0]))
    return pd.DataFrame(rows, columns=["depth", "seed", "quantity", "value"])


def loss_parts(model: nn.Module, x: Tensor, y: Tensor) -> pd.DataFrame:
    """The two sources of the cross-entropy's Hessian, ∇²ℓ = Jᵀ(diag p − ppᵀ)J + Σ_k (p − e_y)_k ∇²z_k.
    Columns: sample; total ‖∇²ℓ‖, softmax (norm of the first part, the softmax's own curvature), activations (norm of
    the second, which β can remove), gradient ‖∇ℓ‖. J = ∂logits/∂x; x (N, …) with few inputs, labels y (N,)."""
    d, n = x[0].numel(), len(x)
    with evaluating(model):
        gradient, hvp = gradient_and_hvp(model, x, y, "loss")
        basis = torch.eye(d, dtype=x.dtype, device=x.device).view(d, 1, *x.shape[1:])
        hessian = torch.stack([hvp(e.expand_as(x)).flatten(1) for e in basis], 2)
        point = x.detach().requires_grad_()
        logits = model(point)
        rows = [torch.autograd.grad(z.sum(), point, retain_graph=True)[0].flatten(1) for z in logits.unbind(1)]
    jacobian, p = torch.stack(rows, 1), logits.detach().softmax(1)
    softmax = jacobian.mT @ (torch.diag_embed(p) - p[:, :, None] * p[:, None]) @ jacobian
    norm = lambda matrix: torch.linalg.eigvalsh((matrix + matrix.mT) / 2).abs().amax(1).cpu().numpy()
    parts = dict(total=norm(hessian), softmax=norm(softmax), activations=norm(hessian - softmax))
    return pd.DataFrame({"sample": range(n), **parts, "gradient": gradient.detach().flatten(1).norm(dim=1).cpu()})


def certificates(
    models_by_name: dict[str, nn.Module], x: Tensor, y: Tensor, *, steps: int = 50, restarts: int = 2, box=(0.0, 1.0)
) -> pd.DataFrame:
    """Certified radius and PGD's smallest successful step of each sample: columns net, sample, certified, attacked.
    Both are 0 where the net is wrong; ``attacked`` is infinite where no attack succeeded. Unit: that of x."""
    parts = []
    for name, model in models_by_name.items():
        attacked, _ = minimal_radius(model, x, y, steps=steps, restarts=restarts, box=box)
        values = dict(certified=certified_radius(model, x, y).cpu().numpy(), attacked=attacked.cpu().numpy())
        parts.append(pd.DataFrame({"net": name, "sample": range(len(x)), **values}))
    return pd.concat(parts, ignore_index=True)


def linear_net(x: Tensor, y: Tensor) -> nn.Module:
    """Logistic regression (scikit-learn's, C = 1) as a network: without curvature, so its certificate is exact."""
    fitted = LogisticRegression(max_iter=1000).fit(x.flatten(1).numpy(), y.numpy())
    net = models.mlp([x[0].numel(), len(fitted.classes_)]).eval()
    net[1].weight.data, net[1].bias.data = torch.tensor(fitted.coef_).to(x), torch.tensor(fitted.intercept_).to(x)
    return net


def certificate_study(
    seeds: Iterable[int], *, penalties: Sequence[float] = (0.01, 0.1), epochs: int = 20, images: int = 360, **attack
) -> pd.DataFrame:
    """:func:`certificates` of the first ``images`` test digits, column seed added.
    Nets: Standard, LCNNs of several λ, and :func:`linear_net`, which is the same for every seed."""
    parts = []
    for seed in seeds:
        recipes = {"Standard": certificate_recipe("standard", seed, epochs=epochs)}
        for penalty in penalties:
            recipes[f"LCNN, λ = {penalty:g}"] = certificate_recipe("lcnn", seed, penalty=penalty, epochs=epochs)
        x, y = samples(recipes["Standard"], "test")
        nets = {name: fit(recipe, device="cpu", progress=False)[0] for name, recipe in recipes.items()}
        nets["Linear"] = linear_net(*samples(recipes["Standard"], "train"))
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
    """Share of samples whose radius exceeds ε: columns net, eps, certified, attacked (and seed, if there)."""
    by = ["net", "seed"] if "seed" in frame else ["net"]
    parts = [(frame[["certified", "attacked"]] > e).groupby([frame[b] for b in by], sort=False).mean().assign(eps=e)
             for e in eps]  # fmt: skip
    return pd.concat(parts).reset_index()


def slope_scaled(model: nn.Module, layer: str, beta: float, factor: float) -> nn.Module:
    """A copy of an LCNN in which activation ``layer`` has sharpness ``beta`` and the BatchNorm before it its channels'
    slopes times ``factor``. ValueError: ``layer`` does not follow a γ-BatchNorm in a sequence."""
    model = copy.deepcopy(model)
    parent, _, name = layer.rpartition(".")
    sequence = model.get_submodule(parent)
    layers = dict(sequence.named_children()) if isinstance(sequence, nn.Sequential) else {}
    norm = dict(zip([*layers][1:], layers.values(), strict=False)).get(name)  # the layer before
    activation = layers.get(name)
    if not isinstance(norm, LipschitzBatchNorm2d) or not isinstance(activation, CenteredSoftplus):
        raise ValueError(
            f"{layer} is no centered softplus that follows a γ-BatchNorm in a sequence: choose one that is"
        )
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


def knobs_frame(model: nn.Module, x: Tensor, y: Tensor, betas: Sequence[float], factors: Sequence[float]):
    """An LCNN with one layer's β, or the slope before it, changed.
    Columns: knob, layer, value, trained (the knob's value as trained), and those of :func:`layer_numbers`."""
    rows = []
    for layer, module in model.named_modules():
        if not isinstance(module, CenteredSoftplus):
            continue
        trained = module.beta.item()
        knobs = [("sharpness β", beta, beta, 1.0, trained) for beta in betas]
        knobs += [("slope before it, times", factor, trained, factor, 1.0) for factor in factors]
        for knob, value, beta, factor, start in knobs:
            numbers = layer_numbers(slope_scaled(model, layer, beta, factor), x, y)
            rows.append(dict(knob=knob, layer=layer, value=value, trained=start) | numbers)
    return pd.DataFrame(rows)


def moons_balls(nets: dict[str, nn.Module], x: Tensor, y: Tensor, resolution: int = 80) -> tuple[pd.DataFrame, ...]:
    """Certified balls and PGD's nearest successes on two moons, and the decision regions, as figures.bounds takes them.
    x (N, 2) and labels y (N,). First frame: net, sample, x1, x2, label, certified, attacked, found1, found2; second:
    net, x1, x2, margin on a grid."""
    points, fields = [], []
    for name, model in nets.items():
        grid = moons_grid(resolution).to(x)
        attacked, found = minimal_radius(model, x, y, box=None)
        found = torch.where(attacked.isfinite()[:, None], found, torch.nan)
        columns = dict(net=name, sample=range(len(x)), x1=x[:, 0], x2=x[:, 1], label=y, attacked=attacked)
        columns |= dict(certified=certified_radius(model, x, y), found1=found[:, 0], found2=found[:, 1])
        points.append(pd.DataFrame(columns))
        margin, _ = moons_fields(model, grid)
        fields.append(pd.DataFrame({"net": name, "x1": grid[:, 0], "x2": grid[:, 1], "margin": margin}))
    return pd.concat(points, ignore_index=True), pd.concat(fields, ignore_index=True)
