"""``lcnn train`` and ``lcnn results``: what they print, store and refuse."""

import json
import re
from dataclasses import asdict, replace

import pandas as pd
import pytest
import torch

from lcnn_utils.cli import commands as cli
from lcnn_utils.cli.runs import parsed, summary
from lcnn_utils.experiments import results, run
from lcnn_utils.experiments import runs as experiments
from lcnn_utils.training import METHODS, OBJECTIVES, Recipe, recipe, run_name
from lcnn_utils.training.checkpoint import read

TINY = ("--dataset", "moons", "--set", "epochs=1", "width=4")


@pytest.fixture(autouse=True)
def shipped(store, monkeypatch, tmp_path):
    """Nothing is shipped, and a store of one's own."""
    monkeypatch.setattr(experiments, "SHIPPED", tmp_path / "shipped")
    return tmp_path / "shipped"


def lcnn(*args: str) -> int:
    return cli.main([*args])


# ---- --set -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("lr=0.2", 0.2),
        ("lr=2e-1", 0.2),
        ("lr=1", 1.0),
        ("lambda_beta=0", 0.0),
        ("epochs=12", 12),
        ("augment=true", True),
        ("augment=False", False),
        ("published=TRUE", True),
        ("model=resnet18", "resnet18"),
        ("schedule=steps", "steps"),
        ("derivative=difference", "difference"),
    ],
)
def test_a_change_has_its_fields_type(text, value):
    (found,) = parsed((text,)).values()
    assert (found, type(found)) == (value, type(value))


def test_every_field_can_be_said():
    for name, value in asdict(Recipe()).items():
        if name in ("dataset", "method", "seed"):
            with pytest.raises(ValueError, match=f"--set {name}=.*: write .* instead"):
                parsed((f"{name}={value}",))
            continue
        assert parsed((f"{name}={value}",)) == {name: value}
    assert parsed(()) == {}
    assert parsed(("lr=1", "epochs=2", "lr=3")) == {"lr": 3.0, "epochs": 2}, "the last one counts"
    assert replace(Recipe(), **parsed(("lr=0.2", "augment=true", "model=vgg11"))) == Recipe(
        lr=0.2, augment=True, model="vgg11"
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lr", r"^--set lr: write NAME=VALUE, as in --set lambda_beta=0$"),
        ("", "write NAME=VALUE"),
        ("=1", "unknown field of a recipe ''"),
        ("lamda_beta=1", "unknown field of a recipe 'lamda_beta'.*did you mean 'lambda_beta'"),
        ("lr=fast", r"^--set lr=fast: lr must be a number$"),
        ("lr=", "lr must be a number"),
        ("lr=0,1", "lr must be a number"),
        ("epochs=1.5", r"^--set epochs=1\.5: epochs must be a whole number$"),
        ("epochs=many", "epochs must be a whole number"),
        ("augment=1", r"^--set augment=1: augment must be true or false$"),
        ("augment=", "augment must be true or false"),
    ],
)
def test_a_mistaken_change_is_explained(text, says):
    with pytest.raises(ValueError, match=says) as raised:
        parsed(("width=2", text))
    assert raised.value.__cause__ is None


# ---- lcnn train --------------------------------------------------------------------------------------------------


def test_train_trains_once_and_prints_what_came_out(store, capsys, monkeypatch):
    assert lcnn("train", "lcnn", "--set", "epochs=1", "width=2") == 0
    first = capsys.readouterr().out
    one = recipe("digits", "lcnn", epochs=1, width=2)
    stem = run_name(one)
    assert {path.name for path in (store / "runs").glob("*.*")} == {f"{stem}.json", f"{stem}.safetensors"}
    made = json.loads((store / "runs" / f"{stem}.json").read_text())
    head, row = first.splitlines()
    assert re.split(r"\s{2,}", head) == ["method", "seed", "accuracy", "C of the loss", "C of the margin", "seconds"]
    method, seed, accuracy, curvature, margin, seconds = row.split()
    assert (method, int(seed)) == ("lcnn", 0)
    assert accuracy == f"{made['metrics']['accuracy']:.2%}"
    assert (curvature, margin) == tuple(f"{made['metrics'][n]:.4g}" for n in ("curvature", "margin_curvature"))
    assert float(seconds) == pytest.approx(made["provenance"]["seconds"], abs=0.051)
    places = [head.index(name) + len(name) for name in ("accuracy", "C of the loss", "C of the margin", "seconds")]
    ends = [match.end() for match in re.finditer(r"\S+", row)][2:]
    assert ends == places, "the columns stand under their heads"
    monkeypatch.setitem(OBJECTIVES, "lcnn", lambda *_, **__: pytest.fail("it was trained again"))
    assert lcnn("train", "lcnn", "--set", "epochs=1", "width=2") == 0
    assert capsys.readouterr().out == first


def test_train_all_with_seeds(store, capsys):
    assert lcnn("train", "all", "--seeds", "1", "4", *TINY) == 0
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [[method, seed] for method in METHODS for seed in ("1", "4")]
    assert len(list((store / "runs").glob("*.json"))) == 2 * len(METHODS)
    frame = results()
    assert set(frame.width) == {4}
    assert set(frame.epochs) == {1}


def test_train_several(capsys):
    assert lcnn("train", "relu", "standard", *TINY) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["relu", "standard"]


def test_train_and_ship(store, shipped, capsys):
    assert lcnn("train", "lcnn", "--ship", *TINY) == 0
    one = recipe("moons", "lcnn", epochs=1, width=4)
    assert {path.name for path in shipped.iterdir()} == {f"{run_name(one)}.json", f"{run_name(one)}.safetensors"}
    tensors, _ = read(shipped / f"{run_name(one)}.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.float16, torch.int64}
    row = capsys.readouterr().out.splitlines()[1]
    assert f"{run(one, weights=False).metrics['curvature']:.4g}" in row.split(), "of the rounded weights"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("train",), "lcnn: say what to train, as in: lcnn train lcnn"),
        (("train", "lcn"), "lcnn: unknown method 'lcn': .*; did you mean 'lcnn'\\?"),
        (("train", "lcnn", "all"), "lcnn: unknown method 'all'"),
        (("train", "lcnn", "--dataset", "digit"), "lcnn: unknown dataset 'digit': .*; did you mean 'digits'\\?"),
        (("train", "lcnn", "--scale", "papr"), "lcnn: unknown scale 'papr': .*; did you mean 'paper'\\?"),
        (("train", "lcnn", "--scale", "paper"), "lcnn: digits has no scale 'paper': use 'lab'"),
        (("train", "lcnn", "--set", "epoch=1"), "lcnn: unknown field of a recipe 'epoch': .*; did you mean 'epochs'"),
        (("train", "lcnn", "--set", "epochs"), "lcnn: --set epochs: write NAME=VALUE"),
        (("train", "lcnn", "--set", "epochs=0"), "lcnn: epochs must be a whole number from 1 .*got 0"),
        (("train", "lcnn", "--set", "lr=-1"), "lcnn: lr must be a finite number > 0"),
        (("train", "lcnn", "--seeds", "-1"), "lcnn: seed must be a whole number from 0 .*got -1"),
        (("train", "lcnn", "--device", "cuda:99", *TINY), "lcnn: device 'cuda:99' is not available here"),
        (("train", "lcnn", *TINY[:2], "--set", "seed=3"), "lcnn: .*seed"),
        (("train", "lcnn", "--set", "dataset=moons"), "lcnn: .*dataset"),
        (("train", "lcnn", *TINY[:2], "--set", "method=relu"), "lcnn: .*method"),
        (("results", "--dataset", "digit"), "lcnn: unknown dataset 'digit': .*; did you mean 'digits'\\?"),
    ],
)
def test_a_mistake_is_one_line(args, says, store, capsys):
    run(recipe("moons", "standard", epochs=1, width=4), progress=False)
    before = sorted((store / "runs").iterdir())
    assert lcnn(*args) == 1
    shown = capsys.readouterr()
    assert re.match(says, shown.err)
    assert shown.err.count("\n") == 1
    assert sorted((store / "runs").iterdir()) == before, "nothing was trained"


@pytest.mark.parametrize(
    "args", [("train", "lcnn", "--seeds", "x"), ("train", "lcnn", "--sede", "1"), ("results", "x")]
)
def test_a_mistyped_option_is_explained_with_status_2(args, capsys):
    with pytest.raises(SystemExit) as stopped:
        lcnn(*args)
    assert stopped.value.code == 2
    assert "lcnn" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("train", [*METHODS, "lcnn train lcnn", "--seeds 0 1 2", "--set lambda_beta=0 lambda_gamma=0", "--ship"]),
        ("results", ["--dataset", "--csv", "standard deviation"]),
    ],
)
def test_help_shows_examples(command, shown, capsys):
    with pytest.raises(SystemExit) as stopped:
        lcnn(command, "--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: lcnn {command}" in text
    for word in shown:
        assert word in text, word
    assert "None" not in text
    with pytest.raises(SystemExit):
        lcnn("--help")
    assert command in capsys.readouterr().out


def test_the_examples_of_the_help_are_commands():
    """Each line of the help that begins with `lcnn` is understood, and its recipes are valid."""
    text = cli.Train.__doc__
    examples = [line.split("    ")[0].split() for line in map(str.strip, text.splitlines()) if line.startswith("lcnn ")]
    assert len(examples) == 4
    for _, *words in examples:
        command = cli.parse(words)
        methods = tuple(METHODS) if command.methods == ("all",) else command.methods
        for method in methods:
            recipe(command.dataset, method, command.seeds[0], command.scale, **parsed(command.set))


# ---- lcnn results ------------------------------------------------------------------------------------------------


def test_results_of_nothing(capsys):
    for args in ((), ("--dataset", "digits"), ("--csv", "x.csv")):
        assert lcnn("results", *args) == 0
        assert capsys.readouterr().out == "no runs yet: try `lcnn train lcnn`\n"


def cells(table: str) -> list[dict[str, str]]:
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines())
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_results_groups_seeds(capsys):
    lcnn("train", "lcnn", "standard", "--seeds", "0", "1", "2", *TINY)
    lcnn("train", "lcnn", *TINY, "lambda_beta=0.5")
    capsys.readouterr()
    assert lcnn("results") == 0
    rows = cells(capsys.readouterr().out)
    assert list(rows[0]) == [
        "dataset", "method", "lambda_beta", "runs", "accuracy", "curvature", "margin_curvature", "seconds"
    ]  # fmt: skip
    by = {(row["method"], row["lambda_beta"]): row for row in rows}
    assert {key: row["runs"] for key, row in by.items()} == {
        ("lcnn", "0.01"): "3", ("standard", "0.01"): "3", ("lcnn", "0.5"): "1"
    }  # fmt: skip
    frame = results()
    part = frame[(frame.method == "lcnn") & (frame.lambda_beta == 0.01)]
    for name in ("accuracy", "curvature", "margin_curvature", "seconds"):
        assert by["lcnn", "0.01"][name] == f"{part[name].mean():.4g} ± {part[name].std():.2g}"
    assert not any("±" in cell for cell in by["lcnn", "0.5"].values()), "one run has no spread"


def test_results_of_one_dataset(capsys):
    lcnn("train", "relu", "minimal", *TINY)
    lcnn("train", "relu", "--set", "epochs=1", "width=2", "batch_size=512")
    capsys.readouterr()
    assert lcnn("results", "--dataset", "moons") == 0
    rows = cells(capsys.readouterr().out)
    assert [(row["dataset"], row["method"]) for row in rows] == [("moons", "minimal"), ("moons", "relu")]
    assert lcnn("results", "--dataset", "svhn") == 0
    assert capsys.readouterr().out.startswith("no runs yet")


def test_results_as_csv(tmp_path, capsys, shipped):
    lcnn("train", "lcnn", "relu", "--seeds", "0", "1", *TINY)
    lcnn("train", "lcnn", "--ship", *TINY)
    capsys.readouterr()
    path = tmp_path / "all.csv"
    assert lcnn("results", "--csv", str(path)) == 0
    assert capsys.readouterr().out == f"4 runs in {path}\n"
    pd.testing.assert_frame_equal(pd.read_csv(path), results(), check_dtype=False)
    (tmp_path / "file").touch()
    assert lcnn("results", "--csv", str(tmp_path / "file" / "all.csv")) == 1
    assert re.match(r"lcnn: cannot write .*choose another folder\n$", capsys.readouterr().err)


def test_results_of_a_damaged_record(store, capsys):
    lcnn("train", "lcnn", *TINY)
    (path,) = (store / "runs").glob("*.json")
    path.write_text("{")
    capsys.readouterr()
    with pytest.warns(RuntimeWarning, match=rf"left out: {path} is damaged"):
        assert lcnn("results") == 0


def test_summary_tells_every_field_that_differs():
    rows = [
        asdict(recipe("digits", method, seed, width=width)) | dict(accuracy=0.5 + 0.1 * seed, images=1)
        | dict(curvature=2.0, margin_curvature=1.0, seconds=3.0, device="here", date="2026-01-01")
        for method in ("lcnn", "relu") for width in (2, 4) for seed in (0, 1)
    ]  # fmt: skip
    shown = cells(summary(pd.DataFrame(rows)))
    assert [(row["method"], row["width"], row["runs"]) for row in shown] == [
        ("lcnn", "2", "2"), ("lcnn", "4", "2"), ("relu", "2", "2"), ("relu", "4", "2")
    ]  # fmt: skip
    assert {row["accuracy"] for row in shown} == {"0.55 ± 0.071"}
    assert "lr" not in shown[0]
