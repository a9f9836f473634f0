"""Training against a loop written out by hand; runs that are stopped, killed, damaged or diverge."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import files_of_at_most
from safetensors.torch import load_file, safe_open, save_file
from sklearn.datasets import load_digits, make_moons
from torch import nn
from torch.nn.utils import parametrize

from lcnn_utils import studies
from lcnn_utils.activations import CenteredSoftplus
from lcnn_utils.lipschitz import LipschitzBatchNorm2d, conv_norm
from lcnn_utils.objectives import DATASETS, MODELS, OBJECTIVES, Recipe
from lcnn_utils.training import accuracy, build, fit, learning_rate, samples, state_path

pytestmark = pytest.mark.usefixtures("store")
MOONS = Recipe("moons", "lcnn", "mlp", width=6, epochs=4)
DIGITS = Recipe("digits", "lcnn", "resnet10", width=2, epochs=3, batch_size=512, augment=True)
RECIPES = pytest.mark.parametrize("recipe", [MOONS, DIGITS], ids=["moons", "digits"])


def train(recipe, **options):
    return fit(recipe, progress=False, **options)


def assert_same(a, b) -> None:
    """Bit for bit: every entry of the state, and the history."""
    (model_a, history_a), (model_b, history_b) = a, b
    state_a, state_b = model_a.state_dict(), model_b.state_dict()
    assert state_a.keys() == state_b.keys()
    assert [name for name in state_a if not torch.equal(state_a[name], state_b[name])] == []
    pd.testing.assert_frame_equal(history_a, history_b, check_exact=True)


def epochs_on_disk(recipe) -> int:
    with safe_open(state_path(recipe), "pt") as file:
        return int(file.metadata()["epoch"])


def after(calls: int, then):
    """The real objective for so many calls; from then on its result is handed to ``then``."""
    real, count = OBJECTIVES.copy(), [0]

    def objective(model, x, y, recipe):
        count[0] += 1
        result = real[recipe.method](model, x, y, recipe)
        return result if count[0] <= calls else then(model, *result)

    return objective


def stop(*_):
    raise KeyboardInterrupt


def interrupt(recipe, calls: int) -> None:
    """Train until Ctrl-C comes in the step after so many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(OBJECTIVES, recipe.method, after(calls, stop))
        with pytest.raises(KeyboardInterrupt):
            train(recipe)


def forbidden(*_):
    raise AssertionError("it must not train")


# ---- parts -------------------------------------------------------------------------------------------------------


def test_the_learning_rate_is_one_cycle():
    recipe = Recipe(lr=0.7)
    t = np.linspace(0, 1, 1001)
    rates = np.array([learning_rate(recipe, p) for p in t])
    assert rates[0] == pytest.approx(0.04 * 0.7)
    assert t[rates.argmax()] == pytest.approx(0.3)
    assert rates.max() == pytest.approx(0.7)
    assert rates[-1] == pytest.approx(0, abs=1e-12)
    assert (np.diff(rates)[:300] > 0).all()
    assert (np.diff(rates)[300:] < 0).all()
    assert np.abs(np.diff(rates)).max() < 0.7 * 4e-3, "no jumps"
    up, down = t < 0.3, t >= 0.3
    np.testing.assert_allclose(rates[up], 0.7 * (0.04 + 3.2 * t[up]))
    np.testing.assert_allclose(rates[down], 0.7 * np.cos(np.pi * (t[down] - 0.3) / 1.4) ** 2, atol=1e-12)


def test_accuracy_against_numpy():
    generator = torch.Generator().manual_seed(0)
    logits, y = torch.randn(37, 5, generator=generator), torch.randint(0, 5, (37,), generator=generator)
    expected = np.mean(logits.numpy().argmax(1) == y.numpy())
    for size in (1, 10, 37, 1024):
        assert accuracy(nn.Identity(), logits, y, batch_size=size) == pytest.approx(expected)


def test_samples_of_the_moons_are_scikit_learns():
    for split, n, seed in (("train", 400, 3), ("test", 1000, 1_000_003)):
        points, labels = make_moons(n, noise=0.15, random_state=seed)
        x, y = samples(replace(MOONS, seed=3), split)
        np.testing.assert_array_equal(x.numpy(), points.astype(np.float32))
        np.testing.assert_array_equal(y.numpy(), labels)


def test_samples_of_the_digits_are_all_of_them():
    x, y = (torch.cat(part) for part in zip(samples(DIGITS, "train"), samples(DIGITS, "test"), strict=True))
    digits = load_digits()
    assert x.shape == (1797, 1, 8, 8)
    assert x.dtype == torch.float32
    assert np.bincount(y.numpy()).tolist() == np.bincount(digits.target).tolist()
    assert x.sum().item() == pytest.approx(np.round(digits.images * 255 / 16).sum() / 255, rel=1e-5)


@pytest.mark.parametrize("method", ["standard", "lcnn"])
@pytest.mark.parametrize(
    ("dataset", "model"), [("moons", "mlp"), *[(dataset, model) for dataset in DATASETS[1:] for model in MODELS]]
)
def test_build_makes_what_the_recipe_says(dataset, model, method):
    recipe = Recipe(dataset, method, model, width=2, beta=3.0, gamma=4.0)
    net = build(recipe).eval()
    shape = {"moons": (2,), "digits": (1, 8, 8)}.get(dataset, (3, 32, 32))
    assert net(torch.rand(2, *shape)).shape == (2, {"moons": 2, "cifar100": 100}.get(dataset, 10))
    betas = [m for m in net.modules() if isinstance(m, CenteredSoftplus)]
    gammas = [m.gamma.item() for m in net.modules() if isinstance(m, LipschitzBatchNorm2d)]
    low = method == "lcnn"
    assert [m.beta.item() for m in betas] == pytest.approx([3.0 if low else 1000.0] * len(betas))
    assert any(name.endswith("log_beta") for name, _ in net.named_parameters()) == low
    assert bool(gammas) == low
    assert gammas == pytest.approx([4.0] * len(gammas))


def test_build_is_drawn_from_the_seed_alone():
    torch.manual_seed(5)
    first = build(DIGITS).state_dict()
    torch.manual_seed(6)
    second, other = build(DIGITS).state_dict(), build(replace(DIGITS, seed=1)).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


# ---- the loop ----------------------------------------------------------------------------------------------------


def test_against_a_loop_written_out():
    """Nesterov's SGD with decay as in its textbook, no optimiser and no scheduler, in the same order of operations."""
    recipe = Recipe("moons", "standard", "mlp", width=6, epochs=2, weight_decay=0.01)
    net, (x, y) = build(recipe), samples(recipe, "train")
    speed = [torch.zeros_like(p) for p in net.parameters()]
    losses = []
    for step in range(40):
        t = step / 40
        lr = 0.1 * (0.04 + 0.96 * t / 0.3 if t < 0.3 else (1 + math.cos(math.pi * (t - 0.3) / 0.7)) / 2)
        logits = net(x)
        loss = (logits.logsumexp(1) - logits.gather(1, y[:, None])[:, 0]).mean()
        losses.append(loss.item())
        for p, v, g in zip(net.parameters(), speed, torch.autograd.grad(loss, list(net.parameters())), strict=True):
            g = g + 0.01 * p.detach()
            v.mul_(0.9).add_(g)
            p.data -= lr * (g + 0.9 * v)
    model, history = train(recipe)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-3, atol=1e-5)
    assert history.epoch.tolist() == [1, 2]
    assert history.loss.tolist() == pytest.approx([np.mean(losses[:20]), np.mean(losses[20:])], rel=1e-4)


def test_weight_decay_spares_beta_and_gamma(monkeypatch):
    """With a zero gradient and no momentum a step multiplies a weight by 1 − lr·decay; log β and log γ stay."""

    def flat(model, x, y, recipe):
        loss = sum(0 * p.sum() for p in model.parameters())
        return loss, {"loss": loss.detach()}

    monkeypatch.setitem(OBJECTIVES, "lcnn", flat)
    recipe = replace(MOONS, epochs=1, momentum=0.0, weight_decay=0.5, lr=0.3)
    before, after_ = dict(build(recipe).named_parameters()), dict(train(recipe)[0].named_parameters())
    factor = math.prod(1 - 0.5 * learning_rate(recipe, step / 20) for step in range(20))
    assert factor < 0.5
    ours = [name for name in before if name.endswith(("log_beta", "log_gamma"))]
    assert len(ours) == 4
    for name, start in before.items():
        if name in ours:
            assert torch.equal(after_[name], start), name
        else:
            torch.testing.assert_close(after_[name], start * factor, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("method", ["standard", "lcnn"])
def test_moons_are_learnt(method):
    recipe = studies.moons_recipe(method)
    model, history = train(recipe)
    assert accuracy(model, *samples(recipe, "test")) > 0.95
    assert history.epoch.tolist() == list(range(1, recipe.epochs + 1))
    assert history.loss.iloc[-1] < history.loss.iloc[0]


@pytest.mark.parametrize("method", ["standard", "lcnn"])
def test_digits_are_learnt(method):
    recipe = Recipe("digits", method, "resnet10", width=4, epochs=4, batch_size=64)
    model, history = train(recipe)
    assert accuracy(model, *samples(recipe, "test")) > 0.8
    assert history.accuracy.is_monotonic_increasing


@RECIPES
def test_the_model_comes_back_ready_to_measure(recipe):
    model, _ = train(recipe)
    assert not any(module.training for module in model.modules())
    norms = {}
    for name, module in model.named_modules():
        if not parametrize.is_parametrized(module, "weight"):
            continue
        if isinstance(module, nn.Conv2d):
            shape = module.parametrizations.weight[0].input_shape
            norms[name] = conv_norm(module, shape, "exact").item()
        else:
            norms[name] = torch.linalg.svdvals(module.weight.detach())[0].item()
    assert len(norms) == (2 if recipe is MOONS else 13)
    assert norms == pytest.approx(dict.fromkeys(norms, 1.0), abs=1e-2)


@RECIPES
def test_twice_the_same(recipe, store, tmp_path, monkeypatch):
    first = train(recipe)
    monkeypatch.setenv("LCNN_STORE", str(tmp_path / "another"))
    torch.manual_seed(99)  # whatever went before must not matter
    assert_same(first, train(recipe))


def test_the_global_generators_are_left_alone():
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())  # noqa: NPY002

    before = states()
    build(DIGITS)
    train(replace(DIGITS, epochs=1))
    train(replace(MOONS, epochs=1))
    assert states() == before


def test_progress_is_shown_or_not(capsys):
    train(replace(MOONS, epochs=1))
    assert capsys.readouterr() == ("", "")
    fit(replace(MOONS, epochs=1, seed=1))
    shown = capsys.readouterr().err
    assert "lcnn seed 1" in shown
    assert "loss" in shown


def test_an_absent_device_is_refused(store):
    with pytest.raises(RuntimeError, match=r"device 'nonsense' is not available"):
        train(MOONS, device="nonsense")
    assert not store.exists()


# ---- stopped and resumed -----------------------------------------------------------------------------------------


@RECIPES
@pytest.mark.parametrize("epochs_done", [0, 2])
def test_interrupted_then_resumed_is_the_uninterrupted_run(recipe, epochs_done, monkeypatch, tmp_path):
    whole = train(recipe)
    monkeypatch.setenv("LCNN_STORE", str(tmp_path / "another"))
    steps = 20 if recipe is MOONS else 3
    interrupt(recipe, epochs_done * steps + 1)
    assert state_path(recipe).exists() == (epochs_done > 0)
    if epochs_done:
        assert epochs_on_disk(recipe) == epochs_done
    assert_same(whole, train(recipe))
    assert [path.name for path in state_path(recipe).parent.iterdir()] == [state_path(recipe).name]


SLOW = """
import os, sys, time, torch
from lcnn_utils import training
from lcnn_utils.objectives import OBJECTIVES, Recipe
torch.set_num_threads(1)
training.samples(Recipe(), "test")  # imports scikit-learn, once
for recipe, pause in ((eval(sys.argv[1]), 0.02), (eval(sys.argv[2]), 0.15)):
    if pid := os.fork():
        print(pid, flush=True)
        continue
    real = OBJECTIVES[recipe.method]
    OBJECTIVES[recipe.method] = lambda *a: (time.sleep(pause), real(*a))[1]
    training.fit(recipe, progress=False)
    os._exit(0)
os.wait(), os.wait()
"""


def test_killed_then_resumed_is_the_uninterrupted_run(monkeypatch, tmp_path):
    """A real SIGKILL, at whatever point of the second epoch it falls."""
    if not hasattr(signal, "SIGKILL"):
        pytest.skip("POSIX only")
    recipes = (MOONS, DIGITS)
    whole = [train(recipe) for recipe in recipes]
    monkeypatch.setenv("LCNN_STORE", str(tmp_path / "another"))
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW, *map(repr, recipes)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    pids = [int(child.stdout.readline() or 0) for _ in recipes]
    assert all(pids), child.stderr.read()
    for recipe, pid in zip(recipes, pids, strict=True):
        deadline = time.monotonic() + 60
        while not state_path(recipe).exists() and time.monotonic() < deadline and child.poll() is None:
            time.sleep(0.005)
        os.kill(pid, signal.SIGKILL)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 0, errors
    for recipe, expected in zip(recipes, whole, strict=True):
        assert 1 <= epochs_on_disk(recipe) < recipe.epochs, "it was killed too late for this test to mean anything"
        assert_same(expected, train(recipe))


@RECIPES
def test_a_finished_run_is_read_back(recipe, monkeypatch):
    whole = train(recipe)
    written = state_path(recipe).stat().st_mtime_ns
    monkeypatch.setitem(OBJECTIVES, recipe.method, forbidden)
    assert_same(whole, train(recipe))
    assert state_path(recipe).stat().st_mtime_ns == written


def test_resume_false_trains_anew(monkeypatch):
    whole = train(MOONS)
    with monkeypatch.context() as patch:
        patch.setitem(OBJECTIVES, "lcnn", forbidden)
        with pytest.raises(AssertionError, match="must not train"):
            train(MOONS, resume=False)
    state_path(MOONS).write_bytes(b"")  # a damaged state does not stop it
    assert_same(whole, train(MOONS, resume=False))
    monkeypatch.setitem(OBJECTIVES, "lcnn", forbidden)
    assert_same(whole, train(MOONS))


# ---- what goes wrong ---------------------------------------------------------------------------------------------


def truncated(path):
    path.write_bytes(path.read_bytes()[:-10])


def header_only(path):
    path.write_bytes(path.read_bytes()[:20])


def empty(path):
    path.write_bytes(b"")


def text(path):
    path.write_text("<html>404</html>" * 100)


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 0x55
    path.write_bytes(content)


def flipped_in_the_header(path):
    flip(path, 12)


def flipped_in_a_weight(path):
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    flip(path, start + (path.stat().st_size - start) // 2)


def flipped_in_the_last_byte(path):
    flip(path, -1)


def foreign(path):
    save_file({"weight": torch.zeros(3)}, path)


def foreign_with_our_metadata(path):
    save_file({"weight": torch.zeros(3)}, path, metadata={"epoch": "1", "history": "[]"})


def edited(path, change):
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


def without_its_generator(path):
    edited(path, lambda tensors, metadata: tensors.pop("generator"))


def without_its_momentum(path):
    edited(path, lambda tensors, _: [tensors.pop(name) for name in list(tensors) if name.startswith("momentum")])


def of_another_width(path):
    other = replace(MOONS, width=5)
    train(other)
    path.write_bytes(state_path(other).read_bytes())


@pytest.mark.parametrize(
    "damage",
    [
        truncated, header_only, empty, text, flipped_in_the_header, flipped_in_a_weight, flipped_in_the_last_byte,
        foreign, foreign_with_our_metadata, without_its_generator, without_its_momentum, of_another_width,
    ],
    ids=lambda damage: damage.__name__,
)  # fmt: skip
def test_a_damaged_state_is_named_with_the_way_out(damage):
    train(MOONS)
    path = state_path(MOONS)
    damage(path)
    damaged = path.read_bytes()
    with pytest.raises(RuntimeError, match=r"delete it.*resume=False") as raised:
        train(MOONS)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert path.read_bytes() == damaged, "nothing of the user's is overwritten"


def test_a_loss_that_is_not_a_number_keeps_the_last_good_epoch(monkeypatch):
    def broken(model, loss, terms):
        return loss * math.nan, terms | {"loss": terms["loss"] * math.nan}

    monkeypatch.setitem(OBJECTIVES, "lcnn", after(25, broken))
    with pytest.raises(RuntimeError, match=r"not finite in epoch 2 .*lower lr \(now 0\.1\)"):
        train(MOONS)
    assert epochs_on_disk(MOONS) == 1
    assert all(value.isfinite().all() for value in load_file(state_path(MOONS)).values())


def test_a_learning_rate_that_is_too_large(store):
    recipe = Recipe("moons", "standard", "mlp", width=6, epochs=2, lr=1e20)
    with pytest.raises(RuntimeError, match=r"not finite in epoch 1 .*lower lr \(now 1e\+20\)"):
        train(recipe)
    assert not state_path(recipe).exists()


@pytest.mark.parametrize("steps", [40, 80], ids=["an epoch", "the training"])
def test_weights_broken_by_the_last_step_are_not_kept(steps, monkeypatch):
    """The loss of a step is taken before it: the last one can be fine, and what it leaves NaN."""

    def poison(model, loss, terms):
        return loss + 0 * model[-1].weight.mul(0).sum().sqrt(), terms  # + 0, whose derivative is 0·∞

    monkeypatch.setitem(OBJECTIVES, "lcnn", after(steps - 1, poison))
    with pytest.raises(RuntimeError, match="not finite"):
        train(MOONS)
    assert epochs_on_disk(MOONS) == steps // 20 - 1
    state = load_file(state_path(MOONS))
    assert all(value.isfinite().all() for value in state.values())


def test_a_store_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LCNN_STORE", str(tmp_path / "file" / "store"))
    with pytest.raises(OSError, match=r"cannot write .*moons-lcnn.*set LCNN_STORE"):
        train(MOONS)
    assert os.listdir(tmp_path) == ["file"]


def test_a_disk_that_fills_up():
    """The state on disk stays that of the last epoch that fitted, and training goes on from it once there is room."""
    whole = train(MOONS)
    state_path(MOONS).unlink()
    interrupt(MOONS, 30)
    kept = state_path(MOONS).read_bytes()
    with files_of_at_most(2000), pytest.raises(OSError, match=r"cannot write .*free some space, or set LCNN_STORE"):
        train(MOONS)
    assert state_path(MOONS).read_bytes() == kept
    assert os.listdir(state_path(MOONS).parent) == [state_path(MOONS).name]
    assert_same(whole, train(MOONS))


def test_the_state_says_what_it_holds():
    _, history = train(MOONS)
    with safe_open(state_path(MOONS), "pt") as file:
        metadata = file.metadata()
    assert metadata["epoch"] == "4"
    pd.testing.assert_frame_equal(pd.DataFrame(json.loads(metadata["history"])), history, check_exact=True)
