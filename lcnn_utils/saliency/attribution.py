"""Saliency maps: which pixels move a network's answer? Captum's methods, signed, seeded, and only where they are valid.

A map explains one scalar of each sample, by default the logit of its label. Signs are kept: whether a pixel speaks for
a class or against it is half of what a map says, and maps that swap signs are not stable.

References: N. Kokhlikyan et al., arXiv:2009.07896 (Captum); D. Smilkov et al., arXiv:1706.03825 (SmoothGrad);
M. Sundararajan et al., ICML 2017 (integrated gradients); A. Shrikumar et al., ICML 2017 (DeepLift); M. Zeiler and R.
Fergus, ECCV 2014 (occlusion); R. Selvaraju et al., ICCV 2017 (Grad-CAM).
"""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from ..curvature import measuring, prepare, scalar_of
from ..lab import check_choice
from ..nn import CenteredSoftplus

MAPS = {  # method: label
    "gradient": "Gradient",
    "input_x_gradient": "Input × gradient",
    "integrated_gradients": "Integrated gradients",
    "smoothgrad": "SmoothGrad",
    "deeplift": "DeepLift",
    "occlusion": "Occlusion",
    "gradcam": "Grad-CAM",
}
GRID = 4  # Grad-CAM looks at the last layer whose maps have at least so many pixels a side
COMPLETE = 1e-2  # DeepLift's attributions must sum up to the difference of the logits, to this share of it


class _Scalar(nn.Module):
    """A network as Captum wants it here: (x, y) → the scalar of each sample, (N,)."""

    def __init__(self, model: nn.Module, scalar: str) -> None:
        super().__init__()
        self.model, self.scalar = model, scalar

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        dtype = next(self.model.parameters(), x).dtype  # Captum draws noise in torch's default dtype
        return scalar_of(self.model(x.to(dtype)), y, self.scalar)


def explain(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    method: str = "gradient",
    *,
    scalar: str = "logit",
    samples: int = 16,
    noise: float = 0.1,
    steps: int = 32,
    baseline: float = 0.0,
    window: int | None = None,
    layer: nn.Module | None = None,
    batch_size: int = 256,
    seed: int = 0,
) -> Tensor:
    """Maps of each sample, the gradient by autograd and all others by Captum → signed, detached, like ``x`` (Grad-CAM:
    (N, 1, H, W)).

    Args:
        model, x: of logits (N, K), used in eval mode, left as it was; (N, C, H, W) images in [0, 1], or (N, d) points.
        y: labels (N,); default: the predicted classes.
        method: ``gradient``; ``input_x_gradient``; ``integrated_gradients`` (from ``baseline``, in ``steps`` steps);
            ``smoothgrad`` (mean gradient over ``samples`` copies with Gaussian noise of this standard deviation);
            ``deeplift`` (against ``baseline``; logits only; its rule of differences is taught centered softplus);
            ``occlusion`` (change of f when a square of ``window`` pixels, default a quarter of the side, becomes
            ``baseline``); ``gradcam`` (of the output of ``layer``, default the last with maps of 4 × 4 and more).
        scalar: what is explained: ``logit``, ``margin`` or ``loss`` of the label.
        batch_size: samples, with their copies, evaluated at once (memory).
        seed: of SmoothGrad's noise, which depends on a sample's place in its batch, not on x.

    ValueError: bad input; a method that this network or scalar does not allow; a network that cannot be measured.
    """
    check_choice(method, tuple(MAPS), "method")
    for name, count in {"samples": samples, "steps": steps, "batch_size": batch_size}.items():
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {count!r}")
    model = getattr(model, "_orig_mod", model)  # of torch.compile, which would not see Captum's hooks
    with measuring(model):
        x, y = prepare(model, x, y)
        f = _Scalar(model, scalar)
        settings = (method, samples, noise, steps, baseline, window, layer, batch_size)
        parts = []
        for xs, ys in zip(x.split(batch_size), y.split(batch_size), strict=True):
            with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Setting .*hooks")  # they are removed, as it says
                torch.manual_seed(seed)  # Captum draws from the global generator, which is put back
                parts.append(_attribute(f, xs.clone().requires_grad_(), ys, *settings).detach().to(x.dtype))
    return torch.cat(parts)


def _attribute(f, x, y, method, samples, noise, steps, baseline, window, layer, batch_size) -> Tensor:
    """The maps of one batch."""
    if method == "gradient":
        return torch.autograd.grad(f(x, y).sum(), x, materialize_grads=True)[0]
    from captum import attr  # here: it takes seconds to import

    copies = max(1, batch_size // len(x))  # of the batch that are evaluated at once
    if method == "smoothgrad":
        options = dict(nt_type="smoothgrad", nt_samples=samples, nt_samples_batch_size=copies, stdevs=float(noise))
        return attr.NoiseTunnel(attr.Saliency(f)).attribute(x, abs=False, additional_forward_args=y, **options)
    if method == "input_x_gradient":
        return attr.InputXGradient(f).attribute(x, additional_forward_args=y)
    if method == "integrated_gradients":
        options = dict(baselines=baseline, n_steps=steps, internal_batch_size=batch_size)
        return attr.IntegratedGradients(f).attribute(x, additional_forward_args=y, **options)
    if method == "deeplift":
        return _deeplift(f, x, y, baseline)
    if x.dim() != 4:
        raise ValueError(f"{MAPS[method]} needs images (N, C, H, W), got x of shape {tuple(x.shape)}")
    if method == "gradcam":
        maps = attr.LayerGradCam(f, layer or _last_maps(f.model, x[:1])).attribute(x, additional_forward_args=y)
        return attr.LayerAttribution.interpolate(maps, tuple(x.shape[-2:]), "bilinear")
    side = window or max(1, x.shape[-1] // 4)
    if not 1 <= side <= min(x.shape[-2:]):
        raise ValueError(f"window is {window}: use 1 to {min(x.shape[-2:])} pixels")
    channels, stride = x.shape[1], max(1, side // 2)
    options = dict(strides=(channels, stride, stride), baselines=baseline, perturbations_per_eval=copies)
    return attr.Occlusion(f).attribute(x, (channels, side, side), additional_forward_args=y, **options)


def _deeplift(f: _Scalar, x: Tensor, y: Tensor, baseline: float) -> Tensor:
    """DeepLift with its rescale rule for centered softplus, checked for completeness."""
    from captum.attr import DeepLift
    from captum.attr._core import deep_lift

    if f.scalar != "logit":
        raise ValueError(f"DeepLift explains logits here: scalar={f.scalar!r} has a layer that it knows no rule for")
    deep_lift.SUPPORTED_NON_LINEAR.setdefault(CenteredSoftplus, deep_lift.nonlinear)
    try:
        maps = DeepLift(copy.deepcopy(f)).attribute(x, baselines=baseline, additional_forward_args=y)
    except (AssertionError, RuntimeError) as error:  # a module used twice, say
        raise ValueError(f"DeepLift can't explain this network: {str(error).splitlines()[0]}") from error
    with torch.no_grad():
        change = f(x, y) - f(torch.full_like(x, baseline), y)
    gap = (maps.flatten(1).sum(1) - change).abs()
    if bool((gap > COMPLETE * change.abs().mean()).any()):
        raise ValueError(
            f"DeepLift's attributions miss the change of the logit by up to {gap.max():.3g}: the network has a "
            "non-linear layer that DeepLift has no rule for, such as a functional one. Use integrated_gradients"
        )
    return maps


def _last_maps(model: nn.Module, x: Tensor) -> nn.Module:
    """The last module to run whose output, of one sample, is maps of at least GRID × GRID pixels."""
    layers: list[nn.Module] = []

    def look(module: nn.Module, _: object, output: object) -> None:
        if isinstance(output, Tensor) and output.dim() == 4 and len(output) == 1 and min(output.shape[-2:]) >= GRID:
            layers.append(module)

    handle = register_module_forward_hook(look)  # on every module
    try:
        with torch.no_grad():
            model(x)
    finally:
        handle.remove()
    if not layers:
        raise ValueError(f"Grad-CAM needs a layer with maps of at least {GRID} × {GRID} pixels: this network has none")
    return layers[-1]
