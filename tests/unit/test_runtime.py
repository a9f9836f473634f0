"""Devices, folders, atomic files and the opening line, with disks that are really full or read-only."""

import errno
import os
import subprocess
import sys

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from helpers import files_of_at_most, small_disk

from lcnn_utils import lab as runtime
from lcnn_utils.lab import PROJECT, atomic_path, nearest, write_text


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    for name in ("LCNN_DATA", "LCNN_FAST", "LCNN_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LCNN_STORE", str(tmp_path / "store"))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_disk(tmp_path):
    """A real file system of 64 KiB, where this user may mount one."""
    with small_disk(tmp_path / "disk", "64k") as folder:
        yield folder


@pytest.mark.parametrize("given", ["cpu", torch.device("cpu")])
def test_the_device_is_the_argument_first(monkeypatch, given):
    monkeypatch.setenv("LCNN_DEVICE", "nonsense")
    assert runtime.pick_device(given) == torch.device("cpu")


def test_then_the_environment_then_what_there_is(monkeypatch):
    expected = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert runtime.pick_device() == expected
    monkeypatch.setenv("LCNN_DEVICE", "meta")
    assert runtime.pick_device() == torch.device("meta")
    monkeypatch.setenv("LCNN_DEVICE", "")  # as for the folders, empty is unset
    assert runtime.pick_device() == expected


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "cpuu", "ipu"])
@pytest.mark.parametrize("by", ["argument", "environment"])
def test_an_absent_device_is_named_with_the_way_out(monkeypatch, name, by):
    if by == "environment":
        monkeypatch.setenv("LCNN_DEVICE", name)
    with pytest.raises(RuntimeError, match=rf"'{name}'.*device='cpu'.*unset LCNN_DEVICE") as raised:
        runtime.pick_device(name if by == "argument" else None)
    assert "\n" not in str(raised.value)


def test_folders_come_from_argument_environment_project(monkeypatch, tmp_path):
    assert runtime.data_root() == PROJECT / "data"
    monkeypatch.setenv("LCNN_DATA", str(tmp_path / "d"))
    assert runtime.data_root() == tmp_path / "d"
    assert runtime.data_root(tmp_path) == tmp_path
    assert runtime.store_root() == tmp_path / "store"
    monkeypatch.delenv("LCNN_STORE")
    assert runtime.store_root() == PROJECT / "data"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LCNN_STORE", "~/mine")
    assert runtime.store_root() == tmp_path / "mine"
    assert runtime.data_root("~/d") == tmp_path / "d"


def test_the_project_is_where_pyproject_is():
    assert (PROJECT / "pyproject.toml").is_file()


OFF, ON = (None, "", "  ", "0", "false", "False", "NO", " off\n"), ("1", "true", "TRUE", " yes ", "On")


@pytest.mark.parametrize(("value", "on"), [*[(value, False) for value in OFF], *[(value, True) for value in ON]])
def test_fast_mode(monkeypatch, value, on):
    if value is not None:
        monkeypatch.setenv("LCNN_FAST", value)
    assert runtime.fast() is on


@pytest.mark.parametrize("value", ["2", "maybe", "-1", "1.0"])
def test_fast_mode_is_on_or_off(monkeypatch, value):
    monkeypatch.setenv("LCNN_FAST", value)
    with pytest.raises(ValueError, match=f"LCNN_FAST '{value}'.*true.*off"):
        runtime.setup()


def test_a_file_appears_whole_and_readable_by_all(tmp_path):
    path = tmp_path / "new" / "folder" / "a.txt"
    with atomic_path(path) as temporary:
        assert temporary.parent == path.parent, "another folder may be another disk, where a rename is a copy"
        assert temporary.suffix == path.suffix, "savefig takes the format from it"
        temporary.write_text("half")
        assert not path.exists()
    assert path.read_text() == "half"
    assert path.stat().st_mode & 0o444 == 0o444
    assert write_text(path, "é β\n") == path
    assert path.read_bytes() == "é β\n".encode()
    assert os.listdir(path.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
def test_an_exception_inside_leaves_the_old_file_and_no_other(tmp_path, error):
    path = write_text(tmp_path / "keep" / "a.txt", "old")

    def fail_half_way():
        with atomic_path(path) as temporary:
            temporary.write_text("new")
            raise error

    with pytest.raises(type(error)) as raised:
        fail_half_way()
    assert raised.value is error
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["a.txt"]


def test_a_really_full_disk(tiny_disk):
    path = write_text(tiny_disk / "a.txt", "old")
    with pytest.raises(OSError, match=r"cannot write .*a\.txt.*No space left.*free some space, or") as raised:
        write_text(path, "x" * 200_000)
    assert raised.value.errno == errno.ENOSPC
    assert path.read_text() == "old"
    assert os.listdir(tiny_disk) == ["a.txt"]


def test_a_write_that_stops_half_way(tmp_path):
    path = write_text(tmp_path / "keep" / "a.txt", "old")
    with files_of_at_most(4096), pytest.raises(OSError, match=r"cannot write .*a\.txt.*free some space") as raised:
        write_text(path, "x" * 20_000)
    assert raised.value.errno == errno.EFBIG
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["a.txt"]


def test_a_rename_that_fails(tmp_path, monkeypatch):
    path = write_text(tmp_path / "keep" / "a.txt", "old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"cannot write .*a\.txt.*No space left") as raised:
        write_text(path, "new")
    assert raised.value.errno == errno.ENOSPC
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["a.txt"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot write .*file/sub/a\.txt.*free some space, or") as raised:
        write_text(tmp_path / "file" / "sub" / "a.txt", "x")
    assert raised.value.errno in (errno.ENOTDIR, errno.EEXIST)
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_read_only_disk(tiny_disk):
    """Permissions do not stop root; a disk mounted read-only does."""
    write_text(tiny_disk / "a.txt", "old")
    subprocess.run(["mount", "-o", "remount,ro", tiny_disk], check=True)
    with pytest.raises(OSError, match=r"cannot write .*Read-only file system.*free some space, or") as raised:
        write_text(tiny_disk / "a.txt", "new")
    assert raised.value.errno == errno.EROFS
    assert os.listdir(tiny_disk) == ["a.txt"]


def test_nearest_returns_lists_and_suggests():
    known = ("digits", "cifar10", "svhn")
    assert all(nearest(name, known, "dataset") == name for name in known)
    with pytest.raises(
        ValueError, match=r"^unknown dataset 'digit': known are digits, cifar10, svhn; did you mean 'digits'\?$"
    ):
        nearest("digit", known, "dataset")
    with pytest.raises(ValueError, match=r"^unknown dataset 'zzz': known are digits, cifar10, svhn$"):
        nearest("zzz", known, "dataset")
    with pytest.raises(ValueError, match="unknown dataset None"):
        nearest(None, known, "dataset")


def test_one_thread_unless_told_otherwise(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    torch.set_num_threads(2)
    runtime.one_thread()
    assert torch.get_num_threads() == 2
    monkeypatch.delenv("OMP_NUM_THREADS")
    runtime.one_thread()
    assert torch.get_num_threads() == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc is told")
def test_memory_is_kept():
    """A large tensor made again and again: with its memory kept, the system has no pages to clear for it."""
    code = (
        "import resource, torch; from lcnn_utils import runtime\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(20): torch.ones(2**22)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "torch.ones(2**22); before = faults(); runtime.keep_memory(); torch.ones(2**22); print(before, faults())\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC")}
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    before, after = map(int, output.stdout.split())
    assert after < before / 10


@pytest.mark.parametrize(
    ("is_fast", "asked", "seeds"), [(False, 3, (0, 1, 2)), (True, 3, (0, 1)), (True, 1, (0,)), (False, 1, (0,))]
)
def test_setup_says_what_is_used(monkeypatch, is_fast, asked, seeds):
    monkeypatch.setenv("LCNN_DEVICE", "cpu")
    monkeypatch.setenv("LCNN_FAST", str(int(is_fast)))
    said: list[str] = []
    with matplotlib.rc_context():
        lab = runtime.setup(seeds=asked, show=said.append)
        assert plt.rcParams["svg.hashsalt"] == "lcnn", "the project's style is on"
    assert (lab.device, lab.seeds, lab.fast) == (torch.device("cpu"), seeds, is_fast)
    (line,) = said
    for part in (torch.__version__, "device cpu", f"seeds {list(seeds)}", f"fast mode {'on' if is_fast else 'off'}"):
        assert part in line


def test_finish_says_how_long_it_took(monkeypatch):
    monkeypatch.setattr(runtime.time, "perf_counter", lambda: 112.4)
    said = runtime.Lab(torch.device("cpu"), (0,), True, started=100.0).finish()
    assert said.startswith("ran in 12 s (cpu, ")
    assert torch.__version__ in said
    assert said.endswith("fast mode on)")


def test_setup_prints_one_line(monkeypatch, capsys):
    monkeypatch.setenv("LCNN_DEVICE", "cpu")
    with matplotlib.rc_context():
        runtime.setup()
    assert capsys.readouterr().out.count("\n") == 1
