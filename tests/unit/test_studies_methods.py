"""What notebook 05 measures: against closed forms, against a simulated optimiser, and by hand on small nets."""

import importlib
import math
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lcnn_utils.experiments import published, run
from lcnn_utils.experiments import runs as experiments
from lcnn_utils.figures.style import METHOD
from lcnn_utils.nn import CenteredSoftplus, LipschitzBatchNorm2d, SpectralNorm
from lcnn_utils.measurements import training as measurements
from lcnn_utils.training import (
    METHODS,
    OBJECTIVES,
    TRAINING,
    build,
    fit,
    learning_rate,
    recipe,
    run_name,
    samples,
    steps_an_epoch,
)


def layer_values(model):
    """β and γ of each layer that trains them: "kind name" → value."""
    kinds = {"beta": CenteredSoftplus, "gamma": LipschitzBatchNorm2d}
    found = [(kind, name, m) for kind, cls in kinds.items() for name, m in model.named_modules() if isinstance(m, cls)]
    return {f"{kind} {name}": getattr(m, kind).item() for kind, name, m in found if any(True for _ in m.parameters())}


training = importlib.import_module("lcnn_utils.training.fit")

TINY = recipe("moons", "lcnn", epochs=2, width=4)
SHIPPED = {path.stem for path in experiments.SHIPPED.glob("digits-*.json")}
needs_shipped = pytest.mark.skipif(not SHIPPED, reason="no digits runs are shipped: data/checkpoints is empty")


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr(experiments, "GEOMETRY", 8)  # images whose curvature a run measures


@pytest.fixture
def no_training(monkeypatch):
    for method in METHODS:
        monkeypatch.setitem(OBJECTIVES, method, lambda *_, **__: pytest.fail("it was trained"))


# ---- where to work -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("here", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("shipped", [False, True])
def test_stage(here, device, shipped, monkeypatch, tmp_path):
    monkeypatch.setattr(studies, "available", lambda: {"cifar10": "/somewhere" if here else "missing"})
    monkeypatch.setattr(studies, "SHIPPED", tmp_path)
    if shipped:
        (tmp_path / f"{run_name(recipe('cifar10', 'lcnn'))}.json").touch()
    expected = ("cifar10", "small") if here and (device == "cuda" or shipped) else ("digits", "lab")
    assert measurements.stage(torch.device(device)) == expected
    recipe(expected[0], "lcnn", scale=expected[1])


# ---- runs side by side -------------------------------------------------------------------------------------------


def test_runs_frame(store):
    recipes = [recipe("moons", m, s, epochs=1, width=4, lambda_beta=0.2) for m in ("relu", "lcnn") for s in (0, 3)]
    frame = measurements.runs_frame(iter(recipes), progress=False)
    assert list(frame.columns[:5]) == ["label", "method", "seed", "lambda_beta", "lambda_gamma"]
    assert frame.label.tolist() == [METHOD["relu"][0]] * 2 + [METHOD["lcnn"][0]] * 2
    assert frame.method.tolist() == ["relu", "relu", "lcnn", "lcnn"]
    assert frame.seed.tolist() == [0, 3, 0, 3]
    assert set(frame.lambda_beta) == {0.2}
    assert set(frame.lambda_gamma) == {0.01}
    for row, one in zip(frame.to_dict("records"), recipes, strict=True):
        made = run(one, progress=False, weights=False)
        assert made.metrics.items() <= row.items()
        assert row["seconds"] == made.provenance["seconds"]


@needs_shipped
def test_the_notebook_trains_nothing_on_digits(store, no_training):
    """Every run of notebook 05 is shipped: methods, λ = 0, the λ explorer, the failure and its repair."""
    seeds = (0, 1, 2)
    frame = measurements.runs_frame([recipe("digits", method, seed) for method in METHODS for seed in seeds])
    assert len(frame) == 3 * len(METHODS)
    by_lambda = measurements.runs_frame(measurements.lambda_recipes(seeds))
    assert by_lambda.groupby("lambda_beta").size().to_dict() == dict.fromkeys(measurements.LAMBDAS, 3)
    assert (by_lambda.lambda_beta == by_lambda.lambda_gamma).all()
    assert set(measurements.lambda_layers().lambda_) == set(measurements.LAMBDAS)
    for arms in (measurements.failure_recipes(seeds), measurements.ingredient_recipes(seeds)):
        assert measurements.arms_frame(arms).groupby("arm", sort=False).size().to_dict() == dict.fromkeys(arms, 3)
    assert list(measurements.arm_nets(measurements.failure_recipes(seeds))) == list(measurements.failure_recipes(seeds))
    assert not store.exists()


def runs(label: str, **columns) -> pd.DataFrame:
    return pd.DataFrame({"label": label} | columns)


def test_geometry_table_by_hand():
    frame = pd.concat(
        [
            runs("LCNN", grad_norm=[1.0, 3.0], hessian_norm=[4.0, 8.0], curvature=[1.5, 2.5], accuracy=[0.5, 0.7]),
            runs("A net of ours", grad_norm=1.0, hessian_norm=0.0, curvature=[3.0, 3.0, 6.0], accuracy=0.98765),
            runs("Standard", grad_norm=[1.0, 2.0], hessian_norm=0.5, curvature=[100.0, 300.0], accuracy=1.0),
        ]
    )
    table = measurements.geometry_table(frame).set_index("net")
    assert list(table.index) == ["LCNN", "A net of ours", "Standard"], "in the order of the frame"
    expected = {  # standard deviations: |a − b|/√2 of two; of 3, 3, 6 it is √3
        "LCNN": {"‖∇f‖": (2, 1.4), "‖∇²f‖": (6, 2.8), "C": (2, 0.71), "accuracy %": (60, 14)},
        "A net of ours": {"‖∇f‖": (1, 0), "‖∇²f‖": (0, 0), "C": (4, 1.7), "accuracy %": (98.765, 0)},
        "Standard": {"‖∇f‖": (1.5, 0.71), "‖∇²f‖": (0.5, 0), "C": (200, 141), "accuracy %": (100, 0)},
    }
    for net, row in expected.items():
        for column, (mean, spread) in row.items():
            found = [float(part) for part in table.loc[net, column].split(" ± ")]
            assert found[0] == pytest.approx(mean, rel=2e-2), (net, column)
            assert len(found) == 1 + (spread > 0), "without a spread the mean stands alone"
            assert found[-1] == pytest.approx(spread or mean, rel=0.05)
    paper = table[[column for column in table if column.startswith("paper: ")]]
    assert list(paper.columns) == [f"paper: {column}" for column in expected["LCNN"]]
    assert paper.loc["LCNN"].tolist() == ["22.04 ± 1.41", "1143.62 ± 99.38", "69.5 ± 2.41", "77.3 ± 0.11"]
    assert paper.loc["Standard"].tolist() == ["19.66 ± 0.33", "6061.96 ± 968.05", "270.89 ± 75.04", "77.42 ± 0.11"]
    assert set(paper.loc["A net of ours"]) == {"–"}


def test_geometry_table_of_one_seed_claims_no_spread():
    frame = runs("LCNN", grad_norm=[1.0], hessian_norm=2.0, curvature=3.0, accuracy=0.5)
    table = measurements.geometry_table(frame)
    assert table["C"].tolist() == ["3"]
    assert not table.astype(str).apply(lambda column: column.str.contains("nan")).any(axis=None)


def test_every_published_method_finds_its_row():
    frame = pd.concat(
        runs(METHOD[m][0], grad_norm=[1.0, 1.0], hessian_norm=1.0, curvature=1.0, accuracy=1.0) for m in METHODS
    )
    table = measurements.geometry_table(frame).set_index("net")
    known = set(published("paper table 1").method)
    assert len(known) == 7
    assert {net for net, row in table.iterrows() if row["paper: C"] != "–"} == known


# ---- layers ------------------------------------------------------------------------------------------------------


def test_layer_frame_by_hand():
    history = pd.DataFrame(
        {"epoch": [1, 2], "loss": [2.0, 1.0], "beta 1.act": [5.0, 4.0], "gamma 2": [9.0, 8.0], "beta 3.act": [6.0, 7.0]}
        | {"sum_beta": [11.0, 11.0], "gamma 10": [7.0, 6.0]}
    )
    frame = measurements.layer_frame(history)
    assert list(frame.columns) == ["epoch", "kind", "layer", "name", "value"]
    assert frame.to_numpy().tolist() == [
        [1, "beta", 1, "1.act", 5.0], [2, "beta", 1, "1.act", 4.0],
        [1, "beta", 2, "3.act", 6.0], [2, "beta", 2, "3.act", 7.0],
        [1, "gamma", 1, "2", 9.0], [2, "gamma", 1, "2", 8.0],
        [1, "gamma", 2, "10", 7.0], [2, "gamma", 2, "10", 6.0],
    ]  # fmt: skip


def test_layers_are_numbered_from_input_to_output(store):
    """Give each activation and BatchNorm, in the order in which data meets it, a value of its own; read them off."""
    one = recipe("digits", "lcnn", width=2, epochs=1)
    model = build(one)
    met: dict[str, list] = {"beta": [], "gamma": []}

    def meet(module, *_):
        kind = "beta" if isinstance(module, CenteredSoftplus) else "gamma"
        met[kind].append(module)

    x, _ = samples(one, "test")
    hooks = [
        m.register_forward_hook(meet) for m in model.modules() if hasattr(m, "log_beta") or hasattr(m, "log_gamma")
    ]
    model.eval()(x[:2])
    for hook in hooks:
        hook.remove()
    for kind, modules in met.items():
        for place, module in enumerate(modules, 1):
            setattr(module, kind, float(place))
    frame = measurements.layer_frame(pd.DataFrame([{"epoch": 1} | layer_values(model)]))
    for kind, modules in met.items():
        part = frame[frame.kind == kind]
        assert part.layer.tolist() == list(range(1, len(modules) + 1))
    beta = frame[frame.kind == "beta"]
    np.testing.assert_allclose(beta.value, beta.layer, rtol=1e-6)
    gamma = frame[frame.kind == "gamma"]  # a block's shortcut is met after its branch
    np.testing.assert_allclose(gamma.value, gamma.layer, rtol=1e-6)


def test_lambda_layers_are_the_last_epoch(store, monkeypatch):
    make = lambda dataset, method, seed, **changes: recipe("moons", method, seed, epochs=2, width=4, **changes)
    monkeypatch.setattr(studies, "recipe", make)
    assert [(one.lambda_beta, one.lambda_gamma, one.seed) for one in measurements.lambda_recipes((0, 5), (0.0, 0.1))] == [
        (0.0, 0.0, 0), (0.0, 0.0, 5), (0.1, 0.1, 0), (0.1, 0.1, 5)
    ]  # fmt: skip
    frame = measurements.lambda_layers(5, (0.0, 0.1))
    for lam in (0.0, 0.1):
        model, _ = fit(make("", "lcnn", 5, lambda_beta=lam, lambda_gamma=lam), progress=False)
        part = frame[frame.lambda_ == lam]
        assert set(part.epoch) == {2}
        found = dict(zip(part.kind + " " + part.name, part.value, strict=True))
        assert found == pytest.approx(layer_values(model), abs=2e-6)


# ---- what λ can do -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "one",
    [TINY, recipe("moons", "lcnn", epochs=1, width=4, schedule="steps")],
)
def test_rates_are_those_of_the_training(one, store, monkeypatch):
    used = {}  # by progress: each group of parameters asks for it

    def note(recipe, progress):
        used[progress] = learning_rate(recipe, progress)
        return used[progress]

    monkeypatch.setattr(training, "learning_rate", note)
    fit(one, progress=False)
    rates = measurements.rates(one)
    assert rates.dtype == torch.float64
    assert rates.tolist() == pytest.approx(list(used.values()))
    assert len(rates) == one.epochs * steps_an_epoch(one)


def test_rates_by_hand():
    one = recipe("digits", "lcnn", epochs=4, batch_size=200, lr=0.2)  # 7 steps an epoch, 28 in all
    assert steps_an_epoch(one) == 7
    rates = measurements.rates(one)
    assert rates[0] == pytest.approx(0.2 * 0.04)
    assert rates[7] == pytest.approx(0.2 * (0.04 + 0.96 * 0.25 / 0.3))
    assert rates[14] == pytest.approx(0.2 * 0.5 * (1 + math.cos(math.pi * 0.2 / 0.7)))
    assert steps_an_epoch(recipe("digits", "lcnn", batch_size=5000)) == 1
    course = measurements.course_recipe()
    assert (course.dataset, course.model, course.width, course.epochs) == ("cifar10", "resnet18", 64, 50)
    assert (course.lambda_beta, course.lambda_gamma) == (1e-2, 1e-2)
    steps = 50 * (50_000 // 128)
    total = 0.1 * steps * (0.75 + 0.1 * 0.125 + 0.01 * 0.125)
    assert len(measurements.rates(course)) == steps
    assert measurements.rates(course).sum().item() == pytest.approx(total, rel=1e-3)


def test_the_number_of_training_images():
    assert len(samples(recipe("digits", "lcnn"), "train")[1]) == TRAINING["digits"]


def simulated(gamma: float, rates: torch.Tensor, lam: float, momentum: float) -> torch.Tensor:
    """γ after each step of torch's SGD on λ|log γ| alone, as ``training`` uses it."""
    log_gamma = nn.Parameter(torch.tensor(math.log(gamma), dtype=torch.float64))
    optimizer = torch.optim.SGD([log_gamma], lr=1.0, momentum=momentum, nesterov=momentum > 0)
    values = []
    for rate in rates.tolist():
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        (lam * log_gamma.abs()).backward()
        optimizer.step()
        values.append(log_gamma.item())
    return torch.tensor(values, dtype=torch.float64).exp()


@settings(max_examples=30, deadline=None)
@given(
    gamma=st.floats(1.1, 100),
    lam=st.floats(0, 0.5),
    momentum=st.floats(0, 0.98),
    rates=st.lists(st.floats(0, 0.5), min_size=1, max_size=60),
)
def test_no_gamma_falls_below_the_lowest_before_it_is_1(gamma, lam, momentum, rates):
    rates = torch.tensor(rates, dtype=torch.float64)
    lowest = measurements.lowest_gamma(gamma, rates, lam, momentum)
    assert lowest >= 1
    path = simulated(gamma, rates, lam, momentum)
    if lowest > 1:
        assert (path >= lowest * (1 - 1e-9)).all()
        t = torch.arange(1, len(rates) + 1, dtype=torch.float64)  # what momentum had no time to do: μᵗ⁺¹ of each step
        missing = lam * (rates * momentum ** (t + 1)).sum() / (1 - momentum)
        assert (path[-1] / lowest).log().item() == pytest.approx(missing.item(), abs=1e-9)
    else:
        before = path[: int((path <= 1).nonzero()[0])] if (path <= 1).any() else path
        assert (before >= lowest).all()


@pytest.mark.parametrize("lam", [1e-3, 3e-2, 3e-1])
def test_the_lowest_gamma_is_nearly_reached_by_the_schedules_of_the_notebook(lam):
    one = recipe("digits", "lcnn", lambda_gamma=lam)
    rates = measurements.rates(one)
    lowest = measurements.lowest_gamma(one.gamma, rates, lam, one.momentum).item()
    path = simulated(one.gamma, rates, lam, one.momentum)
    if lowest > 1:
        assert lowest < path[-1] < 1.1 * lowest
    else:  # momentum carries γ below 1 on the way, but there it ends
        assert path.min() < 0.9
        assert path[-1].item() == pytest.approx(1, abs=1e-3)


def test_lowest_gamma_by_hand():
    rates = torch.full((10,), 0.1, dtype=torch.float64)
    assert measurements.lowest_gamma(10.0, rates, 0.1, 0.9).item() == pytest.approx(10 / math.e)
    assert measurements.lowest_gamma(10.0, rates, 0.0, 0.9).item() == pytest.approx(10)
    assert measurements.lowest_gamma(1.0, rates, 0.1, 0.9).item() == 1
    assert measurements.lowest_gamma(2.0, rates, 1.0, 0.9).item() == 1


# ---- GradReg's two forms -----------------------------------------------------------------------------------------


def test_the_difference_tends_to_the_exact_penalty():
    frame = measurements.two_forms((1e-1, 1e-2, 1e-3), images=12)
    assert list(frame.columns) == ["step", "exact", "difference", "gradient_error"]
    assert frame.step.tolist() == [1e-1, 1e-2, 1e-3]
    assert frame.exact.nunique() == 1
    for errors in ((frame.difference / frame.exact - 1).abs(), frame.gradient_error):
        for large, small in pairwise(errors):
            assert 5 < large / small < 20, "linear in the step"
    assert frame.gradient_error.iloc[-1] < 0.01


def test_the_exact_penalty_is_the_gradient_of_the_loss():
    """N ‖∇ mean ℓ‖², by a directional derivative of the same net's loss."""
    frame = measurements.two_forms((1e-2,), images=6)
    net = build(recipe("digits", "lcnn_gradreg", lambda_grad=1.0)).double().train()
    x, y = (part[:6] for part in samples(recipe("digits", "lcnn"), "train"))
    x = x.double().requires_grad_()
    for module in net.modules():
        if isinstance(module, SpectralNorm):
            module.eval()
    (gradient,) = torch.autograd.grad(F.cross_entropy(net(x), y), x)
    # power iteration has moved a little further there
    assert frame.exact[0] == pytest.approx(6 * gradient.square().sum().item(), rel=0.05)


# ---- a failure and its repair ------------------------------------------------------------------------------------


def test_failure_recipes():
    arms = measurements.failure_recipes((0, 4), lam=0.6)
    prices = {name: {(r.lambda_beta, r.lambda_gamma, r.epochs) for r in recipes} for name, recipes in arms.items()}
    assert prices == {
        "healthy": {(0.01, 0.01, 8)},
        "only λ_β too large": {(0.6, 0.01, 8)},
        "only λ_γ too large": {(0.01, 0.6, 8)},
        "both too large": {(0.6, 0.6, 8)},
        "both too large, 4 × the epochs": {(0.6, 0.6, 32)},
        "a quarter of that, 4 × the epochs": {(0.15, 0.15, 32)},
    }
    assert all([one.seed for one in recipes] == [0, 4] for recipes in arms.values())
    assert arms["healthy"][0] == recipe("digits", "lcnn")
    pulls = [measurements.rates(one).sum().item() * one.lambda_gamma for one, _ in list(arms.values())[3:]]
    assert pulls[2] == pytest.approx(pulls[0], rel=0.01), "the same pull as in a quarter of the time"


def test_ingredient_recipes():
    arms = measurements.ingredient_recipes((3,))
    found = {name: (one.beta, one.lambda_beta, one.lambda_gamma) for name, (one,) in arms.items()}
    assert list(found.values()) == [
        (1000, 0, 0), (5, 0, 0), (5, 0, 0.01), (5, 0.01, 0), (5, 0.01, 0.01), (100, 0.01, 0.01), (1000, 0.01, 0.01)
    ]  # fmt: skip


def test_arms_frame_table_and_nets(store):
    of = lambda seed, lam: recipe("moons", "lcnn", seed, epochs=1, width=4, lambda_beta=lam)
    arms = {"cheap": [of(2, 0.0), of(3, 0.0)], "dear": [of(2, 0.5), of(3, 0.5)]}
    frame, nets = measurements.arms_frame(arms, progress=False), measurements.arm_nets(arms)
    assert [tuple(row) for row in frame[["arm", "seed"]].to_numpy()] == [(arm, s) for arm in arms for s in (2, 3)]
    for arm, recipes in arms.items():
        for one in recipes:
            made = run(one, progress=False)
            (row,) = frame[(frame.arm == arm) & (frame.seed == one.seed)].itertuples()
            values = layer_values(made.model)
            for kind, found in (("beta", row.beta), ("gamma", row.gamma)):
                expected = np.median([value for name, value in values.items() if name.startswith(kind)])
                assert found == pytest.approx(expected, abs=2e-6)
            assert (row.accuracy, row.curvature) == (made.metrics["accuracy"], made.metrics["curvature"])
            if one.seed == 2:
                assert torch.equal(next(nets[arm].parameters()), next(made.model.parameters()))
    assert list(nets) == list(arms)
    table = measurements.arms_table(frame).set_index("")
    assert list(table.index) == list(arms)
    assert table.loc["dear", "C of the loss"] == measurements.plus_minus(frame[frame.arm == "dear"].curvature)
    pd.testing.assert_frame_equal(measurements.history(arms["dear"][0]), run(arms["dear"][0]).history)


@pytest.mark.parametrize(
    ("values", "shown"),
    [([1.0, 3.0], "2.0 ± 1.4"),
     ([5.0], "5"), ([98.7654, 98.7654], "98.8"), ([math.nan], "–"), ([1e3, 9e3], "5000 ± 5657"),
     ([0.01, 0.02], "0.0150 ± 0.0071"), ([0.0, 0.0], "0")],
)  # fmt: skip
def test_plus_minus(values, shown):
    assert measurements.plus_minus(pd.Series(values)) == shown


def test_softened_nets_are_the_trained_ones_with_another_beta(store):
    (row,) = measurements.softened_frame((0,), (10.0,)).itertuples()
    net = run(recipe("digits", "standard")).model
    for module in net.modules():
        if isinstance(module, CenteredSoftplus):
            module.beta = 10.0
    x, y = samples(recipe("digits", "standard"), "test")
    assert row.accuracy > 0.9
    assert row.accuracy == (net(x).argmax(1) == y).float().mean().item()


def test_iteration_share():
    assert 0 < measurements.iteration_share(rounds=2) < 1


def test_signal_frame_by_hand():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, 4), CenteredSoftplus(2.0), nn.BatchNorm1d(4), nn.Linear(4, 2), CenteredSoftplus(9.0)
    )
    net.train()
    x = torch.randn(50, 3) * torch.tensor([1.0, 2.0, 3.0])
    frame = measurements.signal_frame({"one": net, "again": net}, x)
    assert net.training
    assert net[2].num_batches_tracked == 0, "in eval mode meanwhile"
    assert not any(module._forward_hooks for module in net.modules())
    assert frame.to_numpy().tolist()[:3] == [["one", i, v] for i, v in enumerate(frame.spread[:3])]
    assert frame.net.tolist() == ["one"] * 3 + ["again"] * 3
    assert frame.layer.tolist() == [0, 1, 2] * 2
    smooth = lambda z, beta: (F.softplus(z, beta) - math.log(2) / beta).detach()
    first = smooth(net[0](x), 2.0)
    second = smooth(net[3](first / math.sqrt(1 + 1e-5)), 9.0)
    for found, signal in zip(frame.spread, (x, first, second), strict=False):
        spread = signal.double().numpy().std(0, ddof=1)
        assert found == pytest.approx(math.sqrt((spread**2).mean()), rel=1e-4)
    assert frame.spread.tolist()[3:] == frame.spread.tolist()[:3]


def test_signal_frame_of_images():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), CenteredSoftplus(5.0), nn.Flatten())
    x = torch.rand(20, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    frame = measurements.signal_frame({"net": net}, x)
    expected = [x.numpy().std(0, ddof=1), net[:2](x).detach().numpy().std(0, ddof=1)]
    np.testing.assert_allclose(frame.spread, [np.sqrt((s**2).mean()) for s in expected], rtol=1e-5)


# ---- what a step costs -------------------------------------------------------------------------------------------


def test_cost_frame_divides_round_by_round(monkeypatch):
    """With a clock of our own: the first round doesn't count, and every round has its own Standard."""
    now, ended, turns = [0.0], [], []
    price = {"standard": 2.0, "lcnn": 3.0, "cure": 8.0}

    def stepper(one, x, y):
        assert (len(x), len(y)) == (128, 128)

        def step():
            turns.append(one.method)
            disturbed = 10 if turns.count("standard") == 2 else 1  # the whole second round
            late = 100 if turns.count(one.method) == 1 else 1
            now[0] += price[one.method] * disturbed * late

        return step, lambda: ended.append(one.method)

    monkeypatch.setattr(studies, "stepper", stepper)
    monkeypatch.setattr(measurements.time, "perf_counter", lambda: now[0])
    frame = measurements.cost_frame(("lcnn", "cure"), rounds=3)
    assert turns == ["standard", "lcnn", "cure"] * 4
    assert sorted(ended) == sorted(price)
    assert set(frame.method) == {"lcnn", "cure"}, "Standard is timed, but wasn't asked for"
    np.testing.assert_allclose(frame.groupby("method").ratio.agg(list)["lcnn"], [1.5] * 3)
    np.testing.assert_allclose(frame.groupby("method").ratio.agg(list)["cure"], [4.0] * 3)


@pytest.mark.parametrize("method", ["relu", "lcnn", "cure"])
def test_a_timed_step_is_a_training_step(method, monkeypatch):
    """Loss and gradients are those of the objective, again in every step; its end gives the norms back."""
    made = []
    monkeypatch.setattr(studies, "build", lambda one: made.append(build(one)) or made[-1])
    one = recipe("digits", method, width=2)
    x, y = (part[:8] for part in samples(one, "train"))
    step, end = measurements.stepper(one, x, y)
    (model,) = made
    for _ in range(2):
        step()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.training
    norms = [m for m in model.modules() if isinstance(m, SpectralNorm)]
    assert bool(norms) == (method != "relu")
    assert all(norm.now for norm in norms)
    end()
    assert not any(norm.now for norm in norms)
