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
import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save
from torch import Generator, Tensor, nn

from ..lab import atomic_path, store_root
from .recipe import Recipe

DAMAGE = (safetensors.SafetensorError, RuntimeError, LookupError, TypeError, ValueError, AttributeError)
FORMER = (("penalty_eval", False),)  # fields that a recipe no longer has, with the value that makes no difference


class Damaged(RuntimeError):
    """A file (``path``) of a run is damaged, or of another version: the message says what to do about it."""

    def __init__(self, path: Path, error: Exception, way_out: str):
        self.path = path
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        super().__init__(f"{path} is damaged or of another version ({reason}): {way_out}")


def run_name(recipe: Recipe) -> str:
    """A recipe's file name: it ends in a hash of every field that is not at its default. ValueError: no recipe."""
    if not isinstance(recipe, Recipe):
        raise ValueError(f"a {type(recipe).__name__} is no recipe: use Recipe(dataset, method, …)")
    defaults = {field.name: field.default for field in dataclasses.fields(Recipe)}
    changed = {name: value for name, value in dataclasses.asdict(recipe).items() if value != defaults[name]}
    digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:12]
    return f"{recipe.dataset}-{recipe.method}-seed{recipe.seed}-{digest}"


def recipe_of(fields: dict[str, Any]) -> Recipe:
    """The recipe of the fields in a file. One of ``DAMAGE``: they are none."""
    return Recipe(**{name: value for name, value in fields.items() if (name, value) not in FORMER})


def state_path(recipe: Recipe) -> Path:
    """Where the state of a recipe's training is kept."""
    return store_root() / "runs" / f"{run_name(recipe)}.safetensors"


@contextmanager
def locked(path: Path, progress: bool = True) -> Iterator[None]:
    """Hold ``path`` for this process; another one that asks for it waits. The system frees what a killed one held.

    Raises:
        OSError: the folder cannot be written.
    """
    lock = FileLock(path.parent / "locks" / f"{path.stem}.lock")
    try:
        path.parent.joinpath("locks").mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if progress:
                print(f"another process is training {path.stem}: waiting for it", flush=True)
            lock.acquire()
    except OSError as error:
        why = f"cannot write {path} ({error.strerror}): free some space, or set LCNN_STORE to a folder of yours"
        raise type(error)(error.errno, why) from error
    try:
        yield
    finally:
        lock.release()


def digest(tensors: dict[str, Tensor], *texts: str) -> str:
    """SHA-256 of tensors and texts: safetensors has no checksum of its own."""
    total = hashlib.sha256(" ".join(texts).encode())
    for name in sorted(tensors):
        value = tensors[name].cpu().contiguous()
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode() + value.numpy().tobytes())
    return total.hexdigest()


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file with its SHA-256, atomically. Raises OSError: full disk, or no right to write."""
    content = save(tensors, metadata | {"sha256": digest(tensors, *(metadata[name] for name in sorted(metadata)))})
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)  # not save_file, whose error on a full disk is no OSError


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file that ``write`` wrote. Raises one of ``DAMAGE`` for any other."""
    with safetensors.safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    tensors, expected = load_file(path), metadata.pop("sha256")
    if expected != digest(tensors, *(metadata[name] for name in sorted(metadata))):
        raise ValueError("its content does not match its SHA-256")
    return tensors, metadata


def reached(path: Path) -> tuple[int, dict]:
    """Epochs done, and the facts about them, from the head of a state's file alone.

    Raises:
        OSError: there is no such file.
        one of ``DAMAGE``: it is damaged or of another version.
    """
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    return int(metadata["epoch"]), json.loads(metadata["about"])


def finished(path: Path, epochs: int) -> bool:
    """Whether ``path`` holds the state after so many epochs (what else may be wrong with it, loading will say)."""
    try:
        return reached(path)[0] == epochs
    except (OSError, *DAMAGE):
        return False


@dataclass
class State:
    """All that training needs to go on. ``about``: the seconds it took so far, and where."""

    recipe: Recipe
    model: nn.Module
    momenta: list[Tensor]
    generator: Generator
    history: list[dict[str, float]] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=lambda: {"seconds": 0.0, "made_on": []})

    def save(self, path: Path) -> None:
        """Write the state, atomically. Raises OSError: full disk, or no right to write."""
        kept = {f"model.{name}": value.detach() for name, value in self.model.state_dict().items()}
        kept |= {f"momentum.{index}": value for index, value in enumerate(self.momenta)}
        tensors = {name: value.clone(memory_format=torch.contiguous_format) for name, value in kept.items()}
        tensors["generator"] = self.generator.get_state()
        metadata = {"epoch": str(len(self.history)), "recipe": json.dumps(dataclasses.asdict(self.recipe))}
        metadata |= {"history": json.dumps(self.history), "about": json.dumps(self.about)}
        write(path, tensors, metadata)

    def load(self, path: Path) -> None:
        """Put a saved state back, in place.

        Raises:
            Damaged: the file is damaged, holds another recipe's state, or was written by another version.
        """
        try:
            tensors, metadata = read(path)
            if recipe_of(json.loads(metadata["recipe"])) != self.recipe:
                raise ValueError("it is the state of another recipe")
            weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
            self.model.load_state_dict(weights)
            for index, value in enumerate(self.momenta):
                value.copy_(tensors[f"momentum.{index}"].reshape(value.shape))
            self.generator.set_state(tensors["generator"])
            self.history, self.about = json.loads(metadata["history"]), json.loads(metadata["about"])
        except DAMAGE as error:
            raise Damaged(path, error, "delete it, or call fit(…, resume=False) to train again") from None
