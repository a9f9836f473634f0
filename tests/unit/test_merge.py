"""Merging stores: nothing is lost, nothing doubled, ours stays, whatever the other store holds and whenever it ends."""

import contextlib
import errno
import gzip
import itertools
import json
import os
import pickle
import shutil
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import files_of_at_most
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tables import WEIGHTS, Evil, add, curve, run_of

from lcnn_utils.experiments import merge, results, rows, run, tables
from lcnn_utils.experiments import runs as experiments
from lcnn_utils.training import METHODS, MODELS, Recipe, build, make_optimizer, recipe, run_name, strict
from lcnn_utils.training.checkpoint import DAMAGE, load_state, locked, parse, reached, write
from lcnn_utils.training.inspection import _size, inspected

ONE, TWO, THREE = (recipe("moons", method, epochs=2, width=4) for method in ("lcnn", "standard", "relu"))


class Enough(Exception):
    pass


def train(folder: Path, one: Recipe, epochs: int = 2) -> None:
    """Train a recipe in a store, to its end or for some epochs."""

    def stop(history):
        if len(history) == epochs < one.epochs:
            raise Enough

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LCNN_STORE", str(folder))
        patch.setenv("LCNN_DEVICE", "cpu")
        with contextlib.suppress(Enough):
            run(one, progress=False, watch=stop)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Stores: ``done`` (ONE and TWO), ``begun`` (ONE and THREE, an epoch each)."""
    folder = tmp_path_factory.mktemp("made")
    for one in (ONE, TWO):
        train(folder / "done", one)
    for one in (ONE, THREE):
        train(folder / "begun", one, 1)
    add(folder / "done" / "results", curve(eps=[0.1, 0.2], accuracy=0.1))
    add(folder / "done" / "results", seed=1)
    tables.append(folder / "done" / "results", "digits_curves", curve(), {})
    add(folder / "begun" / "results", curve(eps=[0.2, 0.3], accuracy=0.9))
    return folder


@pytest.fixture
def done(made, tmp_path):
    return Path(shutil.copytree(made / "done", tmp_path / "done"))


@pytest.fixture
def begun(made, tmp_path):
    return Path(shutil.copytree(made / "begun", tmp_path / "begun"))


def files(folder: Path) -> dict[str, bytes]:
    """What a store holds, but for the locks."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.parent.name != "locks")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def whole(folder: Path) -> None:
    """Assert that a store can be read, all of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results((folder / "runs",))
    for path in (folder / "runs").glob("[!.]*.safetensors"):
        inspected(path.read_bytes())
    for name in tables.names((folder / "results",)):
        frame = tables.read((folder / "results",), name, every=True)
        assert not frame.duplicated(["run", "sha256", *rows.KEYS[rows.kind(name)]]).any()


# ---- runs --------------------------------------------------------------------------------------------------------


def test_what_is_missing_is_added(done, begun, monkeypatch):
    before = files(begun)
    report = merge.merge(done, begun)
    assert report.runs == {merge.NEW: 1, merge.FURTHER: 1}
    assert report.parts == {merge.NEW: 2, merge.GROWN: 1, merge.OTHER: 1}
    assert not report.left_out
    after = files(begun)
    assert set(after) == set(before) | set(files(done))
    for one in (ONE, TWO):
        for end in ("json", "safetensors"):
            name = f"runs/{run_name(one)}.{end}"
            assert after[name] == files(done)[name]
    name = f"runs/{run_name(THREE)}.safetensors"
    assert after[name] == before[name], "what is here only stays as it is"
    whole(begun)
    found = tables.read((begun / "results",), "digits_curves", run_of())
    assert found[["eps", "accuracy"]].to_numpy().tolist() == [[0.2, 0.9], [0.3, 0.9], [0.1, 0.1]], "ours are kept"
    facts = tables.provenance(begun / "results" / "digits_curves" / f"{run_of()}.{WEIGHTS}.csv.gz")
    assert len(facts["rows_of"]) == 1
    again = merge.merge(done, begun)
    assert again.runs == {merge.HERE: 2}
    assert again.parts == {merge.HERE: 2, merge.OTHER: 1}
    assert files(begun) == after
    monkeypatch.setenv("LCNN_STORE", str(begun))
    monkeypatch.setattr(experiments, "fit", lambda *_, **__: pytest.fail("it was trained again"))
    assert run(TWO, weights=False, device="cpu").metrics


def test_a_finished_run_is_never_written_over(done, begun):
    before = files(done)
    report = merge.merge(begun, done)
    assert report.runs == {merge.HERE: 1, merge.NEW: 1}
    after = files(done)
    assert {name: after[name] for name in before if name.startswith("runs")} == {
        name: content for name, content in before.items() if name.startswith("runs")
    }
    whole(done)


def test_other_numbers_of_a_run_are_counted_and_ours_kept(done, tmp_path):
    other = Path(shutil.copytree(done, tmp_path / "other"))
    path = other / "runs" / f"{run_name(ONE)}.json"
    record = json.loads(path.read_text())
    record["metrics"]["accuracy"] = 0.25
    path.write_text(json.dumps(record))
    before = files(done)
    assert merge.merge(other, done).runs == {merge.OTHER: 1, merge.HERE: 1}
    assert files(done) == before


def test_of_two_trainings_the_one_further_along_stays(made, tmp_path):
    name = run_name(ONE)
    one, two = ((made / which / "runs" / f"{name}.safetensors").read_bytes() for which in ("begun", "done"))
    for state, said in ((one, merge.NEW), (one, merge.HERE), (two, merge.FURTHER), (one, merge.HERE)):
        assert merge.take_run(name, None, state, tmp_path) == said
    assert reached(tmp_path / f"{name}.safetensors")[0] == 2
    record = (made / "done" / "runs" / f"{name}.json").read_bytes()
    assert merge.take_run(name, record, None, tmp_path) == merge.FURTHER
    assert merge.take_run(name, record, two, tmp_path) == merge.HERE
    (tmp_path / f"{name}.safetensors").unlink()
    assert merge.take_run(name, None, two, tmp_path) == merge.HERE, "the numbers and the weights come together"
    assert merge.take_run(name, record, two, tmp_path) == merge.FURTHER
    assert set(files(tmp_path)) == {f"{name}.json", f"{name}.safetensors"}


def test_the_weights_of_a_record_come_with_it(made, tmp_path):
    """A training that is finished and not measured here, of other weights: the measured one takes its place."""
    name = run_name(ONE)
    record, state = ((made / "done" / "runs" / f"{name}.{end}").read_bytes() for end in ("json", "safetensors"))
    tensors, metadata = parse(state)
    tensors["model.2.bias" if "model.2.bias" in tensors else next(k for k in tensors if k.endswith("bias"))] += 1
    write(tmp_path / f"{name}.safetensors", tensors, metadata)
    assert merge.take_run(name, None, state, tmp_path) == merge.HERE
    assert merge.take_run(name, record, state, tmp_path) == merge.FURTHER
    assert (tmp_path / f"{name}.safetensors").read_bytes() == state


def test_a_run_being_trained_is_left(done, begun):
    before = files(begun)
    with locked(begun / "runs" / f"{run_name(ONE)}.safetensors"):
        report = merge.merge(done, begun)
        assert report.busy == [run_name(ONE)]
        assert report.runs == {merge.BUSY: 1, merge.NEW: 1}
    name = f"runs/{run_name(ONE)}.safetensors"
    assert files(begun)[name] == before[name]
    assert merge.merge(done, begun).runs == {merge.FURTHER: 1, merge.HERE: 1}


def test_training_goes_on_from_a_state_that_was_taken(made, tmp_path, monkeypatch):
    state = (made / "begun" / "runs" / f"{run_name(ONE)}.safetensors").read_bytes()
    merge.take_run(run_name(ONE), None, state, tmp_path / "runs")
    train(tmp_path, ONE)
    net, other = build(ONE), build(ONE)
    for model, folder in ((net, tmp_path), (other, made / "done")):
        path = folder / "runs" / f"{run_name(ONE)}.safetensors"
        load_state(path, ONE, model, make_optimizer(ONE, model)[1], torch.Generator())
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("model", MODELS)
def test_the_size_of_a_net_is_known_before_it_is_built(model):
    for method in METHODS:
        dataset = "moons" if model == "mlp" else "cifar10"
        net = build(Recipe(dataset, method, model, width=5))
        assert _size(dataset, method, model, 5) == sum(value.numel() for value in net.state_dict().values())


# ---- interrupted -------------------------------------------------------------------------------------------------


def test_it_goes_on_wherever_it_was_interrupted(made, tmp_path, monkeypatch):
    """A crash at any write leaves a store that is whole, and calling again gives what no crash would have."""
    expected = Path(shutil.copytree(made / "begun", tmp_path / "expected"))
    merge.merge(made / "done", expected)
    real = os.replace
    for crash in itertools.count():
        into, left = Path(shutil.copytree(made / "begun", tmp_path / f"into{crash}")), itertools.count()

        def replace_or_die(*args, left=left, crash=crash):
            if next(left) == crash:
                raise KeyboardInterrupt
            real(*args)

        monkeypatch.setattr(os, "replace", replace_or_die)
        try:
            merge.merge(made / "done", into)
        except KeyboardInterrupt:
            monkeypatch.setattr(os, "replace", real)
            whole(into)
            merge.merge(made / "done", into)
            whole(into)
            assert files(into) == files(expected)
        else:
            monkeypatch.setattr(os, "replace", real)
            break
    assert crash >= 10, "so many writes"


def test_a_full_disk_ends_it(done, tmp_path):
    with files_of_at_most(200), pytest.raises(OSError, match="cannot write") as raised:
        merge.merge(done, tmp_path / "into")
    assert raised.value.errno == errno.EFBIG
    assert not files(tmp_path / "into")


def test_a_column_of_other_values_or_that_one_lacks(tmp_path):
    """Numbers beside texts: other values; a column that one lacks is no difference, and empty where rows are added."""
    here, there = tmp_path / "here", tmp_path / "there"
    add(here / "results", curve(eps=[0, 1], loss=1.5, low=0.1))
    add(there / "results", curve(eps=[0, 1], loss="margin"))
    assert merge.merge(there, here).parts == {merge.OTHER: 1}
    add(there / "results", curve(eps=[0.5], loss="margin", high=123456789))
    assert merge.merge(there, here).parts == {merge.GROWN: 1, merge.OTHER: 1}
    text = tables.unpacked(here / "results" / "digits_curves" / f"{run_of()}.{WEIGHTS}.csv.gz").decode().splitlines()
    assert text[0] == "label,seed,norm,eps,n,correct,accuracy,loss,low,run,sha256,high"
    assert text[1] == f"LCNN,0,l2,0,100,50,0.5,1.5,0.1,{run_of()},{WEIGHTS},"
    assert text[3] == f"LCNN,0,l2,0.5,100,50,0.5,margin,,{run_of()},{WEIGHTS},123456789", "cell by cell as written"


# ---- for all stores ----------------------------------------------------------------------------------------------

EPS = (0.0, 0.1, 0.25, 1.0)
store_of = st.dictionaries(
    st.sampled_from([(0, "a" * 16), (0, "b" * 16), (1, "a" * 16), None]),
    st.sets(st.sampled_from(EPS), min_size=1),
    max_size=3,
)


def build_store(folder: Path, content: dict, mark: float) -> Path:
    (folder / "results").mkdir(parents=True)
    for part, eps in content.items():
        frame = curve(eps=sorted(eps), accuracy=mark)
        if part is None:
            tables.append(folder / "results", "digits_curves", frame, {"mark": mark})
        else:
            add(folder / "results", frame, seed=part[0], weights=part[1], mark=mark)
    return folder


def contents(folder: Path) -> dict[tuple, float]:
    """Every row of a store: its key → its value."""
    found: dict[tuple, float] = {}
    for part, path in tables.parts((folder / "results",), "digits_curves", every=True).items():
        frame = rows.checked(tables.unpacked(path), "digits_curves")
        keys = frame[list(rows.KEYS["curves"])].itertuples(index=False, name=None)
        for key, value in zip(keys, frame.accuracy, strict=True):
            assert (part, *key) not in found, "a row is there once"
            found[part, *key] = value
    return found


@settings(max_examples=25, deadline=None)
@given(st.tuples(store_of, store_of, store_of))
def test_merging_is_a_union(stores):
    """Idempotent, commutative and associative in the rows that there are; each comes from one of the stores."""
    with tempfile.TemporaryDirectory() as name:
        root, count = Path(name), itertools.count()
        fresh = lambda which: build_store(root / f"{next(count)}", stores[which], 0.1 * (which + 1))
        rows_of = [contents(fresh(which)) for which in range(3)]

        def merged(*order: int) -> dict[tuple, float]:
            into = fresh(order[0])
            for which in order[1:]:
                report = merge.merge(fresh(which), into)
                assert not report.left_out
            return contents(into)

        first = merged(0, 1)
        assert first == rows_of[1] | rows_of[0], "ours are kept"
        assert merged(0, 1, 1) == first
        assert merged(0, 1, 0) == first
        assert set(merged(1, 0)) == set(first)
        right = fresh(1)
        merge.merge(fresh(2), right)
        left = fresh(0)
        merge.merge(right, left)
        everything = set(rows_of[0]) | set(rows_of[1]) | set(rows_of[2])
        assert set(contents(left)) == set(merged(0, 1, 2)) == set(merged(2, 1, 0)) == everything
        for key, value in contents(left).items():
            assert value in {rows[key] for rows in rows_of if key in rows}


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_runs_merge_as_a_union_too(data, made):
    """Of a run there may be nothing, an epoch, all epochs, or all and the record: the furthest is there in the end."""
    levels = [data.draw(st.tuples(*[st.integers(0, 3)] * 2)) for _ in range(3)]
    names = [run_name(ONE), run_name(TWO)]
    with tempfile.TemporaryDirectory() as folder:
        root, count = Path(folder), itertools.count()

        def fresh(which: int) -> Path:
            into = root / f"{next(count)}"
            (into / "runs").mkdir(parents=True)
            for name, level in zip(names, levels[which], strict=True):
                source = (
                    made / ("begun" if level == 1 and name == names[0] else "done") / "runs" / f"{name}.safetensors"
                )
                for path in ([source] if level else []) + ([source.with_suffix(".json")] if level == 3 else []):
                    shutil.copy(path, into / "runs")
            return into

        def reach(into: Path) -> list[int]:
            paths = [into / "runs" / f"{name}.safetensors" for name in names]
            return [reached(p)[0] + p.with_suffix(".json").exists() if p.exists() else 0 for p in paths]

        starts = [reach(fresh(which)) for which in range(3)]
        for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2, 2, 1)):
            into = fresh(order[0])
            for which in order[1:]:
                assert not merge.merge(fresh(which), into).left_out
            assert reach(into) == [max(level) for level in zip(*starts, strict=True)]


# ---- what is no store --------------------------------------------------------------------------------------------


def test_what_is_no_store(done, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nothing: name the one"):
        merge.merge(tmp_path / "nothing", done)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is no store: it has neither runs/ nor results/"):
        merge.merge(tmp_path / "empty", done)
    with pytest.raises(ValueError, match="is the store to merge into"):
        merge.merge(done, done)
    (tmp_path / "link").symlink_to(done)
    with pytest.raises(ValueError, match="is the store to merge into"):
        merge.merge(tmp_path / "link", done)
    (tmp_path / "empty" / "runs").mkdir()
    assert merge.merge(tmp_path / "empty", done) == merge.Report()
    before = files(done)
    assert merge.merge(done, tmp_path / "new").runs == {merge.NEW: 2}
    assert files(tmp_path / "new") == before, "a store may begin as another's copy"


def test_links_out_of_the_store_are_not_followed(done, tmp_path):
    secret = tmp_path / "secret.json"
    name = run_name(replace(ONE, seed=7))
    record = json.loads((done / "runs" / f"{run_name(ONE)}.json").read_text())
    record["recipe"]["seed"] = 7
    secret.write_text(json.dumps(record))
    (done / "runs" / f"{name}.json").symlink_to(secret)
    os.mkfifo(done / "runs" / f"{run_name(replace(ONE, seed=8))}.json")
    (done / "results" / "digits_masking").symlink_to(tmp_path)
    tables.append(tmp_path.parent, tmp_path.name, pd.DataFrame({"a": [1]}), {})
    report = merge.merge(done, tmp_path / "into")
    reasons = "\n".join(report.left_out.values())
    assert len(report.left_out) == 4
    assert reasons.count("is a link that leads out of") == 3
    assert reasons.count("is no file") == 1
    assert name not in str(files(tmp_path / "into").keys())


# ---- hostile files -----------------------------------------------------------------------------------------------


def record_with(change) -> callable:
    def damage(record: bytes, path: Path) -> bytes:
        found = json.loads(record)
        change(found)
        return json.dumps(found).encode()

    return damage


RECORDS = {
    "a pickle": lambda record, path: pickle.dumps(Evil(path)),
    "a pickle behind it": lambda record, path: record + pickle.dumps(Evil(path)),
    "deep": lambda record, path: b"[" * 200_000,
    "deep tables": lambda record, path: b'{"recipe":' * 100_000 + b"1" + b"}" * 100_000,
    "a long number": lambda record, path: record.replace(b'"accuracy": ', b'"accuracy": ' + b"1" * 100_000, 1),
    "a large number": lambda record, path: record.replace(b'"lr": 0.1', b'"lr": ' + b"1" * 400, 1),
    "a large float": lambda record, path: record.replace(b'"lr": 0.1', b'"lr": 1e999', 1),
    "NaN metrics": record_with(lambda record: record["metrics"].update(accuracy=float("nan"))),
    "infinite metrics": record_with(lambda record: record["metrics"].update(accuracy=float("inf"))),
    "text metrics": record_with(lambda record: record["metrics"].update(accuracy="__import__('os')")),
    "true metrics": record_with(lambda record: record["metrics"].update(accuracy=True)),
    "a metric called seed": record_with(lambda record: record["metrics"].update(seed=1)),
    "a list of metrics": record_with(lambda record: record.update(metrics=[1])),
    "NaN history": record_with(lambda record: record["history"][0].update(loss=float("nan"))),
    "text history": record_with(lambda record: record["history"][0].update(loss="1")),
    "short history": record_with(lambda record: record["history"].pop()),
    "disordered history": record_with(lambda record: record["history"].reverse()),
    "a formula": record_with(lambda record: record["provenance"].update(device="=cmd|' /C calc'!A0")),
    "codes": record_with(lambda record: record["provenance"].update(device="\x1b[2J")),
    "a list of devices": record_with(lambda record: record["provenance"].update(device=["cpu"])),
    "no date": record_with(lambda record: record["provenance"].update(date="yesterday")),
    "text seconds": record_with(lambda record: record["provenance"].update(seconds="1")),
    "a path for a dataset": record_with(lambda record: record["recipe"].update(dataset="../../etc/passwd")),
    "another seed": record_with(lambda record: record["recipe"].update(seed=1)),
    "a long method": record_with(lambda record: record["recipe"].update(method="x" * 1_000_000)),
    "a nested seed": record_with(lambda record: record["recipe"].update(seed={"a": 1})),
    "more than a record": record_with(lambda record: record.update(code="print(1)")),
    "twice": lambda record, path: record.replace(b'"metrics": {', b'"metrics": {}, "metrics": {', 1),
    "no UTF-8": lambda record, path: b"\xff\xfe" + record,
    "empty": lambda record, path: b"",
}


@pytest.mark.parametrize("what", RECORDS)
def test_a_hostile_record(what, done, tmp_path, monkeypatch):
    """It is an error, of the merge and of the store it may be in; nothing of it is written, and nothing is executed."""
    path, trap = done / "runs" / f"{run_name(ONE)}.json", tmp_path / "trap"
    path.write_bytes(RECORDS[what](path.read_bytes(), trap))
    with pytest.raises(DAMAGE):
        merge.take_run(run_name(ONE), path.read_bytes(), None, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    report = merge.merge(done, tmp_path / "into")
    (left,) = report.left_out
    assert left == str(path.with_suffix(""))
    assert report.runs == {merge.NEW: 1}
    assert not any(run_name(ONE) in name for name in files(tmp_path / "into"))
    with pytest.warns(RuntimeWarning, match="left out: .* is damaged or of another version"):
        assert len(results((done / "runs",))) == 1
    assert not trap.exists()


def state_with(change) -> callable:
    def damage(state: bytes, path: Path) -> bytes:
        tensors, metadata = parse(state)
        change(tensors, metadata)
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder) / "state.safetensors", tensors, metadata)
            return (Path(folder) / "state.safetensors").read_bytes()

    return damage


def history_with(change) -> callable:
    def damage(tensors, metadata):
        history = json.loads(metadata["history"])
        change(history)
        metadata["history"] = json.dumps(history)

    return state_with(damage)


def recipe_with(**changes) -> callable:
    return state_with(lambda t, m: m.update(recipe=json.dumps(json.loads(m["recipe"]) | changes)))


def torch_pickle(path: Path) -> bytes:
    torch.save(Evil(path), path.with_name("evil.pt"))
    return path.with_name("evil.pt").read_bytes()


STATES = {
    "a pickle": lambda state, path: pickle.dumps(Evil(path)),
    "torch's pickle": lambda state, path: torch_pickle(path),
    "a pickle in a head": lambda state, path: (
        len(pickle.dumps(Evil(path))).to_bytes(8, "little") + pickle.dumps(Evil(path))
    ),
    "cut": lambda state, path: state[:-10],
    "a bit": lambda state, path: state[:-1] + bytes([state[-1] ^ 1]),
    "a head without end": lambda state, path: (1 << 62).to_bytes(8, "little") + state[8:],
    "empty": lambda state, path: b"",
    "an epoch more": state_with(lambda t, m: m.update(epoch="3")),
    "more epochs than there are": history_with(lambda h: h.extend([h[0] | {"epoch": 3}])),
    "no history": state_with(lambda t, m: m.update(history="[]", epoch="0")),
    "a text in the history": history_with(lambda h: h[0].update(loss="x")),
    "a deep history": state_with(lambda t, m: m.update(history="[" * 100_000)),
    "another seed": recipe_with(seed=1),
    "a huge net": recipe_with(width=10**9),
    "another width": recipe_with(width=5),
    "a path": recipe_with(dataset="../moons"),
    "hostile facts": state_with(lambda t, m: m.update(about='{"seconds": "x", "made_on": []}')),
    "a formula for a device": state_with(
        lambda t, m: m.update(about='{"seconds": 1, "made_on": [{"device": "=cmd()"}]}')
    ),
    "a layer too few": state_with(lambda t, m: t.pop(next(k for k in t if k.endswith("bias")))),
    "a tensor too many": state_with(lambda t, m: t.update(extra=torch.zeros(3))),
    "a momentum too few": state_with(lambda t, m: t.pop("momentum.0")),
    "a momentum of another shape": state_with(lambda t, m: t.update({"momentum.0": torch.zeros(1)})),
    "no generator": state_with(lambda t, m: t.update(generator=torch.zeros(3, dtype=torch.uint8))),
    "without metadata": lambda state, path: __import__("safetensors.torch").torch.save(parse(state)[0]),
}


@pytest.mark.parametrize("what", STATES)
def test_a_hostile_state(what, done, tmp_path):
    path, trap = done / "runs" / f"{run_name(ONE)}.safetensors", tmp_path / "trap"
    before = path.read_bytes()
    path.write_bytes(STATES[what](before, trap))
    with pytest.raises(DAMAGE):
        merge.take_run(run_name(ONE), None, path.read_bytes(), tmp_path / "runs")
    report = merge.merge(done, tmp_path / "into")
    assert list(report.left_out) == [str(path.with_suffix(""))]
    assert report.runs == {merge.NEW: 1}
    assert not any(run_name(ONE) in name for name in files(tmp_path / "into"))
    assert not trap.exists()
    path.write_bytes(before)
    assert merge.merge(done, tmp_path / "into").runs == {merge.NEW: 1, merge.HERE: 1}, "whole again, it is taken"


NAMES = (
    "../../evil",
    "moons-lcnn-seed0-../../../../x",
    "CON",
    ".hidden",
    "a" * 200,
    "moons-lcnn-seed0-0123456789AB",
    "",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_no_runs(name, made, tmp_path):
    record = (made / "done" / "runs" / f"{run_name(ONE)}.json").read_bytes()
    with pytest.raises(ValueError, match=r"another run|no run"):
        merge.take_run(name, record, None, tmp_path / "runs")
    with pytest.raises(ValueError, match="no run"):
        merge.take_run(name, None, None, tmp_path / "runs")
    part = (made / "done" / "results" / "digits_curves" / "all.csv.gz").read_bytes()
    for table, of in ((f"{name}_curves/", "all"), ("digits_curves", name or ".."), ("../digits_curves", "all")):
        with pytest.raises(ValueError, match=r"is no table of a known kind|is no part's name"):
            merge.take_part(table, of, part, b"{}", tmp_path / "results")
    assert not list(tmp_path.iterdir())


def test_hostile_parts(done, tmp_path, monkeypatch):
    """Each is left out by its name with a reason, and the others are taken."""
    monkeypatch.setattr(rows, "LIMIT", 1_000_000)
    folder, trap = done / "results" / "digits_curves", tmp_path / "trap"
    text, of_a_net = (
        gzip.decompress((folder / f"{part}.csv.gz").read_bytes()) for part in ("all", f"{run_of()}.{WEIGHTS}")
    )
    packed = {
        "a pickle": pickle.dumps(Evil(trap)),
        "a packed pickle": gzip.compress(pickle.dumps(Evil(trap))),
        "cut": gzip.compress(text)[:-9],
        "a bomb": gzip.compress(text + b"\n" * 2_000_000),
        "a formula": gzip.compress(text.replace(b"LCNN", b"+cmd|' /C calc'!A0")),
        "a row twice": gzip.compress(text + text.splitlines()[-1] + b"\n"),
        "no key": gzip.compress(text.replace(b"l2", b"")),
        "of no run": gzip.compress(text),
        "of another run": gzip.compress(of_a_net),
        "of other weights": gzip.compress(
            of_a_net.replace(run_of().encode(), run_of(seed=19).encode()).replace(WEIGHTS.encode(), b"f" * 16)
        ),
    }
    assert list(packed).index("of other weights") == 9
    for seed, content in enumerate(packed.values()):
        (folder / f"{run_of(seed=10 + seed)}.{WEIGHTS}.csv.gz").write_bytes(content)
        facts = {"run": run_of(seed=10 + seed), "weights": WEIGHTS}
        (folder / f"{run_of(seed=10 + seed)}.{WEIGHTS}.json").write_text(json.dumps(facts))
    (folder / f"{run_of(seed=30)}.{WEIGHTS}.json").write_text("{}")  # without rows
    (folder / "evil\x1b[2J.json").write_text("{}")
    (done / "results" / "notes_of_mine").mkdir()
    (done / "results" / "notes_of_mine" / "all.json").write_text("{}")
    report = merge.merge(done, tmp_path / "into")
    assert len(report.left_out) == len(packed) + 3
    assert report.parts == {merge.NEW: 3}
    assert not trap.exists()
    whole(tmp_path / "into")
    assert set(tables.parts((tmp_path / "into" / "results",), "digits_curves")) == {
        "all", f"{run_of()}.{WEIGHTS}", f"{run_of(seed=1)}.{WEIGHTS}"
    }  # fmt: skip


def test_files_too_large(done, tmp_path, monkeypatch):
    monkeypatch.setattr(strict, "JSON", 2000)
    monkeypatch.setattr(merge, "STATE", 1000)
    path = done / "runs" / f"{run_name(ONE)}.json"
    path.write_bytes(path.read_bytes() + b" " * 3000)
    report = merge.merge(done, tmp_path / "into")
    assert report.left_out[str(path.with_suffix(""))].startswith("it is larger than")


def test_what_is_damaged_here_is_named_and_kept(done, begun):
    name = run_name(ONE)
    (begun / "runs" / f"{name}.safetensors").write_bytes(b"damaged")
    part = begun / "results" / "digits_curves" / f"{run_of()}.{WEIGHTS}.csv.gz"
    part.write_bytes(b"damaged")
    report = merge.merge(done, begun)
    reasons = list(report.left_out.values())
    assert len(reasons) == 2
    assert reasons[0].startswith(f"{begun / 'runs' / name}.safetensors is damaged")
    assert reasons[1].startswith(f"{part} is damaged")
    assert part.read_bytes() == (begun / "runs" / f"{name}.safetensors").read_bytes() == b"damaged"
    assert not (begun / "runs" / f"{name}.json").exists()
