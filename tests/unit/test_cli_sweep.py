"""``lcnn sweep``: what it trains, prints, plans and refuses."""

import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
from safetensors.torch import load_file

from lcnn_utils.cli import commands as cli
from lcnn_utils.cli import sweep as cli_sweep
from lcnn_utils.cli.sweep import Sweep
from lcnn_utils.experiments import run, timing
from lcnn_utils.experiments import runs as experiments
from lcnn_utils.experiments.plan import recorded
from lcnn_utils.experiments.progress import duration
from lcnn_utils.experiments.timing import Expectation
from lcnn_utils.training import METHODS, OBJECTIVES, fit, recipe, state_path
from lcnn_utils.training.checkpoint import reached

SMALL = ("--datasets", "moons", "--set", "epochs=2", "width=4")


@pytest.fixture(autouse=True)
def shipped(store, monkeypatch, tmp_path):
    """Nothing is shipped, and a store of one's own."""
    monkeypatch.setattr(experiments, "SHIPPED", tmp_path / "shipped")
    return tmp_path / "shipped"


def lcnn(*args: str, workers: str = "1") -> int:
    """The command, by default in this process."""
    mine = () if {"--help", "--scheduler"} & set(args) else ("--workers", workers)
    return cli.main(["sweep", *args, *mine])


def small(method: str, seed: int = 0, **changes):
    return recipe("moons", method, seed, **dict(epochs=2, width=4) | changes)


# ---- training ----------------------------------------------------------------------------------------------------


def test_a_sweep_trains_what_is_missing(capsys, monkeypatch):
    run(small("relu", 1), progress=False)
    assert lcnn("--methods", "lcnn", "relu", "--seeds", "1", "0", *SMALL) == 0
    *rows, last = capsys.readouterr().out.splitlines()
    order = [("relu", "1"), ("lcnn", "1"), ("lcnn", "0"), ("relu", "0")]  # what is there comes first
    assert [row.split()[:4] for row in rows] == [["moons", method, "seed", seed] for method, seed in order]
    for row in rows:
        one = small(row.split()[1], int(row.split()[3]))
        metrics = run(one, weights=False).metrics
        said = f"done: test accuracy {metrics['accuracy']:.2%}, C of the loss {metrics['curvature']:.4g}"
        assert row.endswith(said)
    assert last == "4 of 4 runs done"
    for method in METHODS:
        monkeypatch.setitem(OBJECTIVES, method, lambda *_, **__: pytest.fail("it was trained again"))
    assert lcnn("--methods", "lcnn", "relu", "--seeds", "1", "0", *SMALL) == 0
    assert capsys.readouterr().out.splitlines() == [rows[1], rows[0], *rows[2:], last]


def test_all_methods_of_several_datasets(capsys):
    assert lcnn("--datasets", "moons", "digits", "--set", "model=mlp", "epochs=1", "width=2", "batch_size=1437") == 0
    rows = [row.split()[:2] for row in capsys.readouterr().out.splitlines()[:-1]]
    assert rows == [[dataset, method] for dataset in ("moons", "digits") for method in METHODS]


def test_sittings_go_on_until_all_is_done(capsys, store, monkeypatch, tmp_path):
    whole = small("lcnn", epochs=3)
    fit(whole, progress=False)
    expected = load_file(state_path(whole))
    monkeypatch.setenv("LCNN_STORE", str(tmp_path / "another"))
    command = ("--datasets", "moons", "--methods", "lcnn", "relu", "--minutes", "0", "--set", "epochs=3", "width=4")
    said = []
    for _ in range(6):
        assert lcnn(*command) == 0
        said.append(capsys.readouterr().out.splitlines())
    head = ["moons     lcnn          seed 0 ", "moons     relu          seed 0 "]
    for i, (first, second, last) in enumerate(said[:5]):
        done = i + 1
        left = f"; left: {6 - done} epochs of {2 - (done >= 3)} runs, with which the same command goes on"
        assert last == f"{int(done >= 3)} of 2 runs done{left}".replace("1 runs,", "1 run,").replace(
            "1 epochs", "1 epoch"
        )
        assert first.startswith(f"{head[0]}  {f'{done} of 3 epochs' if done < 3 else 'done: test accuracy'}")
        assert second == f"{head[1]}  {max(0, done - 3)} of 3 epochs"
    assert said[5][2] == "2 of 2 runs done"
    found = load_file(state_path(whole))
    assert all((found[name] == value).all() for name, value in expected.items())
    assert recorded(whole)


def test_one_that_fails_ends_no_other_and_the_status_is_1(capsys, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("the loss is\nnot finite")

    monkeypatch.setitem(OBJECTIVES, "lcnn", broken)
    assert lcnn("--methods", "lcnn", "relu", *SMALL) == 1
    shown = capsys.readouterr()
    failed, done, last = shown.out.splitlines()
    assert failed == "moons     lcnn          seed 0   failed: the loss is not finite"
    assert done.startswith("moons     relu          seed 0   done: ")
    assert last == "1 of 2 runs done, 1 failed"
    assert "in broken" in shown.err.split("Traceback (most recent call last):")[1]


def test_what_is_held_out_is_said(capsys):
    assert lcnn("--methods", "relu", *SMALL, "held_out=0.2") == 0
    assert "done: held out accuracy" in capsys.readouterr().out


# ---- --plan ------------------------------------------------------------------------------------------------------


def test_a_plan_trains_nothing_and_lists_every_epoch(store, capsys, monkeypatch):
    """10 s an epoch, by the record of a run of that kind; 15 s a piece."""
    run(small("relu"), progress=False)
    fit(small("standard"), progress=False)
    monkeypatch.setattr(timing, "known", lambda *_: timing.Expectation(10.0, "by decree"))
    for method in METHODS:
        monkeypatch.setitem(OBJECTIVES, method, lambda *_, **__: pytest.fail("it was trained"))
    before = sorted((store / "runs").rglob("*"))
    command = ("--methods", "standard", "relu", "lcnn", "--seeds", "0", "3", *SMALL, "--plan")
    assert lcnn(*command, "--minutes", "0.4") == 0
    text = capsys.readouterr().out
    assert [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()] == [
        ["moons", "standard", "seed 0", "trained, not yet measured"],
        ["moons", "relu", "seed 0", "done"],
        ["piece 1 of 4: 20 s"],
        ["moons", "lcnn", "seed 0", "epochs 1–2 of 2", "20 s", "by decree"],
        ["piece 2 of 4: 20 s"],
        ["moons", "standard", "seed 3", "epochs 1–2 of 2", "20 s", "by decree"],
        ["piece 3 of 4: 20 s"],
        ["moons", "relu", "seed 3", "epochs 1–2 of 2", "20 s", "by decree"],
        ["piece 4 of 4: 20 s"],
        ["moons", "lcnn", "seed 3", "epochs 1–2 of 2", "20 s", "by decree"],
        ["together 80 s in 4 pieces of at most 0.4 min"],
        ["training alone: starting, compiling, and measuring each finished net come on top"],
        ["to train a piece: the same with --minutes 0.4 in place of --plan, again and again"],
    ]
    assert lcnn(*command) == 0
    text = capsys.readouterr().out
    assert "piece 1 of 1: 80 s" in text
    assert "in 1 piece of at most 9 min" in text
    assert lcnn(*command, "--minutes", "0.1") == 0
    text = capsys.readouterr().out
    assert "piece 8 of 8: 10 s" in text
    assert "  epoch 2 of 2  " in text
    assert "an epoch that takes longer than that is a piece of its own" in text
    assert sorted((store / "runs").rglob("*")) == before


def test_a_plan_of_what_was_begun(capsys):
    assert lcnn("--methods", "lcnn", *SMALL, "--minutes", "0") == 0
    capsys.readouterr()
    assert lcnn("--methods", "lcnn", *SMALL, "--plan") == 0
    assert re.search(r"moons +lcnn +seed 0 +epoch 2 of 2 .* its own first epoch", capsys.readouterr().out)
    assert reached(state_path(small("lcnn")))[0] == 1


def test_a_plan_of_what_is_done(capsys):
    run(small("lcnn"), progress=False)
    assert lcnn("--methods", "lcnn", *SMALL, "--plan") == 0
    assert capsys.readouterr().out == "moons     lcnn          seed 0   done\nnothing is left to train\n"


def test_a_plan_times_steps_where_nothing_is_known(capsys):
    assert lcnn("--methods", "lcnn", *SMALL, "--plan") == 0
    assert "timed now, 3 steps, uncompiled, on " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.25, "0.25 s"), (119.0, "119 s"), (540.0, "9.0 min"), (9000.0, "2.5 h")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


# ---- what it refuses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [(), ("--plan",)], ids=["", "plan"])
@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--methods", "lcn"), "unknown method 'lcn': .*; did you mean 'lcnn'\\?"),
        (("--methods", "lcnn", "all"), "unknown method 'all'"),
        (("--datasets", "moons", "digit"), "unknown dataset 'digit': .*; did you mean 'digits'\\?"),
        (("--datasets", "cifar10", "digits", "--scale", "tiny"), "digits has no scale 'tiny': use 'lab'"),
        (("--seeds", "-1"), "seed must be a whole number from 0 .*got -1"),
        (("--minutes", "-1"), "--minutes must be a number of at least 0, got -1"),
        (("--minutes", "nan"), "--minutes must be a number of at least 0, got nan"),
        (("--set", "dataset=moons"), "--set dataset=moons: write --datasets NAME ... instead"),
        (("--set", "method=lcnn"), "--set method=lcnn: write --methods NAME ... instead"),
        (("--set", "seed=1"), "--set seed=1: write --seeds N ... instead"),
        (("--set", "held_out=1"), "held_out must be a finite number >= 0 and < 1, got 1.0"),
        (("--set", "epochs=1.5"), "--set epochs=1.5: epochs must be a whole number"),
        (("--grid", "lambda_bet=1"), "unknown field of a recipe 'lambda_bet': .*; did you mean 'lambda_beta'\\?"),
        (("--grid", "lambda_beta"), "--grid lambda_beta=: lambda_beta must be a number"),
        (("--grid", "lambda_beta=1,x"), "--grid lambda_beta=x: lambda_beta must be a number"),
        (("--grid", "seed=0,1"), "--grid seed=0: write --seeds N ... instead"),
        (("--grid", "lr=1", "lr=2"), "--grid lr=2: lr is given twice"),
        (("--grid", "lr=1", "--set", "lr=2"), "--grid lr=1: lr is given twice"),
        (("--scheduler", "tcp://127.0.0.1:9", "--workers", "2"), "--workers is for this machine: leave it out"),
        (("--methods",), "there is nothing to sweep: give --datasets, --methods and --seeds a value each"),
        (("--device", "cuda:99"), "device 'cuda:99' is not available here"),
    ],
)
def test_a_mistake_is_one_line(args, says, plan, store, capsys):
    assert lcnn(*args, *plan) == 1
    shown = capsys.readouterr()
    assert re.match(f"lcnn: {says}", shown.err)
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    assert not store.exists()


@pytest.mark.parametrize("args", [("--seeds", "x"), ("--minutes", "soon"), ("--plans",), ("lcnn",)])
def test_a_mistyped_option_is_explained_with_status_2(args, capsys):
    with pytest.raises(SystemExit) as stopped:
        lcnn(*args)
    assert stopped.value.code == 2
    assert "lcnn" in capsys.readouterr().err


def test_help_and_its_examples(capsys):
    with pytest.raises(SystemExit) as stopped:
        lcnn("--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for word in (
        "usage: lcnn sweep",
        "--datasets",
        "--methods",
        "--seeds",
        "--scale",
        "--minutes",
        "--plan",
        "--device",
    ):
        assert word in text, word
    assert "None" not in text
    lines = [line.split("    ")[0].split() for line in map(str.strip, Sweep.__doc__.splitlines())]
    examples = [cli.parse(line[1:]) for line in lines if line[:2] == ["lcnn", "sweep"]]
    assert [one.plan for one in examples] == [False, True, False, False, False]
    assert [len(one.grid) for one in examples] == [0, 0, 0, 2, 0]
    assert examples[2] == replace(Sweep(), datasets=("cifar10",), minutes=9.0)
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "sweep" in capsys.readouterr().out


def test_options_cover_what_set_refuses():
    assert cli_sweep.OPTIONS.keys() == {"dataset", "method", "seed"} < asdict(small("lcnn")).keys()


# ---- on more than one worker -------------------------------------------------------------------------------------


def test_a_grid_on_two_workers(capsys, monkeypatch):
    """One run fails: its traceback is printed at the end, and the status is 1; the others are done."""
    grid = ("--grid", "lr=0.1,1e20", "lambda_beta=0.01,0.02")
    assert lcnn("--methods", "relu", "lcnn", *grid, *SMALL, workers="2") == 1
    shown = capsys.readouterr()
    first, *rows, last = shown.out.splitlines()
    assert re.fullmatch(r"6 runs on 2 workers, dashboard: http://127\.0\.0\.1:\d+/status", first)
    assert sorted("done: " in row for row in rows) == [False] * 3 + [True] * 3
    assert last == "3 of 6 runs done, 3 failed"
    assert shown.err.count("Traceback (most recent call last):") == 3
    assert "dask" not in shown.err.lower(), "none of its logging"
    found = experiments.results()
    assert sorted(zip(found.method, found.lambda_beta, strict=True)) == [("lcnn", 0.01), ("lcnn", 0.02), ("relu", 1e-2)]


def test_a_plan_for_two_workers(capsys, monkeypatch):
    """Three runs of 30 s each, list-scheduled on two workers, take as long as two of them."""
    monkeypatch.setattr(timing, "probe", lambda *_: Expectation(15.0, "by heart"))
    assert lcnn("--methods", "relu", "lcnn", "standard", *SMALL, "--plan", workers="2") == 0
    assert capsys.readouterr().out.endswith("\non 2 workers, each as fast as this machine: 60 s together\n")


def test_a_damaged_file_is_told_of(capsys):
    one = small("lcnn")
    fit(one, progress=False)
    state_path(one).write_bytes(b"no state")
    assert lcnn("--methods", "lcnn", *SMALL) == 0
    done, note, _ = capsys.readouterr().out.splitlines()
    assert "done: " in done
    assert note.startswith(f"    {state_path(one)} is damaged or of another version")


def test_a_cluster_of_one_machine(store, tmp_path):
    """`lcnn cluster` until Ctrl-C; `lcnn sweep --scheduler` with what it printed."""
    command = [sys.executable, "-m", "lcnn_utils", "cluster", "--workers", "1", "--port", free(), "--dashboard", free()]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        up, use = process.stdout.readline(), process.stdout.readline()
        address = re.fullmatch(rf"1 worker at (tcp://127.0.0.1:{command[7]}), dashboard: http://127.0.0.1:.*\n", up)[1]
        assert f"--scheduler {address} " in use
        assert lcnn("--methods", "relu", *SMALL, "--scheduler", address) == 0
        assert recorded(small("relu"))
    finally:
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in errors


def test_a_port_that_is_taken(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for option in ("--port", "--dashboard"):
            assert cli.main(["cluster", "--port", free(), "--dashboard", free(), option, str(port)]) == 1
            assert capsys.readouterr().err == f"lcnn: port {port} is taken: choose another {option}\n"


def free() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
