"""What a training step costs, method by method. `python benchmarks/training.py [--device cuda] [--profile]`.

On a CPU: the digits, all methods, a step at a time in turn, and each method's whole training. On a GPU: ResNet-18 of
width 64, batch 512, random data, the whole step; peak memory; and CIFAR-10 from start to end, where it is on the disk.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Callable
from typing import Any

import common
import torch
from torch import nn

from lcnn_utils.data import available
from lcnn_utils.figures.style import METHOD
from lcnn_utils.lab import keep_memory, one_thread, pick_device
from lcnn_utils.nn import norms_once_a_step
from lcnn_utils.training import (
    INPUTS,
    METHODS,
    Recipe,
    accuracy,
    build,
    fit,
    make_optimizer,
    recipe,
    samples,
    training_step,
)
from lcnn_utils.training.fit import compiles

LIMIT = 3 * 2 * 0.556e9 / 790e12  # seconds an image of the ReLU net, by an H200's arithmetic in bfloat16 alone


def stepper(
    one: Recipe,
    device: torch.device,
    stack: contextlib.ExitStack,
    profile: bool = False,
    change: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> tuple[Callable, float]:
    """A whole training step on random data, as ``fit`` runs it, and the GPU memory it needs at its peak (GB).

    ``change`` is what is done to the model first.
    """
    on_gpu = device.type == "cuda"
    generator = torch.Generator(device).manual_seed(0)
    shape, classes = INPUTS[one.dataset]
    x = torch.rand(one.batch_size, *shape, device=device, generator=generator)
    y = torch.randint(classes, (one.batch_size,), device=device, generator=generator)
    model = change(build(one)).to(device).train()
    optimizer, _ = make_optimizer(one, model)
    advance = stack.enter_context(norms_once_a_step(model))
    network: Any = torch.compile(model, dynamic=False) if compiles(one, device) else model
    starts = torch.Generator().manual_seed(0)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()

    def run() -> None:
        advance()
        training_step(one, network, optimizer, x, y, generator=starts)
        if on_gpu:
            torch.cuda.synchronize()

    run()
    peak = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0
    if profile:
        with torch.profiler.profile() as seen:
            run()
        sort = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
        print(one.method, seen.key_averages().table(sort_by=sort, row_limit=25, max_name_column_width=60))
    return run, peak


def steps(device: torch.device, profile: bool) -> list[dict]:
    """Time of a step of every method, relative to Standard's."""
    gpu = device.type == "cuda"
    options: dict[str, Any] = dict(width=64, batch_size=512) if gpu else {}
    name = "cifar10" if gpu else "digits"
    with contextlib.ExitStack() as stack:
        recipes = {method: recipe(name, method, **options) for method in METHODS}
        made = {method: stepper(one, device, stack, profile) for method, one in recipes.items()}
        timed = common.interleaved({m: run for m, (run, _) in made.items()}, rounds=40 if gpu else 15, seconds=60)
    rows = []
    for method, t in timed.items():
        row = {
            "method": METHOD[method][0],
            "step / Standard": t["ratio"],
            "quartiles": f"{t['low']:.2f}–{t['high']:.2f}",
        }
        row |= {"step / ReLU": t["seconds"] / timed["relu"]["seconds"], "ms a step": 1e3 * t["seconds"]}
        row |= {"ms an image": 1e3 * t["seconds"] / recipes[method].batch_size}
        if gpu:
            row |= {"peak memory / Standard": made[method][1] / made["standard"][1]}
            row |= {"step / chip's limit": t["seconds"] / (LIMIT * 512) if method == "relu" else None}
        rows.append(row)
    return rows


def trainings(device: torch.device) -> list[dict]:
    """Whole trainings: the digits by every method; on a GPU CIFAR-10 by Standard and LCNN, ResNet-18 of width 64."""
    gpu = device.type == "cuda"
    if gpu and available()["cifar10"] == "missing":
        print("CIFAR-10 is not on the disk: its training is left out")
        return []
    options: dict[str, Any] = dict(width=64) if gpu else {}
    rows = []
    for method in ("standard", "lcnn") if gpu else METHODS:
        one = recipe("cifar10" if gpu else "digits", method, **options)
        model, history = fit(one, device=device, progress=False)
        x, y = samples(one, "test", device)
        row = {"method": METHOD[method][0], "seconds": history.attrs["seconds"], "epochs": one.epochs}
        rows.append(row | {"test accuracy %": 100 * accuracy(model, x, y), "images": len(y)})
    return [*rows, {"method": "together", "seconds": sum(row["seconds"] for row in rows)}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    parser.add_argument("--profile", action="store_true", help="print where the time of a step goes, method by method")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    one_thread()
    keep_memory()
    where = "gpu" if device.type == "cuda" else "cpu"
    command = f"python benchmarks/training.py --device {device.type}"
    notes = ["A step is power iterations, forward and backward passes and optimiser, without data. Eager on a CPU."]
    rows = steps(device, arguments.profile)
    common.write(f"training_steps_{where}", rows, command, n=512 if where == "gpu" else 128, seed=0, notes=notes)
    with tempfile.TemporaryDirectory() as store:
        os.environ["LCNN_STORE"] = store
        rows = trainings(device)
    notes = ["Seconds are wall-clock, with everything but imports; history and state written every epoch.",
             "One seed; n is the number of seeds."]  # fmt: skip
    common.write(f"training_runs_{where}", rows, command, n=1, seed=0, notes=notes)


if __name__ == "__main__":
    main()
