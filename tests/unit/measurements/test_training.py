"""What notebook 05 measures: small nets by hand, what is shipped, and the rule that chooses λ."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lcnn_utils.experiments import SHIPPED, how_measured, measured, run
from lcnn_utils.measurements import training as measurements
from lcnn_utils.measurements.curvature import layer_calls
from lcnn_utils.measurements.evaluate import SEARCHED
from lcnn_utils.nn import CenteredSoftplus, LipschitzBatchNorm2d
from lcnn_utils.training import METHODS, build, recipe, run_name, samples

SEEDS = (0, 1, 2)


def tiny(method="lcnn", seed=0, **changes):
    return recipe("moons", method, seed, epochs=1, width=4, **changes)


def test_runs_and_arms_hold_what_the_runs_say(store):
    """A row a run; the medians of β and γ are those of the trained net."""
    arms = {"cheap": [tiny(seed=2), tiny(seed=3)], "dear": [tiny(seed=2, lambda_beta=0.5)]}
    recipes = [*arms["cheap"], *arms["dear"]]
    rows, arm_rows = measurements.runs_frame(recipes, progress=False), measurements.arms_frame(arms)
    assert rows.seed.tolist() == arm_rows.seed.tolist() == [2, 3, 2]
    assert arm_rows.arm.tolist() == ["cheap", "cheap", "dear"]
    assert rows[["label", "lambda_beta", "lambda_gamma"]].iloc[-1].tolist() == ["LCNN", 0.5, 0.01]
    for row, arm_row, one in zip(rows.to_dict("records"), arm_rows.to_dict("records"), recipes, strict=True):
        result = run(one, progress=False)
        assert result.metrics.items() <= row.items()
        assert result.metrics.items() <= arm_row.items()
        for kind in ("beta", "gamma"):
            values = [p.exp().item() for name, p in result.model.named_parameters() if name.endswith(f"log_{kind}")]
            assert arm_row[kind] == pytest.approx(np.median(values), abs=2e-6)


def test_the_notebook_trains_nothing_on_digits():
    recipes = [recipe("digits", method, seed) for method in METHODS for seed in SEEDS]
    recipes += measurements.lambda_recipes(SEEDS)
    failures = measurements.failure_recipes(SEEDS)
    for arms in (failures, measurements.ingredient_recipes(SEEDS)):
        recipes += [one for arm in arms.values() for one in arm]
    assert {run_name(one) for one in recipes} <= {path.stem for path in SHIPPED.glob("*.json")}
    with_weights = [recipe("digits", "standard", seed) for seed in SEEDS] + [arm[0] for arm in failures.values()]
    assert {run_name(one) for one in with_weights} <= {path.stem for path in SHIPPED.glob("*.safetensors")}


def test_what_notebook_5_says_of_the_shipped_runs():
    methods = measurements.runs_frame(recipe("digits", method, seed) for method in METHODS for seed in range(5))
    mean = methods.groupby("method")[["accuracy", "curvature", "margin_curvature"]].mean()
    assert mean.curvature[["lcnn", "softplus_wd"]].max() < mean.curvature["standard"] / 4
    assert mean.curvature[["gradreg", "cure", "adversarial"]].min() > mean.curvature["standard"] / 2
    assert mean.margin_curvature["lcnn"] < 0.75 * mean.margin_curvature["softplus_wd"]
    papers = mean.accuracy.drop(["minimal", "relu"])
    assert papers.max() - papers.min() < 0.005, "two images of 360"
    arms = measurements.ingredient_recipes(SEEDS)
    hard, soft, gamma_only, beta_only, _, far, farthest = arms
    means = measurements.arms_frame(arms).groupby("arm")[["curvature", "margin_curvature", "beta"]].mean()
    assert means.curvature[[soft, far]].max() < means.curvature[hard] / 4, "the start alone, and the penalty alone"
    assert abs(means.margin_curvature[gamma_only] / means.margin_curvature[soft] - 1) < 0.2
    assert means.margin_curvature[beta_only] < 0.75 * means.margin_curvature[soft]
    assert means.beta[farthest] < 1e-3
    assert means.margin_curvature[farthest] < 0.1
    by_lambda = measurements.runs_frame(measurements.lambda_recipes(SEEDS)).groupby("lambda_beta")
    assert by_lambda.accuracy.mean()[0.01] > by_lambda.accuracy.mean()[0.0] - 0.01
    assert by_lambda.accuracy.mean()[0.3] < 0.3
    assert by_lambda.curvature.mean()[0.1] < by_lambda.curvature.mean()[0.0] / 2


def test_what_notebook_5_says_of_the_dead_network():
    failures = measurements.failure_recipes(SEEDS)
    healthy, large_beta, large_gamma, dead, longer, quarter = failures
    accuracy = measurements.arms_frame(failures).groupby("arm").accuracy.mean()
    assert accuracy[dead] < 0.3
    assert accuracy[[large_beta, large_gamma, longer]].min() > 0.7
    assert accuracy[quarter] > 0.94
    nets = {arm: measurements.trained_net(failures[arm][0]) for arm in (healthy, dead)}
    signal = measurements.signal_frame(nets, samples(recipe("digits", "lcnn"), "test")[0]).groupby("net").sd.last()
    assert signal[dead] < signal[healthy] / 1000
    gammas = measurements.trained_layers(failures[longer]).query("kind == 'gamma'")
    assert (gammas.groupby("seed").value.max() > 10).all(), "where they began"
    first = pd.concat([run(one, weights=False).history.assign(seed=one.seed) for one in failures[dead]])
    assert first[first.epoch == 2].accuracy.mean() > 0.75
    assert first[first.epoch == 4].accuracy.mean() < 0.2


def test_layers_are_numbered_from_input_to_output():
    """Give each activation and BatchNorm, in the order in which data meets it, a value of its own; read them off."""
    one = recipe("digits", "lcnn", width=2)
    model = build(one).eval()
    for field, kind in (("beta", CenteredSoftplus), ("gamma", LipschitzBatchNorm2d)):
        x = samples(one, "test")[0][:2]
        for place, (layer, _, _) in enumerate(layer_calls(model, x, kind), 1):
            setattr(layer, field, float(place))
    history = {"epoch": 1, "loss": 2.0}
    for name, parameter in model.named_parameters():
        layer, _, field = name.rpartition(".log_")
        if layer:
            history[f"{field} {layer}"] = parameter.exp().item()
    frame = measurements.layer_frame(pd.DataFrame([history]))
    assert frame.groupby("kind").layer.max().min() > 5
    np.testing.assert_allclose(frame.value, frame.layer, rtol=1e-6)  # a block's shortcut is met after its branch


def test_trained_layers_are_those_of_the_trained_net():
    lcnn = recipe("digits", "lcnn", 1)
    frame = measurements.trained_layers([lcnn])
    assert frame[["label", "seed", "lambda_"]].drop_duplicates().to_numpy().tolist() == [["LCNN", 1, 0.01]]
    net = measurements.trained_net(lcnn)
    for kind in ("beta", "gamma"):
        values = [p.exp().item() for name, p in net.named_parameters() if name.endswith(f"log_{kind}")]
        np.testing.assert_allclose(frame[frame.kind == kind].value, values, rtol=5e-3)  # float16 in the checkpoint


def test_signal_frame_by_hand():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, 4), CenteredSoftplus(2.0), nn.BatchNorm1d(4), nn.Linear(4, 2), CenteredSoftplus(9.0)
    )
    x = torch.randn(50, 3) * torch.tensor([1.0, 2.0, 3.0])
    frame = measurements.signal_frame({"one": net.train(), "again": net}, x)
    assert net[2].num_batches_tracked == 0, "in eval mode meanwhile"
    assert frame.layer.tolist() == [0, 1, 2] * 2
    first = F.softplus(net[0](x), 2.0) - math.log(2) / 2
    second = F.softplus(net[3](first / math.sqrt(1 + 1e-5)), 9.0) - math.log(2) / 9
    signals = [signal.detach().double().numpy().std(0, ddof=1) for signal in (x, first, second)]
    np.testing.assert_allclose(frame.sd, [np.sqrt((signal**2).mean()) for signal in signals] * 2, rtol=1e-4)


def search(table):
    """λ → accuracies of its seeds, as a frame."""
    rows = [(lam, seed, a) for lam, accuracies in table.items() for seed, a in enumerate(accuracies)]
    return pd.DataFrame(rows, columns=["lambda_", "seed", "accuracy"])


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({0.0: [0.98, 0.96], 0.1: [0.97, 0.95], 0.3: [0.90, 0.92]}, 0.1),  # error 0.01: 0.96 is just within
        ({0.0: [0.98, 0.96], 0.1: [0.969, 0.949], 0.3: [0.90, 0.92]}, 0.0),  # 0.959 isn't
        ({0.0: [0.90, 0.94], 0.1: [0.5, 0.5], 0.3: [0.93, 0.89]}, 0.3),  # a hole between the two doesn't matter
        ({0.0: [0.97], 0.1: [0.97], 0.3: [0.5]}, 0.1),  # one seed: no error; of equals the largest
        ({0.0: [0.92, 1.0], 0.1: [0.96, 0.96], 0.2: [0.955, 0.955]}, 0.1),  # the error is that of the larger λ: none
        ({0.0: [284 / 287] * 3, 3e-3: [284 / 287, 284 / 287, 285 / 287], 1e-2: [284 / 287] * 3}, 0.01),  # on the edge
    ],
)
def test_the_rule_of_one_standard_error(table, expected):
    assert measurements.chosen(search(table)) == expected
    assert measurements.chosen(search(table).sample(frac=1, random_state=0).round(5)) == expected


def test_the_shipped_search_is_whole():
    frame, about = measured("digits_lambda_search"), how_measured("digits_lambda_search")
    expected = [(lam, seed) for lam in SEARCHED for seed in SEEDS]
    assert sorted(map(tuple, frame[["lambda_", "seed"]].to_numpy().tolist())) == expected
    assert about["chosen"] == measurements.chosen(frame)
