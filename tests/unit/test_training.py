"""Training against a loop written out by hand; runs that are stopped or diverge (killed: test_state)."""

import json
import math
import random
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import files_of_at_most
from safetensors.torch import load_file, safe_open
from sklearn.datasets import load_digits, make_moons
from torch import nn
from torch.nn.utils import parametrize

from lcnn_utils import studies
from lcnn_utils.curvature import geometry
from lcnn_utils.experiments import runs as experiments
from lcnn_utils.nn import CenteredSoftplus, LipschitzBatchNorm2d, conv_norm, sigma_error
from lcnn_utils.nn import batchnorm as lipschitz
from lcnn_utils.nn import softplus as activations
from lcnn_utils.nn import spectral_norm as spectral
from lcnn_utils.training import (
    METHODS,
    OBJECTIVES,
    Recipe,
    accuracy,
    build,
    fit,
    learning_rate,
    make_optimizer,
    samples,
    state_path,
    training_step,
)
from lcnn_utils.training.recipe import SCHEDULES

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


def files_beside(path) -> list[str]:
    return [other.name for other in path.parent.iterdir() if other.is_file()]


def after(calls: int, then):
    """The real objective for so many calls; from then on its result is handed to ``then``."""
    real, count = OBJECTIVES.copy(), [0]

    def objective(model, x, y, recipe, **more):
        count[0] += 1
        result = real[recipe.method](model, x, y, recipe, **more)
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


def forbidden(*_, **__):
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


def test_the_learning_rate_in_steps():
    """×0.1 at 75 % and at 87.5 % of training, there and not a step earlier."""
    recipe = Recipe(lr=0.7, schedule="steps", epochs=8)
    rates = [learning_rate(recipe, (epoch + step / 4) / 8) / 0.7 for epoch in range(8) for step in range(4)]
    assert rates == pytest.approx([1.0] * 24 + [0.1] * 4 + [0.01] * 4)


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


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_weight_decay_spares_beta_and_gamma(schedule, monkeypatch):
    """With a zero gradient and no momentum a step multiplies a weight by 1 − lr·decay; log β and log γ stay."""

    def flat(model, x, y, recipe, **_):
        loss = sum(0 * p.sum() for p in model.parameters())
        return loss, {"loss": loss.detach()}

    monkeypatch.setitem(OBJECTIVES, "lcnn", flat)
    recipe = replace(MOONS, epochs=1, momentum=0.0, weight_decay=0.5, lr=0.3, schedule=schedule)
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


@pytest.mark.parametrize("method", METHODS)
def test_digits_are_learnt(method):
    recipe = Recipe("digits", method, "mlp", width=32, epochs=6, batch_size=64)
    model, history = train(recipe)
    assert accuracy(model, *samples(recipe, "test")) > 0.8
    assert history.accuracy.is_monotonic_increasing


@pytest.mark.parametrize(("batch_size", "sizes"), [(512, [512] * 4), (1437, [1437] * 2), (2000, [1437] * 2)])
def test_an_objective_is_told_where_training_stands(batch_size, sizes, monkeypatch):
    """Batches are of one size, the last one of 413 left out; a batch too large for the data is all of them."""
    told = []

    def objective(model, x, y, recipe, *, progress, generator):
        told.append((len(x), progress, model.training, generator))
        return OBJECTIVES["lcnn"](model, x, y, recipe)

    monkeypatch.setitem(OBJECTIVES, "standard", objective)
    train(Recipe("digits", "standard", "mlp", width=2, epochs=2, batch_size=batch_size))
    assert [size for size, *_ in told] == sizes
    assert [progress for _, progress, *_ in told] == [step / len(sizes) for step in range(len(sizes))]
    assert all(training for *_, training, _ in told)
    (generator,) = {generator for *_, generator in told}
    saved = load_file(next(state_path(DIGITS).parent.glob("*.safetensors")))["generator"]
    assert torch.equal(generator.get_state(), saved), "its draws are part of the state"


def test_norms_advance_once_a_step_and_once_before_measuring(monkeypatch):
    calls, advance = [], spectral.SpectralNorm.advance
    monkeypatch.setattr(spectral.SpectralNorm, "advance", lambda *args: (calls.append(args), advance(*args))[1])
    train(replace(DIGITS, method="lcnn_gradreg"))
    assert len(calls) == 13 * 3 * (2 + 1), "layers, epochs, steps: however many forward passes a step makes"


@pytest.mark.parametrize("method", ["standard", "lcnn", "lcnn_gradreg"])
@pytest.mark.parametrize("derivative", ["exact", "difference"])
def test_fast_layers_train_the_net_that_written_out_ones_do(method, derivative, monkeypatch):
    """Some steps from one start: fused kernels come as near to float64 as every operation written out does.

    (β = 1000 is chaotic: both end up a hundredth of the way apart from it.)
    """
    recipe = replace(DIGITS, method=method, derivative=derivative, batch_size=256)
    x, y = samples(recipe, "train")
    found = []
    for dtype, fast in ((torch.float32, True), (torch.float32, False), (torch.float64, False)):
        if not fast:
            for module in (activations, lipschitz):
                monkeypatch.setattr(module, "eager", lambda: False)
        model = build(recipe).to(dtype).train()
        optimizer, _ = make_optimizer(recipe, model)
        with spectral.norms_once_a_step(model) as advance:
            step = training_step(recipe, model, optimizer, advance, {}, [])
            for xs, ys in zip(x[:1024].split(256), y[:1024].split(256), strict=True):
                step(xs.to(dtype), ys)
        found.append(torch.cat([p.detach().double().flatten() for p in model.parameters()]))
    fused, written_out, exact = found
    assert (fused - exact).norm() < 2 * (written_out - exact).norm() + 1e-5 * exact.norm()


def test_the_history_says_what_was_measured():
    """Against the state that was saved, measured again."""
    recipe = replace(DIGITS, method="lcnn_gradreg", epochs=2)
    _, history = train(recipe)
    state = {name: value for name, value in load_file(state_path(recipe)).items() if name.startswith("model.")}
    saved = build(recipe)
    saved.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
    row, layers = history.iloc[-1], dict(saved.named_modules())
    betas = {f"beta {name}": m.beta.item() for name, m in layers.items() if isinstance(m, CenteredSoftplus)}
    gammas = {f"gamma {name}": m.gamma.item() for name, m in layers.items() if isinstance(m, LipschitzBatchNorm2d)}
    terms = ["loss", "accuracy", "squared_gradient", "sum_beta", "sum_abs_log_gamma"]
    assert set(history) == {"epoch", *terms, "curvature", "sigma_error", *betas, *gammas}
    assert (len(betas), len(gammas)) == (9, 12)
    assert dict(row[[*betas, *gammas]]) == pytest.approx(betas | gammas)
    assert row.sigma_error == pytest.approx(sigma_error(saved), abs=1e-6)
    x, y = (part[:16] for part in samples(recipe, "train"))
    curvature = geometry(saved, x, y, method="power", max_iter=4).curvature.mean().item()
    assert row.curvature == pytest.approx(curvature, rel=0.02)  # σ = ‖Wv‖ here, uᵀWv there
    assert history.drop(columns=["epoch"]).notna().all().all()


def test_watch_sees_the_history_grow():
    seen = []
    interrupt(MOONS, 30)
    _, history = train(MOONS, watch=seen.append)
    assert [frame.epoch.tolist() for frame in seen] == [[1, 2], [1, 2, 3], [1, 2, 3, 4]]
    pd.testing.assert_frame_equal(seen[-1], history, check_exact=True)
    train(MOONS, watch=forbidden)  # read back: nothing grows


def test_a_watch_that_fails_costs_no_epoch():
    with pytest.raises(AssertionError, match="must not train"):
        train(MOONS, watch=forbidden)
    assert epochs_on_disk(MOONS) == 1


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
    train(replace(MOONS, epochs=1))
    for method in METHODS:
        train(replace(DIGITS, method=method, model="mlp", epochs=1))
    assert states() == before


def test_progress_is_shown_or_not(capsys):
    train(replace(MOONS, epochs=1))
    assert capsys.readouterr() == ("", "")
    fit(replace(MOONS, epochs=1, seed=1))
    shown = capsys.readouterr().err
    assert "lcnn seed 1" in shown
    assert "loss" in shown


@pytest.mark.parametrize("call", [fit, experiments.run, experiments.ship, lambda given: experiments.sweep([given])])
@pytest.mark.parametrize(
    "given", ["digits", None, (torch.rand(4, 1, 8, 8), torch.arange(4))], ids=["str", "None", "pair"]
)
def test_what_is_no_recipe_is_named(call, given, store):
    with pytest.raises(ValueError, match=f"{type(given).__name__}.*Recipe"):
        call(given)
    assert not store.exists()


def test_an_absent_device_is_refused(store):
    with pytest.raises(RuntimeError, match=r"device 'nonsense' is not available"):
        train(MOONS, device="nonsense")
    assert not store.exists()


@RECIPES
def test_what_is_held_out_is_never_trained_on(recipe, monkeypatch):
    """One batch is all there is to train on: it holds the rest, each sample once, and so does the history's probe."""
    one, seen = replace(recipe, held_out=0.2, augment=False, batch_size=5000, epochs=1), []
    real, rows = OBJECTIVES["lcnn"], lambda x: sorted(row.numpy().tobytes() for row in x)
    monkeypatch.setitem(OBJECTIVES, "lcnn", lambda model, x, *a, **k: seen.append(x) or real(model, x, *a, **k))
    model, history = train(one)
    kept, out, whole = samples(one, "train")[0], samples(one, "held_out")[0], samples(recipe, "train")[0]
    assert all(rows(x) == rows(kept) for x in seen)
    assert rows(torch.cat([kept, out])) == rows(whole)
    x, y = (part[:16] for part in samples(one, "train"))
    curvature = geometry(model, x, y, method="power", max_iter=4).curvature.mean().item()
    assert history.curvature.iloc[-1] == pytest.approx(curvature, rel=0.02)


# ---- stopped and resumed -----------------------------------------------------------------------------------------


@RECIPES
@pytest.mark.parametrize("epochs_done", [0, 2])
def test_interrupted_then_resumed_is_the_uninterrupted_run(recipe, epochs_done, monkeypatch, tmp_path):
    whole = train(recipe)
    monkeypatch.setenv("LCNN_STORE", str(tmp_path / "another"))
    steps = 20 if recipe is MOONS else 2
    interrupt(recipe, epochs_done * steps + 1)
    assert state_path(recipe).exists() == (epochs_done > 0)
    if epochs_done:
        assert epochs_on_disk(recipe) == epochs_done
    assert_same(whole, train(recipe))
    assert files_beside(state_path(recipe)) == [state_path(recipe).name]


VARIANTS = {method: dict(method=method) for method in METHODS} | {
    "cure published": dict(method="cure", published=True),
    "adversarial published": dict(method="adversarial", published=True),
    "cure by differences": dict(method="cure", derivative="difference", model="mlp"),
    "gradreg by differences": dict(method="gradreg", derivative="difference", model="mlp"),
    "no momentum": dict(momentum=0.0, model="mlp"),
    "steps": dict(schedule="steps", model="mlp"),
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_method_goes_on_where_it_was(changes, monkeypatch, tmp_path):
    recipe = replace(DIGITS, epochs=2, **changes)
    whole = train(recipe)
    monkeypatch.setenv("LCNN_STORE", str(tmp_path / "another"))
    interrupt(recipe, 3)
    assert epochs_on_disk(recipe) == 1
    assert_same(whole, train(recipe))


def test_interrupted_twice_in_a_row(monkeypatch, tmp_path):
    whole = train(DIGITS)
    monkeypatch.setenv("LCNN_STORE", str(tmp_path / "another"))
    seconds = [0.0]
    for done in (1, 2):
        interrupt(DIGITS, 3)  # in the second step of the next epoch but one
        assert epochs_on_disk(DIGITS) == done
        with safe_open(state_path(DIGITS), "pt") as file:
            seconds.append(json.loads(file.metadata()["about"])["seconds"])
    third = train(DIGITS)
    assert_same(whole, third)
    assert seconds == sorted(seconds)
    assert third[1].attrs["seconds"] > seconds[-1] > seconds[1] > 0, "all sittings together"
    assert train(DIGITS)[1].attrs["seconds"] == pytest.approx(third[1].attrs["seconds"], abs=0.1)


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


def test_a_loss_that_is_not_a_number_keeps_the_last_good_epoch(monkeypatch):
    def broken(model, loss, terms):
        return loss * math.nan, terms | {"loss": terms["loss"] * math.nan}

    monkeypatch.setitem(OBJECTIVES, "lcnn", after(25, broken))
    with pytest.raises(RuntimeError, match=r"loss is not finite in epoch 2, step 6 of 20, of .*lower lr \(now 0\.1\)"):
        train(MOONS)
    assert epochs_on_disk(MOONS) == 1
    assert all(value.isfinite().all() for value in load_file(state_path(MOONS)).values())


def test_a_learning_rate_that_is_too_large(store):
    recipe = Recipe("moons", "standard", "mlp", width=6, epochs=2, lr=1e20)
    with pytest.raises(RuntimeError, match=r"not finite in epoch 1, step \d+ of 20, .*lower lr \(now 1e\+20\)"):
        train(recipe)
    assert not state_path(recipe).exists()


@pytest.mark.parametrize("steps", [40, 80], ids=["an epoch", "the training"])
def test_weights_broken_by_the_last_step_are_not_kept(steps, monkeypatch):
    """The loss of a step is taken before it: the last one can be fine, and what it leaves NaN."""

    def poison(model, loss, terms):
        return loss + 0 * model[-1].weight.mul(0).sum().sqrt(), terms  # + 0, whose derivative is 0·∞

    monkeypatch.setitem(OBJECTIVES, "lcnn", after(steps - 1, poison))
    with pytest.raises(RuntimeError, match=rf"a weight is not finite in epoch {steps // 20} of"):
        train(MOONS)
    assert epochs_on_disk(MOONS) == steps // 20 - 1
    state = load_file(state_path(MOONS))
    assert all(value.isfinite().all() for value in state.values())


def test_a_disk_that_fills_up():
    """The state on disk stays that of the last epoch that fitted, and training goes on from it once there is room."""
    whole = train(MOONS)
    state_path(MOONS).unlink()
    interrupt(MOONS, 30)
    kept = state_path(MOONS).read_bytes()
    with files_of_at_most(2000), pytest.raises(OSError, match=r"cannot write .*free some space, or set LCNN_STORE"):
        train(MOONS)
    assert state_path(MOONS).read_bytes() == kept
    assert files_beside(state_path(MOONS)) == [state_path(MOONS).name]
    assert_same(whole, train(MOONS))
