"""A training step of every method, and of LCNNs with the published layers, relative to Standard's:
`python benchmarks/training.py [digits|cifar10] [cpu|cuda]`, on random images, so no dataset is needed.

cifar10 is ResNet-18 of width 16 on a CPU, of width 64 and with batches of 512 on a GPU, with the peak of its memory.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from common import interleaved, write
from published import as_published

from lcnn_utils.figures.style import METHOD
from lcnn_utils.lab import keep_memory, one_thread, pick_device
from lcnn_utils.measurements.paper import as_trained, stepping
from lcnn_utils.training import METHODS, Recipe, recipe
from lcnn_utils.training.fit import in_bfloat16


def contestant(
    recipe: Recipe, device: torch.device, stack: contextlib.ExitStack, published: bool
) -> tuple[Callable[[], None], float]:
    """A training step, and the GPU memory it needs at its peak (bytes)."""
    model = as_trained(recipe)
    if published:
        model = as_published(model).to(memory_format=torch.contiguous_format)
    step = stack.enter_context(stepping(recipe, model, device))
    if device.type != "cuda":
        return step, 0.0
    torch.cuda.reset_peak_memory_stats()
    step()
    return step, torch.cuda.max_memory_allocated()


def main(dataset: str = "digits", device_name: str = "cpu") -> None:
    device = pick_device(device_name)
    one_thread()
    keep_memory()
    gpu = device.type == "cuda"
    options: dict[str, Any] = {}
    if dataset == "cifar10":
        options = dict(scale="wide") if gpu else dict(bfloat16=False)
    contestants = {METHOD[method][0]: (recipe(dataset, method, **options), False) for method in METHODS}
    if dataset == "cifar10" and not gpu and in_bfloat16(recipe(dataset, "lcnn"), device):
        for method in ("relu", "standard", "lcnn", "lcnn_gradreg"):
            contestants[f"{METHOD[method][0]}, bfloat16"] = recipe(dataset, method), False
    contestants["LCNN, published layers"] = recipe(dataset, "lcnn", **options), True
    with_gradreg = recipe(dataset, "lcnn_gradreg", **options | {"derivative": "exact"})
    contestants["LCNN + GradReg, published layers"] = with_gradreg, True
    with contextlib.ExitStack() as stack:
        made = {name: contestant(wanted, device, stack, published) for name, (wanted, published) in contestants.items()}
        timed = interleaved({name: step for name, (step, _) in made.items()}, rounds=40, seconds=120)
    rows, batch, relu = [], with_gradreg.batch_size, timed[METHOD["relu"][0]]["seconds"]
    for name, times in timed.items():
        row = {"method": name, "step / Standard": times["ratio"], "quartiles": times["quartiles"]}
        row |= {"step / ReLU": times["seconds"] / relu, "ms an image": 1e3 * times["seconds"] / batch}
        rows.append(row | ({"peak memory / Standard": made[name][1] / made["Standard"][1]} if gpu else {}))
    notes = [
        "A step is power iterations, forward and backward passes and optimiser, on random images; γ = 1 as in trained "
        "nets, so that most channels are clipped. Eager on a CPU, on one thread, in float32 unless it says bfloat16, "
        "which is for CPUs with AVX512_BF16 or AMX. n is the batch.",
        "The published layers (`benchmarks/published.py`) are written from their description, not the authors' code; "
        "they have this lab's optimiser and blocks, and the exact form of GradReg.",
    ]
    write(f"training_steps_{device.type}_{dataset}", rows, batch, notes)


if __name__ == "__main__":
    main(*sys.argv[1:])
