"""The checks of notebook 05's last section; see :mod:`lcnn_utils.exercises`."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from ..studies import scaling
from ..training import Recipe
from . import _check, _kind, _randn

__all__ = ["makespan", "run_key"]
LONGEST = 100  # letters of a key
BASE = Recipe("digits", "lcnn", "mlp", width=8, seed=3, epochs=8)
TEXTS = {"dataset": "cifar10", "method": "minimal", "model": "resnet18"} | {
    "schedule": "steps", "derivative": "difference",
}  # fmt: skip


def makespan(f: Callable) -> bool | None:
    """f(seconds, workers, overhead) → the second at which the last run ends: runs of ``seconds`` (n,) are handed out in
    order, each to the worker that is free first, and handing one out takes the one scheduler ``overhead`` seconds.
    Solution: ``lcnn_utils.studies.scaling.makespan``.
    """
    number = lambda value: torch.tensor(value).double()
    model = lambda seconds, workers, overhead: number(scaling.makespan(seconds.tolist(), workers, overhead))

    def in_turn(seconds, workers, overhead):
        return max(seconds[at::workers].sum() for at in range(workers)) + len(seconds) * overhead

    def last_begun(seconds, workers, overhead):
        free, scheduler = [0.0] * workers, 0.0
        for length in seconds.tolist():
            scheduler = max(scheduler, min(free)) + overhead
            free[free.index(min(free))] = scheduler + length
        return number(scheduler + length)

    mistakes = {
        "runs can't be cut: total/workers is the least it could take": lambda s, w, o: s.sum() / w,
        "this is the bound that no schedule can beat; follow each worker": lambda s, w, o: torch.stack(
            [s.max(), s.sum() / w, number(len(s) * o)]
        ).max(),
        "the next run goes to whoever is free first, not to the next in turn": in_turn,
        "in the order given: don't sort": lambda s, w, o: model(s.sort(descending=True).values, w, o),
        "in the order given: don't sort, and least of all like this": lambda s, w, o: model(s.sort().values, w, o),
        "handing out takes time": lambda s, w, o: model(s, w, 0.0),
        "there is one scheduler: while it hands out a run, it hands out no other": lambda s, w, o: model(s + o, w, 0.0),
        "the overhead is paid while others work: it is not just added at the end": lambda s, w, o: (
            model(s, w, 0.0) + len(s) * o
        ),
        "this is one worker's time: the others work too": lambda s, w, o: s.sum() + len(s) * o,
        "this is the work itself, as one worker would do it if handing out took no time": lambda s, w, o: s.sum(),
        "the last run to begin need not be the last to end": last_begun,
    }
    truth = lambda seconds, workers, overhead: model(seconds, workers, overhead)
    settings = [(9, 4, 0.25), (7, 2, 0.0), (1, 4, 0.5), (40, 6, 0.1), (30, 8, 1.0), (5, 1, 0.25)]
    inputs = [((5 * _randn(i, n).abs() + 0.1), workers, o) for i, (n, workers, o) in enumerate(settings)]
    inputs[0][0][-1] = 30.0  # a long one that comes last: every mistake gives another number
    return _check(makespan, f, inputs, truth, mistakes)


def run_key(f: Callable) -> bool | None:
    """f(recipe) → a text of at most 100 letters, digits, - . and _ (a file's name): the same for equal recipes in every
    process on every machine, different for different recipes. Solution: ``lcnn_utils.state.run_name``.
    """
    try:
        first = f(BASE)
        if first is None or first is ...:
            print("· run_key: not attempted yet: the rest uses lcnn_utils' version", end="")
            print(" (it returned None: once written, it needs a `return`)" if first is None else "")
            return None
        found = _problem(f)
    except NotImplementedError:
        print("· run_key: not attempted yet: the rest uses lcnn_utils' version")
        return None
    except (Exception, SystemExit) as error:
        lines = [at.line for at in traceback.extract_tb(error.__traceback__) if at.filename != __file__]
        where = f", in the line `{lines[0]}`" if lines and lines[0] else ""
        found = f"it raised {type(error).__name__}: {error}{where}", " ".join((run_key.__doc__ or "").split())
    if found:
        print(f"✗ run_key: {found[0]}\n  hint: {found[1]}")
        return False
    print(f"✓ run_key: correct on {len(_recipes())} recipes, and the same in another process")
    return True


def _problem(f: Callable) -> tuple[str, str] | None:
    """What is wrong with a student's key, and the hint."""
    for step in (_one_key, _equal, _different, _named, _elsewhere):
        if found := step(f):
            return found
    return None


def _one_key(f: Callable) -> tuple[str, str] | None:
    key, again = f(BASE), f(BASE)
    if not isinstance(key, str):
        return f"expected a text, got {_kind(key)}", "a file's name is a text; and a number made by hash() won't do"
    if key != again:
        return f"{key!r} at first, then {again!r}, for one recipe", "no clock, no counter and no random numbers"
    return None


def _equal(f: Callable) -> tuple[str, str] | None:
    """Equal recipes that are not the same object."""
    twin = Recipe(**dict(reversed(asdict(BASE).items())))
    spelled = _with(lambda_beta=1), _with(lambda_beta=1.0)
    for one, other in ((BASE, twin), spelled):
        if (a := f(one)) != (b := f(other)):
            hint = "an id() or an address in memory (object.__repr__) belongs to the object, not to the recipe"
            return f"{a!r} and {b!r} for two equal recipes", hint
    return None


def _different(f: Callable) -> tuple[str, str] | None:
    """Recipes that differ in one field, by much or little; or that only look alike."""
    ignored = [name for name, other in _others().items() if f(BASE) == f(other)]
    if ignored:
        hint = "every field counts: dataclasses.asdict(recipe) has them all"
        return f"one key for recipes that differ in {', '.join(ignored)}", hint
    close: list[tuple[str, float, float]] = [(name, x, x * (1 + 1e-12)) for name, x in (("lr", 0.1), ("h", 1.0))]
    for name, value, near in [*close, ("seed", 1_234_567, 1_234_568)]:
        if f(_with(**{name: value})) == f(_with(**{name: near})):
            hint = "numbers must not be rounded: f'{x:g}' keeps six digits; repr, or json.dumps, keeps them all"
            return f"one key for {name} = {value!r} and {near!r}", hint
    whose = "which value is whose? Put each field's name beside its value"
    alike: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        (dict(lambda_beta=0.5, lambda_gamma=0.25), dict(lambda_beta=0.25, lambda_gamma=0.5), whose),
        (dict(lambda_beta=0.5), dict(lambda_gamma=0.5), whose),
        (dict(augment=True), dict(published=True), whose),
        (dict(width=1, seed=11), dict(width=11, seed=1), "values joined without anything between run into each other"),
    ]
    for one, other, hint in alike:
        if f(_with(**one)) == f(_with(**other)):
            return f"one key for {_said(one)} and for {_said(other)}", hint
    keys = [f(one) for one in _recipes()]
    if (distinct := len(set(keys))) < len(keys):
        return (
            f"{len(keys)} different recipes have only {distinct} keys",
            "too short: by the birthday paradox n keys of k possible ones collide from n ≈ √k on; keep 12 hex digits",
        )
    return None


def _named(f: Callable) -> tuple[str, str] | None:
    for one in _recipes():
        key = f(one)
        if len(key) > LONGEST:
            return (
                f"{len(key)} letters: {key[:40]!r}…",
                f"right, but too long for a file's name (at most {LONGEST}): shorten it with a hash that is the same "
                "everywhere, hashlib.sha256(text.encode()).hexdigest()",
            )
        if bad := re.search(r"[^A-Za-z0-9._-]", key):
            return f"{bad[0]!r} in {key!r}", "a file's name: letters, digits, '-', '.' and '_', such as hexdigest() has"
    return None


def _elsewhere(f: Callable) -> tuple[str, str] | None:
    """Keys in another process: a worker's."""
    from ..experiments.clusters import local

    with local(1, device="cpu") as client:
        for one in (BASE, *_others().values()):
            there = client.submit(f, one, pure=False).result(timeout=60)
            if there != (here := f(one)):
                return (
                    f"{here!r} here and {there!r} in another process, for one recipe",
                    "Python salts hash() of texts anew in each process, and sets have another order there: use "
                    "hashlib.sha256 on a text, and sort",
                )
    return None


def _with(**changes: Any) -> Recipe:
    return replace(BASE, **changes)


def _others() -> dict[str, Recipe]:
    """For each field a recipe that differs from BASE in it alone."""
    changed: dict[str, Any] = {}
    for name, value in asdict(BASE).items():
        number = value + 1 if type(value) is int else value / 2 or 0.5 if type(value) is float else None
        changed[name] = (
            TEXTS[name] if isinstance(value, str) else not value if isinstance(value, bool | None) else number
        )
    return {name: _with(**{name: value}) for name, value in changed.items()}


def _recipes() -> list[Recipe]:
    """Many, all different."""
    return [_with(seed=seed, lambda_beta=number / 7) for seed in range(40) for number in range(20)]


def _said(changes: dict[str, Any]) -> str:
    return ", ".join(f"{name} = {value!r}" for name, value in changes.items())
