"""The graph of a network's forward, by torch.fx: which layers, functions and methods it calls, on what."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import fx, nn

TRACING = threading.Lock()  # torch.fx swaps nn.Module.__call__ while it traces: two traces at once never swap it back


class Tracer(fx.Tracer):
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
            return Tracer().trace(root)
    except Exception as error:  # whatever a forward raises when it is traced
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"the forward of {name} depends on its data or can't be followed ({reason}): "
            "write it as nn.Sequential of layers, sums and concatenations"
        ) from error
