"""The state of a training on disk: one safetensors file per recipe, written whole or not at all, and never a pickle."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
from filelock import FileLock, Timeout
from safetensors.torch import save
from torch import Generator, Tensor, nn

from ..files import atomic_path
from ..lab import store_root
from .recipe import Recipe, Training

GONE = {"penalty_eval": False, "published": False, "channels_last": None}  # older recipes' fields, as all had them
RENAMED = {"held_out": "validation_fraction"}
WAY_OUT = "delete it, or call fit(…, resume=False) to train again"
DAMAGE = (safetensors.SafetensorError, RuntimeError, LookupError, TypeError, ValueError, AttributeError)


class Damaged(RuntimeError):
    """A file of a run is damaged, or of another version: the message says what to do about it."""

    def __init__(self, path: Path, error: Exception, way_out: str):
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        super().__init__(f"{path} is damaged or of another version ({reason}): {way_out}")


def run_name(recipe: Recipe) -> str:
    """A recipe's file name: it ends in a hash of every field that is not at its default. ValueError: no recipe."""
    if not isinstance(recipe, Recipe):
        raise ValueError(f"a {type(recipe).__name__} is no recipe: use Recipe(dataset=…, method=…)")
    defaults = {field.name: field.default for field in dataclasses.fields(Recipe)}
    changed = {name: value for name, value in dataclasses.asdict(recipe).items() if value != defaults[name]}
    code = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:12]
    return f"{recipe.dataset}-{recipe.method}-seed{recipe.seed}-{code}"


def recipe_of(fields: dict[str, Any], kind: type[Training] = Recipe) -> Any:
    """The recipe (or Training) of the fields in a file; older ones name some that are ``GONE`` or ``RENAMED``."""
    kept = {name: value for name, value in fields.items() if (name, value) not in GONE.items()}
    return kind(**{RENAMED.get(name, name): value for name, value in kept.items()})


def state_path(recipe: Recipe) -> Path:
    """The file of a recipe's training."""
    return store_root() / "runs" / f"{run_name(recipe)}.safetensors"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold ``path`` for this process; another one says so and waits. OSError: the folder cannot be written."""
    lock = FileLock(path.parent / "locks" / f"{path.stem}.lock")
    try:
        path.parent.joinpath("locks").mkdir(parents=True, exist_ok=True)
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            print(f"another process is training {path.stem}: waiting for it", flush=True)
            held = lock.acquire()
    except OSError as error:
        why = f"cannot write {path} ({error.strerror}): free some space, or set LCNN_STORE to a folder of yours"
        raise type(error)(error.errno, why) from error
    with held:
        yield


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, atomically. Raises OSError: full disk, or no right to write."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(tensors, metadata))  # not save_file, whose error on a full disk is no OSError


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file that ``write`` wrote. Raises one of ``DAMAGE`` for any other."""
    with safetensors.safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118


def epochs_done(path: Path) -> int:
    """Epochs that a state has behind it, from the head of its file alone; 0 if there is none, or a damaged one."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return int(file.metadata()["epoch"])
    except (OSError, *DAMAGE):
        return 0


@dataclass
class State:
    """All that training needs to go on. ``samples``: what tells own data from other data; ``random``: the state of
    torch's global generator; ``about``: the seconds it took so far, and where."""

    recipe: Training
    model: nn.Module
    momenta: list[Tensor]
    generator: Generator
    random: Tensor
    samples: str | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=lambda: {"seconds": 0.0, "made_on": []})

    def save(self, path: Path) -> None:
        """Write the state, as :func:`write`."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"momentum.{index}": value for index, value in enumerate(self.momenta)}
        metadata = {
            "epoch": str(len(self.history)),
            "recipe": json.dumps(dataclasses.asdict(self.recipe)),
            "history": json.dumps(self.history),
            "about": json.dumps(self.about),
            "samples": json.dumps(self.samples),
        }
        write(path, tensors | {"generator": self.generator.get_state(), "random": self.random}, metadata)

    def load(self, path: Path) -> None:
        """Put a saved state back, in place. Raises Damaged, also if it is of another version; ValueError: it is of
        another training, model or data, and nothing is changed."""
        try:
            tensors, metadata = read(path)
            recipe = recipe_of(json.loads(metadata["recipe"]), type(self.recipe))
            samples = json.loads(metadata.get("samples", "null"))
            weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        except DAMAGE as error:
            raise Damaged(path, error, WAY_OUT) from None
        own, other = dataclasses.asdict(self.recipe), dataclasses.asdict(recipe)
        differ = [f"{name}={other[name]!r}, not {own[name]!r}" for name in own if own[name] != other[name]]
        if samples != self.samples:
            differ.append(f"trained on {samples}, not {self.samples}")
        shapes = lambda tensors: {name: value.shape for name, value in tensors.items()}
        if shapes(weights) != shapes(self.model.state_dict()):
            differ.append("another network's weights")
        if differ:
            raise ValueError(f"{path} is of another training ({'; '.join(differ)}): use another file, or resume=False")
        try:
            self.model.load_state_dict(weights)
            for index, value in enumerate(self.momenta):
                value.copy_(tensors[f"momentum.{index}"].reshape(value.shape))
            self.generator.set_state(tensors["generator"])
            self.random = tensors.get("random", self.random)
            self.history, self.about = json.loads(metadata["history"]), json.loads(metadata["about"])
        except DAMAGE as error:
            raise Damaged(path, error, WAY_OUT) from None
