"""What the doctor finds, and what it says to do."""

from pathlib import Path

import pytest

from lcnn_utils.cli import commands, doctor


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.fixture(autouse=True)
def place(monkeypatch, tmp_path):
    monkeypatch.setenv("LCNN_STORE", str(tmp_path / "not" / "yet"))
    monkeypatch.setenv("LCNN_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("LCNN_DEVICE", "cpu")


def test_all_is_well_here_and_nothing_is_left_behind(capsys, tmp_path):
    assert commands.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "MEND" not in shown
    assert "-> `lcnn data cifar10 cifar100 svhn` fetches what is missing" in shown
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "data" / "cifar-10-batches-py").mkdir(parents=True)  # empty
    assert commands.main(["doctor"]) == 0
    assert capsys.readouterr().out == shown


OTHER = {"python3": {"spec": {"argv": ["/opt/other/bin/python"]}}}
FAULTS = [
    ("metadata.distributions", lambda name: [], "packages", "numpy>=2.0 (here: 0)"),
    ("pick_device", failing(RuntimeError("device 'cuda:99' is not here")), "device", "cuda:99"),
    ("KernelSpecManager.get_all_specs", lambda self: OTHER, "kernel", "/opt/other/bin/python"),
    ("tempfile.TemporaryFile", failing(OSError(30, "Read-only file system")), "store", "Read-only file system"),
    ("PROJECT", Path("/usr/lib"), "project", "no notebooks"),
]


@pytest.mark.parametrize(("part", "broken", "name", "says"), FAULTS)
def test_a_fault_is_found_and_told(part, broken, name, says, monkeypatch, capsys):
    monkeypatch.setattr(f"lcnn_utils.cli.doctor.{part}", broken)
    assert doctor.report() == (name != "project")
    monkeypatch.undo()
    line, advice = capsys.readouterr().out.partition(f" {name} ")[2].splitlines()[:2]
    assert says in line
    assert advice.strip().startswith("->")
