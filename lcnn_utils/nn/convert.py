"""From any torchvision-style network to its low-curvature version, keeping what it computes where that is possible.

The forward is traced by torch.fx and its graph is run on an example, which tells the image size of every convolution,
what reads it, and what stays.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torchvision.transforms import Normalize

from ..lab import double
from .batchnorm import LipschitzBatchNorm2d
from .softplus import CenteredSoftplus, check_beta
from .spectral_norm import spectral_normalize
from .tracing import trace

# Layers, functions, methods and operators in one spelling: nn.AvgPool2d and F.avg_pool2d are "avgpool".
LINEAR = {
    "adaptiveavgpool", "add", "alphadropout", "avgpool", "cat", "channelshuffle", "chunk", "clone", "concat",
    "constantpad", "contiguous", "cumsum", "detach", "dim", "dropout", "expand", "flatten", "flip", "float",
    "getattr", "getitem", "iadd", "identity", "interpolate", "isub", "mean", "narrow", "neg", "pad",
    "patchmergingpad", "permute", "pixelshuffle", "pixelunshuffle", "reflectionpad", "repeat", "replicationpad",
    "reshape", "roll", "select", "size", "split", "squeeze", "stack", "stochasticdepth", "sub", "sum", "t", "to",
    "transpose", "unbind", "unflatten", "unfold", "unsqueeze", "upsample", "view", "zeropad",
}  # fmt: skip
PRODUCTS = {"bmm", "div", "einsum", "imul", "itruediv", "linear", "matmul", "mm", "mul", "truediv"}  # see _cause
SMOOTH = {
    "cos", "erf", "exp", "gelu", "glu", "groupnorm", "instancenorm", "layernorm", "localresponsenorm", "logsigmoid",
    "logsoftmax", "logsumexp", "mish", "multiheadattention", "rmsnorm", "scaleddotproductattention",
    "shiftedwindowattention", "sigmoid", "silu", "sin", "softmax", "softplus", "square", "tanh", "var",
}  # fmt: skip

LOST = "scale lost, since not only BatchNorm reads them"
OVERWROTE = "no longer in place, though something else reads their input"
UNBOUNDED = "kept, with no bound on their norm, or never run"
CURVED = "kept, smooth, with a curvature that no β bounds"
KINKED = "kept, with no Hessian at their kinks, if any (F.relu is not converted, nn.ReLU is)"


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


class _Trial(fx.Interpreter):
    """Runs a graph on an example. The ``meta`` of a node then holds the ``name`` of the class, function or method that
    it calls, the ``layer`` if it calls one, the ``shape`` of its value, whether that ``varies`` with the input, and the
    arguments that do, ``reads``."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        layer = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        called = n.target if layer is None else parametrize.type_before_parametrizations(layer)
        reads: list[fx.Node] = []
        fx.node.map_arg((n.args, n.kwargs), lambda a: reads.append(a) if a.meta["varies"] else None)  # type: ignore
        tensors = any(isinstance(v, Tensor) for v in (value if isinstance(value, tuple | list) else [value]))
        n.meta.update(layer=layer, name=getattr(called, "__name__", str(called)), shape=getattr(value, "shape", None))
        n.meta.update(reads=reads, varies=tensors and (n.op == "placeholder" or bool(reads)))
        return value


def _copy_and_graph(module: nn.Module, example: Tensor) -> tuple[nn.Module, fx.Graph]:
    """A copy of ``module`` and its graph in eval mode, tried on an example. Raises ValueError where that fails."""
    try:
        model = copy.deepcopy(module).eval()
        output = model(example.clone())
    except Exception as error:  # whatever a forward raises
        shape = f"{tuple(example.shape)}, {example.dtype}, {example.device}"
        raise ValueError(f"the model can't be copied or does not run on an input of shape {shape}: {error}") from error
    root, name = nn.Sequential(model), type(model).__name__  # takes what tracing leaves behind
    graph = trace(root, name)
    try:
        again = _Trial(root, graph=graph).run(example.clone())
        torch.testing.assert_close(again, output, rtol=1e-3, atol=1e-3, equal_nan=True)
    except Exception as error:
        problem = "does something else when it is traced: chance, a state, or a question for the type of a tensor"
        raise ValueError(f"the forward of {name} {problem} ({str(error).strip().partition(chr(10))[0]})") from error
    for path, layer in model.named_modules():
        layer.training = module.get_submodule(path).training
    return model, graph


def _is_batch_norm(layer: nn.Module | None) -> TypeGuard[nn.BatchNorm2d]:
    return type(layer) is nn.BatchNorm2d and layer.running_var is not None


def _normalise(graph: fx.Graph, iterations: int) -> dict[nn.Module, float]:
    """Give each convolution norm 1 on its largest image; returns the scales that BatchNorms have to take over: of those
    that nothing but BatchNorms reads, which read nothing else."""
    calls: dict[nn.Module, list[fx.Node]] = defaultdict(list)
    for node in graph.find_nodes(op="call_module"):
        calls[node.meta["layer"]].append(node)
    scales: dict[nn.Module, float] = {}
    for conv, nodes in list(calls.items()):
        if type(conv) is not nn.Conv2d:
            continue
        (channels, *_), heights, widths = zip(*(n.all_input_nodes[0].meta["shape"][-3:] for n in nodes), strict=True)
        before = double(conv.weight.detach()).norm()
        try:
            spectral_normalize(conv, (channels, max(heights), max(widths)), iterations).train(conv.training)
        except ValueError:
            continue  # a geometry without one: stays, and is named
        after = double(conv.weight.detach()).norm()
        readers = {user.meta["layer"] for node in nodes for user in node.users}
        read = {source.meta["layer"] for bn in readers for call in calls[bn] for source in call.all_input_nodes}
        if all(map(_is_batch_norm, readers)) and read == {conv}:
            scale = (before / after).item() if after > 0 else 1.0  # a zero kernel stays one
            scales |= dict.fromkeys(readers, scale)
            if conv.bias is not None:
                conv.bias.data /= scale
    return scales


def _lipschitz_from(bn: nn.BatchNorm2d, gamma: float, scale: float) -> LipschitzBatchNorm2d:
    """γ-BatchNorm with the weights of ``bn``, for inputs divided by ``scale``."""
    made = LipschitzBatchNorm2d(bn.num_features, affine=bn.affine, eps=bn.eps / scale**2, momentum=bn.momentum)
    made.to(next(bn.buffers())).load_state_dict(bn.state_dict(), strict=False)
    made.gamma = gamma  # in the model's precision
    made.weight, made.bias = bn.weight, bn.bias
    made.running_mean /= scale
    made.running_var /= scale**2
    return made


def _cause(node: fx.Node, scales: dict[nn.Module, float]) -> str | None:
    """Why a call stays as it is; None: it is converted or linear, or does not depend on the input."""
    layer, reads = node.meta["layer"], node.meta["reads"]
    if isinstance(layer, nn.Conv2d) and parametrize.is_parametrized(layer):
        return None if node.users and all(user.meta["layer"] in scales for user in node.users) else LOST
    known = type(layer) in (nn.ReLU, nn.ReLU6, CenteredSoftplus, LipschitzBatchNorm2d, Normalize)
    if known and getattr(layer, "inplace", False) and any(len(read.users) > 1 for read in reads):
        return OVERWROTE
    if node.op == "output" or not reads or known or _is_batch_norm(layer):
        return None
    if layer is not None and type(layer).__module__.partition(".")[0] not in ("torch", "torchvision"):
        return KINKED  # someone's own, whatever its name
    word = re.sub("[123]d$", "", node.meta["name"].strip("_")).replace("_", "").lower()
    if word in PRODUCTS:  # linear, unless two factors depend on the input
        linear = len(reads) == 1 and ("div" not in word or node.args[:1] == (reads[0],))
        return None if linear else CURVED
    if word in ("batchnorm", "frozenbatchnorm", "syncbatchnorm", "conv", "convtranspose"):
        return UNBOUNDED
    return None if word in LINEAR else CURVED if word in SMOOTH else KINKED


def _warn(model: nn.Module, graph: fx.Graph, scales: dict[nn.Module, float]) -> None:
    """Name what stays, by cause: "conv1 (Conv2d)", "features.3 (max_pool2d)", "layer1.0 (relu_)"."""
    left: dict[str, list[str]] = {LOST: [], OVERWROTE: [], UNBOUNDED: [], CURVED: [], KINKED: []}
    for node in graph.nodes:
        if cause := _cause(node, scales):
            path = list(node.meta["nn_module_stack"].values())[-1][0]
            left[cause].append(f"{path[2:] or 'the model'} ({node.meta['name']})")  # of an nn.Sequential
    run = {node.meta["layer"] for node in graph.nodes}
    left[UNBOUNDED] += [path for path, m in model.named_modules() if type(m) is nn.Conv2d and m not in run]
    few = lambda names: ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
    said = [f"{cause}: {few(list(dict.fromkeys(names)))}" for cause, names in left.items() if names]
    if said:
        warnings.warn("to_low_curvature left something: " + "; ".join(said), stacklevel=3)


def _check(module: nn.Module, example_input: Tensor) -> None:
    """Raise ValueError: no tensor to run on, nothing to convert, or weights that are made by something else."""
    if not isinstance(example_input, Tensor):
        raise ValueError(f"the example is a {type(example_input).__name__}: give one batch of inputs, a tensor")
    for path, layer in module.named_modules():
        parametrised = parametrize.is_parametrized(layer) and not isinstance(layer, nn.Linear)
        if parametrised or layer._forward_hooks or layer._forward_pre_hooks:
            raise ValueError(
                f"{path or 'the model'} has hooks, or a parametrised weight as that of a converted net: end that with "
                "torch.nn.utils.parametrize.remove_parametrizations, or remove_weight_norm, remove_spectral_norm or "
                "prune.remove of torch.nn.utils, or the hook's remove()"
            )
        held = [v for value in vars(layer).values() if isinstance(value, list | tuple) for v in value]
        if any(isinstance(v, nn.Module) for v in held):
            raise ValueError(f"{path or 'the model'} holds layers in a list: make it an nn.ModuleList")
    if not any(type(layer) in (nn.ReLU, nn.ReLU6, nn.BatchNorm2d, nn.Conv2d) for layer in module.modules()):
        raise ValueError("nothing to convert: no ReLU, ReLU6, BatchNorm2d or Conv2d module was found")


def to_low_curvature(
    module: nn.Module, example_input: Tensor, *, beta: float = 5.0, gamma: float = 10.0, iterations: int = 30
) -> nn.Module:
    """The LCNN of a torchvision-style CNN or MLP: a copy with ReLU and ReLU6 → centered softplus, BatchNorm2d →
    γ-BatchNorm, zero-padded Conv2d → convolutions of norm 1.

    A convolution is divided by its norm σ on the largest image it is used on; the BatchNorms that alone read it take σ
    back (mean/σ, var/σ², ε/σ²), so with β and γ large the function is kept. What can't be carried over is named in one
    warning, by cause: convolutions that something else reads, so that their scale is lost; layers with no bound on
    their norm; smooth functions, whose curvature no β bounds; what may have kinks, where there is no Hessian, such as
    max-pooling and ``F.relu``. New parameters have dtype, device and ``requires_grad`` of those before them.

    Args:
        module: the network, seen in eval mode; it is not changed. Linear layers are kept as they are.
        example_input: one batch, (N, C, H, W) or (N, d): the norm of a convolution depends on the image size.
        beta: starting β of every activation. gamma: starting γ of every BatchNorm.
        iterations: power iterations for each convolution.

    Raises:
        ValueError: β, γ or iterations not positive; nothing to convert; hooks, parametrised weights, layers in lists;
            a model that does not run on ``example_input``, or whose forward depends on its data.
    """
    check_beta(beta)
    LipschitzBatchNorm2d(1, gamma)  # raises for a bad γ
    if iterations < 1:
        raise ValueError(f"iterations={iterations}: at least 1 is needed")
    module = module.module if isinstance(module, nn.DataParallel) else module
    _check(module, example_input)
    with torch.no_grad():
        model, graph = _copy_and_graph(module, example_input)
    scales = _normalise(graph, iterations)
    _warn(model, graph, scales)
    latest = next(model.parameters(), nn.Parameter(example_input.new_zeros(()) * 1.0))
    like: dict[nn.Module, Tensor] = {}  # the parameter that new ones are like: the layer's own, or the one before
    for node in graph.find_nodes(op="call_module"):
        latest = like[node.meta["layer"]] = next(node.meta["layer"].parameters(), latest)

    def new(layer: nn.Module) -> nn.Module | None:
        before = like.get(layer, latest)
        if _is_batch_norm(layer):
            norm = _lipschitz_from(layer, gamma, scales.get(layer, 1.0))
            norm.log_gamma.requires_grad_(before.requires_grad)
            return norm.train(layer.training)
        if type(layer) in (nn.ReLU, nn.ReLU6):
            unit = CenteredSoftplus(beta, cap=6.0 if type(layer) is nn.ReLU6 else None).to(before)
            unit.beta = beta  # in the model's precision
            unit.log_beta.requires_grad_(before.requires_grad)
            return unit.train(layer.training)
        return None

    return replace_layers(model, new)
