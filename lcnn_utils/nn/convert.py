"""From any torchvision-style network to its low-curvature version, keeping what it computes where that is possible.

A graph by torch.fx, run on an example, tells the image size of every convolution, what reads it, and what stays.
:func:`softened` changes the activations alone, and needs neither.
"""

from __future__ import annotations

import copy
import functools
import re
import threading
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils import parametrize
from torchvision.transforms import Normalize

from .batchnorm import LipschitzBatchNorm2d
from .softplus import CenteredSoftplus, check_positive
from .spectral_norm import spectral_normalize

TRACING = threading.Lock()  # torch.fx swaps nn.Module.__call__ while it traces: two traces at once never swap it back

# Layers, functions, methods and operators in one spelling: nn.AvgPool2d and F.avg_pool2d are "avgpool".
LINEAR = {
    "adaptiveavgpool", "add", "alphadropout", "avgpool", "cat", "channelshuffle", "chunk", "clone", "concat",
    "constantpad", "contiguous", "cumsum", "detach", "dim", "dropout", "expand", "flatten", "flip", "float",
    "getattr", "getitem", "iadd", "identity", "interpolate", "isub", "mean", "narrow", "neg", "pad",
    "patchmergingpad", "permute", "pixelshuffle", "pixelunshuffle", "reflectionpad", "repeat", "replicationpad",
    "reshape", "roll", "select", "size", "split", "squeeze", "stack", "stochasticdepth", "sub", "sum", "t", "to",
    "transpose", "unbind", "unflatten", "unfold", "unsqueeze", "upsample", "view", "zeropad",
}  # fmt: skip
PRODUCTS = {"bmm", "div", "einsum", "imul", "itruediv", "linear", "matmul", "mm", "mul", "truediv"}
RELUS = (nn.ReLU, nn.ReLU6)
OURS = (CenteredSoftplus, LipschitzBatchNorm2d, Normalize)  # as they should be, or linear
LOST = "scale lost, since not only BatchNorm reads them"
KEPT = "kept: never run, with kinks (nn.ReLU is converted, F.relu is not), or with no bound on norm or curvature"


class _Tracer(fx.Tracer):
    """Traces what its own thread calls: JupyterLab runs the callbacks of widgets beside the cells."""

    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        ours = threading.get_ident() == self.thread
        return super().call_module(m, forward, args, kwargs) if ours else forward(*args, **kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict) -> Any:
        ours = threading.get_ident() == self.thread
        return super().getattr(attr, attr_val, parameter_proxy_cache) if ours else attr_val

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        empty = not any(module.children()) and not isinstance(module, nn.Sequential)
        return empty or isinstance(module, nn.Linear | nn.Conv2d | nn.MultiheadAttention)  # also if parametrised


def trace(root: nn.Module, name: str) -> fx.Graph:
    """The graph of a forward, down to layers without children, or a ValueError about the model called ``name``.

    Tensors that the forward makes become attributes of ``root``, none of its layers.
    """
    try:
        with TRACING:
            return _Tracer().trace(root)
    except Exception as error:  # whatever a forward raises when it is traced
        raise ValueError(
            f"the forward of {name} depends on its data or can't be followed ({error}): write it as "
            "nn.Sequential of layers, sums and concatenations, with no layer kept in a plain list (nn.ModuleList)"
        ) from error


def replace_layers(model: nn.Module, new: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """``model``, changed in place, with ``new(module)`` for each module, itself included, for which it is not None."""
    new = functools.cache(new)  # a shared module stays shared
    root = nn.Sequential(model)
    for parent in list(root.modules()):
        for name, child in list(parent._modules.items()):  # named_children would skip a shared child's second name
            replacement = None if child is None else new(child)
            if replacement is not None:
                setattr(parent, name, replacement)
    return root[0]


def _copy_and_graph(module: nn.Module, example: Tensor) -> tuple[nn.Module, fx.Graph]:
    """A copy of ``module`` in eval mode with nothing in place, and its graph, tried on an example.

    ``meta`` of a node then holds the ``layer`` it calls, if any, and the ``tensor_meta`` of its value, with a shape.
    Raises ValueError: the copy or its graph does not run, or the graph computes something else.
    """
    try:
        model = copy.deepcopy(module).eval()
        output = model(example.clone())
    except Exception as error:  # whatever a forward raises
        what = f"{type(module).__name__} can't be copied or does not run on"
        got = f"an input of shape {tuple(example.shape)}, {example.dtype} (a batch is needed: (N, C, H, W) or (N, d))"
        raise ValueError(f"{what} {got}: {error}") from error
    for layer in model.modules():
        if getattr(layer, "inplace", False):
            layer.inplace = False  # type: ignore[assignment]
    root = nn.Sequential(model)  # which takes what tracing leaves behind
    graph = trace(root, type(model).__name__)
    try:
        traced = ShapeProp(fx.GraphModule(root, graph)).propagate(example.clone())
        torch.testing.assert_close(traced, output, rtol=1e-3, atol=1e-3, equal_nan=True)
    except Exception as error:
        raise ValueError(
            f"{type(module).__name__} does something else when it is traced: chance, a state, a question for the type "
            "of a tensor, or a tensor read elsewhere that a layer overwrites: set inplace=False"
        ) from error
    for node in graph.nodes:
        node.meta["layer"] = root.get_submodule(str(node.target)) if node.op == "call_module" else None
    return model, graph


def _is_batch_norm(layer: nn.Module | None) -> TypeGuard[nn.BatchNorm2d]:
    return type(layer) is nn.BatchNorm2d and layer.running_var is not None


def _normalise(graph: fx.Graph, iterations: int) -> dict[nn.Module, float]:
    """Give each convolution norm 1 on its largest image. Returns by what it was divided, where BatchNorms can take that
    over, which read this convolution only and alone read it: for them and for the convolution."""
    calls: dict[nn.Module, list[fx.Node]] = defaultdict(list)
    for node in graph.find_nodes(op="call_module"):
        calls[node.meta["layer"]].append(node)
    scales: dict[nn.Module, float] = {}
    for conv in [layer for layer in calls if type(layer) is nn.Conv2d]:
        shapes = [node.all_input_nodes[0].meta["tensor_meta"].shape for node in calls[conv]]
        largest = (conv.in_channels, max(shape[-2] for shape in shapes), max(shape[-1] for shape in shapes))
        try:
            spectral_normalize(conv, largest, iterations)
        except ValueError:
            continue  # a geometry without one: stays, and is named
        readers = {user.meta["layer"] for node in calls[conv] for user in node.users}
        read = {source.meta["layer"] for bn in readers for call in calls[bn] for source in call.all_input_nodes}
        if all(map(_is_batch_norm, readers)) and read == {conv}:
            parametrizations: Any = conv.parametrizations
            scale = parametrizations.weight[0].sigma(parametrizations.weight.original).item()
            scales |= dict.fromkeys([conv, *readers], scale)
            if conv.bias is not None:
                conv.bias.data /= scale
    return scales


def _lipschitz_from(bn: nn.BatchNorm2d, gamma: float, scale: float) -> LipschitzBatchNorm2d:
    """γ-BatchNorm with the weights of ``bn``, for inputs divided by ``scale``."""
    lipschitz = LipschitzBatchNorm2d(bn.num_features, affine=bn.affine, eps=bn.eps / scale**2, momentum=bn.momentum)
    lipschitz.to(next(bn.buffers())).load_state_dict(bn.state_dict(), strict=False)
    lipschitz.gamma = gamma  # in the model's precision
    lipschitz.weight, lipschitz.bias = bn.weight, bn.bias
    lipschitz.running_mean /= scale
    lipschitz.running_var /= scale**2
    return lipschitz


def _with_neighbours(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    """Each layer, and the parameter that a new one in its place is like: the layer's own, or the one before."""
    like = next(model.parameters(), nn.Parameter(torch.zeros(())))
    for layer in model.modules():
        like = next(layer.parameters(recurse=False), like)
        yield layer, like


def _softplus_for(activation: nn.Module, beta: float, like: nn.Parameter, trainable: bool = True) -> CenteredSoftplus:
    """What stands in for a ReLU, a ReLU6 or a centered softplus."""
    cap = 6.0 if type(activation) is nn.ReLU6 else getattr(activation, "cap", None)
    softplus = CenteredSoftplus(beta, trainable, cap).to(like).train(activation.training)
    softplus.beta = beta  # in the model's precision
    softplus.log_beta.requires_grad_(trainable and like.requires_grad)
    return softplus


def softened(model: nn.Module, beta: float, *, trainable: bool = False, only_relus: bool = False) -> nn.Module:
    """A copy whose ReLUs, ReLU6s and centered softplus layers (unless ``only_relus``) are centered softplus of one
    sharpness ``beta``; all else stays as it is. So a trained net loses curvature without training, at the price of
    accuracy where β is small.

    ``model``: any ``nn.Module``; its layers are replaced, so ``F.relu`` in a forward is not seen and keeps its kink.
    ``trainable``: whether each β is a parameter, to be trained if those before it are. One number for a whole net is
    what *Curvature Tuning* turns (L. Hu, M. Gamba, R. Balestriero, NeurIPS 2025, arXiv:2502.07783), of a mixture of
    SiLU and softplus. Raises ValueError: no such layer, or one with hooks, β outside ``softplus.BETA_RANGE``.
    """
    copied = copy.deepcopy(model)
    kinds = RELUS if only_relus else (*RELUS, CenteredSoftplus)
    pairs = [(layer, like) for layer, like in _with_neighbours(copied) if type(layer) in kinds]
    if not pairs:
        raise ValueError(
            f"{type(model).__name__} has nothing to soften: no nn.ReLU, nn.ReLU6 or CenteredSoftplus module was found; "
            "write nn.ReLU() in place of F.relu, which is not seen"
        )
    if any(layer._forward_hooks or layer._forward_pre_hooks for layer, _ in pairs):
        raise ValueError("an activation to be replaced has hooks, which would be lost: remove them")
    return replace_layers(copied, {layer: _softplus_for(layer, beta, like, trainable) for layer, like in pairs}.get)


def _replacements(
    model: nn.Module, scales: dict[nn.Module, float], beta: float, gamma: float
) -> dict[nn.Module, nn.Module]:
    """What stands in for each BatchNorm and ReLU."""
    replacements: dict[nn.Module, nn.Module] = {}
    for layer, like in _with_neighbours(model):
        if _is_batch_norm(layer):
            batch_norm = _lipschitz_from(layer, gamma, scales.get(layer, 1.0))
            batch_norm.log_gamma.requires_grad_(like.requires_grad)
            replacements[layer] = batch_norm
        elif type(layer) in RELUS:
            replacements[layer] = _softplus_for(layer, beta, like)
    return replacements


def _warn(model: nn.Module, graph: fx.Graph, converted: set[nn.Module]) -> None:
    """Name what stays, by cause: "conv1 (Conv2d)", "features.3 (max_pool2d)", "layer1.0 (relu_)"."""
    left: dict[str, list[str]] = {LOST: [], KEPT: []}
    varying = set(graph.find_nodes(op="placeholder"))  # what depends on the input
    for node in graph.nodes:
        arguments: list[fx.Node] = []  # with repeats, unlike all_input_nodes: h * h is no linear map
        fx.node.map_arg((node.args, node.kwargs), arguments.append)
        reads = [argument for argument in arguments if argument in varying]
        layer = node.meta["layer"]
        if not reads or node.op == "output":
            continue
        if "tensor_meta" in node.meta:
            varying.add(node)
        if layer in converted or type(layer) in OURS:
            continue
        called = node.target if layer is None else parametrize.type_before_parametrizations(layer)
        name = getattr(called, "__name__", str(called))
        word = re.sub("[123]d$", "", name.strip("_")).replace("_", "").lower()
        own = layer is not None and type(layer).__module__.partition(".")[0] not in ("torch", "torchvision")
        of_input = len(reads) == 1 and ("div" not in word or node.args[:1] == (reads[0],))  # neither h * h nor 1 / h
        linear = not own and (word in LINEAR or (word in PRODUCTS and of_input))
        lost = isinstance(layer, nn.Conv2d) and parametrize.is_parametrized(layer)
        if lost or not linear:
            path = list(node.meta["nn_module_stack"].values())[-1][0]
            left[LOST if lost else KEPT].append(f"{path[2:] or 'the model'} ({name})")  # of an nn.Sequential
    run = {node.meta["layer"] for node in graph.nodes}
    left[KEPT] += [path for path, m in model.named_modules() if type(m) is nn.Conv2d and m not in run]
    notes = []
    for cause, names in left.items():
        if different := list(dict.fromkeys(names)):
            more = f" and {len(different) - 2} more" if len(different) > 2 else ""
            notes.append(f"{cause}: {', '.join(different[:2])}{more}")
    if notes:
        warnings.warn("to_low_curvature left something: " + "; ".join(notes), stacklevel=3)


def to_low_curvature(
    module: nn.Module, example_input: Tensor, *, beta: float = 5.0, gamma: float = 10.0, iterations: int = 30
) -> nn.Module:
    """The LCNN of a torchvision-style CNN or MLP: a copy with ReLU and ReLU6 → centered softplus, BatchNorm2d →
    γ-BatchNorm, zero-padded Conv2d → convolutions of norm 1.

    ``module`` is seen in eval mode and not changed; Linear layers stay as they are. A convolution is divided by its
    norm σ on the largest image it is used on; the BatchNorms that alone read it take σ back (mean/σ, var/σ², ε/σ²), so
    with β and γ large the function is kept. What can't be carried over is named in one warning, by cause. New
    parameters have dtype, device and ``requires_grad`` of those before them.

    ``example_input`` is one batch, (N, C, H, W) or (N, d): norms depend on the image size. Every activation starts at
    ``beta``, every BatchNorm at ``gamma``; ``iterations`` are power iterations for each convolution. To load a saved
    ``state_dict`` of the result, convert the *same* ``module`` again: BatchNorm's ε/σ² are not in it.
    Raises ValueError: β, γ or iterations not positive; nothing to convert; hooks, parametrised weights; a model that
    does not run on ``example_input``, keeps layers in plain lists, or whose forward depends on its data or on what a
    layer with ``inplace=True`` overwrites.
    """
    for name, value in (("beta", beta), ("gamma", gamma), ("iterations", iterations)):
        check_positive(value, name)
    module = module.module if isinstance(module, nn.DataParallel) else module
    for path, layer in module.named_modules():
        parametrised = parametrize.is_parametrized(layer) and not isinstance(layer, nn.Linear)
        if parametrised or layer._forward_hooks or layer._forward_pre_hooks:
            raise ValueError(
                f"{path or 'the model'} has hooks, or a parametrised weight as that of a converted net: remove them, "
                "by torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm, remove_spectral_norm, …"
            )
    if not any(type(layer) in (*RELUS, nn.BatchNorm2d, nn.Conv2d) for layer in module.modules()):
        raise ValueError("nothing to convert: no ReLU, ReLU6, BatchNorm2d or Conv2d module was found")
    example_input = example_input.to(next(module.parameters(), example_input).device)
    with torch.no_grad():
        model, graph = _copy_and_graph(module, example_input)
    scales = _normalise(graph, iterations)
    new = _replacements(model, scales, beta, gamma)
    _warn(model, graph, {*scales, *new})
    converted = replace_layers(model, new.get)
    for path, layer in module.named_modules():  # parents first: what is new in a layer follows it
        converted.get_submodule(path).train(layer.training)
    trace(nn.Sequential(converted), type(module).__name__)  # refuses a list that still holds a layer replaced here
    return converted
