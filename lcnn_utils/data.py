"""Datasets, each split one uint8 tensor on the device, and the batches made from it there (no worker processes).

``digits`` comes with scikit-learn and needs no network; ``cifar10``, ``cifar100`` and ``svhn`` are read from
torchvision's layout under the data root (argument, else ``LCNN_DATA``, else ``data/``) and downloaded when absent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from . import download
from .lab import data_root, nearest, pick_device

DATASETS = ("digits", "cifar10", "cifar100", "svhn")
PathLike = str | Path | None
Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]
Arrays = tuple[np.ndarray, np.ndarray, tuple[str, ...]]  # x (N, C, H, W), y (N,), classes
TEN_DIGITS = tuple("0123456789")
# Crop padding in pixels, and whether to mirror (a mirrored digit is no digit); (4, True) for all others.
AUGMENTATION = {"digits": (1, False), "svhn": (4, False)}


@dataclass(frozen=True, eq=False)
class Images:
    """A split of a dataset: ``x`` uint8 (N, C, H, W), ``y`` int64 (N,), the names of its classes, its name.
    ValueError: x is of another type, which would silently be divided by 255."""

    x: torch.Tensor
    y: torch.Tensor
    classes: tuple[str, ...]
    name: str

    def __post_init__(self) -> None:
        if getattr(self.x, "dtype", None) != torch.uint8:
            raise ValueError(f"x is {getattr(self.x, 'dtype', type(self.x).__name__)}: use (255 * x).round().byte()")

    def __len__(self) -> int:
        return len(self.x)

    def to(self, device: str | torch.device) -> Images:
        """The same images on another device."""
        return replace(self, x=self.x.to(device), y=self.y.to(device))

    def float(self) -> torch.Tensor:
        """All pixels as float32 (N, C, H, W) in [0, 1]."""
        return self.x.float() / 255


def floats(images: Images | tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Images as (x, y): float pixels (N, C, H, W) in [0, 1] and labels (N,); a pair of tensors is returned as it is.
    ValueError: something else, such as a torch ``Dataset``."""
    if isinstance(images, Images):
        return images.float(), images.y
    parts = list(images) if isinstance(images, tuple | list) else []
    if [isinstance(part, torch.Tensor) for part in parts] == [True, True]:
        return parts[0], parts[1]
    given = [type(part).__name__ for part in parts[:4]] or type(images).__name__
    raise ValueError(
        f"images are {given}: pass Images of data.load, or a pair (x, y) of tensors; of a Dataset, "
        "x = torch.stack([image for image, _ in dataset]), y = torch.tensor([label for _, label in dataset])"
    )


def load(
    name: str, split: str, *, root: PathLike = None, device: str | torch.device | None = None, subset: int | None = None
) -> Images:
    """Load one split of a dataset; a CIFAR or SVHN that is absent is downloaded first.

    Args:
        name: one of ``DATASETS``.
        split: ``"train"`` or ``"test"``. Digits have 1,437 and 360 images, a fixed stratified split.
        root: folder of the datasets; default ``LCNN_DATA``, else ``data/`` of the project.
        device: where to put the tensors; default: they stay on the CPU.
        subset: only the first so many images.

    Raises:
        ValueError: unknown name or split, or a subset that the split does not have.
        FileNotFoundError, RuntimeError: a local file is missing or altered (nothing of yours is overwritten), or the
            download failed.
    """
    nearest(name, DATASETS, "dataset")
    nearest(split, ("train", "test"), "split")
    if name == "digits":
        x, y, classes = _digits(split)
    elif name == "svhn":
        x, y, classes = _svhn(split, data_root(root))
    else:
        x, y, classes = _cifar(name, split, data_root(root))
    if subset is not None and not 1 <= subset <= len(x):
        raise ValueError(f"subset is {subset}, but the {split} split of {name} has 1 to {len(x)} images to give")
    images = Images(torch.from_numpy(x)[:subset].contiguous(), torch.as_tensor(y)[:subset].long(), classes, name)
    return images if device is None else images.to(pick_device(device))


def _digits(split: str) -> Arrays:
    """8 x 8 digits of the UCI repository, values 0..16 spread over 0..255."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    chosen = train_test_split(np.arange(len(digits.target)), test_size=360, stratify=digits.target, random_state=0)
    index = chosen[split == "test"]
    x = np.round(digits.images[index, None] * 255 / 16).astype(np.uint8)
    return x, digits.target[index], TEN_DIGITS


def _cifar(name: str, split: str, root: Path) -> Arrays:
    """CIFAR by torchvision, which checks the MD5 of every file before it unpickles it."""
    from torchvision import datasets

    cifar = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    folder = root / cifar.base_folder
    if not folder.exists():
        download.fetch(name, root)
    try:
        found = cifar(root, train=split == "train")
    except RuntimeError:
        meta = (cifar.meta["filename"], cifar.meta["md5"])
        _blame(name, folder, {folder / file: md5 for file, md5 in (*cifar.train_list, *cifar.test_list, meta)})
        raise
    return found.data.transpose(0, 3, 1, 2), np.array(found.targets), tuple(found.classes)


def _svhn(split: str, root: Path) -> Arrays:
    """SVHN by torchvision, which checks the MD5 of the file and turns label 10 into 0."""
    from torchvision import datasets

    _, file, md5 = datasets.SVHN.split_list[split]
    if not (root / file).exists():
        download.fetch("svhn", root)
    try:
        found = datasets.SVHN(root, split)
    except RuntimeError:
        _blame("svhn", root / file, {root / file: md5})
        raise
    return found.data, found.labels, TEN_DIGITS


def _blame(name: str, whole: Path, expected: dict[Path, str]) -> None:
    """Raise for the first file that is missing or altered, with the way out: torchvision says neither."""
    way_out = f"delete {whole} and run `lcnn data {name}`, or set LCNN_DATA to a folder with a good copy"
    for path, md5 in expected.items():
        if not path.is_file():
            raise FileNotFoundError(f"{name} is incomplete, {path} is missing: {way_out}")
        if (actual := download.md5_of(path)) != md5:
            raise RuntimeError(f"{path} is altered (MD5 {actual}, expected {md5}): {way_out}")


def available(root: PathLike = None) -> dict[str, str]:
    """Where each dataset is: ``"embedded"``, a path, or ``"missing"``. Looks for files only, checks none."""
    folder, found = data_root(root), {"digits": "embedded"}
    for name, remotes in download.MIRRORS.items():
        paths = [folder / remote.becomes for remote in remotes]
        here = paths[0] if len(paths) == 1 else folder
        found[name] = str(here) if all(path.exists() for path in paths) else "missing"
    return found


def two_moons(n: int = 400, noise: float = 0.1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two interleaved half circles (scikit-learn's ``make_moons``): points float32 (n, 2), labels int64 (n,).

    Args:
        noise: standard deviation of the Gaussian noise on each coordinate.
    """
    from sklearn.datasets import make_moons

    if n < 2:
        raise ValueError(f"n is {n}: two moons need at least 2 points")
    if not (math.isfinite(noise) and noise >= 0):
        raise ValueError(f"noise is {noise}: it is a standard deviation, finite and 0 or more")
    x, y = make_moons(n, noise=noise, random_state=seed)
    return torch.from_numpy(x).float(), torch.from_numpy(y).long()


def batches(
    images: Images,
    batch_size: int,
    *,
    augment: bool = False,
    generator: torch.Generator | None = None,
    drop_last: bool = False,
) -> Batches:
    """Yield every image once: x float32 (B, C, H, W) in [0, 1] and y int64 (B,), made on the device of ``images``.

    Shuffled with a (CPU) generator or with ``augment``, else in order. Only ``images`` travels to the device, once, and
    the random numbers of a round, together: they are the CPU's, so every device sees the same batches.

    Args:
        augment: random crops of the zero-padded images and horizontal flips, each image its own.
        generator: source of the order and of the augmentation; the same seed gives the same batches.
        drop_last: leave out a last, smaller batch (unless it is the only one), so that all have one shape.
    """
    if not isinstance(images, Images):
        raise ValueError(f"images are a {type(images).__name__}: pass Images of data.load, or Images(x, y, …)")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: use 1 or more")
    return _batches(images, batch_size, augment, generator, drop_last)


def _batches(
    images: Images, batch_size: int, augment: bool, generator: torch.Generator | None, drop_last: bool
) -> Batches:
    n, device = len(images), images.x.device
    order = places = flips = None
    padding, mirror = AUGMENTATION.get(images.name, (4, True))
    if augment or generator is not None:
        order = torch.randperm(n, generator=generator).to(device)
    if augment:
        places = torch.randint(2 * padding + 1, (2, n), generator=generator).to(device)
    if augment and mirror:
        flips = (torch.rand(n, generator=generator) < 0.5).to(device)
    end = n - n % batch_size if drop_last and n > batch_size else n
    for start in range(0, end, batch_size):
        batch = slice(start, min(start + batch_size, n))
        picked = batch if order is None else order[batch]
        x = images.x[picked]
        if places is not None:
            x = _cropped(x, padding, *places[:, batch])
        if flips is not None:
            x = torch.where(flips[batch, None, None, None], x.flip(-1), x)
        yield x.float().div_(255), images.y[picked]


def _cropped(x: torch.Tensor, padding: int, top: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """Crop each image of x (N, C, H, W), zero-padded, at its own place: top and left are (N,)."""
    windows = F.pad(x, (padding,) * 4).unfold(2, x.shape[2], 1).unfold(3, x.shape[3], 1)  # (N, C, top, left, H, W)
    return windows[torch.arange(len(x), device=x.device), :, top, left]


def check_images(x: torch.Tensor, *, channels: int | None = None) -> None:
    """Raise a ValueError, with the way out, unless x is float (N, C, H, W), finite and in [0, 1]."""
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"images are a {type(x).__name__}: use torch.as_tensor(x)")
    if x.dtype == torch.uint8:
        raise ValueError("images are uint8: divide by 255, or use data.batches / Images.float()")
    if not x.is_floating_point():
        raise ValueError(f"images are {x.dtype}: use floating point numbers in [0, 1]")
    shape = tuple(x.shape)
    if x.dim() != 4:
        raise ValueError(f"images have shape {shape}: expected (N, C, H, W); a single image needs x[None]")
    if x.numel() == 0:
        raise ValueError(f"images have shape {shape}: at least one image is needed")
    if channels is not None and shape[1] != channels:
        raise ValueError(f"images have shape {shape}: expected {channels} channels, (N, {channels}, H, W)")
    low, high = torch.stack(x.detach().aminmax()).tolist()  # one wait for the device; NaN wins over any number
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"images hold NaN or infinity (smallest {low}, largest {high}): find where they come from")
    if low < 0 or high > 1:
        raise ValueError(
            f"images lie in [{low:g}, {high:g}], outside [0, 1]: divide by the largest pixel value, or clamp; "
            "do not normalise them, the models do that inside"
        )


def check_labels(y: torch.Tensor, n: int, classes: int, *, device: torch.device | None = None) -> None:
    """Raise a ValueError, with the way out, unless y is int64 (n,) with values 0..classes-1 (on ``device``)."""
    if not isinstance(y, torch.Tensor) or y.dtype != torch.int64:
        kind = y.dtype if isinstance(y, torch.Tensor) else f"a {type(y).__name__}"
        raise ValueError(f"labels are {kind}: use torch.as_tensor(y).long()")
    if tuple(y.shape) != (n,):
        raise ValueError(f"labels have shape {tuple(y.shape)}: expected ({n},), one class number per image")
    if device is not None and y.device != device:
        raise ValueError(f"labels are on {y.device}, images on {device}: use y.to(x.device)")
    low, high = torch.stack(y.aminmax()).tolist() if n else (0, 0)
    if low < 0 or high >= classes:
        raise ValueError(f"labels run from {low} to {high}: with {classes} classes they must be 0 to {classes - 1}")
