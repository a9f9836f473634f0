"""Room ``data`` against scikit-learn, torchvision, NumPy and brute force. No network."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import scipy.io
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits, make_moons
from torch.utils.data import DataLoader, Subset, TensorDataset

from lcnn_utils import data, download


@pytest.fixture(autouse=True)
def _no_download(monkeypatch):
    def refuse(name, root, **_):
        raise AssertionError(f"a test tried to download {name} into {root}")

    monkeypatch.setattr(download, "fetch", refuse)


def counting(n: int, name: str = "made", size: int = 5) -> data.Images:
    """n images whose labels are their indices, with random pixels."""
    pixels = torch.randint(256, (n, 2, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    return data.Images(pixels, torch.arange(n), tuple(map(str, range(n))), name)


# ---------------------------------------------------------------- digits and moons


def test_digits_are_scikit_learns():
    train, test = data.load("digits", "train"), data.load("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    for images in (train, test):
        assert images.x.shape[1:] == (1, 8, 8)
        assert (images.x.dtype, images.y.dtype, images.y.shape) == (torch.uint8, torch.int64, (len(images),))
        assert (images.name, images.classes) == ("digits", tuple("0123456789"))

    raw = load_digits()
    scaled = np.rint(raw.images.astype(int) * 255 / 16).astype(np.uint8)
    assert {0, 128, 255} <= set(np.unique(scaled).tolist())
    where: dict[bytes, list[int]] = {}
    for index, image in enumerate(scaled):
        where.setdefault(image.tobytes(), []).append(index)
    assert all(len(indices) == 1 for indices in where.values())  # so pixels identify an image
    index = {s: [where[image.numpy().tobytes()][0] for image in s.x[:, 0]] for s in (train, test)}
    assert sorted(index[train] + index[test]) == list(range(1797))  # disjoint and complete
    for images in (train, test):
        np.testing.assert_array_equal(images.y.numpy(), raw.target[index[images]])


def test_digits_split_is_stratified_shuffled_and_fixed():
    train, test = data.load("digits", "train"), data.load("digits", "test")
    share = np.bincount(load_digits().target) * 360 / 1797
    assert np.abs(np.bincount(test.y) - share).max() <= 1
    assert len(set(test.y[:30].tolist())) >= 8  # a subset sees nearly every class
    # Shipped models were trained on this very split: a scikit-learn that splits otherwise must be noticed.
    assert hashlib.md5(train.x.numpy().tobytes() + test.x.numpy().tobytes()).hexdigest() == DIGITS_MD5


DIGITS_MD5 = "98927780e9e782043edabf8a0ef95665"


def test_images_values_and_device():
    images = data.load("digits", "test", subset=7, device="cpu")
    assert len(images) == 7
    assert torch.equal(images.x, data.load("digits", "test").x[:7])
    assert images.float().dtype == torch.float32
    assert torch.equal((images.float() * 255).round().to(torch.uint8), images.x)
    assert images.float().min() == 0
    assert images.float().max() == 1
    moved = images.to("meta")
    assert moved.x.device.type == moved.y.device.type == "meta"
    assert (moved.name, moved.classes) == (images.name, images.classes)


@pytest.mark.parametrize("subset", [0, -1, 361])
def test_subset_errors(subset):
    with pytest.raises(ValueError, match=rf"subset is {subset}.*1 to 360"):
        data.load("digits", "test", subset=subset)


def test_unknown_names_are_suggested():
    with pytest.raises(ValueError, match=r"'cifar11'.*digits, cifar10.*did you mean 'cifar10'"):
        data.load("cifar11", "train")
    with pytest.raises(ValueError, match=r"split 'tset'.*train, test.*did you mean 'test'"):
        data.load("digits", "tset")
    with pytest.raises(RuntimeError, match="'nonsense' is not available"):
        data.load("digits", "test", device="nonsense")


def test_two_moons_are_scikit_learns():
    x, y = data.two_moons(51, 0.2, seed=3)
    expected_x, expected_y = make_moons(51, noise=0.2, random_state=3)
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    np.testing.assert_array_equal(x.numpy(), expected_x.astype(np.float32))
    np.testing.assert_array_equal(y.numpy(), expected_y)
    assert data.two_moons(2, 0.0)[0].shape == (2, 2)


@pytest.mark.parametrize(("n", "noise"), [(1, 0.1), (10, -0.1), (10, float("nan")), (10, float("inf"))])
def test_two_moons_errors(n, noise):
    with pytest.raises(ValueError, match=r"two moons need|standard deviation"):
        data.two_moons(n, noise)


def test_import_is_quick():
    code = "import sys, lcnn_utils.data; print([m for m in ('torchvision', 'sklearn', 'scipy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------- batches


def gathered(images, batch_size, seed, **options) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return list(data.batches(images, batch_size, generator=generator, **options))


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 40), batch_size=st.integers(1, 45), seed=st.none() | st.integers(0, 99), augment=st.booleans())
def test_batches_cover_every_image_once(n, batch_size, seed, augment):
    images = counting(n)
    found = gathered(images, batch_size, seed, augment=augment)
    sizes = [len(y) for _, y in found]
    assert sizes == [batch_size] * (n // batch_size) + ([n % batch_size] if n % batch_size else [])
    order = torch.cat([y for _, y in found])
    assert sorted(order.tolist()) == list(range(n))
    if seed is None and not augment:
        assert order.tolist() == list(range(n))
    for x, y in found:
        assert (x.dtype, y.dtype, x.shape) == (torch.float32, torch.int64, (len(y), 2, 5, 5))
        assert x.min() >= 0
        assert x.max() <= 1
        if not augment:
            np.testing.assert_array_equal(x.numpy(), images.x[y].numpy() / np.float32(255))


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 40), batch_size=st.integers(1, 45), seed=st.none() | st.integers(0, 99), augment=st.booleans())
def test_dropping_the_last_batch_leaves_the_others_as_they_are(n, batch_size, seed, augment):
    whole, short = (gathered(counting(n), batch_size, seed, augment=augment, drop_last=drop) for drop in (False, True))
    assert len(short) == max(1, n // batch_size), "one at least: the only batch stays, however small"
    assert len({len(y) for _, y in short}) == 1
    for (x, y), (kept_x, kept_y) in zip(whole[: len(short)], short, strict=True):
        assert torch.equal(x, kept_x)
        assert torch.equal(y, kept_y)


def test_an_image_is_cropped_alike_in_batches_of_any_size():
    """The random numbers of an epoch are drawn at once: the size of its batches doesn't change what they are."""
    images = counting(50, "cifar10", size=6)
    small, ((x, y),) = (gathered(images, size, 3, augment=True) for size in (7, 50))
    assert torch.equal(torch.cat([part for part, _ in small]), x)
    assert torch.equal(torch.cat([part for _, part in small]), y)


def test_the_generator_moves_on_by_a_whole_epoch_at_the_first_batch():
    """Whoever else draws from it while training (a random start, say) then finds it in the same state each time."""
    generator = torch.Generator().manual_seed(0)
    batches = data.batches(counting(20), 5, augment=True, generator=generator)
    next(batches)
    state = generator.get_state()
    list(batches)
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("augment", [False, True])
def test_batches_are_reproducible_and_seeded(augment):
    def epoch(seed, count=1):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            found = list(data.batches(counting(64), 16, augment=augment, generator=generator))
        return torch.cat([x for x, _ in found]), torch.cat([y for _, y in found])

    assert all(torch.equal(a, b) for a, b in zip(epoch(5), epoch(5), strict=True))
    assert not torch.equal(epoch(5)[1], epoch(6)[1])
    assert not torch.equal(epoch(5)[1], epoch(5, count=2)[1])  # the next epoch has another order


@pytest.mark.parametrize(
    ("name", "padding", "mirror"), [("digits", 1, False), ("svhn", 4, False), ("cifar10", 4, True)]
)
def test_augmentation_is_a_shift_and_perhaps_a_flip(name, padding, mirror):
    images, size = counting(300, name, size=6), 6
    seen = set()
    for x, y in data.batches(images, 70, augment=True, generator=torch.Generator().manual_seed(0)):
        for made, index in zip((x * 255).round().byte().numpy(), y.tolist(), strict=True):
            padded = np.pad(images.x[index].numpy(), ((0, 0), (padding, padding), (padding, padding)))
            fits = [
                (top, left, flip)
                for top in range(2 * padding + 1)
                for left in range(2 * padding + 1)
                for flip in (False, True)
                if np.array_equal(made, padded[:, top : top + size, left : left + size][..., :: -1 if flip else 1])
            ]
            assert len(fits) == 1, f"image {index} is no crop of its padded original"
            seen.add(fits[0])
    places = (2 * padding + 1) ** 2
    assert {flip for *_, flip in seen} == ({False, True} if mirror else {False})
    assert len({place[:2] for place in seen}) > 0.9 * places  # every image its own crop, and all of them occur
    assert abs(np.mean([flip for *_, flip in seen]) - 0.5 * mirror) < 0.1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_the_gpu_are_the_cpus():
    images = counting(100)
    pairs = [
        list(data.batches(where, 32, augment=True, generator=torch.Generator().manual_seed(1)))
        for where in (images, images.to("cuda"))
    ]
    for (x, y), (x_gpu, y_gpu) in zip(*pairs, strict=True):
        assert x_gpu.is_cuda
        assert torch.equal(x, x_gpu.cpu())
        assert torch.equal(y, y_gpu.cpu())


def test_batches_errors_come_at_once():
    with pytest.raises(ValueError, match="batch_size is 0"):
        data.batches(counting(3), 0)


PAIRS = TensorDataset(torch.rand(4, 1, 5, 5), torch.arange(4))
X, Y = PAIRS.tensors
NO_IMAGES = {
    "TensorDataset": PAIRS, "Subset": Subset(PAIRS, [0, 1]), "DataLoader": DataLoader(PAIRS), "ndarray": (X.numpy(), Y),
    "Tensor.*ndarray": (X, Y.numpy()), "list.*list": (X.tolist(), Y.tolist()), "Tensor": X, "are Tensor": X[:2],
    "Tensor.*Tensor.*Tensor": (X, Y, Y), "NoneType": None, "Tensor.*None": (X, None), "str": "digits", "dict": {"x": X},
}  # fmt: skip


@pytest.mark.parametrize("kind", NO_IMAGES)
def test_what_is_no_images_is_named(kind):
    with pytest.raises(ValueError, match=f"{kind}.*pair.*stack"):
        data.floats(NO_IMAGES[kind])
    with pytest.raises(ValueError, match=type(NO_IMAGES[kind]).__name__):
        data.batches(NO_IMAGES[kind], 2)


def test_pixels_are_whole_numbers():
    for x in (X, X.double(), (255 * X).int(), X.tolist()):
        with pytest.raises(ValueError, match=str(getattr(x, "dtype", "list"))):
            data.Images(x, Y, ("a", "b", "c", "d"), "mine")


def test_images_and_pairs_are_floats():
    x, y = data.floats(counting(3))
    assert (x.dtype, x.max() <= 1, y.tolist()) == (torch.float32, True, [0, 1, 2])
    assert all(part is given for part, given in zip(data.floats([X, Y]), (X, Y), strict=True))
    loaded = torch.stack([image for image, _ in PAIRS]), torch.tensor([label for _, label in PAIRS])  # as it says
    assert all(torch.equal(*both) for both in zip(loaded, (X, Y), strict=True))


# ---------------------------------------------------------------- checks

GOOD = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_good_images_and_labels_pass(dtype):
    data.check_images(GOOD.to(dtype), channels=3)
    data.check_images(torch.tensor([0.0, 1.0], dtype=dtype).reshape(1, 1, 1, 2).requires_grad_())
    data.check_labels(torch.tensor([0, 9]), 2, 10, device=GOOD.device)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((1, 1, 2, 2), np.float32), "ndarray: use torch"),
        ((GOOD * 255).byte(), r"uint8: divide by 255, or use data\.batches / Images\.float"),
        (torch.ones(1, 1, 2, 2).long(), "torch.int64: use floating point"),
        (GOOD[0], r"\(3, 4, 4\): expected \(N, C, H, W\)"),
        (GOOD[:0], r"\(0, 3, 4, 4\): at least one"),
        (GOOD[:, :2], r"\(2, 2, 4, 4\): expected 3 channels"),
        (GOOD.index_fill(3, torch.tensor(1), float("nan")), "NaN or infinity"),
        (GOOD.index_fill(3, torch.tensor(1), float("inf")), "NaN or infinity.*largest inf"),
        (GOOD.index_fill(3, torch.tensor(1), -0.25), r"\[-0\.25, .*outside \[0, 1\]"),
        (GOOD.index_fill(3, torch.tensor(1), 1.5), r", 1\.5\], outside \[0, 1\]"),
    ],
)
def test_bad_images(x, message):
    with pytest.raises(ValueError, match=message):
        data.check_images(x, channels=3)


INTEGERS = ("bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "uint64")


@pytest.mark.parametrize(
    ("y", "message"),
    [
        ([0, 1], r"labels are a list: use torch"),
        (np.array([0, 1]), "labels are a ndarray: use torch"),
        *[(torch.tensor([0, 1], dtype=getattr(torch, kind)), rf"torch\.{kind}: use .*long\(\)") for kind in INTEGERS],
        (torch.tensor([0.0, 1.0]), r"float32: use .*long\(\)"),
        (torch.tensor([[0], [1]]), r"\(2, 1\): expected \(2,\)"),
        (torch.tensor([0, 1, 2]), r"\(3,\): expected \(2,\)"),
        (torch.tensor([0, 10]), "from 0 to 10: with 10 classes they must be 0 to 9"),
        (torch.tensor([-1, 3]), "from -1 to 3"),
        (torch.empty(2, dtype=torch.int64, device="meta"), r"on meta, images on cpu: use y\.to\(x\.device\)"),
    ],
)
def test_bad_labels(y, message):
    with pytest.raises(ValueError, match=message):
        data.check_labels(y, 2, 10, device=torch.device("cpu"))


# ---------------------------------------------------------------- CIFAR and SVHN from the disk


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar_is_torchvisions(cifar_root, name, classes):
    from torchvision import datasets

    for split, count in (("train", 50_000), ("test", 10_000)):
        images = data.load(name, split, root=cifar_root)
        assert images.x.shape == (count, 3, 32, 32)
        assert (images.x.dtype, images.y.dtype) == (torch.uint8, torch.int64)
        assert images.x.is_contiguous()
        assert len(images.classes) == classes
        assert (torch.bincount(images.y) == count // classes).all()
    theirs = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name](cifar_root, train=False)
    assert images.classes == tuple(theirs.classes)
    for index in (0, 1234, 9999):
        picture, label = theirs[index]
        np.testing.assert_array_equal(images.x[index].permute(1, 2, 0).numpy(), np.asarray(picture))
        assert images.y[index] == label


@pytest.fixture
def cifar100_copy(cifar_root, tmp_path):
    """A CIFAR-100 whose two small files are copies that a test may spoil."""
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for file in ("test", "meta"):
        shutil.copy(cifar_root / folder.name / file, folder)
    (folder / "train").symlink_to(cifar_root / folder.name / "train")
    return folder


@pytest.mark.parametrize("file", ["meta", "test"])
def test_altered_cifar_is_named_and_kept(cifar100_copy, file):
    blob = bytearray((cifar100_copy / file).read_bytes())
    blob[len(blob) // 2] ^= 1
    (cifar100_copy / file).write_bytes(blob)
    with pytest.raises(
        RuntimeError, match=rf"cifar-100-python.{file} is altered.*delete .*lcnn data cifar100.*LCNN_DATA"
    ):
        data.load("cifar100", "test", root=cifar100_copy.parent)
    assert (cifar100_copy / file).read_bytes() == blob


@pytest.mark.parametrize("file", ["meta", "train"])
def test_incomplete_cifar_is_named(cifar100_copy, file):
    (cifar100_copy / file).unlink()
    with pytest.raises(FileNotFoundError, match=rf"incomplete, .*cifar-100-python.{file} is missing: delete"):
        data.load("cifar100", "test", root=cifar100_copy.parent)


@pytest.fixture
def svhn_root(tmp_path, monkeypatch):
    """A tiny SVHN in the published layout: X (32, 32, 3, N) uint8, y (N, 1) with 10 for the digit 0."""
    from torchvision import datasets

    x = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)
    scipy.io.savemat(tmp_path / "test_32x32.mat", {"X": x, "y": np.array([[10.0], [1], [9], [10]])})
    md5 = hashlib.md5((tmp_path / "test_32x32.mat").read_bytes()).hexdigest()
    monkeypatch.setitem(datasets.SVHN.split_list, "test", ["", "test_32x32.mat", md5])
    return tmp_path, x


def test_svhn(svhn_root):
    root, x = svhn_root
    images = data.load("svhn", "test", root=root)
    assert (images.x.dtype, images.x.shape, images.y.dtype) == (torch.uint8, (4, 3, 32, 32), torch.int64)
    assert images.y.tolist() == [0, 1, 9, 0]
    assert images.classes[0] == "0"
    for n in range(4):
        np.testing.assert_array_equal(images.x[n].numpy(), np.moveaxis(x[..., n], 2, 0))


def test_altered_svhn_is_named(svhn_root):
    root, _ = svhn_root
    (root / "test_32x32.mat").write_bytes(b"not a matrix")
    with pytest.raises(RuntimeError, match=r"test_32x32.mat is altered.*lcnn data svhn"):
        data.load("svhn", "test", root=root)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_absent_dataset_is_downloaded(name, tmp_path, monkeypatch):
    calls = []

    def fetch(name, root):
        calls.append((name, root))
        raise RuntimeError("no mirror")

    monkeypatch.setattr(download, "fetch", fetch)
    monkeypatch.setenv("LCNN_DATA", str(tmp_path))
    with pytest.raises(RuntimeError, match="no mirror"):
        data.load(name, "test")
    assert calls == [(name, tmp_path)]


def test_available(tmp_path):
    assert tuple(data.available(tmp_path)) == data.DATASETS
    assert list(data.available(tmp_path).values()) == ["embedded", "missing", "missing", "missing"]
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "test_32x32.mat").touch()
    found = data.available(tmp_path)
    assert found["cifar10"] == str(tmp_path / "cifar-10-batches-py")
    assert (found["cifar100"], found["svhn"]) == ("missing", "missing")  # SVHN needs both files
    (tmp_path / "train_32x32.mat").touch()
    assert data.available(tmp_path)["svhn"] == str(tmp_path)
