"""How far a sweep is: runs done, running and failed, and the time that is left by the epochs seen so far."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from statistics import fmean, median
from typing import Any

from ..training import Recipe, run_name, steps_an_epoch
from .timing import kind

KEPT = 100  # times of a kind of recipe, the newest


def counted(n: int, what: str) -> str:
    """``1 run``, ``2 runs``."""
    return f"{n} {what}{'s' * (n != 1)}"


def duration(seconds: float) -> str:
    """Seconds up to two minutes, then minutes, then hours."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class Progress:
    """Counts of a sweep, fed with the workers' events and with what came back.

    Args:
        recipes: those to train, and how many epochs of each are done.
    """

    def __init__(self, recipes: Mapping[Recipe, int]):
        self.recipes = {run_name(one): one for one in recipes}
        self.epochs = {run_name(one): done for one, done in recipes.items()}
        self.ended: dict[str, str] = {}  # name: "done", "failed" or "stopped"
        self.seconds: dict[tuple, deque[float]] = {}  # kind of recipe: of a step
        self.begun: set[str] = set()
        self.workers = 0

    def tell(self, event: Mapping[str, Any]) -> None:
        """An epoch is over, of one of these runs or of another."""
        name = event["run"]
        if name in self.recipes:
            one = self.recipes[name]
            self.epochs[name] = event["epoch"]
            if name in self.begun or one.epochs == 1:  # a first epoch has the start in it
                self.seconds.setdefault(kind(one), deque(maxlen=KEPT)).append(event["seconds"] / steps_an_epoch(one))
            self.begun.add(name)

    def end(self, one: Recipe, done: bool, failed: bool) -> None:
        """A recipe came back: done, failed, or stopped."""
        self.ended[run_name(one)] = "failed" if failed else "done" if done else "stopped"

    def left(self) -> float | None:
        """Seconds that are left; None before any recipe's second epoch is over.

        The epochs that are missing, by the median step of those of their kind (or the mean of all kinds'), shared
        among the workers; not less than the longest run that is left.
        """
        rates = {which: median(list(values)) for which, values in list(self.seconds.items())}  # told by another thread
        if not rates:
            return None
        typical = fmean(rates.values())
        times = [
            (one.epochs - self.epochs[name]) * steps_an_epoch(one) * rates.get(kind(one), typical)
            for name, one in self.recipes.items()
            if name not in self.ended
        ]
        return max(sum(times) / max(1, self.workers), max(times, default=0.0))

    def text(self) -> str:
        """``3 of 12 done, 2 running, 1 failed, about 40 s left``."""
        ends = Counter(self.ended.values())
        waiting = len(self.recipes) - len(self.ended)
        parts = [f"{ends['done']} of {len(self.recipes)} done", f"{min(self.workers, waiting)} running"]
        parts += [f"{ends[how]} {how}" for how in ("failed", "stopped") if ends[how]]
        left = self.left()
        if waiting and not self.workers:
            parts.append("waiting for a worker")
        elif waiting and left is not None:
            parts.append(f"about {duration(max(1, round(left)))} left")
        return ", ".join(parts)
