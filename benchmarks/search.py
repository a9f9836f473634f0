"""Choose λ on digits by a held-out fifth of the training set: `python benchmarks/search.py`.

Writes the table digits_lambda_search, with the λ that `measurements.search.chosen` chooses. 30 trainings, some two minutes
on one core. LCNN_STORE=FOLDER puts them and the table elsewhere than in data/runs and data/results.
"""

from __future__ import annotations

import time

from common import provenance

from lcnn_utils.experiments import append
from lcnn_utils.lab import one_thread
from lcnn_utils.measurements.training import HELD_OUT, chosen, search_frame, search_recipes

SEEDS = (0, 1, 2)


def main() -> None:
    one_thread()
    begun = time.perf_counter()
    frame = search_frame(search_recipes(SEEDS))
    about = provenance("python benchmarks/search.py", int(frame.images.iloc[0]), SEEDS[0])
    about |= {"seeds": SEEDS, "held_out": HELD_OUT, "training_seconds": round(frame.seconds.sum())}
    about |= {"seconds": round(time.perf_counter() - begun), "chosen": chosen(frame)}
    append(frame, "digits_lambda_search", about)
    means = frame.groupby("lambda_")[["accuracy", "curvature", "margin_curvature"]].agg(["mean", "std"])
    print(f"{means.to_string(float_format='%.4g')}\nchosen: λ = {about['chosen']:g}")


if __name__ == "__main__":
    main()
