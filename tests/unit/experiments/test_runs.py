"""Runs: trained once and then read; their records and shipped weights, damaged or not; the list of all of them."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from lcnn_utils.experiments import load_weights, measure, results, run
from lcnn_utils.experiments import runs as experiments
from lcnn_utils.measurements.ship import ship
from lcnn_utils.training import METHODS, OBJECTIVES, Recipe, accuracy, fit_recipe, recipe, run_name, samples
from lcnn_utils.training.checkpoint import read, recipe_of, write

TINY = recipe("moons", "lcnn", epochs=2, width=4)
OTHER = recipe("moons", "standard", epochs=1, width=4)

METRICS = (
    "accuracy", "grad_norm", "hessian_norm", "curvature", "margin_curvature", "curvature_median",
    "margin_curvature_median", "images", "measured", "parameters",
)  # fmt: skip
RECORDS = sorted(experiments.SHIPPED.glob("*.json"))
WEIGHTS = sorted(experiments.SHIPPED.glob("*.safetensors"))


@pytest.fixture
def shipped(monkeypatch, tmp_path):
    """A folder of one's own for what is shipped."""
    monkeypatch.setattr(experiments, "SHIPPED", tmp_path / "shipped")
    return tmp_path / "shipped"


@pytest.fixture
def no_training(monkeypatch):
    """From ``no_training()`` on, a step of training fails the test."""

    def refuse():
        for method in METHODS:
            monkeypatch.setitem(OBJECTIVES, method, lambda *_, **__: pytest.fail("it was trained again"))

    return refuse


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


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*") if path.is_file()}


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def test_a_run_is_trained_once_and_then_read(store, no_training, monkeypatch):
    first = run(TINY, progress=False)
    before = files(store / "runs")
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
    assert files(store / "runs") == before
    about = {"lcnn_utils", "torch", "python", "device", "threads", "precision", "seconds", "seed", "date"}
    assert about == set(first.provenance)


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_the_metrics_are_what_they_say(share, store, monkeypatch):
    """Against torch's Hessians in float64; on the part that the recipe holds out, if it does."""
    one, seen = replace(OTHER, validation_fraction=share), []
    monkeypatch.setattr(experiments, "samples", lambda one, split, _: seen.append(split) or samples(one, split))
    made = run(one, progress=False)
    assert tuple(made.metrics) == METRICS
    assert seen == ["validation" if share else "test"]
    x, y = samples(one, seen[0])
    assert made.metrics["images"] == made.metrics["measured"] == len(y) == (80 if share else 1000)
    assert made.metrics["parameters"] == (2 * 4 + 4) + (4 * 4 + 4) + (4 * 2 + 2)
    assert made.metrics["accuracy"] == pytest.approx((made.model(x).argmax(1) == y).float().mean().item())
    net, n = made.model.double(), 41
    x, y = x[:n].double(), y[:n]
    scalars = (
        lambda z, label: nn.functional.cross_entropy(net(z[None]), label[None]),
        lambda z, label: (2 * label - 1) * net(z[None]).diff().sum(),
    )
    monkeypatch.setattr(experiments, "samples", lambda *_: (x, y))
    found = measure(net, one)
    for name, f in zip(("curvature", "margin_curvature"), scalars, strict=True):
        grad_norm = torch.func.vmap(torch.func.grad(f))(x, y).norm(dim=1)
        hessian_norm = torch.linalg.matrix_norm(torch.func.vmap(torch.func.hessian(f))(x, y), 2)
        curvature = hessian_norm / (grad_norm + 1e-6)
        assert found[name] == pytest.approx(curvature.mean().item(), rel=1e-5)
        assert found[f"{name}_median"] == pytest.approx(curvature.sort().values[n // 2].item(), rel=1e-5)
        if name == "curvature":
            assert found["grad_norm"] == pytest.approx(grad_norm.mean().item(), rel=1e-5)
            assert found["hessian_norm"] == pytest.approx(hessian_norm.mean().item(), rel=1e-5)
    monkeypatch.setattr(experiments, "GEOMETRY", 10)
    few = measure(net, one)
    assert (few["images"], few["measured"], few["accuracy"]) == (n, 10, found["accuracy"])


# ---- damaged -----------------------------------------------------------------------------------------------------


def altered(part: str = "recipe", **changes):
    """Change fields of a part of the record, with a checksum of its own."""

    def damage(content: bytes) -> bytes:
        record = json.loads(content)
        del record["sha256"]
        record[part] |= changes
        return json.dumps(record | {"sha256": experiments._sha256(record)}).encode()

    return damage


DAMAGES = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "not text": lambda content: b"\xff\xfe" + content,
    "another accuracy": lambda content: content.replace(b'"accuracy": 0.', b'"accuracy": 0.9', 1),
    "a field too many": altered(lambda_delta=1.0),
    "another seed": altered(seed=1),
    "a metric that is no number": altered("metrics", curvature=float("nan")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_named_and_kept_and_left_out_of_the_list(damage, stored, shipped, no_training):
    whole = results()
    stored.with_name(f".{stored.name}").touch()  # one that is being written
    stored.write_bytes(DAMAGES[damage](stored.read_bytes()))
    before = files(stored.parent)
    no_training()
    with pytest.raises(RuntimeError, match=r"is damaged .* delete it") as raised:
        run(TINY, progress=False)
    assert str(stored) in str(raised.value)
    with pytest.warns(RuntimeWarning, match=r"left out: .* is damaged"):
        assert len(results()) == len(whole) - 1
    assert files(stored.parent) == before
    stored.unlink()  # the way out
    assert run(TINY, progress=False).metrics["images"] == 1000


CHECKPOINTS = {
    "one bit": lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
    "of another recipe": lambda path: write(path, read(path)[0], {"recipe": json.dumps(asdict(OTHER))}),
    "a layer too few": lambda path: write(path, dict([*read(path)[0].items()][1:]), read(path)[1]),
}


@pytest.mark.parametrize("damage", CHECKPOINTS)
def test_damaged_weights_are_named_and_kept(damage, store, made, shipped, no_training):
    shutil.copytree(made / "shipped", shipped)
    path = shipped / f"{run_name(TINY)}.safetensors"
    CHECKPOINTS[damage](path)
    before = files(shipped)
    no_training()
    with pytest.raises(RuntimeError, match=r"is damaged or of another version .*restore it with git") as raised:
        run(TINY, progress=False)
    assert str(path) in str(raised.value)
    assert files(shipped) == before
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
    assert list(history.columns) == list(recorded.history.columns)
    assert history.sum_beta.iloc[-1] == pytest.approx(recorded.history.sum_beta.iloc[-1], rel=0.1)
