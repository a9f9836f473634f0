"""What the doctor finds, and what it says to do."""

import errno
import os
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest

from lcnn_utils.cli import commands, doctor


@pytest.fixture(autouse=True)
def place(monkeypatch, tmp_path):
    monkeypatch.setenv("LCNN_STORE", str(tmp_path / "not" / "yet"))
    monkeypatch.setenv("LCNN_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("LCNN_DEVICE", "cpu")


def found() -> dict[str, tuple]:
    return {name: rest for name, *rest in (*doctor.programs(), *doctor.folders())}


def test_all_is_well_here(capsys, tmp_path):
    assert commands.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "MEND" not in shown
    assert "-> `lcnn data cifar10 cifar100 svhn` fetches what is missing" in shown
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_an_empty_folder_is_no_cifar(tmp_path):
    (tmp_path / "data" / "cifar-10-batches-py").mkdir(parents=True)
    assert "cifar10" in found()["datasets"][1]
    (tmp_path / "data" / "cifar-10-batches-py" / "data_batch_1").touch()
    assert "cifar10," not in found()["datasets"][1]


def break_torchvision(patch):
    def missing(*_):
        raise RuntimeError("operator torchvision::nms does not exist")

    patch.setattr("torchvision.ops.nms", missing)


def old_numpy(patch):
    patch.setattr(doctor.metadata, "distributions", lambda name: [SimpleNamespace(version="1.26.4")])


def read_only(patch):
    def refuse(dir):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(dir))

    patch.setattr(doctor.tempfile, "TemporaryFile", refuse)


def full(patch):
    patch.setattr(doctor.shutil, "disk_usage", lambda _: namedtuple("usage", "free")(10**8))


def other_kernel(patch):
    spec = {"python3": {"spec": {"argv": ["/opt/other/bin/python"]}}}
    patch.setattr(doctor.KernelSpecManager, "get_all_specs", lambda self: spec)


@pytest.mark.parametrize(
    ("fault", "name", "ok", "says"),
    [
        (old_numpy, "packages", False, "numpy>=2.0 (here: 1.26.4)"),
        (lambda patch: patch.setattr(doctor.metadata, "distributions", lambda name: []), "packages", False, "torch"),
        (break_torchvision, "torch", False, "operator torchvision::nms does not exist"),
        (lambda patch: patch.setenv("LCNN_DEVICE", "cuda:99"), "device", False, "'cuda:99'"),
        (other_kernel, "kernel", False, "/opt/other/bin/python"),
        (lambda patch: patch.setattr(doctor.KernelSpecManager, "get_all_specs", lambda _: {}), "kernel", False, "no"),
        (read_only, "store", False, "can't be written (Read-only file system)"),
        (full, "store", False, "0.1 GB free"),
        (lambda patch: patch.setattr(doctor, "PROJECT", Path("/usr/lib")), "project", None, "plain install"),
    ],
)
def test_a_fault_is_found_and_told(fault, name, ok, says, monkeypatch, capsys):
    assert found()[name][0]
    with monkeypatch.context() as patch:
        fault(patch)
        assert found()[name][0] is ok
        assert says in found()[name][1]
        assert doctor.report() == (ok is False)
    assert f"{'MEND' if ok is False else 'note':<5} {name}" in capsys.readouterr().out
