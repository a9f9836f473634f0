"""The command line as a user meets it."""

import os
import re
import shutil
import subprocess
import sys

import pandas as pd
import pytest
from helpers import folder_of_images

from lcnn_utils.cli import commands as cli
from lcnn_utils.cli.own_data import load, splits
from lcnn_utils.experiments import results
from lcnn_utils.nn import CenteredSoftplus
from lcnn_utils.training import accuracy

TINY = ("--dataset", "moons", "--set", "epochs=1", "width=4")


# ---- starting ----------------------------------------------------------------------------------------------------


def test_help_starts_without_torch_and_on_a_terminal_that_lacks_most_characters():
    code = "import sys; from lcnn_utils.cli import commands as c; c.parse(['lab']); print('torch' in sys.modules)"
    code += "; c.main(['--help'])"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("False\nusage: lcnn")


@pytest.mark.parametrize("command", [cli.Train, cli.Sweep])
def test_the_examples_of_the_help_are_commands(command):
    """Each line of the help that begins with `lcnn` is understood, and its recipes are valid."""
    lines = [line.strip() for line in command.__doc__.splitlines() if line.strip().startswith("lcnn ")]
    assert len(lines) >= 3
    for line in lines:
        assert cli.asked_for(cli.parse(line.split("    ")[0].split()[1:]))


# ---- lcnn lab ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "folder"),
    [([], "my_notebooks"), (["--read"], "notebooks"), (["--instructor"], "instructor_notebooks")],
)
def test_lab_becomes_jupyter_with_what_it_is_given(mode, folder, monkeypatch):
    started, made = [], []
    monkeypatch.setattr(cli, "make_copies", lambda _, folder, instructor: made.append((folder.name, instructor)))
    monkeypatch.setattr(cli.os, "execve", lambda _, command, environment: sys.exit(started.append(command)))
    given = ["--port", "9999", "-y"]
    with pytest.raises(SystemExit):
        cli.main(["lab", *mode, *given])
    (command,) = started
    assert made == ([] if folder == "notebooks" else [(folder, folder == "instructor_notebooks")])
    assert command[:3] == [sys.executable, "-m", "jupyterlab"]
    assert f"--LabApp.default_url=/lab/tree/{folder}/01_softplus_and_beta.ipynb" in command
    assert command[-3:] == given
    assert not any("token" in part or "ip=" in part for part in command), "Jupyter's safe defaults"


# ---- lcnn data, train, results -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("train",), "say what to train"),
        (("train", "lcn"), "did you mean 'lcnn'"),
        (("train", "lcnn", "--set", "seed=1"), "unknown field of a recipe 'seed'"),
        (("train", "lcnn", "--set", "augment=1"), "true or false"),
        (("train", "lcnn", "--data", "nowhere"), "no images in .*nowhere.*one subfolder a class"),
        (("train", "lcnn", "--data", "nowhere", "--set", "width=3"), "unknown setting of a training .* 'width'"),
        (("train", "lcnn", "--device", "cuda:99", *TINY), "'cuda:99' is not available"),
    ],
)
def test_a_mistake_is_one_line_and_trains_nothing(args, says, store, capsys):
    assert cli.main(args) == 1
    shown = capsys.readouterr().err
    assert re.search(says, shown)
    assert shown.count("\n") == 1
    assert not store.exists()


def test_train_prints_what_came_out_and_results_tells_it(store, shipped, capsys, tmp_path):
    assert cli.main(["results"]) == 0
    assert "no runs yet" in capsys.readouterr().out
    assert cli.main(["train", "lcnn", "relu", "--seeds", "1", "4", *TINY]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[:2] for row in rows] == [["lcnn", "1"], ["relu", "1"], ["lcnn", "4"], ["relu", "4"]]
    assert cli.main(["train", "lcnn", *TINY, "lambda_beta=0.5"]) == 0
    capsys.readouterr()
    assert cli.main(["results", "--dataset", "moons"]) == 0
    table = capsys.readouterr().out
    assert "lambda_beta" in table, "what differs is told"
    assert "width" not in table
    assert cli.main(["results", "--csv", str(tmp_path / "all.csv")]) == 0
    assert (tmp_path / "all.csv").read_text(encoding="utf-8") == results().to_csv(index=False)


# ---- a folder of one's own ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_folder_is_trained_on_reported_and_read_back(store, tmp_path, capsys, no_training):
    folder = folder_of_images(tmp_path / "pets", n=10)
    args = ["train", "--data", str(folder), "--method", "lcnn", "--size", "32", "--set", "epochs=1", "max_beta=3"]
    assert cli.main(args) == 0
    shown, place = capsys.readouterr().out, store / "own" / "pets"
    assert "16 images to train on, 4 held out, classes: cats, dogs" in shown
    assert "maxpool (MaxPool2d)" in shown, "what stays as it was is named"
    (weights,) = (path for path in place.glob("*.safetensors") if not path.stem.endswith("state"))
    net, classes = load(weights)
    assert classes == ("cats", "dogs")
    assert all(layer.beta.item() < 3.001 for layer in net.modules() if isinstance(layer, CenteredSoftplus))
    frame = pd.read_csv(place / "report.csv")
    _, val = splits(folder, 32)
    assert frame.value[frame.measure == "accuracy"].item() == pytest.approx(accuracy(net, val.float(), val.y))
    no_training()
    assert cli.main(args) == 0
    shutil.copy(folder / "dogs" / "0.png", folder / "cats" / "0.png")  # another picture, of the same name
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        cli.main(args)
