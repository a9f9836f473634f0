"""BatchNorm of slope ≤ γ. Reference: S. Srinivas et al., NeurIPS 2022, arXiv:2206.07144, whose layer it corrects."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from .softplus import check_positive, eager, wide

FAST = ((torch.float32,) * 3, (torch.float64,) * 3, (torch.bfloat16, torch.float32, torch.float32))  # x, σ², log γ


def _slope(square: Tensor, log_gamma: Tensor, weight: Tensor | None) -> Tensor:
    """The slope of each channel, (C,), from σ² = var + eps."""
    slope, gamma = square.rsqrt(), log_gamma.exp()
    return torch.clamp(slope if weight is None else slope * weight, -gamma, gamma)


class _FastBatchNorm(torch.autograd.Function):
    """(x − mean)·slope + bias with the batch's own statistics, by the kernels of torch's BatchNorm and at its cost.

    With gradient g, Δ = x − mean and n values a channel, the gradient in x is w/σ·(g − Σg/n − Δ·Σ(gΔ)/(nσ²)) where the
    slope is w/σ. Where it is ±γ the last term is missing: so there torch's kernel is given a 1/σ that is ε times the
    true one, ε the rounding unit, and w to match. Third derivatives are refused, by torch.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, log_gamma: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor,
        eps: float,
    ) -> Tensor:  # fmt: skip
        inverse, gamma = var.add(eps).rsqrt_(), math.exp(min(log_gamma.item(), 99.0))
        unclipped = inverse if weight is None else inverse * weight
        slope = unclipped.clamp(-gamma, gamma)
        clipped = slope != unclipped
        used = torch.where(clipped, inverse * torch.finfo(inverse.dtype).eps, inverse)
        ctx.save_for_backward(x, log_gamma, weight, bias, mean, used, slope / used, clipped)
        ctx.eps = eps
        return torch.batch_norm(x, slope / inverse, bias, mean, var, False, 0.0, eps, False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, log_gamma, weight, bias, mean, used, scale, clipped = ctx.saved_tensors
        if torch.is_grad_enabled():  # a graph of the gradient is asked for: from here on γ and w count
            scale = torch.where(clipped, scale.sign() * log_gamma.exp() / used, 1.0 if weight is None else weight)
        by_x, by_weight, by_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, scale, None, None, mean, used, True, ctx.eps, [True, True, bias is not None]
        )
        by_log_gamma = torch.dot(by_weight * clipped, scale)
        return by_x, by_log_gamma, None if weight is None else by_weight * ~clipped, by_bias, None, None, None


@fx.wrap
def _lipschitz_batch_norm(layer: LipschitzBatchNorm2d, x: Tensor) -> Tensor:
    """What :class:`LipschitzBatchNorm2d` computes: one node of a graph that torch.fx traces."""
    channels, others = layer.num_features, [0, *range(2, x.ndim)]
    if x.ndim not in (2, 4) or x.shape[1] != channels:
        raise ValueError(f"expected (N, C, H, W) or (N, C) with C = {channels}, got {tuple(x.shape)}")
    by_channel = lambda values: values.view(1, -1, *[1] * (x.ndim - 2))
    log_gamma, weight, bias, eps = layer.log_gamma, layer.weight, layer.bias, layer.eps
    running_mean, running_var, momentum = layer.running_mean, layer.running_var, layer.momentum
    if not layer.training:
        slope = layer.channel_slopes()
        shift = -running_mean * slope if bias is None else bias - running_mean * slope
        return torch.addcmul(by_channel(shift), wide(x), by_channel(slope)).to(x.dtype)
    count = x.numel() // channels
    if count < 2:
        raise ValueError(f"training needs more than 1 value per channel, got {tuple(x.shape)}: use eval()")
    if momentum is None or momentum > 0:  # 0: a pass that is not to be felt
        layer.num_batches_tracked.add_(1)
        momentum = 1 / layer.num_batches_tracked.item() if momentum is None else momentum
    if (x.dtype, running_mean.dtype, log_gamma.dtype) in FAST and x.is_cpu and eager():
        mean, var = torch.batch_norm_update_stats(x.detach(), running_mean, running_var, momentum)
        return _FastBatchNorm.apply(x, log_gamma, weight, bias, mean, var, eps)
    mean = wide(x).mean(others)
    centred = wide(x) - by_channel(mean)
    var = centred.square().mean(others)  # several times faster than torch.var_mean
    running_mean.lerp_(mean.detach().to(running_mean), momentum)
    running_var.lerp_(var.detach().to(running_var) * (count / (count - 1)), momentum)
    y = centred * by_channel(_slope(var + eps, log_gamma, weight))
    return (y if bias is None else y + by_channel(bias)).to(x.dtype)


class LipschitzBatchNorm2d(_NormBase):
    """BatchNorm whose slope is at most γ in every channel: y_c = (x_c − mean_c)·slope_c (+ bias_c), with

        slope_c = min(1/σ_c, γ),   or   clamp(w_c/σ_c, −γ, γ) with affine weights w;   σ² = var + eps

    the projection of BatchNorm's diagonal map onto the maps of norm ≤ γ. It corrects the published BN·min(1, γ·σ_min),
    where one dead channel, σ → 0, scales down all the others. The variance is the batch's in training, the running one
    in eval. Arguments, parameters and statistics are those of ``nn.BatchNorm2d``; γ is trained as ``log_gamma``, and
    ``layer.gamma = 3.0`` sets it. Input (N, C, H, W) or (N, C), output alike. Raises ValueError: γ not positive and
    finite, a wrong shape, one value a channel in training.
    """

    running_mean: Tensor  # type: ignore[assignment]
    running_var: Tensor  # type: ignore[assignment]
    num_batches_tracked: Tensor  # type: ignore[assignment]

    def __init__(
        self, num_features: int, gamma: float = 10.0, *, affine: bool = False, eps: float = 1e-5,
        momentum: float | None = 0.1,
    ) -> None:  # fmt: skip
        super().__init__(num_features, eps, momentum, affine)
        self.log_gamma = nn.Parameter(torch.zeros(()))
        self.gamma = gamma

    @property
    def gamma(self) -> Tensor:
        """The largest slope allowed: a positive scalar tensor."""
        return self.log_gamma.exp()

    @gamma.setter
    def gamma(self, value: float) -> None:
        self.log_gamma.data.fill_(math.log(check_positive(value, "gamma")))

    def channel_slopes(self) -> Tensor:
        """slope_c in eval mode, with the running statistics: (C,)."""
        return _slope(self.running_var + self.eps, self.log_gamma, self.weight)

    def lipschitz_constant(self) -> Tensor:
        """Largest |slope_c|: the Lipschitz constant in eval mode, a scalar ≤ γ."""
        return self.channel_slopes().abs().max()

    def forward(self, x: Tensor) -> Tensor:
        return _lipschitz_batch_norm(self, x)

    def extra_repr(self) -> str:
        return f"{self.num_features}, gamma={self.gamma.item():.3g}, affine={self.affine}"


@torch.no_grad()
def refresh_statistics(
    model: nn.Module, x: Tensor | Iterable[Tensor], batch_size: int = 512, but: Collection[nn.Module] = ()
) -> nn.Module:
    """Take the running statistics of every BatchNorm again, from what arrives there for x (N, …), in place: ``model``.

    ``x`` may come in batches; of several it is the mean over batches. Norms in ``but`` and all other layers are in the
    mode they are in. (``torch.optim.swa_utils.update_bn`` passes over γ-BatchNorms, and switches dropout on.)
    ValueError, of a layer: one value a channel.
    """
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.running_mean is not None and m not in but]
    before = [(norm.momentum, norm.training) for norm in norms]
    batches = x.tensor_split(math.ceil(len(x) / batch_size)) if isinstance(x, Tensor) else x  # of equal sizes
    try:
        for index, part in enumerate(batches):
            for norm in norms:
                norm.momentum = 1 / (index + 1)  # the plain mean over batches
                norm.train()
            model(part)
    finally:
        for norm, (momentum, training) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.train(training)
    return model
