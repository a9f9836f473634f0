"""What several unit tests use."""

import contextlib
from pathlib import Path

import pytest
import torch
from torchvision.transforms.functional import to_pil_image


@contextlib.contextmanager
def files_of_at_most(size: int):
    """Let the kernel refuse to write more than ``size`` bytes into a file, which needs no privileges."""
    resource = pytest.importorskip("resource", reason="POSIX only")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder: Path) -> dict[str, bytes]:
    """The files in a folder, by their names."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def folder_of_images(folder: Path, n: int = 4, size: int = 32, classes: tuple[str, ...] = ("cats", "dogs")) -> Path:
    """A folder with a subfolder of n random PNGs for each class."""
    generator = torch.Generator().manual_seed(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for index in range(n):
            to_pil_image(torch.rand(3, size, size, generator=generator)).save(folder / name / f"{index}.png")
    return folder
