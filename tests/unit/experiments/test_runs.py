"""Runs: trained once and then read; their records and shipped weights, damaged or not; the list of all of them."""

import json
import shutil
from dataclasses import asdict, replace

import pandas as pd
import pytest
import torch
from helpers import contents
from networks import same_weights

from lcnn_utils.curvature import geometry
from lcnn_utils.experiments import load_weights, measure, results, run
from lcnn_utils.experiments import runs as experiments
from lcnn_utils.measurements.ship import ship
from lcnn_utils.training import Recipe, accuracy, fit_recipe, recipe, run_name, samples
from lcnn_utils.training.checkpoint import read, recipe_of, write

TINY = recipe("moons", "lcnn", epochs=2, width=4)
OTHER = recipe("moons", "standard", epochs=1, width=4)

METRICS = (
    "accuracy", "grad_norm", "hessian_norm", "curvature", "margin_curvature", "curvature_median",
    "margin_curvature_median", "images", "measured", "parameters",
)  # fmt: skip
RECORDS = sorted(experiments.SHIPPED.glob("*.json"))
WEIGHTS = sorted(experiments.SHIPPED.glob("*.safetensors"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store in which TINY has been trained, and a folder in which it has been shipped."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LCNN_STORE", str(folder / "store"))
        patch.setenv("LCNN_DEVICE", "cpu")
        run(TINY, progress=False)
        ship(TINY, folder / "shipped", progress=False)
    return folder


@pytest.fixture
def stored(store, made):
    """The record of TINY, in a copy of that store."""
    shutil.copytree(made / "store", store)
    return store / "runs" / f"{run_name(TINY)}.json"


def test_a_run_is_trained_once_and_then_read(store, no_training, monkeypatch):
    first = run(TINY, progress=False)
    before = contents(store / "runs")
    assert set(before) == {f"{run_name(TINY)}.json", f"{run_name(TINY)}.safetensors"}, "and nothing half-written"
    no_training()
    second = run(TINY, progress=False)
    assert same_weights(first.model, second.model)
    assert not second.model.training
    monkeypatch.setattr(experiments, "fit_recipe", lambda *_, **__: pytest.fail("the weights were not asked for"))
    third = run(TINY, progress=False, weights=False)
    assert third.model is None
    for other in (second, third):
        assert (other.recipe, other.metrics, other.provenance) == (TINY, first.metrics, first.provenance)
        pd.testing.assert_frame_equal(other.history, first.history, check_dtype=False, atol=1e-6, rtol=0)
    assert contents(store / "runs") == before
    about = {"lcnn_utils", "torch", "python", "device", "threads", "precision", "seconds", "seed", "date"}
    assert about == set(first.provenance)


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_the_metrics_are_what_they_say(share, store, monkeypatch):
    """Means and medians of the geometry; on the part that the recipe holds out, if it does."""
    one, seen = replace(OTHER, validation_fraction=share), []
    monkeypatch.setattr(experiments, "samples", lambda one, split, _: seen.append(split) or samples(one, split))
    made = run(one, progress=False)
    assert tuple(made.metrics) == METRICS
    assert seen == ["validation" if share else "test"]
    x, y = samples(one, seen[0])
    assert made.metrics["images"] == made.metrics["measured"] == len(y) == (80 if share else 1000)
    assert made.metrics["parameters"] == (2 * 4 + 4) + (4 * 4 + 4) + (4 * 2 + 2)
    assert made.metrics["accuracy"] == pytest.approx((made.model(x).argmax(1) == y).float().mean().item())
    monkeypatch.setattr(experiments, "GEOMETRY", 41)
    found = measure(made.model, one)
    assert (found["images"], found["measured"], found["accuracy"]) == (len(y), 41, made.metrics["accuracy"])
    loss, margin = (geometry(made.model, x[:41], y[:41], scalar=scalar) for scalar in ("loss", "margin"))
    values = [loss.grad_norm.mean(), loss.hessian_norm.mean(), loss.curvature.mean(), margin.curvature.mean()]
    values += [loss.curvature.median(), margin.curvature.median()]
    assert [found[name] for name in METRICS[1:7]] == pytest.approx([value.item() for value in values])


# ---- damaged -----------------------------------------------------------------------------------------------------


DAMAGES = {
    "truncated": lambda content: content[: len(content) // 2],
    "a field too many": lambda content: content.replace(b'"epochs":', b'"lambda_delta": 1.0, "epochs":', 1),
    "another seed": lambda content: content.replace(b'"seed": 0', b'"seed": 1', 1),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_named_and_kept_and_left_out_of_the_list(damage, stored, shipped, no_training):
    whole = results()
    stored.with_name(f".{stored.name}").touch()  # one that is being written
    stored.write_bytes(DAMAGES[damage](stored.read_bytes()))
    before = contents(stored.parent)
    no_training()
    with pytest.raises(RuntimeError, match=r"is damaged .* delete it") as raised:
        run(TINY, progress=False)
    assert str(stored) in str(raised.value)
    with pytest.warns(RuntimeWarning, match=r"left out: .* is damaged"):
        assert len(results()) == len(whole) - 1
    assert contents(stored.parent) == before
    stored.unlink()  # the way out
    assert run(TINY, progress=False).metrics["images"] == 1000


CHECKPOINTS = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "of another recipe": lambda path: write(path, read(path)[0], {"recipe": json.dumps(asdict(OTHER))}),
    "a layer too few": lambda path: write(path, dict([*read(path)[0].items()][1:]), read(path)[1]),
}


@pytest.mark.parametrize("damage", CHECKPOINTS)
def test_damaged_weights_are_named_and_kept(damage, store, made, shipped, no_training):
    shutil.copytree(made / "shipped", shipped)
    path = shipped / f"{run_name(TINY)}.safetensors"
    CHECKPOINTS[damage](path)
    before = contents(shipped)
    no_training()
    with pytest.raises(RuntimeError, match=r"is damaged or of another version .*restore it with git") as raised:
        run(TINY, progress=False)
    assert str(path) in str(raised.value)
    assert contents(shipped) == before
    assert run(TINY, weights=False).metrics["images"] == 1000, "the numbers are still there"


# ---- shipping ----------------------------------------------------------------------------------------------------


def test_shipped_weights_are_rounded_and_so_are_their_metrics(store, shipped, no_training, monkeypatch, tmp_path):
    monkeypatch.setattr(experiments, "GEOMETRY", 20)
    one = recipe("digits", "lcnn", epochs=2, model="mlp", width=16, batch_size=64)
    net, state = fit_recipe(one, progress=False)[0], torch.random.get_rng_state()
    made = ship(one, shipped, progress=False)
    assert torch.equal(state, torch.random.get_rng_state())
    path, exact = shipped / f"{run_name(one)}.safetensors", net.state_dict()
    for name, value in read(path)[0].items():
        assert value.dtype == (torch.float16 if exact[name].is_floating_point() else exact[name].dtype), name
        torch.testing.assert_close(value.to(exact[name].dtype), exact[name], rtol=2**-11, atol=1e-7, msg=name)
    rounded, (x, y) = load_weights(path, one), samples(one, "test")
    assert made.metrics == measure(rounded, one)
    assert same_weights(made.model, rounded)
    assert accuracy(net, x, y) > 0.3, "a net that has learnt something"
    with torch.no_grad():
        assert (rounded(x) - net(x)).abs().max() < 0.05 * net(x).std()
    monkeypatch.setenv("LCNN_STORE", str(tmp_path / "empty"))
    no_training()
    found = run(one, progress=False)
    assert same_weights(found.model, rounded)
    assert (found.metrics, found.provenance) == (made.metrics, made.provenance)


def test_results_lists_each_run_once(store, shipped, monkeypatch, tmp_path):
    assert results().empty
    made = run(TINY, progress=False)
    ship(TINY, shipped, progress=False)
    other, stored = ship(replace(OTHER, seed=3), shipped, progress=False, weights=False), run(OTHER, progress=False)
    frame = results()
    assert set(frame.columns) == {*asdict(TINY), *METRICS, "seconds", "device", "date"}
    assert len(frame) == 3
    for one in (made, other, stored):
        (row,) = frame[(frame.method == one.recipe.method) & (frame.seed == one.recipe.seed)].to_dict("records")
        assert Recipe(**{name: row[name] for name in asdict(TINY)}) == one.recipe
        assert row["accuracy"] == pytest.approx(one.metrics["accuracy"], abs=2e-3)
    monkeypatch.setenv("LCNN_STORE", str(tmp_path / "empty"))
    assert run(other.recipe, progress=False).metrics["images"] == 1000, "weights that aren't shipped are trained"


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.stem)
def test_every_shipped_net_has_its_accuracy(path, store, no_training, request):
    no_training()
    one = recipe_of(json.loads(path.with_suffix(".json").read_text())["recipe"])
    if one.dataset == "cifar10":
        request.getfixturevalue("cifar_root")
    made = run(one, progress=False)
    x, y = (part[: 360 if one.dataset == "digits" else 100] for part in samples(one, "test"))
    n, share = len(y), made.metrics["accuracy"]
    allowed = 1.5 / n if one.dataset == "digits" else 3.5 * (share * (1 - share) / n) ** 0.5  # of all 10,000
    assert abs(accuracy(made.model, x, y) - share) < allowed


@pytest.mark.slow
def test_one_of_them_trained_again_is_as_good(store, shipped):
    one = recipe("digits", "lcnn", 1)
    recorded = experiments.read_record(next(path for path in RECORDS if path.stem == run_name(one)))
    model, history = fit_recipe(one, progress=False)
    assert accuracy(model, *samples(one, "test")) == pytest.approx(recorded.metrics["accuracy"], abs=0.03)
    assert set(history.columns) <= set(recorded.history.columns)
    assert history.sum_beta.iloc[-1] == pytest.approx(recorded.history.sum_beta.iloc[-1], rel=0.1)
