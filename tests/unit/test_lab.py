"""Devices, folders, atomic files and the opening line, with disks that are really full or read-only."""

import os
import re

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from helpers import files_of_at_most

from lcnn_utils import lab
from lcnn_utils.files import atomic_path, write_text
from lcnn_utils.lab import check_choice


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    for name in ("LCNN_DATA", "LCNN_FAST", "LCNN_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LCNN_STORE", str(tmp_path / "store"))


def test_the_device_is_the_argument_then_the_environment_then_what_there_is(monkeypatch):
    expected = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert lab.pick_device() == expected
    monkeypatch.setenv("LCNN_DEVICE", "")  # as for the folders, empty is unset
    assert lab.pick_device() == expected
    monkeypatch.setenv("LCNN_DEVICE", "meta")
    assert lab.pick_device() == torch.device("meta")
    assert lab.pick_device("cpu") == lab.pick_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99"])
def test_an_absent_device_is_named_with_the_way_out(monkeypatch, name):
    monkeypatch.setenv("LCNN_DEVICE", name)
    for argument in (name, None):
        with pytest.raises(RuntimeError, match=rf"'{name}'.*device='cpu'.*unset LCNN_DEVICE"):
            lab.pick_device(argument)


def test_a_file_appears_whole_and_readable_by_all(tmp_path):
    path = tmp_path / "new" / "folder" / "a.txt"
    with atomic_path(path) as temporary:
        assert temporary.parent == path.parent, "another folder may be another disk, where a rename is a copy"
        assert temporary.suffix == path.suffix, "savefig takes the format from it"
        temporary.write_text("half")
        assert not path.exists()
    assert path.stat().st_mode & 0o444 == 0o444
    assert write_text(path, "é β\n") == path
    assert path.read_bytes() == "é β\n".encode()
    assert os.listdir(path.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_inside_leaves_the_old_file_and_no_other(tmp_path, error):
    path = write_text(tmp_path / "keep" / "a.txt", "old")
    context = atomic_path(path)
    context.__enter__().write_text("new")
    assert not context.__exit__(error, error(), None), "it is not swallowed"
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["a.txt"]


def test_a_write_that_stops_half_way(tmp_path):
    path = write_text(tmp_path / "keep" / "a.txt", "old")
    with files_of_at_most(4096), pytest.raises(OSError, match=r"cannot write .*a\.txt.*free some space"):
        write_text(path, "x" * 20_000)
    with pytest.raises(OSError, match=r"cannot write .*a\.txt/sub/b\.txt.*free some space, or"):
        write_text(path / "sub" / "b.txt", "no folder can be made in a file")
    assert (path.read_text(), os.listdir(path.parent)) == ("old", ["a.txt"])


def test_a_choice_is_returned_or_one_is_suggested():
    known = ("digits", "cifar10", "svhn")
    assert all(check_choice(name, known, "dataset") == name for name in known)
    with pytest.raises(ValueError, match=r"unknown dataset 'digit'.*did you mean 'digits'"):
        check_choice("digit", known, "dataset")


def test_a_bar_shows_what_is_done_and_leaves_nothing(capsys):
    assert [*lab.track(range(3), "steps", mininterval=0, disable=False)] == [0, 1, 2]
    *_, blank, end = capsys.readouterr().err.split("\r")
    assert (blank.strip(), end) == ("", "")
    assert [*lab.track(range(3), "steps", progress=False)] == [0, 1, 2]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("fast", "asked", "seeds"), [("0", 3, (0, 1, 2)), ("1", 3, (0, 1)), ("1", 1, (0,))])
def test_setup_says_what_is_used(monkeypatch, capsys, fast, asked, seeds):
    monkeypatch.setenv("LCNN_DEVICE", "cpu")
    monkeypatch.setenv("LCNN_FAST", fast)
    with matplotlib.rc_context():
        found = lab.setup(seeds=asked)
        assert plt.rcParams["svg.hashsalt"] == "lcnn", "the project's style is on"
    assert (found.device, found.seeds, found.fast) == (torch.device("cpu"), seeds, fast == "1")
    (line,) = capsys.readouterr().out.splitlines()
    for part in (torch.__version__, "thread", f"seeds {list(seeds)}", f"fast mode {'on' if found.fast else 'off'}"):
        assert part in line
    monkeypatch.setattr(lab.time, "perf_counter", lambda: found.started + 12.4)
    unit, size = r"\d+ threads? of a CPU", r"(, \d+\.\d GB of memory)?"  # Windows doesn't say
    assert re.match(rf"ran in 12 s on {unit}{size} \(torch ", found.finish())
    monkeypatch.setenv("LCNN_FAST", "maybe")
    with pytest.raises(ValueError, match="LCNN_FAST 'maybe': known are 0, 1"):
        lab.setup()
