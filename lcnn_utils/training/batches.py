"""What a network is trained on: a recipe's samples, or anybody's tensors or dataset, checked, as batches."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate
from torchvision.datasets import DatasetFolder

from .. import data
from ..curvature import evaluating
from ..curvature.premises import check_logits
from ..lab import check_choice, pick_device
from .objectives import statistics_at_rest
from .recipe import INPUTS, ONLY, Recipe, Training

TRAINING = {"moons": 400, "digits": 1437, "cifar10": 50_000, "cifar100": 50_000, "svhn": 73_257}  # samples to train on
MOONS_TEST = 1000, 1_000_000  # points to test on, and what is added to the seed for them
MOONS_STEPS = 20  # an epoch, each on all points
SPLIT_SEED = 20_221_128  # of the one permutation that says what is held out
PROBES = 16  # training images of the history's curvature, at most …
A_PROBE = 250  # … of own data one for so many, so that it takes no more than a few percent of an epoch
Batch = tuple[Tensor, Tensor]
Device = str | torch.device | None
Samples = data.Images | Batch | Dataset


@dataclass(frozen=True)
class Feed:
    """What training takes from its data: what tells the ``samples`` from others, so many ``classes``, ``steps`` an
    epoch, an epoch's batches (shuffled by the generator), and a few samples to watch the curvature of."""

    samples: str
    classes: int
    steps: int
    batches: Callable[[Generator], Iterable[Batch]]
    probe: Batch


def validation_split(n: int, fraction: float) -> tuple[Tensor, Tensor]:
    """Ascending indices of those of n samples to train on, and of those held out: the same for all methods and seeds; a
    larger fraction holds out the same and more. ValueError: one of the two parts would be empty."""
    count = round(fraction * n)
    if fraction and not 0 < count < n:
        what = f"validation_fraction={fraction:g} holds out {count} of {n} samples"
        raise ValueError(f"{what}: leave at least one on each side")
    order = torch.randperm(n, generator=Generator().manual_seed(SPLIT_SEED))
    return order[count:].sort().values, order[:count].sort().values


def _split(recipe: Recipe, split: str, device: Device) -> Batch:
    """:func:`samples`, but images as bytes: CIFAR's training set as float32 would be 600 MB."""
    check_choice(split, ("train", "validation", "test"), "split")
    if split == "validation" and not recipe.validation_fraction:
        raise ValueError("this recipe holds nothing out: give it validation_fraction=0.2, say, or ask for 'test'")
    source = "test" if split == "test" else "train"
    if recipe.dataset == "moons":
        points, offset = MOONS_TEST if source == "test" else (TRAINING["moons"], 0)
        x, y = data.two_moons(points, noise=0.15, seed=recipe.seed + offset)
    else:
        images = data.load(recipe.dataset, source)  # on the CPU, so that the device never holds what isn't chosen
        x, y = images.x, images.y
    if source == "train" and recipe.validation_fraction:
        kept, out = validation_split(len(y), recipe.validation_fraction)
        chosen = out if split == "validation" else kept
        x, y = x[chosen], y[chosen]
    device = pick_device(device)
    return x.to(device), y.to(device)


def samples(recipe: Recipe, split: str, device: torch.device | str = "cpu") -> Batch:
    """A split as (x, y): images (N, C, H, W) in [0, 1] or points (N, 2), and labels (N,). ``split``: ``train`` without
    what is held out, ``validation`` or ``test``. ValueError: another split, or nothing is held out."""
    x, y = _split(recipe, split, device)
    return data.pixels(x), y


def steps_an_epoch(recipe: Recipe) -> int:
    """Training steps an epoch, the last partial batch left out. Moons: the full batch, 20 times."""
    if recipe.dataset == "moons":
        return MOONS_STEPS
    n = TRAINING[recipe.dataset]
    return max(1, (n - round(recipe.validation_fraction * n)) // recipe.batch_size)


def recipe_feed(recipe: Recipe, device: torch.device) -> Feed:
    """The training samples of a recipe, on the device."""
    x, y = _split(recipe, "train", device)
    if recipe.dataset != "moons":
        images = data.Images(x, y, (), recipe.dataset)
        return _tensor_feed(images, recipe, range(PROBES), INPUTS[recipe.dataset][1], recipe.dataset)
    return Feed("moons", 2, MOONS_STEPS, lambda _: [(x, y)] * MOONS_STEPS, (x[:PROBES], y[:PROBES]))


def _tensor_feed(
    samples: data.Images | Batch, training: Training, probe: Sequence[int], classes: int, name: str
) -> Feed:
    """A feed of tensors that are on the device; ``name`` tells them from others."""
    x, y = (samples.x, samples.y) if isinstance(samples, data.Images) else samples
    options: dict[str, Any] = dict(augment=training.augment, drop_last=True)
    batches = lambda generator: data.batches(samples, training.batch_size, generator=generator, **options)
    steps, chosen = max(1, len(y) // training.batch_size), list(probe)
    return Feed(name, classes, steps, batches, (data.pixels(x[chosen]), y[chosen]))


def fingerprint(x: Tensor, y: Tensor) -> str:
    """What tells samples from others: their number and a hash of them."""
    code = hashlib.sha256()
    for part in (x, y):
        code.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return f"{len(y)} samples, {code.hexdigest()[:12]}"


def own_feed(
    model: nn.Module, train: Samples, training: Training, device: torch.device, workers: int, watched: bool
) -> Feed:
    """A feed of anybody's samples, once they and the model are seen to fit each other. ``watched``: with samples to
    watch the curvature of. ValueError: see ``fit``."""
    if isinstance(train, Dataset):
        return _dataset_feed(model, train, training, device, workers, watched)
    if isinstance(train, data.Images):
        x, y = train.x, train.y
    else:
        x, y = (part.detach() for part in data.floats(train))
        _check(x, y)
    classes = _classes(model, x[:2], training)
    _check_labels(y, classes)
    if training.augment and x.dim() != 4:
        raise ValueError(f"augment crops and mirrors images (N, C, H, W): x has shape {tuple(x.shape)}")
    samples = train.to(device) if isinstance(train, data.Images) else (x.to(device), y.to(device))
    return _tensor_feed(samples, training, _probe(len(y)) if watched else (), classes, fingerprint(x, y))


def _dataset_feed(
    model: nn.Module, train: Any, training: Training, device: torch.device, workers: int, watched: bool
) -> Feed:
    """A feed of a Dataset: its images are made anew for each batch, by ``workers`` processes."""
    if training.augment:
        raise ValueError("augment=True is for tensors: a Dataset augments by its own transform")
    if isinstance(train, IterableDataset):
        raise ValueError("an IterableDataset can't be shuffled again each epoch: use a Dataset with len() and indices")
    if len(train) < 2:
        raise ValueError(f"the dataset has {len(train)} samples to train on: is its folder empty?")
    first, labels = _stacked([train[0], train[1]])
    classes = _classes(model, first, training)
    data.check_labels(labels, 2, classes)
    if isinstance(train, DatasetFolder) and train.target_transform is None:
        _check_labels(torch.as_tensor(train.targets), classes)

    def batches(generator: Generator) -> Iterator[Batch]:
        options: dict[str, Any] = dict(shuffle=True, drop_last=len(train) > training.batch_size, num_workers=workers)
        for x, y in DataLoader(train, training.batch_size, generator=generator, collate_fn=_stacked, **options):
            data.check_labels(y, len(x), classes)
            yield x.to(device), y.to(device)

    x, y = _stacked([train[index] for index in _probe(len(train))])
    few = slice(None if watched else 0)
    steps = max(1, len(train) // training.batch_size)
    return Feed(f"{len(train)} samples", classes, steps, batches, (x[few].to(device), y[few].to(device)))


def _probe(n: int) -> range:
    """Which of n samples are watched: from all over, since a folder's images come class by class."""
    return range(0, n, max(A_PROBE, math.ceil(n / PROBES)))


def read_batches(samples: Samples, classes: int, device: torch.device, batch_size: int = 512) -> Iterator[Batch]:
    """All samples in order, checked, on the device, images in [0, 1]."""
    parts: Iterable[Batch]
    if isinstance(samples, Dataset):
        parts = DataLoader(samples, batch_size, collate_fn=_stacked)
    elif isinstance(samples, data.Images):
        parts = data.batches(samples, batch_size)
    else:
        x, y = data.floats(samples)
        _check(x, y)
        parts = zip(x.split(batch_size), y.split(batch_size), strict=True)
    for x, y in parts:
        data.check_labels(y, len(x), classes)
        yield x.to(device), y.to(device)


def _stacked(items: list[Any]) -> Batch:
    """A batch of a Dataset's items, checked: x (N, …) and y (N,)."""
    try:
        x, y = default_collate([(image, label) for image, label in items])
        x, y = x.detach(), y.reshape(len(items))
        y = y if y.is_floating_point() else y.long()
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        way_out = "images as tensors of one size (ToTensor, Resize, CenterCrop), labels as whole numbers"
        raise ValueError(f"the dataset's items are no pairs (image, label) for a batch ({error}): {way_out}") from error
    _check(x, y)
    return x, y


def check_validation(model: nn.Module, val: Samples, train: Samples, classes: int, device: torch.device) -> None:
    """ValueError unless the samples held out are of the same classes, and the model runs on them."""
    names, other = (tuple(getattr(samples, "classes", ())) for samples in (train, val))
    if names and other and names != other:
        raise ValueError(f"train has the classes {names}, val has {other}")
    if isinstance(val, Dataset):
        if len(val) == 0:  # type: ignore[arg-type]
            raise ValueError("val has no samples")
    else:
        y = val.y if isinstance(val, data.Images) else data.floats(val)[1]
        data.check_labels(y, len(y), classes)
    x, _ = next(read_batches(val, classes, device))
    with evaluating(model), torch.no_grad():
        try:
            model(x[:2])
        except Exception as error:  # whatever a forward raises
            raise ValueError(f"the model does not run on val, of shape {tuple(x.shape)}: {error}") from error


def _check(x: Tensor, y: Tensor) -> None:
    """ValueError unless x are images (N, C, H, W) in [0, 1] or finite points (N, d), with as many labels y."""
    if not (x.dim() == 2 and x.is_floating_point()):
        data.check_images(x)
    elif not bool(x.isfinite().all()):
        raise ValueError("x has entries that are NaN or infinite: leave those points out")
    if len(x) != len(y):
        raise ValueError(f"there are {len(x)} samples and {len(y)} labels: give one label to each")


def _check_labels(y: Tensor, classes: int) -> None:
    """ValueError unless labels (N,) are of the model's classes, and of two at least."""
    data.check_labels(y, len(y), classes)
    if len(y.unique()) < 2:
        raise ValueError(f"all {len(y)} labels are {int(y[0])}: a classifier needs two classes at least")


def _classes(model: nn.Module, x: Tensor, training: Training) -> int:
    """How many classes the model tells apart: it is tried on two samples in training mode, which leaves no trace.
    ValueError: it doesn't run on x, or has nothing that the method trains."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("no parameter of the model has requires_grad: there is nothing to train")
    soft = any(name.endswith(("log_beta", "log_gamma")) and p.requires_grad for name, p in model.named_parameters())
    if training.method in ONLY["lambda_beta"] and not soft:
        raise ValueError(
            f"{training.method} trains β and γ, and this model has none that are trained: convert its ReLUs and "
            "BatchNorms first, by lcnn_utils.nn.to_low_curvature(model, x[:2]), or use another method"
        )
    few = data.pixels(x[: training.batch_size]).to(trained[0].device)
    modes = {module: module.training for module in model.modules()}
    try:
        with statistics_at_rest(model.train()), torch.no_grad():
            logits = model(few)
    except Exception as error:  # whatever a forward raises
        raise ValueError(f"the model can't be trained on batches of shape {tuple(few.shape)}: {error}") from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    check_logits(torch.cat([logits, logits]) if len(few) == 1 and isinstance(logits, Tensor) else logits)
    return logits.shape[1]
