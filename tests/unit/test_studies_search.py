"""The search for λ: on held-out images only, and the rule that chooses."""

import importlib
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcnn_utils.experiments import how_measured, measured, run
from lcnn_utils.experiments import runs as experiments
from lcnn_utils.measurements.training import HELD_OUT, SEARCHED_LAMBDAS, chosen, search_frame, search_recipes
from lcnn_utils.training import recipe

training = importlib.import_module("lcnn_utils.training.fit")

TINY = dict(model="mlp", width=4, epochs=1)


def frame(table: dict[float, list[float]]) -> pd.DataFrame:
    return pd.DataFrame([(lam, i, a) for lam, accuracies in table.items() for i, a in enumerate(accuracies)],
                        columns=["lambda_", "seed", "accuracy"])  # fmt: skip


def test_the_recipes_differ_in_lambda_and_seed_only():
    recipes = search_recipes((0, 4))
    assert len(set(recipes)) == 2 * len(SEARCHED_LAMBDAS)
    assert [one.lambda_beta for one in recipes[::2]] == list(SEARCHED_LAMBDAS) == sorted(SEARCHED_LAMBDAS)
    for one in recipes:
        assert one.lambda_beta == one.lambda_gamma
        assert one == recipe("digits", "lcnn", one.seed, lambda_beta=one.lambda_beta, lambda_gamma=one.lambda_beta,
                             held_out=HELD_OUT)  # fmt: skip


def test_the_frame_is_of_the_held_out_part(store, monkeypatch):
    asked = []
    monkeypatch.setattr(experiments, "GEOMETRY", 8)
    monkeypatch.setattr(experiments, "samples", lambda r, split, d: asked.append(split) or training.samples(r, split))
    recipes = [replace(one, **TINY) for one in search_recipes((0, 1), (0.0, 0.1))]
    found = search_frame(recipes, progress=False)
    assert set(asked) == {"held_out"}
    assert list(found.columns) == ["lambda_", "seed", "accuracy", "curvature", "margin_curvature", "images", "seconds"]
    assert found[["lambda_", "seed"]].to_numpy().tolist() == [[0, 0], [0, 1], [0.1, 0], [0.1, 1]]
    for row, one in zip(found.to_dict("records"), recipes, strict=True):
        made = run(one, weights=False)
        assert row["images"] == 287
        assert {name: row[name] for name in ("accuracy", "curvature", "margin_curvature")}.items() <= (
            made.metrics.items()
        )
        assert row["seconds"] == made.provenance["seconds"]


def test_the_frame_refuses_other_runs(store):
    with pytest.raises(ValueError, match="holds nothing out: its accuracy would be that of the test set"):
        search_frame([recipe("digits", "lcnn", **TINY)])
    with pytest.raises(ValueError, match=r"λ_β = 0\.1 and λ_γ = 0\.01: the search varies one λ"):
        search_frame([recipe("digits", "lcnn", lambda_beta=0.1, held_out=0.2, **TINY)])
    assert not store.exists()


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({0.0: [0.98, 0.96], 0.1: [0.97, 0.95], 0.3: [0.90, 0.92]}, 0.1),  # error 0.01: 0.96 is just within
        ({0.0: [0.98, 0.96], 0.1: [0.969, 0.949], 0.3: [0.90, 0.92]}, 0.0),  # 0.959 isn't
        ({0.0: [0.90, 0.94], 0.1: [0.5, 0.5], 0.3: [0.93, 0.89]}, 0.3),  # a hole between the two doesn't matter
        ({0.0: [0.97], 0.1: [0.969], 0.3: [0.5]}, 0.0),  # one seed: no error, the best
        ({0.0: [0.97], 0.1: [0.97], 0.3: [0.5]}, 0.1),  # and of equals the largest
        ({0.0: [0.92, 1.0], 0.1: [0.96, 0.96], 0.2: [0.955, 0.955]}, 0.1),  # the error is that of the larger λ: none
        ({0.0: [0.98, 0.97], 0.1: [0.97, 0.97]}, 0.1),  # one standard error below, to the last digit: within
        ({0.2: [0.1, 0.2]}, 0.2),
        ({0.3: [0.9, 0.9, 0.9], 0.1: [0.9, 0.9, 0.9]}, 0.3),
    ],
)
def test_the_rule(table, expected):
    assert chosen(frame(table)) == expected
    assert chosen(frame(table).sample(frac=1, random_state=0)) == expected, "the order of rows doesn't matter"


def test_the_rule_does_not_hang_on_the_files_digits():
    """Counts of 287 images whose third mean is exactly one standard error below the best, as found on digits."""
    table = {lam: [n / 287 for n in ns] for lam, ns in {0.0: [284] * 3, 3e-3: [284, 284, 285], 1e-2: [284] * 3}.items()}
    assert chosen(frame(table)) == chosen(frame({lam: [round(a, 5) for a in v] for lam, v in table.items()})) == 0.01


@settings(deadline=None, max_examples=30)
@given(
    st.dictionaries(st.sampled_from(SEARCHED_LAMBDAS), st.lists(st.integers(0, 20), min_size=3, max_size=3), min_size=1),
)
def test_the_rule_against_numpy(counts):
    table = {lam: [n / 20 for n in ns] for lam, ns in counts.items()}
    means = {lam: np.mean(values) for lam, values in table.items()}
    best = max(lam for lam in table if means[lam] >= max(means.values()) - 2e-5)
    error = np.std(table[best], ddof=1) / math.sqrt(3)
    assert chosen(frame(table)) == max(lam for lam in table if means[lam] > means[best] - error - 2e-5)


@pytest.mark.parametrize("table", [frame({}), frame({0.1: [0.5, math.nan]})])
def test_nothing_to_choose_from(table):
    with pytest.raises(ValueError, match="nothing to choose from"):
        chosen(table)


def test_the_shipped_search_is_whole():
    found = measured("digits_lambda_search")
    about = how_measured("digits_lambda_search")
    assert sorted(map(tuple, found[["lambda_", "seed"]].to_numpy().tolist())) == [
        (lam, seed) for lam in SEARCHED_LAMBDAS for seed in (0, 1, 2)
    ]
    assert set(found.images) == {about["n"]} == {287}
    assert about["chosen"] == chosen(found)
    assert (about["seeds"], about["held_out"]) == ([0, 1, 2], HELD_OUT)
    assert {"command", "date", "torch", "cpu", "threads", "seconds"} <= set(about)
