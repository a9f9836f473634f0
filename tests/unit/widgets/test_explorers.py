"""Every explorer: each control changes the picture, and what is drawn and said is what the functions behind it give."""

import copy
import io
import itertools
import re

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg as Canvas
from PIL import Image
from torch import nn

from lcnn_utils import attacks, data, saliency
from lcnn_utils import nn as models
from lcnn_utils.curvature import curvature_bound, geometry, layer_terms, local_bound
from lcnn_utils.experiments import claims
from lcnn_utils.measurements.curvature import moons_fields, moons_grid
from lcnn_utils.measurements.saliency import Scene
from lcnn_utils.training import accuracy
from lcnn_utils.widgets import bound, curvature, engine, lipschitz, own_network, paper, softplus, training
from lcnn_utils.widgets.attacks import attack_explorer, path_explorer
from lcnn_utils.widgets.saliency import noise_explorer

RESOLUTION = 16
MAPS = ("gradient", "input_x_gradient")


def mlp(seed: int) -> nn.Sequential:
    """An LCNN of two inputs with βs of 2 and 7, and BatchNorm statistics as after a training."""
    torch.manual_seed(seed)
    model = models.mlp([2, 6, 5, 2], lcnn=True).eval()
    model[3].beta, model[6].beta = 2.0, 7.0
    for layer in (model[2], model[5]):
        layer.running_mean.copy_(torch.randn(layer.num_features) / 3)
        layer.running_var.copy_(0.5 + torch.rand(layer.num_features))
    model[-1].bias.data -= model(X).mean(0)  # the boundary goes through the points
    return model


def images() -> Scene:
    """Two untrained nets, and random images about whose classes they agree."""
    torch.manual_seed(0)
    nets, x = {}, torch.rand(100, 1, 8, 8)
    for method in ("standard", "lcnn"):
        nets[method] = models.resnet(10, lcnn=method == "lcnn", num_classes=10, width=4, in_channels=1, image_size=8)
        with torch.no_grad():
            for _ in range(20):
                nets[method](x)  # statistics: else signals fade away from layer to layer
            nets[method].eval()
            nets[method][-1].bias -= nets[method](x).mean(0)  # all classes occur
    y, other = (net(x).argmax(1) for net in nets.values())
    return Scene("digits", nets, x[y == other][:3], y[y == other][:3], tuple("abcdefghij"))


X, Y = data.two_moons(60, noise=0.15, seed=3)
NETS = {"standard": mlp(0), "lcnn": mlp(1)}
LABELS = NETS["lcnn"](X).argmax(1)
SCENE = images()
RNG = np.random.default_rng(0)
GAMMAS = (1.0, 2.0, 4.0, 8.0)
LAMBDAS = (0.0, 1e-3, 1e-2, 3e-1)


def grid_of(**columns) -> pd.DataFrame:
    """Every combination of the values of the columns."""
    return pd.MultiIndex.from_product(columns.values(), names=columns).to_frame(index=False)


ESTIMATES = grid_of(estimator=["power", "Lanczos", "published"], products=range(1, 7), sample=range(4))
ESTIMATES = ESTIMATES.assign(estimate=RNG.uniform(1, 2, len(ESTIMATES)), exact=2.0)
OF_GAMMA = grid_of(method=list(NETS), statistics=["as trained", "again"], gamma=GAMMAS)
OF_GAMMA[["accuracy", "curvature", "grad_norm"]] = RNG.uniform(0.1, 1, (len(OF_GAMMA), 3))
SLOPES = grid_of(gamma=GAMMAS, layer=["stem", "block"]).assign(natural=[3.0, 6.0] * len(GAMMAS))
OF_GAMMA = OF_GAMMA.merge(SLOPES.assign(slope=SLOPES[["gamma", "natural"]].min(axis=1)), on="gamma")
RUNS = grid_of(lambda_beta=LAMBDAS, seed=range(3))
RUNS[["accuracy", "curvature", "margin_curvature"]] = RNG.uniform(0.1, 1, (len(RUNS), 3))
LAYERS = grid_of(lambda_=LAMBDAS, kind=["beta", "gamma"], layer=[1, 2, 3])
LAYERS = LAYERS.assign(value=RNG.uniform(1, 10, len(LAYERS)))
SOFT = grid_of(statistics=["as trained", "again"], beta=[30.0, 3.0, 0.3], measure=list(own_network.QUANTITY))
SOFT = SOFT.assign(value=RNG.uniform(0.1, 1, len(SOFT)))
CLAIMS = claims("digits")
TABLES = {"ours": CLAIMS.assign(ours=7.0, low=6.0, high=8.0), "missing": CLAIMS.assign(ours=np.nan, low=np.nan)}


def check_softplus(axes):
    x, beta = np.asarray(axes[0].lines[0].get_xdata()), 3
    assert (x[0], x[-1]) == (-2, 2)
    sigmoid = 1 / (1 + np.exp(-beta * x))
    plain = np.logaddexp(0, beta * x) / beta
    expected = [  # ReLU, centered softplus, softplus
        (np.maximum(x, 0), plain - np.log(2) / beta, plain),
        (x > 0, sigmoid, sigmoid),
        (0 * x, beta * sigmoid * (1 - sigmoid), beta * sigmoid * (1 - sigmoid)),
        (np.maximum(x, 0), np.log1p(np.expm1(beta * x) / 2**4) / beta, np.logaddexp(np.log(4), beta * x) / beta),
    ]
    for axis, curves in zip(axes, expected, strict=True):
        for line, curve in zip(axis.lines, curves, strict=True):
            np.testing.assert_allclose(line.get_xydata(), np.stack([x, curve], 1), atol=1e-5)
    return [beta / 4, np.log(5) / beta, 0]


def check_moons(axes):
    model = copy.deepcopy(NETS["standard"])
    model[3].beta = model[6].beta = 20.0
    margin, curvatures = moons_fields(model, moons_grid(RESOLUTION))
    left, right = axes[:2]
    np.testing.assert_allclose(left.images[0].get_array().ravel(), margin, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(right.images[0].get_array().ravel(), (curvatures + 1e-12).log10(), atol=1e-2)
    boundary = torch.tensor(left.lines[-1].get_xydata(), dtype=torch.float32)
    logits = model(boundary[~boundary.isnan().any(1)]).detach()
    assert len(logits) > 5
    assert (logits[:, 1] - logits[:, 0]).abs().max() < 0.1 * margin.abs().max()
    return [accuracy(model, X, Y), np.median(curvatures), curvatures.max()]


def check_convergence(axes):
    part = ESTIMATES[(ESTIMATES["sample"] == 2) & (ESTIMATES.products <= 4)]
    for line, (_, estimates) in zip(axes[0].lines[:3], part.groupby("estimator", sort=False), strict=True):
        np.testing.assert_allclose(line.get_xydata(), np.stack([range(1, 5), estimates.estimate / 2], 1))
    return part[part.products == 4].estimate / 2 - 1


def check_layer(axes):
    """Against the same net by hand: torch's BatchNorm, whose weight is the slope, for the γ-BatchNorm."""
    model = copy.deepcopy(NETS["lcnn"])
    model[6].beta = 30.0
    gamma_norm = model[5]
    model[5] = nn.BatchNorm1d(gamma_norm.num_features, gamma_norm.eps).eval()
    model[5].load_state_dict(gamma_norm.state_dict(), strict=False)
    model[5].weight.data.fill_(0.5)
    left, right = axes
    terms = layer_terms(model, (2,)).set_index("layer").contribution[["3", "6"]]
    np.testing.assert_allclose([bar.get_height() for bar in left.containers[1]], terms, rtol=1e-4)
    measured = curvature_bound(model, (2,)), local_bound(model, X, Y).max().item()
    truth = geometry(model, X, Y, scalar="margin", method="exact").hessian_norm.max().item()
    np.testing.assert_allclose(right.lines[1].get_xdata(), [*measured, truth], rtol=1e-4)
    return [terms["6"] / terms.sum(), measured[0], measured[0] / truth, accuracy(model, X, Y)]


def check_gamma(axes):
    part = OF_GAMMA[(OF_GAMMA.method == "lcnn") & (OF_GAMMA.statistics == "again")]
    left, right, _ = axes
    np.testing.assert_allclose([line.get_ydata()[1] for line in left.lines[:2]], [3, 4])
    np.testing.assert_allclose(right.lines[0].get_ydata(), 100 * part.groupby("gamma").accuracy.first())
    row = part[part.gamma == 4].iloc[0]
    return [1, row.accuracy, row.curvature, row.grad_norm]


def check_lambda(axes):
    layers = LAYERS[LAYERS.lambda_ == 0.3]
    np.testing.assert_allclose(axes[0].lines[1].get_ydata(), layers[layers.kind == "beta"].value)
    mean = RUNS[RUNS.lambda_beta == 0.3].mean()
    np.testing.assert_allclose(axes[2].lines[-1].get_xydata(), [[mean.curvature, 100 * mean.accuracy]])
    medians = layers.groupby("kind").value.median()
    return [mean.accuracy, mean.curvature, mean.margin_curvature, medians.beta, medians.gamma]


def check_softening(axes):
    at = SOFT[SOFT.beta == 0.3].set_index(["statistics", "measure"]).value["again"]
    sharpest = SOFT[SOFT.beta == 30].set_index(["statistics", "measure"]).value["as trained"]
    np.testing.assert_allclose(axes[0].lines[-1].get_xydata(), [[at.curvature, at.accuracy]])
    names = list(own_network.QUANTITY)
    np.testing.assert_allclose(axes[1].lines[0].get_xdata(), (at / sharpest)[names])
    return at[["accuracy", "robust_accuracy", "curvature", "margin_curvature", "relative_change"]]


def check_noise(axes):
    x, y = SCENE.x[[1]], SCENE.y[[1]]
    shown = {axis: torch.tensor(np.asarray(axis.images[0].get_array()), dtype=torch.float32) for axis in axes}
    first, second, third, noisy, *noisy_maps = shown.values()
    torch.testing.assert_close(first, x[0, 0])
    assert (noisy - first).norm().item() == pytest.approx(0.5, rel=1e-3)
    expected = []
    for net, before, after in zip(SCENE.nets.values(), (second, third), noisy_maps, strict=True):
        plain, moved = (saliency.explain(net, images, y, "input_x_gradient") for images in (x, noisy[None, None]))
        torch.testing.assert_close(before, plain[0, 0] / plain.abs().max())
        torch.testing.assert_close(after, (moved[0, 0] / plain.abs().max()).clamp(-1, 1), atol=1e-3, rtol=1e-3)
        result = saliency.compare(plain, moved)
        expected += [result["relative_change"][0], result["cosine"][0]]
    return expected


def check_path(axes):
    ring, way, begin, end = (line.get_xydata() for line in axes[0].lines)
    start, label = X[[1]], LABELS[[1]]
    x_adv = attacks.pgd(NETS["lcnn"], start, label, 1.2, norm="linf", steps=20, step_size=0.12, box=None)
    fooled = NETS["lcnn"](x_adv).argmax(1) != label
    np.testing.assert_allclose(begin, start)
    np.testing.assert_allclose(np.abs(ring - begin).max(1), 1.2, rtol=1e-5)
    np.testing.assert_array_equal(end, way[-1:])
    assert len(way) - 1 == 20 or fooled, "it goes on while the network is right"
    if fooled:
        np.testing.assert_allclose(end, x_adv, rtol=1e-5)
    return ["wrong" if fooled else "still right"]


def check_attack(axes):
    x, net = SCENE.x[[2]], SCENE.nets["lcnn"]
    x_adv = attacks.pgd(net, x, SCENE.y[[2]], 0.1, norm="linf", steps=3)
    delta = (x_adv - x)[0, 0]
    pictures = x[0, 0], 0.5 + delta / (2 * delta.abs().max()), x_adv[0, 0]
    for axis, expected in zip(axes[:3], pictures, strict=True):
        np.testing.assert_allclose(axis.images[0].get_array(), expected, atol=1e-6)
    before, after = net(torch.cat([x, x_adv])).softmax(1).detach()
    for bars, expected in zip(axes[3].containers, (before, after), strict=True):
        np.testing.assert_allclose([bar.get_width() for bar in bars], expected, atol=1e-6)
    seen = after.argmax()
    return [SCENE.classes[seen], after[seen], before[SCENE.y[2]], delta.abs().max()]


def check_claim(axes):
    assert axes[0].lines[1].get_xdata() == [7]
    return ["open", "not measured"]


EXPLORERS = {  # how it is made; a position of its controls; what it must draw and say there
    "softplus": (softplus.beta_explorer, [3.0, 2.0, 4], check_softplus),
    "moons": (lambda: curvature.moons_explorer(NETS, X, Y, RESOLUTION), ["standard", 20.0], check_moons),
    "convergence": (lambda: curvature.convergence_explorer(ESTIMATES), [2, 4], check_convergence),
    "layer": (lambda: bound.layer_explorer(NETS["lcnn"], X, Y), ["6", 30.0, 0.5], check_layer),
    "gamma": (lambda: lipschitz.gamma_explorer(OF_GAMMA), ["lcnn", "again", 4.0], check_gamma),
    "lambda": (lambda: training.lambda_explorer(RUNS, LAYERS), [0.3], check_lambda),
    "softening": (lambda: own_network.softening_explorer(SOFT), ["again", 0.3], check_softening),
    "noise": (lambda: noise_explorer(SCENE, MAPS), [1, "input_x_gradient", "random", 0.5], check_noise),
    "path": (lambda: path_explorer(NETS["lcnn"], X, LABELS, RESOLUTION), [1, "linf", 1.2, 20, 0.1], check_path),
    "attack": (lambda: attack_explorer(SCENE, steps=3), ["lcnn", 2, "linf", 1.0], check_attack),
    "claim": (lambda: paper.claim_explorer(TABLES), [CLAIMS.index[0], 6.5], check_claim),
}


@pytest.fixture(scope="module", params=EXPLORERS)
def explorer(request):
    """An explorer, the axes of its figure, and the rest of its row in EXPLORERS."""
    make, position, check = EXPLORERS[request.param]
    canvases = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "FigureCanvasAgg", lambda figure: canvases.append(Canvas(figure)) or canvases[-1])
        box = make()
    return box, canvases[0].figure.axes, position, check


def states(control) -> list:
    """Both ends and a middle value, or every choice."""
    if hasattr(control, "options"):
        return [value for _, value in control._options_full]
    middle = type(control.min)((control.min + control.max) / 2)
    return [control.min, middle, control.max]


def pixels(image) -> np.ndarray:
    with Image.open(io.BytesIO(image.value)) as png:
        return np.asarray(png.convert("RGB"))


def test_every_control_changes_the_picture_and_back(explorer):
    *controls, image, text = explorer[0].children
    assert len({control.description for control in controls}) == len(controls)
    first, words = pixels(image), text.value
    for control in controls:
        start, pictures = control.value, set()
        beside = [(other, other.value) for other in controls]
        for value in states(control):
            control.value = value  # outside a kernel, what a callback raises comes out
            pictures.add(image.value)
            assert pixels(image).shape == first.shape
            assert "nan" not in text.value
        assert len(pictures) > 1 or len(states(control)) == 1, control.description
        control.value = start
        for other, value in beside:  # a net brings its own β along
            other.value = value
    np.testing.assert_array_equal(pixels(image), first)
    assert text.value == words


def test_what_is_drawn_and_said_is_what_is_measured(explorer):
    box, axes, position, check = explorer
    *controls, _, text = box.children
    for control, value in zip(controls, position, strict=True):
        control.value = value
    said = re.findall(r"<b>(.*?)</b>", text.value)
    expected = check(axes)
    for word, value in zip(said, expected, strict=True):
        if isinstance(value, str):
            assert word == value
        elif word.endswith("%"):
            assert float(word[:-1]) / 100 == pytest.approx(float(value), abs=0.51e-2, rel=1e-2)
        else:
            assert float(word) == pytest.approx(float(value), rel=1e-2)


@pytest.mark.parametrize("explorer", ["softplus"], indirect=True)
def test_the_curvature_drawn_reaches_a_quarter_of_beta(explorer):
    beta, span, *_ = explorer[0].children
    for beta.value, span.value in itertools.product((0.01, 0.3, 2.0, 80.0, 1000.0), (0.1, 4.0, 100.0)):
        for line in explorer[1][2].lines[1:]:
            assert line.get_ydata().max() == pytest.approx(beta.value / 4)


def test_the_models_given_are_not_changed():
    model = copy.deepcopy(NETS["lcnn"]).train()
    before = copy.deepcopy(model.state_dict())
    for box in (curvature.moons_explorer({"lcnn": model}, X, Y, 8), bound.layer_explorer(model, X, Y)):
        box.children[1].value = 100.0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_live_curves_follow_a_training(monkeypatch):
    displayed = []
    monkeypatch.setattr(training, "display", displayed.append)
    watch = training.live_curves("lcnn", 3)
    (image,) = displayed[0].children
    pictures = {image.value}
    history = pd.DataFrame({"epoch": [1, 2, 3], "loss": [2.0, 1.0, 0.5], "curvature": [1.0, 20.0, 30.0]})
    for epoch in range(1, 4):
        watch(history[:epoch], None)
        pictures.add(image.value)
    assert len(displayed) == 1
    assert len(pictures) == 4
