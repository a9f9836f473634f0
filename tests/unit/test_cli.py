"""The command line and the doctor, as a user meets them: in a subprocess where that is what matters."""

import errno
import os
import socket
import subprocess
import sys
import tempfile
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import pytest

from lcnn_utils.cli import commands as cli
from lcnn_utils.cli import doctor


def lcnn(*args: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m lcnn_utils`` away from the project's folder."""
    return subprocess.run(
        [sys.executable, "-m", "lcnn_utils", *args],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tempfile.gettempdir(),
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )


# ------------------------------------------------------------------------------------------------ the command line
@pytest.mark.parametrize("command", ["", "lab", "figures", "doctor", "data"])
def test_help_of_every_command(command):
    done = lcnn(*command.split(), "--help")
    assert done.returncode == 0, done.stderr
    assert f"usage: lcnn {command}".rstrip() in done.stdout
    if not command:
        assert all(name in done.stdout for name in ("lab", "figures", "doctor", "data"))


def test_help_and_lab_start_without_torch():
    code = "import sys, lcnn_utils.cli as cli; cli.parse(['lab']); assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("args", [["labb"], ["data", "--rot", "x"], ["lab", "--port", "many"], ["figures", "all"], []])
def test_a_mistyped_command_is_explained_with_status_2(args, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(args)
    assert stopped.value.code == 2
    assert "lcnn --help" in capsys.readouterr().err


def test_console_script_is_installed():
    (script,) = metadata.entry_points(group="console_scripts", name="lcnn")
    assert script.load() is cli.main


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("beta must be\n  positive"), 1, "lcnn: beta must be positive\n"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x.csv"), 1, "lcnn: x.csv: No such file"),
        (OSError(errno.ENOSPC, "cannot write x: free some space"), 1, "lcnn: cannot write x: free some space\n"),
        (RuntimeError("device 'cuda' is not available"), 1, "lcnn: device 'cuda' is not available\n"),
        (KeyboardInterrupt(), 130, "lcnn: interrupted\n"),
    ],
)
def test_an_expected_error_is_one_line(error, status, line, monkeypatch, capsys):
    def fail(self):
        raise error

    monkeypatch.setattr(cli.Data, "run", fail)
    assert cli.main(["data"]) == status
    shown = capsys.readouterr().err
    assert shown.startswith(line)
    assert shown.count("\n") == 1


def test_a_programming_error_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli.Data, "run", lambda self: {}["no such key"])
    with pytest.raises(KeyError):
        cli.main(["data"])


# ------------------------------------------------------------------------------------------------------ lcnn lab
@pytest.mark.parametrize(
    ("environ", "platform", "seen"),
    [
        ({}, "linux", False),
        ({"DISPLAY": ""}, "linux", False),
        ({"DISPLAY": ":0"}, "linux", True),
        ({"WAYLAND_DISPLAY": "wayland-0"}, "linux", True),
        ({"DISPLAY": "localhost:10.0", "SSH_CONNECTION": "1.2.3.4 5 6.7.8.9 22"}, "linux", False),
        ({}, "darwin", True),
        ({"SSH_TTY": "ttys001"}, "darwin", False),
        ({}, "win32", True),
    ],
)
def test_display(environ, platform, seen):
    assert cli.has_display(environ, platform) is seen


def test_lab_command_line():
    plain = cli.lab_command(None, browser=True, root=False)
    assert plain[:3] == [sys.executable, "-m", "jupyterlab"]
    assert f"--ServerApp.root_dir={cli.PROJECT}" in plain
    assert "--LabApp.default_url=/lab/tree/notebooks/01_softplus_and_beta.ipynb" in plain
    assert not any("token" in part or "ip=" in part or "port" in part for part in plain)  # Jupyter's safe defaults
    assert not {"--no-browser", "--allow-root"} & set(plain)

    full = cli.lab_command(9999, browser=False, root=True, extra=["--ServerApp.ip=0.0.0.0"])
    assert set(plain) < set(full)
    assert {"--no-browser", "--allow-root", "--ServerApp.port=9999", "--ServerApp.port_retries=0"} < set(full)
    assert full[-1] == "--ServerApp.ip=0.0.0.0"  # the last one wins


@pytest.fixture
def started(monkeypatch, tmp_path):
    """What `lcnn lab` would have become, instead of JupyterLab, in a project that has its first notebook."""
    commands = []
    notebook = tmp_path / cli.FIRST_NOTEBOOK
    notebook.parent.mkdir()
    notebook.write_text("{}")
    monkeypatch.setattr(cli, "PROJECT", tmp_path)
    monkeypatch.setattr(cli, "become", lambda command: commands.append(command) or 0)
    for name in ("SSH_CONNECTION", "SSH_TTY"):
        monkeypatch.delenv(name, raising=False)
    return commands


@pytest.mark.skipif(os.name != "posix", reason="the superuser is a matter of POSIX")
@pytest.mark.parametrize("display", [":0", ""])
@pytest.mark.parametrize("user", [0, 1000])
def test_lab_says_what_it_changed(started, user, display, monkeypatch, capsys):
    monkeypatch.setattr(cli.os, "geteuid", lambda: user)
    monkeypatch.setattr(cli.sys, "platform", "linux")
    monkeypatch.setenv("DISPLAY", display)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    cli.main(["lab"])
    (command,), said = started, capsys.readouterr().out
    assert ("--allow-root" in command) == ("--allow-root" in said) == (user == 0)
    assert ("--no-browser" in command) == ("URL printed below" in said) == (display == "")


def test_lab_passes_on_what_it_does_not_know(started):
    given = ["--ServerApp.allow_origin=*", "--LabApp.expose_app_in_browser=True", "--ip", "127.0.0.1", "-y"]
    cli.main(["lab", "--no-browser", *given, "--", "--debug"])
    (command,) = started
    assert command[-6:] == [*given, "--debug"]
    assert "--no-browser" in command


def test_port_taken():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = lcnn("lab", "--no-browser", "--port", str(port))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"lcnn: port {port} is taken: choose another --port")
    assert done.stderr.count("\n") == 1
    cli.require_free(port)  # given up by now


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_port_that_does_not_exist(port, capsys):
    assert cli.main(["lab", "--port", str(port)]) == 1
    assert f"port {port} does not exist: choose one from" in capsys.readouterr().err


def test_lab_outside_a_clone(started, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "PROJECT", tmp_path / "site-packages")
    assert cli.main(["lab"]) == 1
    assert "install from a clone" in capsys.readouterr().err
    assert not started


# --------------------------------------------------------------------------------------------- lcnn data
def test_data_lists_and_loads(tmp_path, capsys):
    assert cli.main(["data", "--root", str(tmp_path)]) == 0
    listed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert listed["digits"] == "embedded"
    assert listed["cifar10"] == "missing"

    assert cli.main(["data", "digits", "--root", str(tmp_path)]) == 0
    loaded = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in loaded] == [["digits", "train"], ["digits", "test"]]
    assert all("images of 1×8×8, 10 classes" in line for line in loaded)


def test_data_of_an_unknown_name(capsys):
    assert cli.main(["data", "cifar"]) == 1
    assert "did you mean 'cifar10'" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- lcnn doctor
def test_doctor_is_content_here():
    done = lcnn("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "✗" not in done.stdout
    assert "digits" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("all well")


def test_doctor_finds_a_broken_device(monkeypatch, capsys):
    monkeypatch.setenv("LCNN_DEVICE", "cuda:99")
    check = doctor.device()
    assert check.ok is False
    assert "'cuda:99'" in check.found
    assert doctor.report([check]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("✗ device")
    assert shown[1].strip() == "→ unset LCNN_DEVICE, or set it to cpu"
    assert shown[2] == "1 to mend"


def named(found: list[doctor.Check], name: str) -> doctor.Check:
    return next(check for check in found if check.name == name)


def pretend_version(monkeypatch, package: str, version: str | None) -> None:
    real = metadata.version

    def pretended(name):
        if name == package and version is None:
            raise metadata.PackageNotFoundError(name)
        return version if name == package else real(name)

    monkeypatch.setattr(doctor.metadata, "version", pretended)


@pytest.mark.parametrize(("old", "found"), [("1.26.4", "1.26.4, needs >=2.0"), (None, "not installed, needs >=2.0")])
def test_doctor_finds_a_package_too_old_or_missing(monkeypatch, capsys, old, found):
    pretend_version(monkeypatch, "numpy", old)
    check = named(doctor.packages(), "numpy")
    assert check == doctor.Check("numpy", False, found, doctor.REINSTALL)
    assert doctor.report([check]) == 1
    assert f"→ {sys.executable} -m pip install -r" in capsys.readouterr().out


def test_doctor_notes_versions_other_than_locked(monkeypatch, tmp_path):
    lock = tmp_path / "requirements.lock"
    elsewhere = "numpy==1.0 ; python_version < '3'"
    lock.write_text(f"numpy==2.4.6 ; python_version >= '3' \\\n    --hash=sha256:0\n    # via x==1\n{elsewhere}\n")
    pretend_version(monkeypatch, "numpy", "2.9.9")
    (note,) = doctor.packages(lock)
    assert note.ok is None
    assert note.found == "other than in requirements.lock: numpy 2.9.9 (locked: 2.4.6)"
    assert "requirements.lock" in note.advice
    assert doctor.report([note]) == 0

    pretend_version(monkeypatch, "numpy", "2.4.6+cpu")  # a build tag is no other version
    (fine,) = doctor.packages(lock)
    assert fine.ok


def test_doctor_without_the_package_or_the_lock(monkeypatch, tmp_path):
    assert doctor.packages(tmp_path / "none")[0].ok  # not a clone: nothing to compare with

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "requires", missing)
    (check,) = doctor.packages()
    assert check.ok is False
    assert "pip install --no-deps -e ." in check.advice


def test_doctor_finds_torchvision_of_another_torch(monkeypatch):
    import torchvision

    def missing(*args):
        raise RuntimeError("operator torchvision::nms does not exist\nand more")

    monkeypatch.setattr(torchvision.ops, "nms", missing)
    found = doctor.checks()
    assert found[-1].name == "torch"  # the rest cannot be asked
    assert found[-1].ok is False
    assert found[-1].found == "operator torchvision::nms does not exist"
    assert "one release" in found[-1].advice


def test_doctor_finds_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    def read_only(dir):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(dir))

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", read_only)
    store = doctor.folder("store", tmp_path, "LCNN_STORE", needed=True)
    assert store.ok is False
    assert "cannot be written (Read-only file system)" in store.found
    assert "set LCNN_STORE to a folder of yours" in store.advice
    assert doctor.folder("data", tmp_path, "LCNN_DATA", needed=False).ok is None  # a shared, read-only copy will do


def test_doctor_finds_a_full_disk(monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")(10**12, 10**12 - 10**8, 10**8)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    store = doctor.folder("store", tmp_path, "LCNN_STORE", needed=True)
    assert (store.ok, store.found) == (False, f"{tmp_path}: 0.1 GB free")
    assert store.advice.startswith("free some space, or set LCNN_STORE")


def test_doctor_leaves_nothing_behind(tmp_path):
    assert doctor.folder("store", tmp_path / "not" / "yet", "LCNN_STORE", needed=True).ok
    assert list(tmp_path.iterdir()) == []


def test_doctor_names_missing_datasets(monkeypatch, tmp_path):
    monkeypatch.setenv("LCNN_DATA", str(tmp_path))
    check = doctor.datasets()
    assert check.ok is None
    assert "missing: cifar10" in check.found
    assert "`lcnn data cifar10" in check.advice
    assert "LCNN_DATA" in check.advice


def test_doctor_counts_models(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "PROJECT", tmp_path / "project")
    assert doctor.stored(tmp_path).ok is None
    for folder, names in (("project/data/checkpoints", "ab"), ("runs", "c")):
        (tmp_path / folder).mkdir(parents=True)
        for name in names:
            (tmp_path / folder / f"{name}.safetensors").touch()
            (tmp_path / folder / f"{name}.json").touch()  # its record
            (tmp_path / folder / f".{name}-x.safetensors").touch()  # being written
    assert doctor.stored(tmp_path).found.startswith("2 shipped, 1 in ")


def test_doctor_finds_a_kernel_of_another_python(monkeypatch):
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager, NoSuchKernel

    assert doctor.kernel().ok
    other = KernelSpec(argv=["/opt/other/bin/python", "-m", "ipykernel_launcher"])
    monkeypatch.setattr(KernelSpecManager, "get_kernel_spec", lambda self, name: other)
    assert doctor.kernel().ok is False
    assert "would run in /opt/other/bin/python" in doctor.kernel().found
    assert "ipykernel install --sys-prefix" in doctor.kernel().advice

    def none(self, name):
        raise NoSuchKernel(name)

    monkeypatch.setattr(KernelSpecManager, "get_kernel_spec", none)
    assert doctor.kernel().ok is False


def test_find_browser(monkeypatch, tmp_path):
    program = tmp_path / ("chromium.exe" if os.name == "nt" else "chromium")
    program.write_text("")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LCNN_BROWSER", raising=False)
    assert Path(doctor.find_browser()) == program

    chosen = program.with_name("edge" + program.suffix)
    chosen.write_text("")
    chosen.chmod(0o755)
    monkeypatch.setenv("LCNN_BROWSER", str(chosen))
    assert Path(doctor.find_browser()) == chosen

    monkeypatch.setenv("LCNN_BROWSER", "nonesuch")
    with pytest.raises(FileNotFoundError, match="LCNN_BROWSER=nonesuch"):
        doctor.find_browser()
    assert doctor.browser().ok is False


def test_doctor_notes_what_only_a_few_need(monkeypatch):
    monkeypatch.delenv("LCNN_BROWSER", raising=False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    for check in (doctor.browser(), doctor.compiler()):
        assert check.ok is None
        assert "install" in check.advice
