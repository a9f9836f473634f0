"""How steady maps are: closed forms of quadratic networks, theory for short steps, promises of the docstrings."""

import copy
import functools
import importlib
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from lcnn_utils.curvature import evaluating, geometry
from lcnn_utils.data import Images
from lcnn_utils.nn import CenteredSoftplus, LipschitzBatchNorm2d, conv_norm, mlp, resnet
from lcnn_utils.saliency import LENGTHS, MEASURES, compare, curved_ways, explain, randomized, stability, worst_step

saliency = importlib.import_module("lcnn_utils.saliency.stability")

COLUMNS = ["image", "weights", "noise", "eps", "method", *MEASURES]


@functools.cache
def _trained_like(kind: str) -> nn.Module:
    """Random weights, but running statistics that fit: without them the logits hardly depend on the image."""
    torch.manual_seed(0)
    options = dict(lcnn=dict(lcnn=True), standard={}, relu=dict(activation=nn.ReLU, ordinary=True))[kind]
    net = resnet(10, num_classes=4, width=4, in_channels=1, image_size=8, **options)
    net = net.double().train()
    for _ in range(40):
        net(torch.rand(64, 1, 8, 8).double())
    return net.eval()


def case(kind: str = "lcnn", n: int = 6) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A network of the lab, images, and labels: what it says, but wrong for the second and the last."""
    model = copy.deepcopy(_trained_like(kind))
    x = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    x[0] = x[0].round()  # a corner of the box
    with torch.no_grad():
        y = model(x).argmax(1)
    y[[1, -1]] = (y[[1, -1]] + 1) % 4
    return model, x, y


class Quadratic(nn.Module):
    """Logits (½ xᵀAx + b·x, 0) of an image's pixels: the gradient of logit 0 is Ax + b."""

    def __init__(self, matrix, slope):
        super().__init__()
        self.matrix, self.slope = matrix, slope

    def forward(self, x):
        x = x.flatten(1)
        value = torch.einsum("ni,ij,nj->n", x, self.matrix, x) / 2 + x @ self.slope
        return torch.stack([value, torch.zeros_like(value)], 1)


def quadratic(seed: int = 0) -> tuple[Quadratic, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    half = torch.rand(16, 16).double()  # logit 0 is positive in the box
    return Quadratic(half + half.T, torch.rand(16).double()), torch.rand(5, 1, 4, 4).double(), torch.zeros(5).long()


@pytest.fixture
def seen(monkeypatch):
    """Every (network, x, y, method) that is explained."""
    calls = []

    def spy(model, x, y, method, **options):
        calls.append((model, x.clone(), y.clone(), method))
        return explain(model, x, y, method, **options)

    monkeypatch.setattr(saliency, "explain", spy)
    return calls


def predicted(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x).argmax(1)


def length(step: torch.Tensor) -> torch.Tensor:
    return step.flatten(1).norm(dim=1)


# ----------------------------------------------------------------------------------------------------- the table
def test_a_row_for_each_right_image_method_noise_and_length():
    model, x, y = case()
    frame = stability(model, (x, y), [0.1, 0.01, 0.1], ["gradient", "occlusion"])
    assert list(frame.columns) == COLUMNS
    keys = ["image", "weights", "noise", "eps", "method"]
    assert not frame.duplicated(keys).any()
    assert sorted(set(frame.image)) == [0, 2, 3, 4], "the second and the last are classified wrongly"
    assert len(frame) == 4 * 2 * 2 * 2
    assert set(frame.weights) == {"trained"}
    assert set(frame.noise) == {"random", "worst"}
    assert list(dict.fromkeys(frame.eps)) == [0.01, 0.1]
    assert frame.drop(columns=keys).notna().all(axis=None)
    assert len(stability(model, (x, y), noise=("random",))) == 4 * len(LENGTHS)


def test_image_is_the_index_into_what_was_given():
    """Whichever images are asked for beside it, an image that counts gives the same numbers under its own index."""
    model, x, y = case()
    all_of_them = stability(model, (x, y), [0.05], noise=("worst",)).set_index("image")
    for index in (2, 4):
        alone = stability(model, (x[index:], y[index:]), [0.05], noise=("worst",)).set_index("image")
        assert alone.loc[0].relative_change == pytest.approx(all_of_them.loc[index].relative_change, rel=1e-2)


def test_rows_are_comparisons_of_the_maps_at_both_ends(seen):
    model, x, y = case()
    methods = ["gradient", "integrated_gradients"]
    frame = stability(model, (x, y), [0.02, 0.2], methods, steps=7)
    right = [0, 2, 3, 4]
    starts, moved = seen[:2], seen[2:]
    assert all(torch.equal(at, x[right]) for _, at, _, _ in starts)
    assert all(torch.equal(labels, y[right]) for _, _, labels, _ in seen)
    assert len(moved) == 2 * 2 * 2
    parts = [part for _, part in frame.groupby(["eps", "noise", "method"], sort=False)]
    for (_, at, labels, method), part in zip(moved, parts, strict=True):
        assert set(part.method) == {method}
        here, there = (explain(model, points, labels, method, scalar="loss", steps=7) for points in (x[right], at))
        for name, values in compare(here, there).items():
            np.testing.assert_allclose(part[name], values, rtol=1e-9, err_msg=name)


def test_options_reach_the_maps_and_the_scalar_is_the_loss_as_in_the_paper():
    model, x, y = case()
    frame = lambda **options: stability(model, (x, y), [0.05], noise=("random",), **options)
    pd.testing.assert_frame_equal(frame(), frame(scalar="loss"))
    assert (frame().relative_change != frame(scalar="logit").relative_change).all()
    smooth = [frame(methods=["smoothgrad"], samples=k).relative_change for k in (2, 20)]
    assert (smooth[0] != smooth[1]).all()


def test_every_map_is_made_with_the_options_given(monkeypatch):
    model, x, y = case()
    given = []

    def spy(*arguments, **options):
        given.append(options)
        return explain(*arguments, **options)

    monkeypatch.setattr(saliency, "explain", spy)
    options = dict(scalar="logit", batch_size=3, seed=5, samples=2, noise=("random",))
    stability(model, (x, y), [0.05], ["smoothgrad"], **options)
    assert given == [{name: options[name] for name in ("scalar", "batch_size", "seed", "samples")}] * 2


# -------------------------------------------------------------------------------------------------- closed forms
def test_on_a_quadratic_network_the_change_is_that_of_the_closed_form(seen):
    """‖Aη‖/‖Ax + b‖; and for the worst η, which the box leaves alone here, ε‖A‖/‖Ax + b‖."""
    model, x, y = quadratic()
    x = 0.3 + 0.4 * x
    frame = stability(model, (x, y), [0.01, 0.1], scalar="logit", worst_steps=10)
    size = (x.flatten(1) @ model.matrix + model.slope).norm(dim=1)
    for noise, calls in (("random", seen[1::2]), ("worst", seen[2::2])):
        for eps, (_, at, _, _) in zip((0.01, 0.1), calls, strict=True):
            want = ((at - x).flatten(1) @ model.matrix).norm(dim=1) / size
            got = frame[(frame.noise == noise) & (frame.eps == eps)].relative_change
            np.testing.assert_allclose(got, want, rtol=1e-9)
            if noise == "worst":
                np.testing.assert_allclose(got, eps * torch.linalg.matrix_norm(model.matrix, 2) / size, rtol=1e-4)


@pytest.mark.parametrize("scalar", ["loss", "logit"])
def test_short_steps_change_the_gradient_in_proportion_and_at_most_by_the_curvature(scalar):
    model, x, y = case("lcnn")
    frame = stability(model, (x, y), [1e-5, 1e-4, 1e-3], scalar=scalar)
    bound = geometry(model, x, y, scalar=scalar, method="exact", eps=0).curvature.numpy()
    table = frame.assign(rate=frame.relative_change / frame.eps).pivot(index="image", columns=["noise", "eps"])["rate"]
    inside = table[table.index > 0]  # image 0 lies in a corner of the box, which cuts off its worst step
    for part, noise in ((table, "random"), (inside, "worst")):
        np.testing.assert_allclose(part[noise, 1e-4], part[noise, 1e-5], rtol=1e-2)
        np.testing.assert_allclose(part[noise, 1e-3], part[noise, 1e-5], rtol=0.1)
        assert (table[noise, 1e-5] <= bound[table.index] * 1.001).all()
    np.testing.assert_allclose(inside["worst", 1e-5], bound[inside.index], rtol=1e-2)


@pytest.mark.parametrize("kind", ["lcnn", "standard", "relu"])
def test_the_worst_noise_is_worse_than_random_noise_for_the_gradient(kind):
    model, x, y = case(kind, n=12)
    table = stability(model, (x, y), LENGTHS).pivot(index=["image", "eps"], columns="noise", values="relative_change")
    assert (table.worst >= table.random * (1 - 1e-6)).mean() > 0.95
    if kind == "lcnn":  # a smooth network, where ascent misses nothing
        assert (table.worst >= table.random * (1 - 1e-6)).all()
    mean = table.groupby("eps").mean()
    assert (mean.worst > 1.5 * mean.random).all()


# ---------------------------------------------------------------------------------------------------- the noise
@pytest.mark.parametrize("box", [(0.0, 1.0), None])
def test_random_noise_has_its_length_and_stays_in_the_box(seen, box):
    model, x, y = case()
    if box is None:  # images may not leave [0, 1]
        x = 0.4 + 0.2 * x
        y = predicted(model, x)
    stability(model, (x, y), LENGTHS, noise=("random",), box=box)
    start = seen[0][1]
    for eps, (_, at, _, _) in zip(LENGTHS, seen[1:], strict=True):
        np.testing.assert_allclose(length(at - start), eps, rtol=1e-9)
        assert ((at >= 0) & (at <= 1)).all()


def test_random_noise_is_uniform_among_directions(seen):
    """Entries of a direction in d dimensions have mean 0 and variance 1/d, and images have directions of their own."""
    model, _, _ = quadratic()
    x = 0.4 + 0.2 * torch.rand(500, 1, 4, 4).double()
    stability(model, (x, torch.zeros(500).long()), [0.1], noise=("random",))
    direction = ((seen[1][1] - x) / 0.1).flatten(1)
    np.testing.assert_allclose(direction.mean(0), 0, atol=4 / math.sqrt(16 * 500))
    np.testing.assert_allclose(direction.T @ direction / 500 * 16, np.eye(16), atol=0.3)


def test_all_lengths_methods_and_networks_meet_the_same_directions(seen):
    model, x, y = case("lcnn")
    other = case("standard")[0]
    labels = predicted(other, x)
    labels[[3, 4]] = (labels[[3, 4]] + 1) % 4  # gets other images right
    stability(model, (x, y), [0.01, 0.1], ["gradient", "occlusion"], noise=("random",))
    stability(other, (x, labels), [0.1], ["input_x_gradient"], noise=("random",))
    by_length = [
        (at - x[[0, 2, 3, 4]]) / eps for (_, at, _, _), eps in zip(seen[2:6], (0.01, 0.01, 0.1, 0.1), strict=True)
    ]
    for direction in by_length[1:]:
        torch.testing.assert_close(direction, by_length[0], rtol=1e-6, atol=1e-9)
    shared = (seen[-1][1] - x[[0, 1, 2, 5]])[[0, 2]] / 0.1  # images 0 and 2
    torch.testing.assert_close(shared, by_length[0][:2], rtol=1e-6, atol=1e-9)
    stability(model, (x, y), [0.1], noise=("random",), seed=1)
    assert not torch.allclose((seen[-1][1] - x[[0, 2, 3, 4]]) / 0.1, by_length[0], atol=1e-2), "the seed does nothing"


def test_all_methods_meet_the_worst_step_for_the_gradient(seen):
    model, x, y = case()
    stability(model, (x, y), [0.1], ["gradient", "occlusion"], noise=("worst",))
    assert [method for *_, method in seen] == ["gradient", "occlusion"] * 2
    assert torch.equal(seen[2][1], seen[3][1])
    step = seen[2][1] - x[[0, 2, 3, 4]]
    assert (length(step) <= 0.1 * (1 + 1e-6)).all()
    assert ((seen[2][1] >= 0) & (seen[2][1] <= 1)).all()


def test_longer_worst_steps_are_at_least_as_bad_in_a_smooth_network():
    model, x, y = case("lcnn")
    table = stability(model, (x, y), LENGTHS, noise=("worst",)).pivot(
        index="image", columns="eps", values="relative_change"
    )
    assert (np.diff(table.to_numpy(), axis=1) >= -1e-6).all()


def test_the_ascent_begins_at_the_curved_ways_and_at_the_step_before(monkeypatch):
    model, x, y = case()
    calls, found = [], []

    def spy(net, x, y, eps, *, starts, steps, **options):
        calls.append((eps, steps, [start.clone() for start in starts]))
        found.append(worst_step(net, x, y, eps, starts=starts, steps=steps, **options))
        return found[-1]

    monkeypatch.setattr(saliency, "worst_step", spy)
    stability(model, (x, y), [0.1, 0.01], noise=("worst",), worst_steps=2)
    assert [(eps, steps) for eps, steps, _ in calls] == [(0.01, 2), (0.1, 2)]
    right = [0, 2, 3, 4]
    ways = curved_ways(model, x[right], y[right])
    for (_, _, starts), before in zip(calls, (torch.zeros_like(x[right]), found[0][0]), strict=True):
        torch.testing.assert_close(starts, [*ways, before])


# -------------------------------------------------------------------------------------------------- the control
def test_the_control_adds_rows_of_a_network_with_shuffled_weights(seen):
    model, x, y = case("lcnn")
    trained = stability(model, (x, y), [0.01, 0.1])
    seen.clear()
    both = stability(model, (x, y), [0.01, 0.1], control=True)
    assert list(dict.fromkeys(both.weights)) == ["trained", "random"]
    pd.testing.assert_frame_equal(both[both.weights == "trained"], trained)
    control = both[both.weights == "random"].reset_index(drop=True)
    pd.testing.assert_frame_equal(
        control[["image", "noise", "eps", "method"]], trained[["image", "noise", "eps", "method"]]
    )
    assert (control.relative_change != trained.relative_change).all()
    half = len(seen) // 2
    made = seen[-1][0]
    assert made is not model
    assert [net for net, *_ in seen] == [model] * half + [made] * half
    assert torch.equal(made(x), randomized(model, x[[0, 2, 3, 4]])(x))
    for (_, one, _, _), (_, other, _, _) in zip(seen[1:half:2], seen[half + 1 :: 2], strict=True):
        torch.testing.assert_close(one, other, msg="the control meets other random noise")


def test_the_worst_noise_of_the_control_is_its_own():
    model, x, y = case("lcnn")
    x, y = x[[2, 3, 4]], y[[2, 3, 4]]
    frame = stability(model, (x, y), [1e-5], noise=("worst",), control=True)
    bound = geometry(randomized(model, x), x, y, method="exact", eps=0).curvature.numpy()
    np.testing.assert_allclose(frame[frame.weights == "random"].relative_change, 1e-5 * bound, rtol=1e-2)


@pytest.mark.parametrize("kind", ["lcnn", "standard", "relu"])
def test_randomized_keeps_sizes_and_sharpness_but_no_weight_in_its_place(kind):
    model, x, _ = case(kind)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    made = randomized(model, x, seed=3)
    assert model.training
    assert not any(module.training for module in made.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "the original is touched"
    for (name, old), new in zip(model.named_parameters(), made.parameters(), strict=True):
        assert new.data_ptr() != old.data_ptr(), name
        if old.dim() > 1:
            assert torch.equal(old.flatten().sort().values, new.flatten().sort().values), name
            assert (old == new).double().mean() < 0.5, f"{name} is not shuffled"
        else:
            assert torch.equal(old, new), name
    for old, new in zip(model.modules(), made.modules(), strict=True):
        assert type(old) is type(new)
        if isinstance(old, CenteredSoftplus):
            assert old.beta == new.beta
        if isinstance(old, LipschitzBatchNorm2d):
            assert old.gamma == new.gamma
        if hasattr(old, "momentum"):
            assert old.momentum == new.momentum
    again, other = randomized(model, x, seed=3), randomized(model, x, seed=4)
    with evaluating(model), torch.no_grad():
        assert torch.equal(made(x), again(x))
        assert not torch.allclose(made(x), other(x))
        assert not torch.allclose(made(x), model(x))


def test_randomized_takes_the_statistics_of_an_lcnn_s_batchnorm_anew_from_x():
    model, _, _ = case("lcnn")
    x = torch.rand(64, 1, 8, 8).double() ** 3
    made = randomized(model, x)
    with torch.no_grad():
        var, mean = torch.var_mean(made[0](x), (0, 2, 3))
    torch.testing.assert_close(made[1].running_mean, mean)
    torch.testing.assert_close(made[1].running_var, var)
    assert made[1].momentum == model[1].momentum


def test_points_may_lie_anywhere_and_noise_belongs_to_the_image():
    model, x = mlp([2, 8, 3]).double().eval(), 5 * torch.randn(12, 2).double()
    y = model(x).argmax(1)
    frame = stability(model, (x, y), [0.5], scalar="margin")
    assert len(frame) == 2 * 12
    y[11] = (y[11] + 1) % 3  # the last is wrong now: the others' noise stays
    fewer = stability(model, (x, y), [0.5], scalar="margin", noise=("random",))
    before = frame[frame.noise == "random"].relative_change[:11]
    np.testing.assert_allclose(fewer.relative_change, before)


def test_randomized_takes_the_statistics_of_a_batchnorm_anew_from_x():
    """In a network like the authors' Standard: what leaves each BatchNorm has mean 0 and variance 1, but for the
    N − 1 of the running variance."""
    model, _, _ = case("standard")
    x = torch.rand(64, 1, 8, 8).double() ** 3  # other images than those that the network has seen
    made, out = randomized(model, x), []
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda _, __, output: out.append(output))
    with torch.no_grad():
        made(x)
    assert len(out) == 12
    for output in out:
        var, mean = torch.var_mean(output, (0, 2, 3))
        assert mean.abs().max() < 0.05
        assert (var < 1.1).all()  # the constant of BatchNorm makes it smaller where there is little to divide
    var, mean = torch.var_mean(out[0], (0, 2, 3))
    torch.testing.assert_close(mean, torch.zeros(4).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(var, torch.ones(4).double(), rtol=1e-3, atol=0)


class Dropping(nn.Module):
    """Dropout as a layer, and as a function that looks at its module's mode."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Dropout(0.9)

    def forward(self, x):
        return nn.functional.dropout(self.layer(x), 0.9, self.training)


@pytest.mark.parametrize("momentum", [0.1, None, 0.0])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, LipschitzBatchNorm2d])
def test_randomized_takes_the_statistics_of_every_kind_of_norm_without_dropout(norm, momentum):
    shape = (50, 3, *{nn.BatchNorm1d: (4,), nn.BatchNorm3d: (2, 2, 2)}.get(norm, (4, 4)))
    model, x = nn.Sequential(Dropping(), norm(3, momentum=momentum), Dropping(), norm(3)), torch.rand(shape)
    model[1].running_mean.fill_(9.0)
    made = randomized(model, x)
    assert made[1].momentum == momentum
    var, mean = torch.var_mean(x.transpose(0, 1).flatten(1), 1)
    torch.testing.assert_close(made[1].running_mean, mean)
    torch.testing.assert_close(made[1].running_var, var)
    with torch.no_grad():
        want = made[1](x).transpose(0, 1).flatten(1).mean(1)
    torch.testing.assert_close(made[3].running_mean, want, atol=1e-3, rtol=0)


def test_randomized_takes_an_instance_norm_s_statistics_and_lets_a_spectral_norm_follow_its_weights():
    model = nn.Sequential(nn.Linear(64, 64), nn.Unflatten(1, (4, 4, 4)), nn.InstanceNorm2d(4, track_running_stats=True))
    nn.utils.parametrizations.spectral_norm(model[0])
    x = torch.rand(20, 64)
    made = randomized(model, x)
    with torch.no_grad():
        var, mean = torch.var_mean(made[:2](x), (2, 3))
    torch.testing.assert_close(made[2].running_mean, mean.mean(0))
    torch.testing.assert_close(made[2].running_var, var.mean(0))
    assert 0.9 < torch.linalg.matrix_norm(made[0].weight, 2) < 2


def test_randomized_convolutions_of_an_lcnn_keep_norm_one():
    model, x, _ = case("lcnn")
    made, sizes = randomized(model, x), {}
    convs = [module for module in made.modules() if isinstance(module, nn.Conv2d)]
    for conv in convs:
        conv.register_forward_pre_hook(lambda module, given: sizes.update({module: given[0].shape[1:]}))
    with torch.no_grad():
        made(x)
        for conv in convs:
            assert conv_norm(conv, tuple(sizes[conv]), "exact").item() == pytest.approx(1, abs=1e-2)


# -------------------------------------------------------------------------------------------- Captum's two scores
def test_perturbations_add_captum_s_two_scores_to_the_random_rows():
    model, x, y = case()
    frame = stability(model, (x, y), [0.02, 0.1], ["gradient", "input_x_gradient"], perturbations=4)
    assert list(frame.columns) == [*COLUMNS, "sensitivity_max", "infidelity"]
    random, worst = frame[frame.noise == "random"], frame[frame.noise == "worst"]
    assert worst[["sensitivity_max", "infidelity"]].isna().all(axis=None)
    assert random.infidelity.between(0, 1).all()
    assert (random.sensitivity_max > 0).all()
    direct = saliency.captum_scores(
        model, x[[0, 2, 3, 4]], y[[0, 2, 3, 4]], "gradient", 0.1, 4,
        explain(model, x[[0, 2, 3, 4]], y[[0, 2, 3, 4]], scalar="loss"), scalar="loss",
    )  # fmt: skip
    at = random[(random.eps == 0.1) & (random.method == "gradient")]
    for name, values in direct.items():
        np.testing.assert_allclose(at[name], values, rtol=1e-9)
    plain = stability(model, (x, y), [0.02, 0.1], ["gradient", "input_x_gradient"])
    pd.testing.assert_frame_equal(plain, frame[COLUMNS])


# ------------------------------------------------------------------------- what must not change, nor be changed
def test_stored_images_and_float_pixels_give_the_same():
    model = case()[0].float()
    pixels = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    y = predicted(model, pixels / 255)
    stored = Images(pixels, y, ("a", "b", "c", "d"), "made")
    frame = stability(model, stored, [0.05])
    pd.testing.assert_frame_equal(frame, stability(model, (stored.float(), y), [0.05]))
    assert set(frame.eps) == {0.05}
    assert (frame.relative_change < 5).all()


@pytest.mark.parametrize("method", ["gradient", "integrated_gradients", "deeplift", "occlusion", "gradcam"])
def test_batches_change_nothing(method):
    model, x, y = case()
    frames = [
        stability(model, (x, y), [0.05], [method], scalar="logit", noise=("random",), batch_size=size)
        for size in (1, 4, 256)
    ]
    for frame in frames[:2]:
        pd.testing.assert_frame_equal(frame, frames[2], rtol=1e-5, atol=1e-7)


def test_batches_hardly_change_the_worst_noise():
    """Its start is found to 10 % for the slowest image of a batch."""
    model, x, y = case()
    small, whole = (stability(model, (x, y), [0.05], noise=("worst",), batch_size=size) for size in (2, 256))
    np.testing.assert_allclose(small.relative_change, whole.relative_change, rtol=0.02)


def test_the_model_is_left_as_found_and_the_table_repeats():
    model, x, y = case()
    options = dict(eps_grid=[0.05], methods=["gradient", "smoothgrad"], control=True, perturbations=2)
    want = stability(model, (x, y), **options)
    model.train()
    model[3].eval()
    modes = [module.training for module in model.modules()]
    before, pixels = {k: v.clone() for k, v in model.state_dict().items()}, x.clone()
    torch.manual_seed(7)
    generator = torch.random.get_rng_state()
    pd.testing.assert_frame_equal(stability(model, (x, y), **options), want)
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    assert torch.equal(x, pixels)


# ---------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(eps_grid=[]), "eps_grid must hold lengths"),
        (dict(eps_grid=[0.1, 0.0]), r"above 0.*\[0.0, 0.1\]"),
        (dict(eps_grid=[-0.1]), "eps_grid must"),
        (dict(eps_grid=[math.nan]), "eps_grid must"),
        (dict(eps_grid=[0.1, math.nan]), "eps_grid must"),
        (dict(eps_grid=[math.inf]), "eps_grid must"),
        (dict(noise=("wurst",)), "unknown kind of noise 'wurst'.*did you mean 'worst'"),
        (dict(noise="worst"), "unknown kind of noise"),
        (dict(methods="gradient"), "methods must be a sequence.*'gradient'"),
        (dict(methods=[]), "methods must be a sequence"),
        (dict(methods=["gradients"]), "unknown method 'gradients'.*did you mean 'gradient'"),
        (dict(scalar="los"), "unknown scalar 'los'.*did you mean 'loss'"),
        (dict(worst_steps=0), "steps must be"),
        (dict(samples=0), "samples must be"),
        (dict(methods=["deeplift"]), "DeepLift explains logits"),
        (dict(box=(0.2, 0.8)), "outside the box"),
    ],
)
def test_bad_input_is_named(change, message):
    model, x, y = case()
    with pytest.raises(ValueError, match=message):
        stability(model, **(dict(images=(x, y), eps_grid=[0.1]) | change))


def test_bad_images_are_named():
    model, x, y = case()
    for images, message in (
        ((x, (predicted(model, x) + 1) % 4), "wrong about all of these images"),
        ((x + 1, y), r"\[0, 1\]"),
        ((x, y[:2]), "labels have shape"),
        ((x.float(), y), "float32.*float64"),
    ):
        with pytest.raises(ValueError, match=message):
            stability(model, images, [0.1])
