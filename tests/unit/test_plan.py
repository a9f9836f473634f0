"""Sweeps in sittings: the pieces of a plan, what an epoch is expected to take, and trainings that stop in between."""

import json
import math
import time
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, safe_open

from lcnn_utils import data
from lcnn_utils.experiments import plan, run, timing
from lcnn_utils.experiments import runs as experiments
from lcnn_utils.experiments.plan import Part, epochs_done, missing, one_by_one, ordered, pieces, recorded
from lcnn_utils.experiments.timing import Expectation, kind, known, probe, timed_runs
from lcnn_utils.training import OBJECTIVES, Recipe, fit, recipe, run_name, state_path
from lcnn_utils.training.checkpoint import reached
from lcnn_utils.training.fit import made_on

CPU = torch.device("cpu")
TINY = recipe("moons", "lcnn", epochs=3, width=4)
OTHER = replace(TINY, method="standard")
BROKEN = replace(OTHER, lr=1e20)


@pytest.fixture(autouse=True)
def shipped(store, monkeypatch, tmp_path):
    """Nothing is shipped, and a store of one's own."""
    monkeypatch.setattr(experiments, "SHIPPED", tmp_path / "shipped")
    return tmp_path / "shipped"


def swept(recipes, **options):
    return list(one_by_one(recipes, progress=False, **options))


def until_now() -> dict[str, float]:
    """A deadline that has come."""
    return {"until": time.monotonic()}


def metadata(one: Recipe) -> dict[str, str]:
    with safe_open(state_path(one), "pt") as file:
        return file.metadata()


def forbid(monkeypatch):
    for method in OBJECTIVES:
        monkeypatch.setitem(OBJECTIVES, method, lambda *_, **__: pytest.fail("it was trained"))


# ---- the order ---------------------------------------------------------------------------------------------------


def test_seeds_are_outermost_then_datasets_then_methods():
    found = ordered(("svhn", "cifar10"), ("relu", "lcnn"), (2, 0), "tiny", epochs=1)
    assert [(one.seed, one.dataset, one.method) for one in found] == [
        (2, "svhn", "relu"), (2, "svhn", "lcnn"), (2, "cifar10", "relu"), (2, "cifar10", "lcnn"),
        (0, "svhn", "relu"), (0, "svhn", "lcnn"), (0, "cifar10", "relu"), (0, "cifar10", "lcnn"),
    ]  # fmt: skip
    assert all(one == recipe(one.dataset, one.method, one.seed, "tiny", epochs=1) for one in found)
    assert len(ordered(("moons",), ("relu", "lcnn", "relu"), (0, 0))) == 2, "each once"


def test_a_grid():
    grid = {"lambda_beta": [1e-4, 1e-3], "width": [2, 3]}
    found = ordered(("moons",), ("lcnn", "minimal"), (0, 1), epochs=1, grid=grid)
    assert [(one.seed, one.method, one.lambda_beta, one.width) for one in found] == [
        (seed, method, value, width)
        for seed in (0, 1) for method in ("lcnn", "minimal") for value in (1e-4, 1e-3) for width in (2, 3)
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"unknown field of a recipe 'lambda_bet'.*did you mean 'lambda_beta'"):
        ordered(("moons",), ("lcnn",), (0,), grid={"lambda_bet": [1.0]})


def test_what_means_nothing_to_a_method_is_not_varied():
    grid = {"lambda_beta": [1e-4, 1e-3], "lambda_cure": [1.0, 2.0], "lr": [0.1, 0.2]}
    found = ordered(("moons",), ("standard", "lcnn", "cure"), (0,), grid=grid)
    assert [(one.method, one.lambda_beta, one.lambda_cure, one.lr) for one in found] == [
        *[("standard", found[0].lambda_beta, found[0].lambda_cure, lr) for lr in (0.1, 0.2)],
        *[("lcnn", value, found[0].lambda_cure, lr) for value in (1e-4, 1e-3) for lr in (0.1, 0.2)],
        *[("cure", found[0].lambda_beta, value, lr) for value in (1.0, 2.0) for lr in (0.1, 0.2)],
    ]
    assert found[0] == recipe("moons", "standard"), "with the default"


# ---- pieces ------------------------------------------------------------------------------------------------------

PARTS = st.lists(
    st.tuples(st.integers(1, 5), st.integers(0, 40), st.floats(0.01, 500)).map(
        lambda t: Part(TINY, t[0], t[0] + t[1] - 1, Expectation(t[2], "test"))
    ),
    max_size=6,
).map(lambda parts: [replace(part, recipe=replace(TINY, seed=i)) for i, part in enumerate(parts)])


@settings(deadline=None, max_examples=300)
@given(parts=PARTS, limit=st.one_of(st.floats(0, 600), st.just(math.inf)))
def test_pieces_keep_the_limit_and_hold_every_epoch_once_in_order(parts, limit):
    cut = pieces(parts, limit)
    wanted = [(part.recipe, epoch) for part in parts for epoch in range(part.first, part.last + 1)]
    assert [(p.recipe, e) for piece in cut for p in piece for e in range(p.first, p.last + 1)] == wanted
    for piece in cut:
        alone = len(piece) == 1 and piece[0].first == piece[0].last
        assert sum(part.seconds for part in piece) <= limit * (1 + 1e-9) or alone
        assert all(part.first <= part.last for part in piece)
    for piece, after in pairwise(cut):
        assert sum(part.seconds for part in piece) + after[0].epoch.seconds > limit * (1 - 1e-9), "no room was left"


def test_pieces_by_hand():
    one = [Part(TINY, 3, 10, Expectation(2.0, "")), Part(OTHER, 1, 2, Expectation(10.0, ""))]
    found = [[(p.recipe.method, p.first, p.last, p.seconds) for p in piece] for piece in pieces(one, 9.0)]
    assert found == [
        [("lcnn", 3, 6, 8.0)], [("lcnn", 7, 10, 8.0)], [("standard", 1, 1, 10.0)], [("standard", 2, 2, 10.0)]
    ]  # fmt: skip
    assert [len(piece) for piece in pieces(one, 26.0)] == [2, 1]
    assert pieces([], 9.0) == []


# ---- what is left ------------------------------------------------------------------------------------------------


def test_epochs_done(store):
    assert (epochs_done(TINY), recorded(TINY)) == (0, False)
    swept([TINY], **until_now())
    assert (epochs_done(TINY), recorded(TINY)) == (1, False)
    fit(TINY, progress=False)
    assert (epochs_done(TINY), recorded(TINY)) == (3, False), "trained, not measured"
    run(TINY, progress=False)
    state_path(TINY).unlink()
    assert (epochs_done(TINY), recorded(TINY)) == (3, True), "its numbers are there"
    assert epochs_done(OTHER) == 0


def test_what_is_shipped_is_done(store, shipped, monkeypatch, tmp_path):
    experiments.ship(TINY, progress=False)
    monkeypatch.setenv("LCNN_STORE", str(tmp_path / "empty"))
    forbid(monkeypatch)
    assert missing([TINY], CPU) == []
    (outcome,) = swept([TINY])
    assert outcome.run.metrics == run(TINY, weights=False).metrics
    assert not (tmp_path / "empty").exists()


def test_missing_starts_at_the_next_epoch():
    swept([TINY], **until_now())
    run(OTHER, progress=False)
    third = replace(TINY, method="relu")
    parts = missing([TINY, OTHER, third], CPU)
    assert [(part.recipe, part.first, part.last) for part in parts] == [(TINY, 2, 3), (third, 1, 3)]
    assert missing([OTHER], CPU) == []


def test_a_damaged_state_is_named(monkeypatch):
    """A plan says what to do about it; a sweep puts it aside, and trains anew."""
    swept([TINY], **until_now())
    path = state_path(TINY)
    content = path.read_bytes()[:30]
    path.write_bytes(content)
    with pytest.raises(RuntimeError, match=rf"^{path} is damaged or of another version .*delete it to train anew$"):
        missing([TINY], CPU)
    anew, other = swept([TINY, OTHER])
    (note,) = anew.notes
    assert note.startswith(f"{path} is damaged")
    assert note.endswith(f"it was put into {path.parent / 'damaged'}, and made anew")
    assert (path.parent / "damaged" / path.name).read_bytes() == content
    assert (anew.epochs, anew.error, other.notes) == (3, None, ())
    assert None not in (anew.run, other.run)


def test_a_damaged_record_and_a_damaged_state(monkeypatch, tmp_path):
    """Both at once; the numbers are those of a run that nothing happened to."""
    expected = run(TINY, progress=False).metrics
    for path in (state_path(TINY), state_path(TINY).with_suffix(".json")):
        path.write_bytes(b"not that")
    (outcome,) = swept([TINY])
    assert len(outcome.notes) == 2
    assert outcome.run.metrics == expected


def test_what_is_shipped_is_never_put_aside(store, shipped, monkeypatch):
    experiments.ship(TINY, progress=False, weights=False)
    path = shipped / f"{run_name(TINY)}.json"
    path.write_text("{}")
    (outcome,) = swept([TINY])
    assert outcome.run is None
    assert "restore it with git" in str(outcome.error)
    assert path.exists()


def test_any_error_is_an_outcome_with_its_traceback(monkeypatch):
    def broken(*_, **__):
        raise AssertionError("a mistake of ours")

    monkeypatch.setitem(OBJECTIVES, "lcnn", broken)
    failed, other = swept([TINY, OTHER])
    assert str(failed.error) == "a mistake of ours"
    assert failed.traceback.startswith("Traceback (most recent call last):")
    assert "in broken" in failed.traceback
    assert (other.error, other.traceback) == (None, "")


# ---- what an epoch takes -----------------------------------------------------------------------------------------


def pretend(one: Recipe, seconds: float, device: str | None = None) -> None:
    """Make the record of a run say that its training took so long, there."""
    run(one, progress=False)
    path = state_path(one).with_suffix(".json")
    record = json.loads(path.read_text())
    record["provenance"] |= {"seconds": seconds, "device": device or made_on(CPU)["device"]}
    path.write_text(json.dumps(record))


def no_probe(monkeypatch):
    monkeypatch.setattr(timing, "probe", lambda *_: pytest.fail("steps were timed"))


def test_a_finished_run_of_the_same_kind_tells(monkeypatch):
    no_probe(monkeypatch)
    pretend(TINY, 30.0)
    (part,) = missing([replace(TINY, seed=1, epochs=7, lambda_beta=0.5, lr=0.2)], CPU)
    assert part.epoch == Expectation(pytest.approx(10.0), f"a finished run of this kind on {made_on(CPU)['device']}")
    assert part.seconds == pytest.approx(70.0)
    pretend(replace(TINY, seed=2), 60.0)
    pretend(replace(TINY, seed=3, epochs=1), 12.0)
    (part,) = missing([replace(TINY, seed=1)], CPU)
    assert part.epoch.seconds == pytest.approx(12.0), "the median of 10, 20 and 12 seconds"
    assert part.epoch.source.startswith("median of 3 finished runs of this kind on ")


OTHER_KINDS = [
    dict(method="relu"), dict(width=5), dict(batch_size=64), dict(derivative="difference"), dict(attack_steps=7),
    dict(augment=True),
]  # fmt: skip


@pytest.mark.parametrize("change", OTHER_KINDS, ids=str)
def test_runs_of_another_kind_do_not(change):
    pretend(TINY, 30.0)
    assert known(replace(TINY, seed=1, **change), CPU, timed_runs(CPU)) is None
    assert known(replace(TINY, seed=1), CPU, timed_runs(CPU)) is not None


@pytest.mark.parametrize("device", ["NVIDIA H200", "NVIDIA H200 and {here}", "arm64 CPU"])
def test_runs_of_another_device_do_not(device):
    pretend(TINY, 30.0, device.format(here=made_on(CPU)["device"]))
    assert known(replace(TINY, seed=1), CPU, timed_runs(CPU)) is None


def test_fewer_steps_take_less():
    """With a part held out an epoch is shorter: 8 steps in place of 11."""
    one = recipe("digits", "relu", model="mlp", width=4, epochs=1)
    pretend(one, 11.0)
    assert known(replace(one, held_out=0.2), CPU, timed_runs(CPU)).seconds == pytest.approx(8.0)


def test_else_its_own_epochs_tell(monkeypatch):
    no_probe(monkeypatch)
    for epochs in (1, 2):
        swept([replace(TINY, seed=2)], **until_now())
        (part,) = missing([replace(TINY, seed=2)], CPU)
        about = json.loads(metadata(replace(TINY, seed=2))["about"])
        assert part.epoch.seconds == pytest.approx(about["seconds"] / epochs)
        own = "its own first epoch" if epochs == 1 else "its own 2 epochs"
        assert part.epoch.source == f"{own}, with starting and compiling, on {made_on(CPU)['device']}"
    pretend(TINY, 30.0)
    (part,) = missing([replace(TINY, seed=2)], CPU)
    assert part.epoch.seconds == pytest.approx(10.0), "a whole run tells more than an epoch with its start"


def test_its_own_epochs_on_another_device_do_not(monkeypatch):
    swept([TINY], **until_now())
    monkeypatch.setattr(timing, "made_on", lambda _: {"device": "NVIDIA H200"})
    assert known(TINY, CPU, timed_runs(CPU)) is None


def test_else_steps_are_timed(monkeypatch):
    parts = missing([TINY, replace(TINY, seed=1)], CPU)
    assert parts[0].epoch is parts[1].epoch, "once a kind"
    assert parts[0].epoch.source == f"timed now, 3 steps, uncompiled, on {made_on(CPU)['device']}"
    assert 0 < parts[0].epoch.seconds < 60
    assert not state_path(TINY).exists(), "nothing is trained"


@pytest.mark.parametrize("dataset", ["moons", "digits"])
def test_a_probe_times_steps_and_counts_them(dataset, monkeypatch):
    clock, batches = [0.0], []
    real = OBJECTIVES["relu"]

    def slow(model, x, y, *args, **more):
        clock[0] += 100.0 if not batches else 2.0  # the first step is the slow one
        batches.append((tuple(x.shape), x.dtype))
        return real(model, x, y, *args, **more)

    monkeypatch.setitem(OBJECTIVES, "relu", slow)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    one = recipe(dataset, "relu", model="mlp", width=4, held_out=0.2)
    found = probe(one, CPU)
    shape, steps = ((320, 2), 20) if dataset == "moons" else ((128, 1, 8, 8), 8)
    assert found.seconds == pytest.approx(2.0 * steps)
    assert batches == [(shape, torch.float32)] * 4
    assert "random" not in found.source


def test_a_probe_without_its_dataset_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("LCNN_DATA", str(tmp_path / "nothing"))
    monkeypatch.setattr(data, "load", lambda *_, **__: pytest.fail("it was loaded"))
    seen = []
    real = OBJECTIVES["standard"]
    monkeypatch.setitem(OBJECTIVES, "standard", lambda model, x, *a, **k: seen.append(x) or real(model, x, *a, **k))
    found = probe(recipe("cifar100", "standard", scale="tiny", width=1, batch_size=4), CPU)
    assert found.source.endswith("; random images of its shape, as cifar100 is not on the disk")
    assert {tuple(x.shape) for x in seen} == {(4, 3, 32, 32)}
    assert 0 <= seen[0].min() < seen[0].max() <= 1
    assert found.seconds > 0


def test_a_probe_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    probe(TINY, CPU)
    assert torch.equal(state, torch.get_rng_state())


def test_kind_knows_every_field():
    """A new field: does it change the time of a step?"""
    free = {"seed", "epochs", "lr", "momentum", "weight_decay", "schedule", "beta", "softplus", "gamma", "h", "eps",
            "lambda_beta", "lambda_gamma", "lambda_grad", "lambda_cure", "held_out"}  # fmt: skip
    assert set(timing.COSTLY) | free == set(vars(TINY))
    assert len(kind(TINY)) == len(timing.COSTLY)


# ---- sweeps ------------------------------------------------------------------------------------------------------


def test_a_sweep_trains_what_is_missing_in_order(monkeypatch):
    made = run(OTHER, progress=False)
    third = replace(TINY, method="relu")
    outcomes = swept([TINY, OTHER, third])
    assert [outcome.recipe for outcome in outcomes] == [TINY, OTHER, third]
    assert all((o.epochs, o.error) == (3, None) for o in outcomes)
    assert outcomes[1].run.metrics == made.metrics
    forbid(monkeypatch)
    again = swept([TINY, OTHER, third])
    assert [o.run.metrics for o in again] == [o.run.metrics for o in outcomes]


@pytest.mark.parametrize("one", [TINY, recipe("digits", "lcnn", epochs=3, width=2, batch_size=512, augment=True)],
                         ids=["moons", "digits"])  # fmt: skip
def test_sittings_end_with_the_uninterrupted_model(one, store, monkeypatch, tmp_path):
    """Stopped after every epoch: bit for bit the run that was not, and no record before the end."""
    whole = run(one, progress=False)
    before = load_file(state_path(one))
    monkeypatch.setenv("LCNN_STORE", str(tmp_path / "another"))
    for epoch in (1, 2):
        (outcome,) = swept([one], **until_now())
        assert (outcome.run, outcome.error, outcome.epochs) == (None, None, epoch)
        assert reached(state_path(one))[0] == epoch
        assert not recorded(one)
    (outcome,) = swept([one], **until_now())
    assert outcome.epochs == 3
    assert outcome.run.metrics == whole.metrics
    after = load_file(state_path(one))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(json.loads(metadata(one)["history"])) == 3


def test_a_sitting_that_is_over_begins_nothing_new(monkeypatch):
    done = replace(TINY, seed=9)
    run(done, progress=False)
    outcomes = swept([TINY, OTHER, done], **until_now())
    assert [(o.epochs, o.run is not None) for o in outcomes] == [(1, False), (0, False), (3, True)]
    assert not state_path(OTHER).exists()


def test_a_sitting_stops_before_an_epoch_that_would_not_fit(monkeypatch):
    """An epoch takes 10 s by this clock, so that after 35 s there is none that would end within 40."""
    one, clock = replace(TINY, epochs=9), [0.0]
    real = OBJECTIVES["lcnn"]

    def objective(*args, **more):
        clock[0] += 0.5
        return real(*args, **more)

    monkeypatch.setitem(OBJECTIVES, "lcnn", objective)
    monkeypatch.setattr(plan.time, "monotonic", lambda: clock[0])
    assert [o.epochs for o in swept([one], until=35.0)] == [3]
    assert clock[0] == 30.0
    assert [o.epochs for o in swept([one], until=30.0 + 40.0)] == [7]
    clock[0] = 0.0
    for seed in (1, 5):
        pretend(replace(one, seed=seed), 9 * 10.0)
    clock[0] = 0.0
    outcomes = swept([replace(one, seed=2, epochs=1), replace(one, seed=3)], until=19.0)
    assert [o.epochs for o in outcomes] == [1, 0], "a run of its kind says that its first epoch would end at 20"
    outcomes = swept([replace(one, seed=4, epochs=1), replace(one, seed=3)], until=clock[0] + 21.0)
    assert [o.epochs for o in outcomes] == [1, 1]


def test_a_run_that_fails_ends_no_other():
    first, broken, last = swept([TINY, BROKEN, replace(TINY, method="relu")])
    assert first.run is not None
    assert last.run is not None
    assert (broken.run, broken.epochs) == (None, 0)
    assert "not finite in epoch 1" in str(broken.error)
    assert not recorded(BROKEN)


def test_a_run_that_fails_first_does_not_block_the_others():
    """Every call gets on by an epoch, whatever fails before."""
    broken, other = swept([BROKEN, TINY], **until_now())
    assert broken.error is not None
    assert other.epochs == 1


def test_a_trained_run_is_measured_even_if_time_is_up(monkeypatch):
    fit(OTHER, progress=False)
    outcomes = swept([TINY, OTHER], **until_now())
    assert [o.epochs for o in outcomes] == [1, 3]
    assert recorded(OTHER)


def test_a_device_that_is_not_there():
    with pytest.raises(RuntimeError, match="device 'cuda:99' is not available here"):
        swept([TINY], device="cuda:99")
    with pytest.raises(RuntimeError, match="device 'cuda:99' is not available here"):
        missing([TINY], "cuda:99")


def test_names_of_files_are_those_of_runs():
    swept([TINY])
    assert {path.stem for path in state_path(TINY).parent.glob("*.*")} == {run_name(TINY)}
