"""The checks of notebook 05's last section: right answers pass, each likely mistake gets its own hint."""

import dataclasses
import hashlib
import heapq
import itertools
import json
import time

import pytest
import torch

from lcnn_utils.exercises import methods, scaling
from lcnn_utils.exercises import scaling as check
from lcnn_utils.studies import scaling as studies
from lcnn_utils.training import Recipe, run_name


def text(one, **options):
    return json.dumps(dataclasses.asdict(one), sort_keys=True, **options)


def sha(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()


def changed(one):
    return {k: v for k, v in dataclasses.asdict(one).items() if v != getattr(Recipe(), k)}


def heap(seconds, workers, overhead):
    free, scheduler = [0.0] * workers, 0.0
    for length in seconds:
        scheduler = max(scheduler, free[0]) + overhead
        heapq.heapreplace(free, scheduler + float(length))
    return max(free)


def last_begun(seconds, workers, overhead):
    free, scheduler = [0.0] * workers, 0.0
    for length in seconds:
        scheduler = max(scheduler, free[0]) + overhead
        heapq.heapreplace(free, scheduler + float(length))
    return scheduler + float(length)


def tensors(seconds, workers, overhead):
    free, scheduler = torch.zeros(workers, dtype=torch.float64), torch.tensor(0.0)
    for length in seconds:
        at = free.argmin()
        scheduler = torch.maximum(scheduler, free[at]) + overhead
        free[at] = scheduler + length
    return free.max()


RIGHT = [
    ("makespan", heap),
    ("makespan", tensors),
    ("run_key", run_name),
    ("run_key", lambda one: sha(text(one))),
    ("run_key", lambda one: sha(repr(one))[:16]),
]
counter = itertools.count()
WRONG = [
    ("run_key", lambda one: hash(one), "a number made by hash() won't do"),
    ("run_key", lambda one: dataclasses.asdict(one), "a file's name is a text"),
    ("run_key", lambda one: f"{time.perf_counter_ns()}", "no clock"),
    ("run_key", lambda one: f"{next(counter)}", "no clock, no counter"),
    ("run_key", lambda one: str(id(one)), "an id() or an address in memory"),
    ("run_key", lambda one: object.__repr__(one), "an id() or an address in memory"),
    ("run_key", lambda one: f"{one.dataset}-{one.method}-{one.seed}", "every field counts"),
    ("run_key", lambda one: run_name(dataclasses.replace(one, held_out=0.0)), "every field counts"),
    ("run_key", lambda one: "-".join(f"{v:g}" if isinstance(v, float) else str(v)
                                     for v in dataclasses.asdict(one).values()), "must not be rounded"),
    ("run_key", lambda one: sha(str({k: round(v, 9) if isinstance(v, float) else v
                                     for k, v in dataclasses.asdict(one).items()})), "must not be rounded"),
    ("run_key", lambda one: sha("".join(map(str, dataclasses.asdict(one).values()))), "without anything between"),
    ("run_key", lambda one: sha(str(sorted(map(str, dataclasses.asdict(one).values())))), "which value is whose"),
    ("run_key", lambda one: sha(str(list(changed(one).values()))), "which value is whose"),
    ("run_key", lambda one: sha(text(one))[:4], "birthday paradox"),
    ("run_key", lambda one: text(one), "too long for a file's name"),
    ("run_key", repr, "too long for a file's name"),
    ("run_key", lambda one: f"run/{sha(text(one))[:12]}", "'-', '.' and '_'"),
    ("run_key", lambda one: str(hash(one)), "Python salts hash()"),
    ("run_key", lambda one: sha(str(set(dataclasses.asdict(one).items()))), "sets have another order there"),
    ("makespan", lambda s, w, o: s.sum() / w, "runs can't be cut"),
    ("makespan", lambda s, w, o: max(s.max(), s.sum() / w, torch.tensor(len(s) * o)), "no schedule can beat"),
    ("makespan", lambda s, w, o: max(s[i::w].sum() for i in range(w)) + len(s) * o, "not to the next in turn"),
    ("makespan", lambda s, w, o: heap(sorted(s.tolist(), reverse=True), w, o), "in the order given"),
    ("makespan", lambda s, w, o: heap(sorted(s.tolist()), w, o), "in the order given"),
    ("makespan", lambda s, w, o: heap(s, w, 0.0), "handing out takes time"),
    ("makespan", lambda s, w, o: heap(s + o, w, 0.0), "there is one scheduler"),
    ("makespan", lambda s, w, o: heap(s, w, 0.0) + len(s) * o, "not just added at the end"),
    ("makespan", lambda s, w, o: s.sum() + len(s) * o, "the others work too"),
    ("makespan", lambda s, w, o: s.sum(), "as one worker would do it"),
    ("makespan", lambda s, w, o: last_begun(s, w, o), "need not be the last to end"),
    ("makespan", lambda s, w, o: float("nan"), None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "answer"), RIGHT)
def test_right_answers_pass(name, answer, capsys):
    assert getattr(check, name)(answer) is True, capsys.readouterr().out
    assert capsys.readouterr().out.startswith(f"✓ {name}: correct on ")


@pytest.mark.parametrize(("name", "answer", "hint"), WRONG)
def test_a_wrong_answer_gets_its_hint(name, answer, hint, capsys):
    assert getattr(check, name)(answer) is False
    out = capsys.readouterr().out
    assert out.startswith(f"✗ {name}: ")
    if hint is not None:
        assert hint in out.split("hint: ")[1], out


@pytest.mark.parametrize("name", check.__all__)
def test_stubs_and_errors(name, capsys):
    def fails(*args):
        raise error

    def stub(*args):
        raise NotImplementedError

    for unwritten in (lambda *args: None, lambda *args: ..., stub):
        assert getattr(check, name)(unwritten) is None
        assert "not attempted yet" in capsys.readouterr().out
    for error in (ZeroDivisionError("mine"), SystemExit(3)):
        assert getattr(check, name)(fails) is False
        assert f"{type(error).__name__}: {error}" in capsys.readouterr().out


def test_each_field_is_tried():
    others = scaling._others()
    assert list(others) == [field.name for field in dataclasses.fields(Recipe)]
    for name, other in others.items():
        differing = [n for n, v in dataclasses.asdict(other).items() if v != getattr(scaling.BASE, n)]
        assert differing == [name]
    assert len(set(scaling._recipes())) == len(scaling._recipes())


def test_the_package_means_the_same():
    seen = []
    check.makespan(lambda s, w, o: seen.append((s.tolist(), w, o)) or heap(s, w, o))
    assert len(seen) >= 5
    for lengths, workers, overhead in seen:
        assert heap(lengths, workers, overhead) == pytest.approx(studies.makespan(lengths, workers, overhead))


def test_notebook_05_finds_them_with_its_others():
    assert methods.run_key is check.run_key
    assert methods.makespan is check.makespan
