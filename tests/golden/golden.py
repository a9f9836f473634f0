"""Numbers that must not change while the package moves: ``python tests/golden/golden.py`` compares, ``--write`` stores.

Hardware and versions are in the JSON; equal means 1e-5 relative on other machines, and bit for bit on that one.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from pathlib import Path

import torch

from lcnn_utils.attacks import minimal_radius, robustness_curve
from lcnn_utils.curvature import (
    certified_radius,
    curvature_bound,
    geometry,
    layer_terms,
    local_bound,
    normalised_bound,
    published_bound,
)
from lcnn_utils.experiments import measure, run
from lcnn_utils.nn import mlp
from lcnn_utils.saliency import MAPS, explain, stability
from lcnn_utils.training import METHODS, fit, recipe, samples

FILE = Path(__file__).with_name("golden.json")


def values(t: torch.Tensor) -> list[float]:
    return [float(v) for v in t.detach().flatten().double()]


def golden() -> dict[str, list[float]]:
    """What is compared: name → numbers."""
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {}
    os.environ["LCNN_STORE"] = tempfile.mkdtemp()
    for method in ("standard", "lcnn", "relu"):  # shipped weights
        made = run(recipe("digits", method), progress=False)
        found[f"metrics {method}"] = [float(v) for v in made.metrics.values()]
        if method == "lcnn":
            found["measured"] = [float(v) for v in measure(made.model, made.recipe).values()]
        x, y = (t[:24] for t in samples(made.recipe, "test"))
        for scalar in ("loss", "margin", "logit"):
            if method != "relu":
                g = geometry(made.model, x, y, scalar=scalar)
                for name in ("grad_norm", "hessian_norm", "curvature"):
                    found[f"geometry {method} {scalar} {name}"] = values(getattr(g, name))
        curve = robustness_curve(made.model, (x, y), [0.05, 0.2, 0.5, 1.0], steps=5, restarts=2)
        found[f"pgd {method}"] = [float(v) for v in curve.accuracy]
        found[f"radius {method}"] = values(minimal_radius(made.model, x[:8], y[:8], steps=10)[0])
        for name in MAPS:
            if name != "deeplift" or method == "relu":
                try:
                    found[f"map {method} {name}"] = values(explain(made.model, x[:2], y[:2], name))
                except ValueError as error:
                    found[f"map {method} {name}"] = [float(len(str(error)) > 0)]
        frame = stability(made.model, (x[:8], y[:8]), [0.05, 0.1], seed=0)
        for name in frame.select_dtypes("number").columns:
            found[f"stability {method} {name}"] = [float(v) for v in frame[name]]
    torch.manual_seed(0)
    net = mlp([2, 16, 16, 3], lcnn=True, beta=3.0).eval()
    x, y = torch.randn(6, 2, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 0, 1, 2])
    for scalar in ("margin", "logit"):
        found[f"bound global {scalar}"] = [curvature_bound(net, (2,), scalar=scalar)]
        found[f"bound local {scalar}"] = values(local_bound(net, x, y, scalar=scalar))
    found["bound published"] = [published_bound(net, (2,))]
    found["bound normalised"] = values(normalised_bound(net, x, y).bound)
    found["bound terms"] = [float(v) for v in layer_terms(net, x, y).select_dtypes("number").to_numpy().flatten()]
    found["certified"] = values(certified_radius(net, x, y))
    for method in METHODS:
        model, history = fit(recipe("moons", method, epochs=3), progress=False, resume=False)
        numbers = history.select_dtypes("number").to_numpy().flatten()
        found[f"fit {method}"] = [float(v) for v in numbers] + values(next(model.parameters()))[:8]
    return found


def main() -> int:
    found = golden()
    if "--write" in sys.argv:
        about = {"torch": torch.__version__, "machine": platform.machine(), "python": platform.python_version()}
        FILE.write_text(json.dumps({"made on": about, "numbers": found}) + "\n")
        return 0
    known, different = json.loads(FILE.read_text())["numbers"], []
    for name in sorted({*known, *found}):
        a, b = (torch.tensor(where.get(name, []), dtype=torch.float64) for where in (known, found))
        if a.shape != b.shape or not torch.allclose(a, b, rtol=1e-5, atol=1e-9, equal_nan=True):
            different.append(name)
            print("different:", name, a[:4].tolist(), b[:4].tolist())
        elif not bool(((a == b) | (a.isnan() & b.isnan())).all()):
            print("equal to rounding:", name)
    print(f"{len(found)} compared, {len(different)} different")
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
