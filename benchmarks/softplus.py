"""``centered_softplus`` against torch's softplus and ReLU: forward and backward, eager and compiled."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import interleaved, write
from torch import Tensor

from lcnn_utils.activations import CenteredSoftplus, centered_softplus

SHAPE, BETA = (64, 64, 16, 16), 5.0


class Plain(torch.nn.Module):
    """log(1 + e^{βx})/β with a trainable β, from torch's softplus: what one would write without the package."""

    def __init__(self) -> None:
        super().__init__()
        self.log_beta = torch.nn.Parameter(torch.tensor(BETA).log())

    def forward(self, x: Tensor) -> Tensor:
        beta = self.log_beta.exp()
        return F.softplus(beta * x) / beta


def contestants() -> dict[str, Callable[[Tensor], Tensor]]:
    """The yardstick comes first. Named functions, so that each is compiled for itself."""

    def softplus(x: Tensor) -> Tensor:
        return F.softplus(x, BETA)

    def relu(x: Tensor) -> Tensor:
        return x.relu()

    def centered(x: Tensor) -> Tensor:
        return centered_softplus(x, BETA)

    return {
        "F.softplus, β fixed": softplus,
        "relu": relu,
        "centered_softplus, β fixed": centered,
        "F.softplus(βx)/β, β trainable": Plain(),
        "CenteredSoftplus, β trainable": CenteredSoftplus(BETA),
    }


def forward(function: Callable, x: Tensor) -> Callable[[], Tensor]:
    return torch.no_grad()(lambda: function(x))


def backward(function: Callable, x: Tensor, g: Tensor) -> Callable[[], Tensor]:
    leaf = x.clone().requires_grad_()
    parameters = [leaf, *function.parameters()] if isinstance(function, torch.nn.Module) else [leaf]
    return lambda: torch.autograd.grad(function(leaf), parameters, g)[0]


def check(functions: dict[str, Callable], x: Tensor, g: Tensor) -> None:
    """All softplus have one derivative, and the centered ones are log 2/β below the others."""
    names = list(functions)
    value, slope = forward(functions[names[0]], x)(), backward(functions[names[0]], x, g)()
    for name in names[2:]:
        shift = torch.log(torch.tensor(2.0)) / BETA if "entered" in name else 0
        torch.testing.assert_close(forward(functions[name], x)() + shift, value, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(backward(functions[name], x, g)(), slope, rtol=1e-4, atol=1e-5)


def rows_of(functions: dict[str, Callable], mode: str, x: Tensor, g: Tensor) -> list[dict]:
    check(functions, x, g)
    passes = {
        "forward": {name: forward(f, x) for name, f in functions.items()},
        "forward + backward": {name: backward(f, x, g) for name, f in functions.items()},
    }
    rows = []
    for what, runs in passes.items():
        for name, t in interleaved(runs, 60, 6).items():
            spread = f"{t['low']:.2f} … {t['high']:.2f}"
            facts = {
                "ms": t["seconds"] * 1e3,
                "time / F.softplus": t["ratio"],
                "quartiles": spread,
                "of the fastest": t["best"],
            }
            rows.append({"mode": mode, "pass": what, "function": name} | facts)
    return rows


def main() -> None:
    torch.set_num_threads(1)  # else a busy second core decides: each operation waits at its barrier for it
    begin, generator = time.perf_counter(), torch.Generator().manual_seed(0)
    x, g = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    rows = rows_of(contestants(), "eager", x, g)
    notes = [
        f"Tensor {SHAPE}, float32, standard normal, β = {BETA:g}, one thread; backward to x (and β if trainable).",
        "torch's softplus turns linear at βx > 20 and has no trainable β, so F.softplus(βx)/β stands in for one.",
    ]
    try:
        compiled = {name: torch.compile(f, fullgraph=True) for name, f in contestants().items()}
        rows += rows_of(compiled, "compiled", x, g)
        notes.append("torch.compile with fullgraph=True: no contestant breaks the graph.")
    except Exception as error:  # whatever the compiler lacks: say so, and keep the eager numbers
        if isinstance(error, AssertionError):
            raise
        notes.append(f"Compiled skipped, no working compiler: {type(error).__name__}: {str(error).splitlines()[0]}")
    notes.append(f"The whole script took {time.perf_counter() - begin:.0f} s.")
    write("softplus", rows, "python benchmarks/softplus.py", x.numel(), 0, notes)


if __name__ == "__main__":
    main()
