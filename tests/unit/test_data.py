"""Room ``data`` against scikit-learn, torchvision, NumPy, brute force, and a server of our own for the downloads."""

import errno
import hashlib
import http.server
import io
import os
import shutil
import socket
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from helpers import files_of_at_most
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from lcnn_utils import data


def listed(folder):
    """What is in a folder, but for the locks."""
    return sorted(name for name in os.listdir(folder) if not name.endswith(".lock"))


DIGITS_MD5 = "98927780e9e782043edabf8a0ef95665"  # of the split that shipped models were trained on
X, Y = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)), torch.arange(4)


def counting(n: int, name: str = "made", size: int = 5) -> data.Images:
    """n images whose labels are their indices, with random pixels."""
    pixels = torch.randint(256, (n, 2, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    return data.Images(pixels, torch.arange(n), tuple(map(str, range(n))), name)


# ---------------------------------------------------------------- datasets


def test_digits_are_scikit_learns_in_a_fixed_stratified_split():
    train, test, raw = data.load("digits", "train"), data.load("digits", "test"), load_digits()
    assert (train.x.shape, test.x.shape, test.classes) == ((1437, 1, 8, 8), (360, 1, 8, 8), tuple("0123456789"))
    assert (train.x.dtype, train.y.dtype) == (torch.uint8, torch.int64)
    where = {np.rint(im.astype(int) * 255 / 16).astype(np.uint8).tobytes(): i for i, im in enumerate(raw.images)}
    index = [[where[image.numpy().tobytes()] for image in split.x] for split in (train, test)]
    assert sorted(index[0] + index[1]) == list(range(1797)), "disjoint and complete"
    for split, indices in zip((train, test), index, strict=True):
        np.testing.assert_array_equal(split.y.numpy(), raw.target[indices])
    assert np.abs(np.bincount(test.y) - np.bincount(raw.target) * 360 / 1797).max() <= 1
    assert hashlib.md5(train.x.numpy().tobytes() + test.x.numpy().tobytes()).hexdigest() == DIGITS_MD5


def test_cifar_is_torchvisions(cifar_root):
    from torchvision.datasets import CIFAR100

    images, theirs = data.load("cifar100", "test", root=cifar_root), CIFAR100(cifar_root, train=False)
    assert (images.x.shape, images.x.dtype, images.y.dtype) == ((10_000, 3, 32, 32), torch.uint8, torch.int64)
    assert images.classes == tuple(theirs.classes)
    for index in (0, 1234, 9999):
        np.testing.assert_array_equal(images.x[index].permute(1, 2, 0).numpy(), np.asarray(theirs[index][0]))
        assert images.y[index] == theirs[index][1]


def test_svhn_puts_the_label_10_to_0(tmp_path, monkeypatch):
    from torchvision import datasets

    x, path = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 3), dtype=np.uint8), tmp_path / "test_32x32.mat"
    scipy.io.savemat(path, {"X": x, "y": np.array([[10.0], [1], [9]])})
    split = ["", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setitem(datasets.SVHN.split_list, "test", split)
    images = data.load("svhn", "test", root=tmp_path)
    assert images.y.tolist() == [0, 1, 9]
    np.testing.assert_array_equal(images.x.numpy(), np.moveaxis(x, (3, 2), (0, 1)))
    path.write_bytes(b"altered")
    with pytest.raises(RuntimeError, match=r"test_32x32.mat is incomplete or altered: delete it.*lcnn data svhn"):
        data.load("svhn", "test", root=tmp_path)
    assert path.read_bytes() == b"altered"


# ---------------------------------------------------------------- a folder of images

SHAPES = {"ants/1.png": (30, 20, 3), "bees/1.png": (17, 40, 3), "bees/2.jpg": (20, 20), "bees/3.png": (8, 8, 4)}


@pytest.fixture
def folder(tmp_path):
    """Two classes: wide, high, grey, and with a transparent channel."""
    rng = np.random.default_rng(0)
    for name, shape in SHAPES.items():
        path = tmp_path / "insects" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path)
    return tmp_path / "insects"


def test_a_folder_of_images_against_pil(folder, monkeypatch):
    monkeypatch.chdir(folder)
    images = data.image_folder(".", size=10)
    assert (images.classes, images.name) == (("ants", "bees"), "insects")
    assert images.y.tolist() == [0, 1, 1, 1]
    for x, name in zip(images.x, SHAPES, strict=True):
        image = Image.open(folder / name).convert("RGB")
        width, height = image.size
        scale = 10 / min(width, height)
        image = image.resize((int(width * scale), int(height * scale)), Image.Resampling.BILINEAR)
        left, top = round((image.width - 10) / 2), round((image.height - 10) / 2)
        expected = np.asarray(image.crop((left, top, left + 10, top + 10)))
        np.testing.assert_array_equal(x.permute(1, 2, 0).numpy(), expected)


def test_a_photo_is_turned_as_its_camera_says(folder):
    """EXIF orientation 6: the picture's top is the right side of the file's."""
    upright = Image.open(folder / "bees" / "3.png").convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.rotate(90, expand=True).save(folder / "ants" / "1.png", exif=exif)
    x = data.image_folder(folder, size=8).x
    assert torch.equal(x[0], x[-1])


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


SPOILT = {
    "absent": (lambda folder: folder.rename(folder.with_name("moved")), FileNotFoundError, "insects.*subfolder"),
    "empty": (lambda folder: (shutil.rmtree(folder), folder.mkdir()), FileNotFoundError, "insects.*subfolder"),
    "empty class": (lambda folder: (folder / "ants" / "1.png").unlink(), FileNotFoundError, "ants.*subfolder"),
    "one class": (lambda folder: shutil.rmtree(folder / "ants"), ValueError, "single class, bees"),
    "truncated": (lambda folder: half(folder / "bees" / "1.png"), ValueError, r"bees.1.png is damaged.*delete"),
    "16 bits": (
        lambda folder: Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(folder / "bees" / "4.png"),
        ValueError,
        r"bees.4.png has pixels of mode 'I;16'.*8 bits",
    ),
    "no image": (lambda folder: (folder / "bees" / "2.jpg").write_text("?"), ValueError, r"bees.2.jpg is damaged"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_folder_that_cannot_be_read(folder, case):
    spoil, error, message = SPOILT[case]
    spoil(folder)
    with pytest.raises(error, match=message):
        data.image_folder(folder)


# ---------------------------------------------------------------- batches


def gathered(images, batch_size, seed, **options) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return list(data.batches(images, batch_size, generator=generator, **options))


@settings(deadline=None, max_examples=20)
@given(n=st.integers(1, 40), batch_size=st.integers(1, 45), seed=st.none() | st.integers(0, 99), augment=st.booleans())
def test_batches_cover_every_image_once(n, batch_size, seed, augment):
    images = counting(n)
    whole, short = (gathered(images, batch_size, seed, augment=augment, drop_last=drop) for drop in (False, True))
    assert [len(y) for _, y in whole] == [batch_size] * (n // batch_size) + [n % batch_size] * (n % batch_size > 0)
    order = torch.cat([y for _, y in whole])
    assert sorted(order.tolist()) == list(range(n))
    assert seed is not None or augment or order.tolist() == list(range(n))
    for x, y in whole:
        assert (x.dtype, y.dtype, x.shape) == (torch.float32, torch.int64, (len(y), 2, 5, 5))
        assert augment or np.array_equal(x.numpy(), images.x[y].numpy() / np.float32(255))
    assert len(short) == max(1, n // batch_size), "the only batch stays, however small"
    assert all(torch.equal(a, b) for pair in zip(whole, short, strict=False) for a, b in zip(*pair, strict=True))


def test_batches_are_reproducible_and_draw_an_epochs_numbers_at_once():
    generator = torch.Generator().manual_seed(5)
    batches = data.batches(counting(64), 16, augment=True, generator=generator)
    first = next(batches)
    state = generator.get_state()
    epoch = [first, *batches]
    assert torch.equal(generator.get_state(), state), "whoever else draws from it finds the same state each time"
    x, y = (torch.cat(parts) for parts in zip(*epoch, strict=True))
    (again,) = gathered(counting(64), 64, 5, augment=True)  # in one batch
    assert torch.equal(again[0], x)
    assert torch.equal(again[1], y)
    following = torch.cat([y for _, y in data.batches(counting(64), 16, augment=True, generator=generator)])
    assert not torch.equal(following, y)


@pytest.mark.parametrize(
    ("name", "padding", "mirror"), [("digits", 1, False), ("svhn", 4, False), ("cifar10", 4, True)]
)
def test_augmentation_is_a_shift_and_perhaps_a_flip(name, padding, mirror):
    images, size, seen = counting(300, name, size=6), 6, set()
    for x, y in data.batches(images, 70, augment=True, generator=torch.Generator().manual_seed(0)):
        for made, index in zip((x * 255).round().byte().numpy(), y.tolist(), strict=True):
            padded = np.pad(images.x[index].numpy(), ((0, 0), (padding, padding), (padding, padding)))
            places = np.ndindex(2 * padding + 1, 2 * padding + 1, 2)
            crops = {(t, l, f): padded[:, t : t + size, l : l + size][..., :: -1 if f else 1] for t, l, f in places}
            (fit,) = (place for place, crop in crops.items() if np.array_equal(made, crop))
            seen.add(fit)
    assert {flip for *_, flip in seen} == ({0, 1} if mirror else {0})
    assert len({place[:2] for place in seen}) > 0.9 * (2 * padding + 1) ** 2, "every image its own crop"
    assert abs(np.mean([flip for *_, flip in seen]) - 0.5 * mirror) < 0.1


# ---------------------------------------------------------------- checks


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: data.Images(X, Y, ("a",) * 4, "mine"), "float32: use .*byte"),
        (lambda: data.check_images((X * 255).byte()), r"uint8: use .*x / 255"),
        (lambda: data.check_images(X[0]), "expected"),
        (lambda: data.check_images(X.index_fill(3, Y[0], 1.5)), "outside"),
        (lambda: data.check_labels(Y, 4, 3), "3 classes"),
        (lambda: data.check_labels(Y.to("meta"), 4, 10, device=X.device), "on meta, images on cpu"),
    ],
)
def test_bad_images_and_labels(check, message):
    data.check_images(X)
    data.check_labels(Y, 4, 4, device=X.device)
    with pytest.raises(ValueError, match=message):
        check()


# ---------------------------------------------------------------- downloads

CONTENT = np.random.default_rng(0).bytes(300_000)
SORRY = b"<html>Sorry</html>"


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves ``files[path]``; the first folder of the path says how: good, cut, stall; anything else: 404."""

    def do_GET(self):
        manner, blob = self.path.split("/")[1], self.server.files.get(self.path)
        self.server.seen.append(self.path)
        if blob is None:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(blob)))
        self.end_headers()
        self.wfile.write(blob[: len(blob) // 2] if manner in ("cut", "stall") else blob)
        if manner == "stall":
            self.wfile.flush()
            self.server.closing.wait(20)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server on 127.0.0.1; ``base(folder, blob)`` puts a file there and gives the folder's address."""
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.seen, server.closing = {}, [], threading.Event()
        address = f"http://127.0.0.1:{server.server_port}"
        server.base = lambda folder, blob: server.files.update({f"/{folder}/file": blob}) or f"{address}/{folder}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def made(monkeypatch):
    """Define a dataset ``made``, which becomes a file or, from an archive, a folder."""

    def define(*bases, blob=CONTENT, becomes="file"):
        monkeypatch.setitem(data.FILES, "made", [("file", hashlib.md5(blob).hexdigest(), becomes)])
        monkeypatch.setitem(data.MIRRORS, "made", bases)

    return define


def test_files_are_torchvisions():
    from torchvision.datasets import CIFAR10, CIFAR100, SVHN

    for name, cifar in {"cifar10": CIFAR10, "cifar100": CIFAR100}.items():
        assert data.FILES[name] == [(cifar.filename, cifar.tgz_md5, cifar.base_folder)]
        assert cifar.url in [f"{base}/{cifar.filename}" for base in data.MIRRORS[name]]
    assert data.FILES["svhn"] == [(file, md5, file) for _, file, md5 in (SVHN.split_list[s] for s in ("train", "test"))]


@pytest.mark.parametrize("bad", ["none", "cut", "stall", "good/wrong"])
def test_a_file_comes_whole_from_the_first_mirror_that_has_it(server, made, tmp_path, bad):
    made(server.base(bad, SORRY if bad == "good/wrong" else CONTENT), server.base("good", CONTENT))
    server.files.pop("/none/file", None)
    for _ in range(2):  # the second call finds it there
        data.fetch("made", tmp_path, timeout=0.3)
        assert server.seen == [f"/{bad}/file", "/good/file"]
        assert (tmp_path / "file").read_bytes() == CONTENT
        assert listed(tmp_path) == ["file"]


def test_every_mirror_fails(server, made, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"  # bound but not listening: refused
        made(closed, server.base("good/wrong", SORRY), server.base("cut", CONTENT))
        with pytest.raises(RuntimeError, match=r"LCNN_DATA.*digits") as caught:
            data.fetch("made", tmp_path)
    _, *reasons, _ = str(caught.value).splitlines()
    for line, reason in zip(reasons, ["refused", "hash", "/cut/file: "], strict=True):
        assert reason in line
    assert listed(tmp_path) == []


def test_an_archive_is_unpacked_whole_or_not_at_all(server, made, tmp_path, monkeypatch):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("folder/train"))
    blob = buffer.getvalue()
    made(server.base("good", blob), blob=blob, becomes="folder")
    (tmp_path / "folder").mkdir()  # an empty folder is no dataset

    def full(self, path, **_):
        (Path(path) / "folder").mkdir()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extractall", full)
        with pytest.raises(OSError, match=r"cannot write made into .*No space left.*free some space.*LCNN_DATA"):
            data.fetch("made", tmp_path)
    assert listed(tmp_path / "folder") == []
    data.fetch("made", tmp_path)
    assert listed(tmp_path / "folder") == ["train"]
    assert listed(tmp_path) == ["folder"]
    asked, by_hand = len(server.seen), tmp_path / "by hand"
    by_hand.mkdir()
    (by_hand / "file").write_bytes(blob)
    data.fetch("made", by_hand)
    assert listed(by_hand) == ["file", "folder"]
    assert len(server.seen) == asked, "an archive that is there need not be downloaded"


def test_a_full_disk_is_not_blamed_on_a_mirror(server, made, tmp_path):
    made(server.base("good", CONTENT), server.base("good/2", CONTENT))
    with files_of_at_most(100_000), pytest.raises(OSError, match=r"cannot write made into .*free some space"):
        data.fetch("made", tmp_path)
    assert len(server.seen) == 1
