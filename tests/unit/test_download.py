"""Room ``download`` against a server of our own on 127.0.0.1: nothing here leaves the machine."""

from __future__ import annotations

import errno
import hashlib
import http.server
import io
import socket
import tarfile
import threading

import numpy as np
import pytest

from lcnn_utils import data, download

CONTENT = np.random.default_rng(0).bytes(3_000_000)
HALF = len(CONTENT) // 2


def md5(blob: bytes) -> str:
    return hashlib.md5(blob).hexdigest()


CONTENT_MD5 = md5(CONTENT)


def archive(**files: bytes) -> bytes:
    """A tar.gz that holds these files in a folder ``made``."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, blob in files.items():
            member = tarfile.TarInfo(f"made/{name}")
            member.size = len(blob)
            tar.addfile(member, io.BytesIO(blob))
    return buffer.getvalue()


class Server(http.server.ThreadingHTTPServer):
    """Serves ``files[path]``; the first folder of the path says how: good, norange, cut, stall, or anything: 404."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.seen: list[tuple[str, str | None, str]] = []  # path, Range, User-Agent
        self.closing = threading.Event()

    def url(self, path: str, blob: bytes | None = None) -> str:
        if blob is not None:
            self.files[f"/{path}"] = blob
        return f"http://127.0.0.1:{self.server_port}/{path}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        wanted, manner = self.headers["Range"], self.path.split("/")[1]
        self.server.seen.append((self.path, wanted, self.headers["User-Agent"]))
        if self.path not in self.server.files:
            self.send_error(404)
            return
        blob, start = self.server.files[self.path], 0
        if wanted and manner != "norange":
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(blob):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(blob) - 1}/{len(blob)}")
        else:
            self.send_response(200)
        if manner != "nolength":
            self.send_header("Content-Length", str(len(blob) - start))
        self.end_headers()
        body = blob[start:HALF] if manner in ("cut", "stall") else blob[start:]
        self.wfile.write(body)
        if manner == "stall":
            self.wfile.flush()
            self.server.closing.wait(20)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("LCNN_MIRRORS", raising=False)
    resolve = socket.getaddrinfo

    def only_here(host, *args, **kwargs):
        assert host == "127.0.0.1", f"a test asked for {host}"
        return resolve(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", only_here)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def mirrors(monkeypatch):
    """Set the mirrors of dataset ``made``, whose file ``made.bin`` has the MD5 of CONTENT."""

    def use(*urls, filename="made.bin", checksum=CONTENT_MD5, becomes="made.bin"):
        monkeypatch.setitem(download.MIRRORS, "made", [download.Remote(filename, checksum, urls, becomes)])

    return use


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def test_mirrors_are_well_formed():
    assert set(download.MIRRORS) == set(data.DATASETS) - {"digits"}
    from torchvision import datasets

    published = {
        "cifar10": {datasets.CIFAR10.filename: datasets.CIFAR10.tgz_md5},
        "cifar100": {datasets.CIFAR100.filename: datasets.CIFAR100.tgz_md5},
        "svhn": {file: digest for _, file, digest in (datasets.SVHN.split_list[s] for s in ("train", "test"))},
    }
    folders = {"cifar10": datasets.CIFAR10.base_folder, "cifar100": datasets.CIFAR100.base_folder}
    for name, remotes in download.MIRRORS.items():
        assert {remote.filename: remote.md5 for remote in remotes} == published[name]
        for remote in remotes:
            assert remote.becomes == folders.get(name, remote.filename)
            assert len(remote.urls) >= 2
            assert all(url.startswith("http") and url.endswith(f"/{remote.filename}") for url in remote.urls)
    official = {url for remotes in download.MIRRORS.values() for remote in remotes for url in remote.urls}
    assert {datasets.CIFAR10.url, datasets.CIFAR100.url} <= official
    assert {datasets.SVHN.split_list[split][0] for split in ("train", "test")} <= official


def test_good_file(server, mirrors, tmp_path):
    mirrors(server.url("good/made.bin", CONTENT))
    download.fetch("made", tmp_path / "new" / "folder")
    assert listing(tmp_path / "new" / "folder") == ["made.bin"]
    assert (tmp_path / "new" / "folder" / "made.bin").read_bytes() == CONTENT
    assert server.seen[0][1] is None
    assert "lcnn-lab" in server.seen[0][2]

    download.fetch("made", tmp_path / "new" / "folder")  # there already: no request
    assert len(server.seen) == 1


def test_no_content_length(server, mirrors, tmp_path):
    mirrors(server.url("nolength/made.bin", CONTENT))
    download.fetch("made", tmp_path)
    assert (tmp_path / "made.bin").read_bytes() == CONTENT


def test_what_is_there_is_never_overwritten(server, mirrors, tmp_path):
    mirrors(server.url("good/made.bin", CONTENT))
    (tmp_path / "made.bin").write_bytes(b"mine")
    download.fetch("made", tmp_path)
    assert (tmp_path / "made.bin").read_bytes() == b"mine"
    assert server.seen == []


def test_killed_download_is_resumed(server, mirrors, tmp_path):
    mirrors(server.url("cut/made.bin", CONTENT))
    with pytest.raises(RuntimeError, match=r"connection closed after 1,500,000 of 3,000,000 bytes"):
        download.fetch("made", tmp_path)
    assert listing(tmp_path) == ["made.bin.part"]
    assert (tmp_path / "made.bin.part").read_bytes() == CONTENT[:HALF]

    mirrors(server.url("good/made.bin", CONTENT))
    download.fetch("made", tmp_path)
    assert server.seen[-1][:2] == ("/good/made.bin", f"bytes={HALF}-")
    assert (tmp_path / "made.bin").read_bytes() == CONTENT
    assert listing(tmp_path) == ["made.bin"]


def test_interrupt_keeps_the_part(server, mirrors, tmp_path, monkeypatch):
    mirrors(server.url("good/made.bin", CONTENT))
    read, calls = download._read, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(*args)

    with monkeypatch.context() as patch:
        patch.setattr(download, "_read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            download.fetch("made", tmp_path)
    assert listing(tmp_path) == ["made.bin.part"]
    had = (tmp_path / "made.bin.part").stat().st_size
    assert 0 < had < len(CONTENT)
    download.fetch("made", tmp_path)
    assert server.seen[-1][1] == f"bytes={had}-"
    assert (tmp_path / "made.bin").read_bytes() == CONTENT


def test_server_that_cannot_resume(server, mirrors, tmp_path):
    mirrors(server.url("norange/made.bin", CONTENT))
    (tmp_path / "made.bin.part").write_bytes(CONTENT[:HALF])
    download.fetch("made", tmp_path)
    assert server.seen[-1][1] == f"bytes={HALF}-"
    assert (tmp_path / "made.bin").read_bytes() == CONTENT


def test_part_that_was_complete(server, mirrors, tmp_path):
    mirrors(server.url("good/made.bin", CONTENT))
    (tmp_path / "made.bin.part").write_bytes(CONTENT)  # killed just before it got its name; the server says 416
    download.fetch("made", tmp_path)
    assert listing(tmp_path) == ["made.bin"]
    assert len(server.seen) == 1


@pytest.mark.parametrize("size", [HALF, len(CONTENT), len(CONTENT) + 5])
def test_spoilt_part_is_not_blamed_on_the_mirror(server, mirrors, tmp_path, size):
    mirrors(server.url("good/made.bin", CONTENT))
    (tmp_path / "made.bin.part").write_bytes(b"x" * size)
    download.fetch("made", tmp_path)
    assert [wanted for _, wanted, _ in server.seen] == [f"bytes={size}-", None]
    assert (tmp_path / "made.bin").read_bytes() == CONTENT
    assert listing(tmp_path) == ["made.bin"]


def test_wrong_file_then_good_mirror(server, mirrors, tmp_path):
    mirrors(server.url("good/wrong/made.bin", b"<html>Sorry</html>"), server.url("good/made.bin", CONTENT))
    download.fetch("made", tmp_path)
    assert [path for path, *_ in server.seen] == ["/good/wrong/made.bin", "/good/made.bin"]
    assert server.seen[1][1] is None  # nothing of the wrong file was kept
    assert (tmp_path / "made.bin").read_bytes() == CONTENT


def test_wrong_file_alone_leaves_nothing(server, mirrors, tmp_path):
    mirrors(server.url("good/made.bin", b"<html>Sorry</html>"))
    with pytest.raises(RuntimeError, match=rf"another file \(MD5 {md5(b'<html>Sorry</html>')}, expected {CONTENT_MD5}"):
        download.fetch("made", tmp_path)
    assert listing(tmp_path) == []


def test_stalled_mirror_is_left_and_the_next_resumes(server, mirrors, tmp_path):
    mirrors(server.url("stall/made.bin", CONTENT), server.url("good/made.bin", CONTENT))
    download.fetch("made", tmp_path, timeout=0.3)
    assert server.seen[1][:2] == ("/good/made.bin", f"bytes={HALF}-")
    assert (tmp_path / "made.bin").read_bytes() == CONTENT


def test_every_mirror_fails(server, mirrors, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}/made.bin"  # bound but not listening: refused
        urls = [server.url("a/made.bin"), server.url("stall/made.bin", CONTENT), closed, "campus/made.bin"]
        mirrors(*urls)
        with pytest.raises(RuntimeError) as caught:
            download.fetch("made", tmp_path, timeout=0.3)
    first, *lines, ways_out = str(caught.value).splitlines()
    assert first == "no mirror gave made.bin:"
    reasons = ["HTTP Error 404: Not Found", "no answer for 0.3 s", "refused", "unknown url type"]
    assert len(lines) == len(urls)
    for line, url, reason in zip(lines, urls, reasons, strict=True):
        assert line.startswith(f"  {url}: ")
        assert reason in line
    for way in ("resumed", "LCNN_DATA", "LCNN_MIRRORS", "digits"):
        assert way in ways_out
    assert listing(tmp_path) == ["made.bin.part"]  # the half of the stalled mirror, for the next time


def test_campus_mirrors_come_first(server, mirrors, tmp_path, monkeypatch):
    mirrors(server.url("good/made.bin", CONTENT))
    server.url("good/campus/made.bin", CONTENT)
    monkeypatch.setenv("LCNN_MIRRORS", f"{server.url('none')} {server.url('good/campus')}/")
    download.fetch("made", tmp_path)
    assert [path for path, *_ in server.seen] == ["/none/made.bin", "/good/campus/made.bin"]


def test_a_folder_can_be_a_mirror(server, mirrors, tmp_path, monkeypatch):
    mirrors()
    share, root = tmp_path / "share", tmp_path / "root"
    share.mkdir()
    (share / "made.bin").write_bytes(CONTENT)
    monkeypatch.setenv("LCNN_MIRRORS", share.as_uri())
    download.fetch("made", root)
    assert (root / "made.bin").read_bytes() == CONTENT
    assert server.seen == []


# ---------------------------------------------------------------- archives


@pytest.fixture
def packed(server, mirrors):
    blob = archive(train=b"images", meta=b"names")
    mirrors(server.url("good/made.tar.gz", blob), filename="made.tar.gz", checksum=md5(blob), becomes="made")
    return blob


def test_archive_is_unpacked_and_deleted(packed, tmp_path):
    download.fetch("made", tmp_path)
    assert listing(tmp_path) == ["made"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()} == {
        "train": b"images",
        "meta": b"names",
    }


def test_archive_put_there_by_hand_is_used_and_kept(packed, server, tmp_path):
    (tmp_path / "made.tar.gz").write_bytes(packed)
    download.fetch("made", tmp_path)
    assert listing(tmp_path) == ["made", "made.tar.gz"]
    assert server.seen == []


def test_wrong_archive_put_there_by_hand_is_kept_and_not_used(packed, server, tmp_path):
    (tmp_path / "made.tar.gz").write_bytes(b"mine")
    download.fetch("made", tmp_path)
    assert listing(tmp_path) == ["made", "made.tar.gz"]
    assert (tmp_path / "made.tar.gz").read_bytes() == b"mine"
    assert len(server.seen) == 1


def test_unpacking_that_fails_leaves_only_the_part(packed, tmp_path, monkeypatch):
    def full(self, path, **_):
        (tmp_path / path / "made").mkdir()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extractall", full)
        with pytest.raises(
            OSError, match=r"cannot write made into .*No space left.*free some space.*LCNN_DATA"
        ) as caught:
            download.fetch("made", tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert listing(tmp_path) == ["made.tar.gz.part"]
    download.fetch("made", tmp_path)
    assert listing(tmp_path) == ["made"]


def test_archive_that_climbs_out_is_refused(server, mirrors, tmp_path):
    blob = archive(**{"../../../escaped": b"x"})
    mirrors(server.url("good/made.tar.gz", blob), filename="made.tar.gz", checksum=md5(blob), becomes="made")
    with pytest.raises(tarfile.OutsideDestinationError):
        download.fetch("made", tmp_path / "root")
    assert listing(tmp_path) == ["root"]


# ---------------------------------------------------------------- the disk


def test_disk_full_while_downloading(server, mirrors, tmp_path, monkeypatch):
    class Full(io.BytesIO):
        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

    urls = [server.url(f"good/{n}/made.bin", CONTENT) for n in range(2)]
    mirrors(*urls)
    monkeypatch.setattr(download, "open", lambda *_: Full(), raising=False)
    with pytest.raises(OSError, match=r"No space left.*free some space"):
        download.fetch("made", tmp_path)
    assert len(server.seen) == 1  # no mirror can help
    assert listing(tmp_path) == []


def test_folder_that_cannot_be_written(mirrors, server, tmp_path):
    mirrors(server.url("good/made.bin", CONTENT))
    (tmp_path / "file").touch()
    with pytest.raises(
        NotADirectoryError, match=r"cannot write made into .*file.data .*LCNN_DATA to a folder of yours"
    ):
        download.fetch("made", tmp_path / "file" / "data")
    assert server.seen == []


def test_read_only_folder(mirrors, server, tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    mirrors(server.url("good/made.bin", CONTENT))
    monkeypatch.setattr(download, "open", refuse, raising=False)
    with pytest.raises(PermissionError, match=r"cannot write made .*Permission denied.*LCNN_DATA"):
        download.fetch("made", tmp_path)
    assert listing(tmp_path) == []


def test_unknown_dataset(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'cifar100'"):
        download.fetch("cifar-100", tmp_path)
