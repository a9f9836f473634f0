"""Measure the shipped networks' two promises, steady gradients and robustness: `python benchmarks/evaluate.py`.

Writes data/results/DATASET_stability, DATASET_curves and DATASET_masking, from which the figures are drawn. digits (the
default) takes about a quarter of an hour on one core, cifar10 (its nets of the scale tiny, and CIFAR-10 on the disk)
an hour.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import pandas as pd
import torch
from common import provenance

from lcnn_utils.experiments import recipe
from lcnn_utils.published import save_measured
from lcnn_utils.recipe import METHODS
from lcnn_utils.runtime import one_thread
from lcnn_utils.studies import attacks, saliency
from lcnn_utils.studies.scene import scene, shipped

PLANS: dict[str, dict[str, Any]] = {
    "digits": dict(scale="lab", seeds=(0, 1, 2), images=360, maps=100, l2=attacks.DIGITS_EPS, linf=attacks.DIGITS_LINF,
                   attack=dict(steps=20, restarts=5), masking=(0.5, 200)),
    "cifar10": dict(scale="tiny", seeds=(0, 1), images=500, maps=100, l2=attacks.PAPER_EPS, linf=attacks.LINF_EPS,
                    attack=dict(steps=20, restarts=1), masking=(0.2, 200)),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", nargs="?", default="digits", choices=PLANS)
    parser.add_argument("--only", choices=("stability", "curves", "masking"))
    arguments = parser.parse_args()
    dataset, only = arguments.dataset, arguments.only
    one_thread()
    plan, begun = PLANS[dataset], time.perf_counter()
    recipes = [recipe(dataset, method, seed, plan["scale"]) for method in METHODS for seed in plan["seeds"]]
    recipes = [one for one in recipes if shipped([one])]
    about = provenance(f"python benchmarks/evaluate.py {dataset}", 0, 0)
    about |= {"runs": [f"{one.method} seed {one.seed}" for one in recipes], "scale": plan["scale"]}

    def save(frame, kind: str, **facts) -> None:
        seconds = round(time.perf_counter() - begun)
        save_measured(frame, f"{dataset}_{kind}", about | facts | {"seconds": seconds})
        print(f"{kind}: {len(frame)} rows after {seconds} s", flush=True)

    if only in (None, "stability"):
        frame = saliency.stability_frame(recipes, images=plan["maps"])
        keep = ["net", "label", "seed", "image", "method", "weights", "noise", "eps", "relative_change", "cosine"]
        save(frame[[*keep, "curvature"]], "stability", n=plan["maps"])
    if only in (None, "curves"):
        parts = [attacks.curves_frame(recipes, plan[norm], images=plan["images"], norm=norm, **plan["attack"])
                 for norm in ("l2", "linf")]  # fmt: skip
        save(pd.concat(parts, ignore_index=True), "curves", n=plan["images"], attack=plan["attack"])
    if only in (None, "masking"):
        eps, n = plan["masking"]
        here = scene(device=torch.device("cpu"), dataset=dataset).first(n)
        frame = attacks.masking_frame(here.nets, here.x, here.y, eps, referee=True)
        save(frame, "masking", n=n, eps=eps)


if __name__ == "__main__":
    main()
