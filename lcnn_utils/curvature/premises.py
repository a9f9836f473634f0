"""What is asked of a network before it is measured, and the scalar f of its logits.

Every public measure of curvature, attacks and saliency runs ``with measuring(model)`` and begins with ``prepare``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..data import check_images, check_labels
from ..lab import check_choice
from ..nn.softplus import wide

SCALARS = ("loss", "margin", "logit")


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Every module in eval mode, and convolutions on a GPU with float32's 24 bits, not TF32's 11; then as before."""
    was = {module: module.training for module in model.modules()}
    model.eval()
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield model
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
        for module, training in was.items():
            module.training = training


@contextlib.contextmanager
def measuring(model: nn.Module) -> Iterator[nn.Module]:
    """:func:`evaluating`, with gradients on even where the caller has switched them off (``torch.no_grad``,
    ``torch.inference_mode``), and attention by the kernel that has second derivatives."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"the model is a {type(model).__name__}: wrap it in an nn.Module whose forward gives logits")
    with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), evaluating(model):
        yield model


def scalar_of(logits: Tensor, y: Tensor, scalar: str = "loss") -> Tensor:
    """The scalar f of each sample: logits (N, K) and labels (N,) → (N,).

    ``margin``: z_y − max_{j≠y} z_j. ``logit``: z_y. ``loss``: cross-entropy z_m − z_y + log(1 + Σ_{j≠m} e^{z_j − z_m}),
    with the largest logit z_m: so written, its derivatives are exact even where p_m rounds to 1.
    """
    logits = wide(logits)  # sums over a batch lose too much in half precision
    own = logits.gather(1, y[:, None]).squeeze(1)
    if check_choice(scalar, SCALARS, "scalar") == "logit":
        return own
    if scalar == "margin":
        return own - logits.masked_fill(F.one_hot(y, logits.shape[1]).bool(), -torch.inf).amax(1)
    best = logits.argmax(1, keepdim=True)
    top = logits.gather(1, best)
    rest = (logits - top).exp().scatter(1, best, 0.0).sum(1)
    return torch.where(best.squeeze(1) == y, 0.0, top.squeeze(1) - own) + rest.log1p()


def prepare(model: nn.Module, x: Tensor, y: Tensor | None, *, precise: bool = False) -> tuple[Tensor, Tensor]:
    """x and y (default: the predicted classes), checked, as is the model; ``precise``: not in half precision."""
    if not isinstance(x, Tensor) or x.dim() == 4:
        check_images(x)
    elif x.dim() < 2 or x.numel() == 0 or not x.is_floating_point() or not bool(x.isfinite().all()):
        raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}: points are finite floating numbers (N, d), N >= 1")
    x = x.detach().clone()  # made in inference mode, it would have no gradient
    logits = _check_model(model, x)
    if precise and torch.finfo(logits.dtype).bits < 32:
        raise ValueError(f"the logits are {logits.dtype}: use model.float() and x.float(), outside torch.autocast")
    if y is None:
        with torch.no_grad():
            y = torch.cat([model(part).argmax(1) for part in x.split(512)])
    check_labels(y, len(x), logits.shape[1], device=x.device)
    return x, y.clone()


def _check_model(model: nn.Module, x: Tensor) -> Tensor:
    """Logits (2, K) of the first sample of x and a random one; ValueError unless samples have their own derivatives."""
    other = torch.rand(x[:1].shape, generator=torch.Generator().manual_seed(0), device="cpu").to(x)
    pair = torch.cat([x[:1], other]).requires_grad_()
    random_state = lambda: torch.cuda.get_rng_state(x.device) if x.is_cuda else torch.get_rng_state()
    before = random_state()
    try:
        logits = model(pair)
    except Exception as error:  # whatever a forward raises
        got = f"shape {tuple(x.shape)} ({x.dtype} on {x.device}{'; a single sample needs x[None]' * (x.dim() == 3)})"
        raise ValueError(f"the model does not take inputs of {got}: {error}") from error
    check_logits(logits)
    weights, entangled = torch.linspace(1, 2, logits.shape[1], device="cpu").to(logits).requires_grad_(), False
    for mine in (0, 1):
        (gradient,) = torch.autograd.grad(logits[mine] @ weights, pair, retain_graph=True, allow_unused=True)
        if gradient is None:
            raise ValueError("the forward cuts the graph (no_grad, detach, numpy …): the logits have no gradient in x")
        if not bool(gradient.isfinite().all()):
            raise ValueError("the gradient of the logits is not finite here: is there a root or a logarithm of 0?")
        entangled |= bool(gradient[1 - mine].any())
    alone = torch.cat([model(sample) for sample in pair.detach().split(1)])  # statistics of the batch may be detached
    eps = torch.finfo(logits.dtype).eps
    tolerance = max(1e-3, 16 * eps) * (logits.amax() - logits.amin()) + 4 * eps * logits.abs().max()
    differs = not bool((alone - logits).abs().max() <= tolerance)
    differs |= bool((model(pair.detach()) - logits).abs().max() > 100 * eps * logits.abs().max())
    if entangled or differs or not torch.equal(random_state(), before):
        cause = "BatchNorm without running statistics, F.dropout without training=self.training?"
        raise ValueError(f"in eval mode, a sample's logits depend on the rest of its batch, or are random: {cause}")
    return logits.detach()


def check_logits(logits: object) -> None:
    """Raise a ValueError unless these are finite logits (N, K) with K >= 2, of a model given two samples."""
    got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != 2 or logits.shape[1] < 2:
        raise ValueError(f"the model must give logits of shape (N, K) with K >= 2, as one tensor, got {got}")
    if not bool(logits.isfinite().all()):
        raise ValueError("the network's logits are not finite here: its weights or inputs are too large or NaN")
