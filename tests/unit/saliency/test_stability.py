"""Comparisons of maps against SciPy, noise, the worst noise of quadratics, infidelity, intervals."""

import importlib
import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from captum.metrics import infidelity, infidelity_perturb_func_decorator
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from networks import Quadratic, case
from scipy.stats import spearmanr
from torch import nn

from lcnn_utils.attacks import direction, mirror, move
from lcnn_utils.curvature import SCALARS, evaluating, geometry, scalar_of
from lcnn_utils.nn import CenteredSoftplus, LipschitzBatchNorm2d, conv_norm
from lcnn_utils.saliency import MEASURES, compare, explain, randomized, stability, summary, worst_step

file = importlib.import_module("lcnn_utils.saliency.stability")
maps_of = arrays(np.float64, (3, 12), elements=st.integers(-2, 2).map(float) | st.floats(-1e6, 1e6, width=32))


def problem(kind: str = "lcnn", n: int = 6) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A network of the lab, images, one in a corner of the box, and labels, wrong for the second and the last."""
    model, x, _ = case(kind, n=n)
    x[0] = x[0].round()
    with torch.no_grad():
        y = model(x).argmax(1)
    y[[1, -1]] = (y[[1, -1]] + 1) % 4
    return model, x, y


def quadratic(d: int = 16, top: float = 9.0) -> tuple[Quadratic, torch.Tensor]:
    """One whose Hessian has the norm |top|, and its top eigenvector."""
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(d, d).double())[0]
    values = torch.cat([torch.tensor([top]), torch.linspace(-6, 6, d - 1)]).double()
    return Quadratic(q @ torch.diag(values) @ q.T, torch.full((d,), 50.0).double()), q[:, 0]


def change_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor, eta: torch.Tensor, scalar: str) -> torch.Tensor:
    """‖∇f(x + η) − ∇f(x)‖."""
    gradients = []
    with evaluating(model):
        for at in (x, x + eta):
            at = at.detach().requires_grad_()
            gradients.append(torch.autograd.grad(scalar_of(model(at), y, scalar).sum(), at)[0])
    return (gradients[1] - gradients[0]).flatten(1).norm(dim=1)


def length(step: torch.Tensor) -> torch.Tensor:
    return step.flatten(1).norm(dim=1)


@settings(deadline=None, max_examples=20)
@given(maps_of, maps_of)
def test_change_cosine_ranks_and_largest_pixel_are_those_of_numpy_and_scipy(a, b):
    found = compare(torch.from_numpy(a), torch.from_numpy(b))
    for i, (p, q) in enumerate(zip(a, b, strict=True)):
        if np.linalg.norm(p) > 1e-6 and np.linalg.norm(q) > 1e-6:
            assert found["relative_change"][i] == pytest.approx(np.linalg.norm(q - p) / np.linalg.norm(p), rel=1e-9)
            assert found["cosine"][i] == pytest.approx(p @ q / np.linalg.norm(p) / np.linalg.norm(q), abs=1e-9)
        if np.ptp(p) > 0 and np.ptp(q) > 0:
            assert found["spearman"][i] == pytest.approx(spearmanr(p, q).statistic, abs=1e-9)
        largest, others = np.sort(np.abs([p, q]))[:, :-3:-1].T  # the tenth of 12 pixels is one
        same = float(np.abs(p).argmax() == np.abs(q).argmax())
        np.testing.assert_equal(found["top_overlap"][i], same if (largest > others).all() else np.nan)


def test_maps_that_are_zero_constant_or_not_finite_spoil_no_other():
    a, b = (torch.randn(3, 1, 9, 9, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    want, first = compare(a, b), lambda m, value: torch.cat([torch.full((1, 1, 9, 9), value), m[1:]])
    pairs = {"zero": (first(a, 0.0), b), "constant": (first(a, 1.0), b), "broken": (a, first(b, np.inf))}
    found = {kind: compare(*pair) for kind, pair in pairs.items()}
    for kind, name in itertools.product(found, MEASURES):
        np.testing.assert_allclose(found[kind][name][1:], want[name][1:], rtol=1e-6, err_msg=name)
    assert np.isinf(found["zero"]["relative_change"][0])
    assert np.isnan([found["zero"][name][0] for name in ("cosine", "spearman")]).all()
    assert np.isnan([found["constant"]["spearman"][0], *(found["broken"][name][0] for name in MEASURES)]).all()
    with pytest.raises(ValueError, match=r"maps of shapes \(3, 1, 9, 9\) and \(2, 1, 9, 9\)"):
        compare(a, b[:2])


@pytest.mark.parametrize(("top", "eps", "scalar"), [(9.0, 1e-6, "logit"), (-9.0, 0.1, "margin"), (9.0, 10.0, "logit")])
def test_on_a_quadratic_network_the_worst_change_is_the_length_times_the_norm(top, eps, scalar):
    (model, vector), x, y = quadratic(top=top), torch.randn(3, 16).double(), torch.zeros(3).long()
    eta, change = worst_step(model, x, y, eps, scalar=scalar, box=None)
    torch.testing.assert_close(change, torch.full((3,), 9 * eps).double(), rtol=1e-4, atol=0)
    torch.testing.assert_close((eta @ vector).abs(), torch.full((3,), eps).double(), rtol=1e-3, atol=0)
    start = torch.randn(3, 16).double()
    _, climbed = worst_step(model, x, y, eps, scalar=scalar, box=None, starts=[start], steps=60)
    first = change_of(model, x, y, eps * start / length(start)[:, None], "logit")
    assert (first < 7 * eps).all(), "the start is no solution"
    assert (climbed > 8.7 * eps).all()


@settings(deadline=None, max_examples=10)
@given(st.sampled_from(SCALARS), st.integers(0, 9), st.booleans(), st.lists(st.floats(0, 2), min_size=3, max_size=3))
def test_inside_ball_and_box_as_good_as_it_says_and_never_below_a_start(scalar, seed, boxed, eps):
    torch.manual_seed(seed)
    layers = [(nn.Linear(a, b), CenteredSoftplus(8.0)) for a, b in itertools.pairwise((12, 24, 24, 4))]
    model = nn.Sequential(*itertools.chain(*layers)).double()
    x, y, eps = torch.rand(3, 12).double(), torch.arange(3), torch.tensor(eps, dtype=torch.float64)
    x[0] = x[0].round()  # a corner of the box
    start = torch.randn_like(x)
    more = dict(scalar=scalar, steps=3, box=(0.0, 1.0) if boxed else None, starts=[start, 0 * x])
    eta, change = worst_step(model, x, y, eps, **more)
    assert (length(eta) <= eps * (1 + 1e-6)).all()
    assert not boxed or ((x + eta >= -1e-15) & (x + eta <= 1 + 1e-15)).all()
    torch.testing.assert_close(change, change_of(model, x, y, eta, scalar), rtol=1e-9, atol=1e-9)
    step = start * (eps / length(start))[:, None]
    step = (x + step).clamp(0, 1) - x if boxed else step
    assert (change >= change_of(model, x, y, step, scalar) - 1e-9).all()
    for i, one in enumerate(worst_step(model, x, y, eps, batch_size=2, **more)):
        torch.testing.assert_close(one, (eta, change)[i])


def test_rows_are_comparisons_of_the_maps_at_both_ends(monkeypatch):
    """For the right images only, each method with the options given; a random η has its length and stays in the box."""
    seen = []

    def spy(model, x, y, method, **options):
        seen.append((x, y, options))
        return explain(model, x, y, method, **options)

    monkeypatch.setattr(file, "explain", spy)
    model, x, y = problem()
    right = [0, 2, 3, 4]
    frame = stability(model, (x, y), [0.2, 0.02, 0.2], ["gradient", "integrated_gradients"], steps=7)
    assert list(frame.columns) == ["image", "weights", "noise", "eps", "method", *MEASURES]
    steps = {}
    groups = frame.groupby(["eps", "noise", "method"], sort=False)
    for (at, labels, options), (key, part) in zip(seen[2:], groups, strict=True):
        eps, kind, method = key
        assert options == dict(scalar="loss", batch_size=256, seed=0, steps=7)
        assert torch.equal(labels, y[right])
        assert (list(part.image), set(part.weights)) == (right, {"trained"})
        before, after = (explain(model, points, labels, method, scalar="loss", steps=7) for points in (x[right], at))
        for name, values in compare(before, after).items():
            np.testing.assert_allclose(part[name], values, rtol=1e-9, err_msg=name)
        assert ((at >= 0) & (at <= 1)).all()
        step = at - x[right]
        assert (length(step) <= eps * (1 + 1e-6)).all()
        assert kind == "worst" or length(step).numpy() == pytest.approx(eps, rel=1e-9)
        assert torch.equal(steps.setdefault((eps, kind), step), step), "both methods meet the same step"
    one, other = (steps[eps, "random"] / eps for eps in (0.02, 0.2))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9, msg="the direction stays")
    seen.clear()
    stability(model, (x, y), [0.2], noise=("random",), seed=1)
    assert not torch.allclose(seen[1][0] - x[right], 0.2 * one, atol=1e-2), "the seed does nothing"
    seen.clear()
    x = 0.4 + 0.2 * torch.rand(500, 1, 4, 4).double()
    stability(quadratic()[0], (x, torch.zeros(500).long()), [0.1], noise=("random",))
    drawn = ((seen[1][0] - x) / 0.1).flatten(1)  # uniform among directions: mean 0 and variance 1/d
    np.testing.assert_allclose(drawn.mean(0), 0, atol=4 / np.sqrt(16 * 500))
    np.testing.assert_allclose(drawn.T @ drawn / 500 * 16, np.eye(16), atol=0.3)


@pytest.mark.parametrize("scalar", ["loss", "logit"])
def test_short_steps_change_the_gradient_in_proportion_and_at_most_by_the_curvature(scalar):
    model, x, y = problem()
    frame = stability(model, (x, y), [1e-5, 1e-4], scalar=scalar, control=scalar == "loss")
    nets = {"trained": model, "random": randomized(model, x[[0, 2, 3, 4]])}
    for weights, part in frame.assign(rate=frame.relative_change / frame.eps).groupby("weights"):
        bound = geometry(nets[weights], x, y, scalar=scalar, method="exact", eps=0).curvature.numpy()
        table = part.pivot(index="image", columns=["noise", "eps"])["rate"]
        inside = table[table.index > 0]  # image 0 lies in a corner of the box, which cuts off its worst step
        np.testing.assert_allclose(table["random", 1e-4], table["random", 1e-5], rtol=1e-2)
        np.testing.assert_allclose(inside["worst", 1e-5], bound[inside.index], rtol=1e-2)
        assert (table["random", 1e-5] <= bound[table.index] * 1.001).all()


@pytest.mark.parametrize("kind", ["lcnn", "standard"])
def test_randomized_shuffles_weights_and_takes_statistics_from_x(kind):
    model, x, _ = problem(kind, n=64)
    x = x**3  # other images than those that the network has seen
    before = {k: v.clone() for k, v in model.state_dict().items()}
    made, given = randomized(model.train(), x, seed=3), {}
    assert model.training
    assert not any(module.training for module in made.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "the original is touched"
    for (name, old), new in zip(model.named_parameters(), made.parameters(), strict=True):
        assert torch.equal(old.flatten().sort().values, new.flatten().sort().values), name
        assert old.dim() < 2 or (old == new).double().mean() < 0.5, f"{name} is not shuffled"
    for module in made.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | LipschitzBatchNorm2d):
            module.register_forward_pre_hook(lambda module, inputs: given.update({module: inputs[0]}))
    with torch.no_grad():
        made(x)
        for module in made.modules():
            if isinstance(module, nn.BatchNorm2d | LipschitzBatchNorm2d):
                torch.testing.assert_close(module.running_mean, given[module].mean((0, 2, 3)), rtol=0.1, atol=0.05)
            elif kind == "lcnn" and isinstance(module, nn.Conv2d):
                assert conv_norm(module, tuple(given[module].shape[1:]), "exact").item() == pytest.approx(1, abs=1e-2)
        var, mean = torch.var_mean(given[made[1]], (0, 2, 3))
        torch.testing.assert_close(made[1].running_mean, mean)
        torch.testing.assert_close(made[1].running_var, var)
        assert not torch.allclose(made(x), randomized(model, x, seed=4)(x))


@pytest.mark.parametrize("method", ["gradient", "input_x_gradient", "integrated_gradients"])
def test_infidelity_is_captum_s_as_a_share_of_the_change(method):
    """0 for a linear network's own maps, of any scale; in general least squares of f(x) − f(x + η) on −⟨map, η⟩."""
    torch.manual_seed(0)
    y, box, baseline = torch.arange(6) % 3, (0.0, 1.0), 0.2 if method == "integrated_gradients" else 0.0
    x = 0.1 + 0.8 * torch.rand(6, 1, 6, 6).double()
    line = nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).double()
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), CenteredSoftplus(5.0), nn.Linear(16, 3)).double()
    maps = -30 * explain(line, x, y, method, baseline=baseline)
    zero = file._infidelity(line, x, y, method, maps, 0.05, 9, box, "logit", 0, baseline)
    np.testing.assert_allclose(zero, 0, atol=1e-9)
    maps, generator = torch.randn_like(x) * 0.1 + explain(model, x, y, method, baseline=baseline), None

    def perturbed(at, *_):
        drawn = torch.randn(at.shape, generator=generator, dtype=at.dtype)
        return move(at, mirror(at, 0.5 * direction(drawn, "l2"), box), box)

    wrapped, theirs = infidelity_perturb_func_decorator(multiply_by_inputs=method != "gradient")(perturbed), []
    for map_ in (maps, torch.zeros_like(x)):
        generator = torch.Generator().manual_seed(2)
        more = dict(n_perturb_samples=9, max_examples_per_batch=6, normalize=True, baselines=baseline or None)
        theirs.append(infidelity(lambda at: scalar_of(model(at), y, "logit"), wrapped, x, map_, **more))
    ours = file._infidelity(model, x, y, method, maps, 0.5, 9, box, "logit", 0, baseline)
    np.testing.assert_allclose(ours, theirs[0] / theirs[1], rtol=1e-6)
    frame = stability(model, (x, model(x).argmax(1)), [0.1], perturbations=2)
    assert frame[frame.noise == "random"].infidelity.between(0, 1).all()
    assert frame[frame.noise == "worst"].infidelity.isna().all()


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_summary_is_the_statistic_of_each_group_over_its_finite_rows(statistic):
    values = np.random.default_rng(0).exponential(size=(3, 30))
    values[0, :4], values[1, 5], values[2, :] = np.nan, np.inf, 0.5
    table = pd.concat([pd.DataFrame({"cosine": part, "net": net}) for part, net in zip(values, "abc", strict=True)])
    got = summary(table, "cosine", ("net",), statistic)
    assert list(got.columns) == ["net", "n", "value", "low", "high"]
    assert list(got.n) == [26, 29, 30]
    for row, part in zip(got.itertuples(), values, strict=True):
        assert row.value == pytest.approx(getattr(np, statistic)(part[np.isfinite(part)]))
        assert row.low < row.value < row.high or row.low == row.value == row.high == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(eps_grid=[0.1, 0.0]), "eps_grid"), (dict(noise=("wurst",)), "did you mean 'worst'"),
        (dict(images=(problem()[1][1:2], problem()[2][1:2])), "right about 0 of these images"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change, message):
    model, x, y = problem()
    with pytest.raises(ValueError, match=message):
        stability(model, **(dict(images=(x, y), eps_grid=[0.1]) | change))
