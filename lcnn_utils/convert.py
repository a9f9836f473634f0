"""From any torchvision-style network to its low-curvature version, keeping what it computes where that is possible."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from .activations import CenteredSoftplus, check_beta
from .lipschitz import LipschitzBatchNorm2d, SpectralNorm, spectral_normalize


def replace_layers(model: nn.Module, new: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """``model`` with ``new(module)`` in place of each module, itself included, for which it is not None.

    Changed in place; a shared module stays shared.
    """
    root = nn.Sequential(model)
    made: dict[nn.Module, nn.Module | None] = {}
    for parent in list(root.modules()):
        for name, child in list(parent._modules.items()):  # named_children would skip a shared child's second name
            if child is None:
                continue
            if child not in made:
                made[child] = new(child)
            if (replacement := made[child]) is not None:
                setattr(parent, name, replacement)
    return root[0]


class _Watch(TorchFunctionMode):
    """During one forward pass, notes what a walk over modules can't see: shapes, which BatchNorm reads which
    convolution, and kinked functions that a ``forward`` calls directly."""

    KINKED = frozenset({
        "relu", "relu_", "relu6", "hardtanh", "hardtanh_", "leaky_relu", "elu", "selu", "prelu", "hardswish", "abs",
        "hardsigmoid", "maximum", "minimum", "max", "min", "amax", "amin", "clamp", "clamp_", "clamp_min", "clamp_max",
        "clip", "max_pool2d", "boolean_dispatch", "adaptive_max_pool2d",
    })  # fmt: skip

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {module: name or "the model" for name, module in model.named_modules()}
        self.running: list[nn.Module] = []
        self.shapes: dict[nn.Module, tuple[int, int, int]] = {}
        self.made_by: dict[int, nn.Module] = {}
        self.reads: dict[nn.Module, nn.Module] = {}
        self.kept: list[Tensor] = []  # keeps ids unique
        self.uses: Counter[nn.Module] = Counter()  # how many functions read a convolution's output
        self.norms: Counter[nn.Module] = Counter()  # how often a BatchNorm is used
        self.direct: set[str] = set()

    def before(self, module: nn.Module, inputs: tuple) -> None:
        self.running.append(module)
        if isinstance(module, nn.Conv2d):
            self.shapes[module] = inputs[0].shape[1], inputs[0].shape[2], inputs[0].shape[3]
        elif isinstance(module, nn.BatchNorm2d):
            self.norms[module] += 1
            if (conv := self.made_by.get(id(inputs[0]))) is not None:
                self.reads[module] = conv

    def after(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self.running.pop()
        if isinstance(module, nn.Conv2d):
            self.made_by[id(output)] = module
            self.kept.append(output)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        module = self.running[-1] if self.running else None
        name = getattr(func, "__name__", "")
        if name in self.KINKED and module is not None and any(module.children()):  # not called by a layer of its own
            self.direct.add(f"{self.names.get(module, '?')}.forward calls {name} itself")
        if name not in ("__get__", "size", "dim"):
            inner = [a for argument in args for a in (argument if isinstance(argument, list | tuple) else [argument])]
            self.uses.update(self.made_by[id(a)] for a in inner if id(a) in self.made_by)
        return func(*args, **(kwargs or {}))

    def run(self, model: nn.Module, example_input: Tensor) -> None:
        hooks = [register_module_forward_pre_hook(self.before), register_module_forward_hook(self.after)]
        try:
            with torch.no_grad(), self:
                model(example_input)
        finally:
            for hook in hooks:
                hook.remove()


FAITHFUL = (
    nn.Linear, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Identity, nn.Dropout, nn.ZeroPad2d,
    CenteredSoftplus, LipschitzBatchNorm2d, SpectralNorm,
)  # fmt: skip


def to_low_curvature(
    module: nn.Module, example_input: Tensor, *, beta: float = 5.0, gamma: float = 10.0, iterations: int = 30
) -> nn.Module:
    """The LCNN of a torchvision-style CNN or MLP: a copy with ReLU and ReLU6 → centered softplus, BatchNorm2d →
    γ-BatchNorm, convolutions → convolutions of norm 1.

    A convolution is divided by its norm σ; the BatchNorm that reads it takes σ back (mean/σ, var/σ², ε/σ²), so with β
    and γ large the function is kept. What can't be carried over is named in one warning: convolutions that no
    BatchNorm reads (their scale is lost), layers with kinks (max-pooling) and functions called inside a ``forward``.
    A BatchNorm that averages without momentum gets 0.1.

    Args:
        module: the network; it is not changed. Linear layers are kept as they are.
        example_input: one batch, (N, C, H, W) or (N, d): the norm of a convolution depends on the image size.
        beta: starting β of every activation. gamma: starting γ of every BatchNorm.
        iterations: power iterations for each convolution.

    Raises:
        ValueError: β or γ not positive, nothing to convert, or the model cannot run on ``example_input``.
    """
    check_beta(beta)
    LipschitzBatchNorm2d(1, gamma)  # raises for a bad γ
    model = copy.deepcopy(module).eval()
    like = next((p for p in model.parameters() if p.is_floating_point()), example_input)
    watch = _Watch(model)
    try:
        watch.run(model, example_input)
    except RuntimeError as error:
        raise ValueError(f"the model does not run on an input of shape {tuple(example_input.shape)}: {error}") from None
    scaled = {conv: bn for bn, conv in watch.reads.items()}
    notes, converted = sorted(watch.direct), 0
    for conv in scaled:
        if watch.uses[conv] > 1:
            notes.append(f"{watch.names[conv]} is read by more than its BatchNorm: its scale is lost there")
    notes += [f"{watch.names[bn]} is used more than once" for bn, times in watch.norms.items() if times > 1]

    def new(layer: nn.Module) -> nn.Module | None:
        nonlocal converted
        name = watch.names.get(layer, "?")
        if isinstance(layer, nn.Conv2d) and layer in watch.shapes:
            if layer.padding_mode != "zeros":
                notes.append(f"{name} (padding_mode={layer.padding_mode!r}) is kept")
            elif layer not in scaled:
                notes.append(f"{name} loses its scale: no BatchNorm reads it")
                spectral_normalize(layer, watch.shapes[layer], iterations)
            converted += 1
        elif isinstance(layer, nn.BatchNorm2d) and layer.running_var is not None:
            converted += 1
            return _lipschitz_from(layer, watch.reads.get(layer), watch.shapes, gamma, iterations)
        elif isinstance(layer, nn.ReLU | nn.ReLU6):
            converted += 1
            made = CenteredSoftplus(beta, cap=6.0 if isinstance(layer, nn.ReLU6) else None).to(like)
            made.beta = beta  # in the model's precision
            return made
        elif not any(layer.children()) and not isinstance(layer, FAITHFUL):
            notes.append(f"{name} ({type(layer).__name__}) is kept")
        return None

    model = replace_layers(model, new)
    if not converted:
        raise ValueError("nothing to convert: no ReLU, ReLU6, BatchNorm2d or Conv2d module was found")
    if notes:
        warnings.warn("to_low_curvature left something: " + "; ".join(notes), stacklevel=2)
    return model.train(module.training)


def _lipschitz_from(
    bn: nn.BatchNorm2d, conv: nn.Module | None, shapes: dict, gamma: float, iterations: int
) -> LipschitzBatchNorm2d:
    """γ-BatchNorm with the weights of ``bn``; the convolution it reads is given norm 1 and its scale is absorbed."""
    assert bn.running_var is not None
    sigma = torch.ones((), device=bn.running_var.device)
    if isinstance(conv, nn.Conv2d) and conv.padding_mode == "zeros":
        before = conv.weight.detach().clone()
        spectral_normalize(conv, shapes[conv], iterations)
        after = conv.weight.detach().norm()
        sigma = torch.where(after > 0, before.norm() / after, 1)  # a zero kernel stays one
        if conv.bias is not None:
            conv.bias.data /= sigma
    made = LipschitzBatchNorm2d(bn.num_features, gamma, affine=bn.affine, momentum=bn.momentum or 0.1)
    made = made.to(bn.running_var)
    made.gamma = gamma  # in the model's precision
    made.eps = bn.eps / float(sigma) ** 2
    made.load_state_dict(bn.state_dict() | {"log_gamma": made.log_gamma.detach()})
    made.running_mean /= sigma
    made.running_var /= sigma**2
    return made
