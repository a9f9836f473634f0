"""Our PGD against foolbox's on digits, at equal settings and over a grid of ε: `python benchmarks/attacks.py`."""

from __future__ import annotations

from functools import partial

import foolbox
import torch
from common import interleaved, write

from lcnn_utils.attacks import first_success, pgd
from lcnn_utils.figures.style import METHOD
from lcnn_utils.lab import one_thread, pick_device
from lcnn_utils.measurements.saliency import scene

STEPS = 20
GRIDS = {"l2": (0.1, 0.2, 0.3, 0.5, 0.7, 1.0), "linf": (8 / 255, 16 / 255, 24 / 255, 32 / 255, 48 / 255)}
FOOLBOX = {"l2": foolbox.attacks.L2ProjectedGradientDescentAttack, "linf": foolbox.attacks.LinfPGD}


def theirs(model, x, y, grid, norm) -> list[float]:
    """Accuracies that foolbox's PGD on cross-entropy leaves: each ε is attacked by itself, the last iterate counts."""
    wrapped, left = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device), []
    for eps in grid:
        attack = FOOLBOX[norm](steps=STEPS, abs_stepsize=2.5 * eps / STEPS, random_start=False)
        left.append(1 - attack(wrapped, x, y, epsilons=eps)[2].float().mean().item())
    return left


def ours(model, x, y, grid, norm) -> list[float]:
    """The same with ours: cross-entropy, the same steps from x; images drop out once they are fooled."""
    left = []
    for eps in grid:
        length = 2.5 * eps / STEPS
        x_adv = pgd(model, x, y, eps, norm=norm, loss="ce", steps=STEPS, step_size=length, random_start=False)
        with torch.no_grad():
            left.append((model(x_adv).argmax(1) == y).float().mean().item())
    return left


def curve(model, x, y, grid, norm) -> list[float]:
    """The whole grid as the package does it: survivors only, the margin loss, its own steps."""
    fell = first_success(model, x, y, grid, norm=norm, steps=STEPS)
    return [(fell > eps).float().mean().item() for eps in grid]


def compare(net, x, y, grid, norm) -> dict:
    left = {attack: attack(net, x, y, grid, norm) for attack in (ours, theirs, curve)}
    few = (net, x[:200], y[:200])
    single = {"foolbox": partial(theirs, *few, grid[1:2], norm), "ours": partial(ours, *few, grid[1:2], norm)}
    whole = {"foolbox": partial(theirs, *few, grid, norm), "curve": partial(curve, *few, grid, norm)}
    single_time = interleaved(single, rounds=5, seconds=60)["ours"]
    whole_time = interleaved(whole, rounds=3, seconds=120)["curve"]
    return {
        "norm": norm,
        "largest gap at equal settings, points": 100
        * max(abs(torch.tensor(left[ours]) - torch.tensor(left[theirs]))).item(),
        "left at the largest ε, %: ours": 100 * left[ours][-1],
        "foolbox": 100 * left[theirs][-1],
        "our curve": 100 * left[curve][-1],
        "time at one ε / foolbox's": single_time["ratio"],
        "quartiles": single_time["quartiles"],
        "time of the grid / foolbox's": whole_time["ratio"],
    }


def main() -> None:
    one_thread()
    shown = scene(pick_device(), ("standard", "lcnn_gradreg"), dataset="digits")
    rows = []
    for method, net in shown.nets.items():
        for norm, grid in GRIDS.items():
            rows.append({"net": METHOD[method][0]} | compare(net, shown.x, shown.y, grid, norm))
    notes = [
        f"digits: {len(shown.x)} test images for the accuracies, 200 for the times; foolbox {foolbox.__version__}.",
        f"Equal settings: cross-entropy, {STEPS} steps of 2.5ε/{STEPS} from x, no restart; grid: {GRIDS}.",
        "foolbox counts the last iterate and carries fooled images along; ours stops them and keeps the worst point.",
        "Our curve: margin loss, random start, steps that fall from 2ε, and only survivors are attacked at the next ε.",
    ]
    write("attacks_digits", rows, len(shown.x), notes)


if __name__ == "__main__":
    main()
