"""Every figure draws a small frame without a warning and saves nothing; and what must be true of what is drawn."""

import inspect
import itertools
import json

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import files_of_at_most
from matplotlib.figure import Figure
from matplotlib.text import Text

from lcnn_utils.experiments import CLAIMS
from lcnn_utils.figures import (
    attacks,
    bound,
    curvature,
    lipschitz,
    own_network,
    paper,
    saliency,
    softplus,
    style,
    training,
)  # fmt: skip
from lcnn_utils.figures.style import METHOD, VARIANTS
from lcnn_utils.lab import use_style
from lcnn_utils.measurements.softplus import activation_frame, composition_frame, normalised_curvature_frame

NETS = ("standard", "lcnn", "gradreg", "lcnn_gradreg")
COLOURS = dict(zip(("Standard", "LCNN"), VARIANTS, strict=False))
X = torch.linspace(-3, 3, 31)


def every(**columns) -> pd.DataFrame:
    """A row for each combination of the columns' values."""
    return pd.DataFrame(itertools.product(*columns.values()), columns=list(columns))


def positive(frame: pd.DataFrame, **levels: float) -> pd.DataFrame:
    """Columns of random numbers around each level, over a decade."""
    rng = np.random.default_rng(0)
    return frame.assign(**{name: level * 10 ** rng.uniform(-0.5, 0.5, len(frame)) for name, level in levels.items()})


def interval(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """low and high around a column, further above than below."""
    return frame.assign(low=0.9 * frame[column], high=1.2 * frame[column])


def labelled(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(label=[METHOD[method][0] for method in frame.method])


def field(**key) -> pd.DataFrame:
    """A grid whose margin is x1 − 0.5 and whose curvature is 10^(x1 + x2)."""
    frame = every(x2=np.linspace(-1, 1, 5), x1=np.linspace(-1, 2, 7))
    return frame.assign(margin=frame.x1 - 0.5, curvature=10 ** (frame.x1 + frame.x2), accuracy=0.9, **key)


def fields(name: str, values: tuple) -> pd.DataFrame:
    return pd.concat([field(**{name: value}) for value in values], ignore_index=True)


def points() -> pd.DataFrame:
    """An infinite ball, which no attack found a way out of, and a misread image."""
    return pd.DataFrame(dict(x1=[0, 1, 0.2], x2=[0, 0.5, -0.5], label=[0, 1, 0], certified=[0.3, np.inf, 0],
                             found1=[0.5, np.nan, 0.2], found2=[0, np.nan, -0.5]))  # fmt: skip


def images() -> pd.DataFrame:
    frame = labelled(every(method=NETS[:2], seed=(0, 1, 2), image=range(20)))
    frame = positive(frame, curvature=10.0, grad_norm=1.0, hessian_norm=10.0)
    return frame.assign(accuracy=0.9 + 0.01 * frame.seed)


def audited() -> pd.DataFrame:
    """Some points fail the published bound; the last two have no gradient and no curvature."""
    frame = positive(pd.DataFrame(index=range(30)), gradient=1.0, hessian=10.0, kappa=1.0)
    frame["curvature"] = frame.hessian / frame.gradient
    frame = frame.assign(local=3 * frame.hessian, data_free=30 * frame.hessian, normalised=9 * frame.curvature)
    frame["published"] = frame.curvature / frame.kappa
    odd = dict(hessian=[1, 0], curvature=[np.inf, 0], local=[2, 0], data_free=[5, 0], normalised=[np.inf, 0])
    return pd.concat([frame, frame[:2].assign(kappa=[np.inf, 0], **odd)], ignore_index=True)


def layer_terms() -> pd.DataFrame:
    """Linear layers between the activations have no β and contribute nothing."""
    frame = every(net=("LCNN, MLP", "Standard, ResNet-10"), layer=range(8))
    active = frame.layer % 2 == 1
    return frame.assign(before=3.0**frame.layer, beta=np.where(active, frame.layer, np.nan),
                        contribution=np.where(active, 40.0**frame.layer, 0.0))  # fmt: skip


def history() -> pd.DataFrame:
    return pd.DataFrame(dict(epoch=[1, 2, 3], loss=[2.0, 0.5, 0.1], accuracy=[0.3, 0.7, 0.9], curvature=[9.0, 5, 2]))


def of_layers(**columns) -> pd.DataFrame:
    return positive(every(kind=("beta", "gamma"), layer=(1, 2, 3, 4), **columns), value=5.0)


def runs(**columns) -> pd.DataFrame:
    frame = positive(every(**columns, seed=(0, 1, 2)), curvature=10.0, margin_curvature=3.0)
    return frame.assign(accuracy=0.9 + 0.01 * frame.seed, images=287)


def method_runs() -> pd.DataFrame:
    """The margin of an ordinary ReLU net has no curvature."""
    frame = labelled(runs(method=(*NETS, "relu")))
    return frame.assign(margin_curvature=frame.margin_curvature.where(frame.method != "relu", 0.0))


def noisy(published: bool) -> pd.DataFrame:
    frame = positive(every(label=[METHOD[net][0] for net in NETS], eps=(1e-3, 0.1, 1.0)), value=0.3, theory=1.0)
    return frame if published else interval(frame, "value")


def by_map() -> pd.DataFrame:
    frame = every(net=NETS[:2], map=("Gradient", "SmoothGrad"), weights=("trained", "random"),
                  noise=("random", "worst"), measure=("relative_change", "infidelity"))  # fmt: skip
    return interval(positive(frame, value=0.3), "value")


def attacked(norm: str) -> pd.DataFrame:
    frame = every(method=NETS, eps=(0.0, 0.1, 0.2))
    return interval(frame.assign(accuracy=0.8 - 3 * frame.eps, norm=norm), "accuracy")


def path(norm: str) -> dict:
    loss = field().margin.to_numpy().reshape(5, 7)
    return dict(title=norm, norm=norm, eps=0.6, x1=np.linspace(-1, 2, 7), x2=np.linspace(-1, 1, 5), loss=loss,
                path=np.array([[0.0, 0.0], [0.2, 0.1], [0.5, 0.0]]))  # fmt: skip


def claims(scale: float = 1.0) -> pd.DataFrame:
    """As ``experiments.claims`` gives them; the first was not measured."""
    frame = pd.DataFrame([(c.text, c.value, c.rule, c.low, c.high) for c in CLAIMS])
    frame.columns = ["claim", "value", "rule", "low_bound", "high_bound"]
    frame["ours"] = scale * (1.5 + frame.index.to_series()).where(frame.index > 0)
    return interval(frame.assign(theirs=2.0 + frame.index), "ours")


def softened() -> pd.DataFrame:
    frame = every(statistics=("as trained", "measured again"), beta=(100, 3, 0.3), measure=tuple(own_network.QUANTITY))
    return interval(positive(frame, value=0.1), "value")


def references() -> pd.DataFrame:
    """The margin of a ReLU net has no curvature."""
    frame = every(network=("lcnn", "relu"), measure=tuple(own_network.QUANTITY)).assign(n=9, eps=np.nan)
    nothing = (frame.network == "relu") & (frame.measure == "margin_curvature")
    return interval(frame.assign(value=np.where(nothing, 0.0, 0.5)), "value")


def by_way() -> pd.DataFrame:
    frame = every(way=("as it came", "softened"), setting=("", "β = 3")).assign(accuracy=0.9, low=0.8, high=0.95)
    frame = positive(frame, curvature=1.0)
    return frame.assign(low_curvature=0.9 * frame.curvature, high_curvature=1.2 * frame.curvature)


MAP = np.random.default_rng(0).normal(size=(8, 8))
EXAMPLE = dict(title="LCNN", image=abs(MAP) / 4, found=abs(MAP[::-1]) / 4, before=0, after=1, confidence=0.9)
PUBLISHED = every(label=("Standard", "LCNN"), eps=(0.0, 0.1, 0.2)).assign(accuracy=[70, 50, 30, 71, 52, 33], sd=1.0)
CERTIFIED = every(net=tuple(COLOURS), seed=(0, 1), eps=(0.0, 0.1, 0.5)).assign(certified=0.5, attacked=0.7)
NORMS = every(stride=(1, 2), size=(4, 8), kernel=(0, 1, 2), estimate=tuple(lipschitz.ESTIMATE))
SPECTRA = every(method=NETS[:2], operator=("convolution", "then BatchNorm"), layer=("stem", "block 1 conv 1",
                "block 1 conv 2", "block 2 shortcut"), share=(0.2, 0.6, 1.0))  # fmt: skip
GAMMAS = every(method=("lcnn", "minimal"), statistics=("as trained", "again"), gamma=(1.0, 10.0), layer=("a", "b"))
STACKS = every(block=tuple(lipschitz.BLOCK), seed=(0, 1), blocks=(1, 2, 3)).assign(bound=2.0)
TAYLOR = every(order=(1, 2), length=(1e-3, 1e-2, 1e-1))
CANCELLING = pd.DataFrame(dict(x=[1e-3, 0.1, 1], curvature=[1e3, 10, 1], normalised=[3e3, 30, 3])).assign(
    published=7.0, published_widths=14.0
)
FIGURES = {
    softplus.activations: lambda: [activation_frame((0.5, 4.0), X)],
    softplus.figure_1c: lambda: [activation_frame((0.5, 4.0), X)],
    softplus.composition: lambda: [composition_frame((0.5, 4.0), (1, 5), X)],
    softplus.normalised_curvature: lambda: [normalised_curvature_frame((0.1, 1.0, 100.0), range(-3, 4))],
    curvature.moons: lambda: [fields("method", NETS[:2]), points()],
    curvature.beta_maps: lambda: [fields("beta", (1.0, 1000.0))],
    curvature.curvature_distribution: lambda: [images()],
    curvature.taylor: lambda: [TAYLOR.assign(error=TAYLOR.length ** (TAYLOR.order + 1))],
    curvature.what_predicts_c: lambda: [positive(images(), doubt=0.1, softmax=3.0)],
    curvature.convergence: lambda: [
        positive(every(estimator=("power", "Lanczos"), products=(1, 2), sample=range(5)), error=0.1)
    ],
    bound.audit: lambda: [audited()],
    bound.cancellation: lambda: [CANCELLING],
    bound.depth: lambda: [positive(every(quantity=("truth", "(A)", "(B)"), depth=(1, 4), seed=range(5)), value=1.0)],
    bound.waterfall: lambda: [layer_terms()],
    bound.robust_accuracy: lambda: [CERTIFIED, COLOURS],
    bound.moons_balls: lambda: [
        pd.concat([points().assign(net=net) for net in "ab"]),
        fields("net", ("a", "b")),
        ["K = 7", "K = 2"],
    ],
    lipschitz.matrices: lambda: [torch.randn(3, 3), {1: torch.randn(16, 16), 2: torch.randn(4, 16)}],
    lipschitz.norms: lambda: [positive(NORMS, true=1.0, ratio=1.0)],
    lipschitz.power: lambda: [every(kernel=(0, 1, 2), iterations=(1, 10, 1000)).assign(ratio=0.99)],
    lipschitz.training_norms: lambda: [positive(every(epoch=(1, 4), layer=("a", "b")), error=1e-3), 0.3],
    lipschitz.spectra: lambda: [SPECTRA.assign(value=2 - SPECTRA.share)],
    lipschitz.clips: lambda: [positive(every(rule=tuple(lipschitz.RULE), channel=(0, 1)), slope=1.0), 3.0],
    lipschitz.gamma: lambda: [positive(GAMMAS, curvature=5.0, grad_norm=1.0).assign(accuracy=0.8)],
    lipschitz.residual: lambda: [positive(STACKS, slope=1.0, signal=1.0)],
    training.training_curves: lambda: [{"standard": history(), "lcnn": history()}],
    training.layers: lambda: [of_layers(epoch=(0, 1, 2))],
    training.accuracy_against_curvature: lambda: [method_runs()],
    training.lambdas: lambda: [runs(lambda_beta=(0.0, 0.01, 0.3)), of_layers(lambda_=(0.0, 0.01, 0.3))],
    training.signal: lambda: [positive(every(net=("healthy", "both too large"), layer=(0, 1)), sd=1.0)],
    training.cost: lambda: [
        dict.fromkeys(("digits", "CIFAR-10"), positive(every(method=NETS, round=(0, 1)), ratio=1.0))
    ],
    saliency.maps: lambda: [[abs(MAP) / 4] * 2, {"LCNN": [MAP] * 2, "zero": [0 * MAP] * 2}, ["one", "two"]],
    saliency.gradient_robustness: lambda: [
        {f"{noise} η": noisy(published=False) for noise in ("random", "worst")},
        {"published": noisy(published=True)},
    ],
    saliency.by_map: lambda: [by_map().query("weights == 'trained'"), ("relative_change", "infidelity")],
    saliency.stable_or_right: lambda: [by_map()],
    saliency.random_meets: lambda: [positive(every(sample=range(9)), spectral=10.0, frobenius=1.0, measured=1.0)],
    attacks.paths: lambda: [[path("l2"), path("linf")]],
    attacks.step_sizes: lambda: [every(rule=("2ε, falling to 0", "ε/20"), eps=(0.1, 0.5), accuracy=(0.5,))],
    attacks.logit_scale: lambda: [
        interval(every(loss=("ce", "margin"), scale=(0.1, 1.0, 100.0), accuracy=(0.5,)), "accuracy")
    ],
    attacks.curves: lambda: [{"digits, L2": attacked("l2"), "digits, L∞": attacked("linf")}, PUBLISHED],
    attacks.examples: lambda: [[EXAMPLE] * 2, ["zero", "one"]],
    own_network.report: lambda: [references().assign(note="", eps=0.1)],
    own_network.softening: lambda: [softened(), references()],
    own_network.ways: lambda: [by_way()],
    paper.claims: lambda: [{"digits": claims(), "CIFAR-10": claims(0.1)}],
    paper.layers: lambda: [{"digits": labelled(of_layers(method=NETS[1:3], seed=(0, 1)))}],
    paper.train_test: lambda: [{"digits": labelled(positive(every(method=NETS, seed=(0, 1)), train=3.0, test=3.0))}],
}


@pytest.mark.parametrize("figure_function", FIGURES, ids=lambda f: f"{f.__module__.split('.')[-1]}.{f.__name__}")
def test_every_figure(figure_function, drawing):
    """Drawn without a warning, no text under 8 pt; an axis with numbers is named, by a neighbour where it is shared."""
    figure = figure_function(*FIGURES[figure_function]())
    figure.canvas.draw()
    assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text()) >= 8
    for axis in figure.axes:
        for direction, shared in (("x", axis.get_shared_x_axes()), ("y", axis.get_shared_y_axes())):
            names = [getattr(other, f"get_{direction}label")() for other in shared.get_siblings(axis)]
            ticks = [text.get_text() for text in getattr(axis, f"get_{direction}ticklabels")()]
            numbers = [tick for tick in ticks if tick[:1].isdigit()]
            assert any(names) or not numbers or axis.get_label() == "<colorbar>"


def test_every_figure_is_tried():
    functions = set()
    for module in (attacks, bound, curvature, lipschitz, own_network, paper, saliency, softplus, training):
        for _, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and function.__annotations__.get("return") == "Figure":
                functions.add(function)
    assert functions == set(FIGURES)


def draw(function, *arguments) -> list:
    return function(*(arguments or FIGURES[function]())).axes


@pytest.mark.parametrize(
    ("function", "frame"),
    [(saliency.gradient_robustness, noisy(published=False)),
     (attacks.logit_scale, FIGURES[attacks.logit_scale]()[0]),
     (saliency.by_map, by_map().query("weights == 'trained' & measure == 'relative_change' & noise == 'random'")),
     (paper.claims, claims()[[("points" not in claim.value) for claim in CLAIMS]].dropna())],
)  # fmt: skip
def test_error_bars_reach_from_low_to_high(function, frame, drawing):
    axis = draw(function)[0]
    direction = 0 if function in (saliency.by_map, paper.claims) else 1
    bars = [segment for container in axis.containers if hasattr(container, "has_yerr")
            for segment in container[2][0].get_segments() if len(segment)]  # fmt: skip
    ends = np.array(bars)[:, :, direction][: len(frame)]
    np.testing.assert_allclose(np.sort(ends, 0), np.sort(frame[["low", "high"]], 0))


def test_means_have_bars_of_their_standard_deviation(drawing):
    frame = images()
    runs = frame.groupby(["label", "seed"])[["curvature", "accuracy"]].mean()
    containers = draw(curvature.curvature_distribution, frame)[1].containers
    for container, label in zip(containers, ("Standard", "LCNN"), strict=True):
        np.testing.assert_allclose(container[0].get_xydata(), [runs.loc[label].mean()])
        for bar, column in enumerate(("curvature", "accuracy")):
            ends = np.ptp(container[2][bar].get_segments()[0], axis=0)[bar]
            assert ends / 2 == pytest.approx(runs.loc[label][column].std())


def test_what_is_published_is_drawn_beside_ours(drawing):
    last = draw(attacks.curves)[-1]
    for container, (_, part) in zip(last.containers, PUBLISHED.groupby("label", sort=False), strict=True):
        np.testing.assert_allclose(container[0].get_ydata().astype(float), part.accuracy / 100)
    published = draw(saliency.gradient_robustness)[2]
    assert len(published.lines) == 2 * len(NETS), "solid and dashed"
    tables = {"digits": claims(), "CIFAR-10": claims(0.1)}
    drawn = [line.get_xdata() for axis in draw(paper.claims, tables) for line in axis.lines if line.get_marker() == "D"]
    assert sorted(np.concatenate(drawn)) == sorted([*claims().theirs, *claims().theirs])


def test_softening_is_drawn_against_beta_and_beside_other_nets(drawing):
    frame, axes = softened(), draw(own_network.softening)
    values = frame.pivot(index=["statistics", "beta"], columns="measure", values="value")
    for axis, measure in zip(axes, own_network.QUANTITY, strict=False):
        dashed = [line.get_ydata()[0] for line in axis.lines if line.get_xdata()[-1] == 1]  # across the whole panel
        assert dashed == [0.5] * (1 if measure == "margin_curvature" else 2)
        for container, (_, part) in zip(axis.containers, values[measure].groupby("statistics"), strict=True):
            drawn = sorted(container[0].get_xydata().tolist())
            np.testing.assert_allclose(drawn, part.reset_index()[["beta", measure]])
    for line, (_, part) in zip(axes[5].lines, values.groupby("statistics"), strict=False):
        np.testing.assert_allclose(line.get_xydata(), part[["curvature", "accuracy"]])


def test_maps_are_the_right_way_up(drawing):
    """Also of a shuffled frame: x1 to the right, x2 upwards, class 1 where the margin is positive."""
    frame = fields("method", NETS[:1]).sample(frac=1, random_state=0)
    regions, image = draw(curvature.moons, frame, points()[:0])[:2]
    regions.get_legend().remove()
    regions.figure.canvas.draw()
    pixels = np.asarray(regions.figure.canvas.buffer_rgba())
    for x1, hexadecimal in ((0.1, style.CLASS_COLOURS[0]), (0.9, style.CLASS_COLOURS[1])):
        column, row = regions.transData.transform((x1, 0.25)).round().astype(int)
        colour = 0.25 * np.array(matplotlib.colors.to_rgb(hexadecimal)) + 0.75
        np.testing.assert_allclose(pixels[-row, column, :3] / 255, colour, atol=0.02)
    (shown,) = image.images
    np.testing.assert_allclose(shown.get_array(), np.add.outer(np.linspace(-1, 1, 5), np.linspace(-1, 2, 7)), atol=1e-9)
    assert (shown.origin, list(shown.get_extent())) == ("lower", [-1, 2, -1, 1])


def test_a_certified_ball_has_its_radius(drawing):
    axis = draw(bound.moons_balls)[0]
    (balls,) = [c for c in axis.collections if hasattr(c, "get_widths")]
    np.testing.assert_allclose(balls.get_widths(), [0.6, np.nan, 0.0])
    assert axis.get_aspect() == 1


def a_figure() -> Figure:
    figure, axis = plt.subplots(figsize=(1.5, 1))
    axis.plot([0, 1], [0, 1], label="β")
    return figure


@pytest.fixture
def saved(tmp_path):
    """A figure and a table in a folder; what they are saved by, and the bytes of every file."""
    with plt.rc_context():
        use_style()
        style.save(a_figure(), "it", {"seeds": [0], "what": "β"}, tmp_path / "f")
        style.save_table(pd.DataFrame({"net": ["A|B"], "n": [3]}), "t", {}, tmp_path / "f")
        yield {path: path.read_bytes() for path in (tmp_path / "f").iterdir()}
    plt.close("all")


def test_save_is_the_same_byte_for_byte(saved):
    assert not plt.get_fignums(), "it is closed"
    folder = next(iter(saved)).parent
    style.save(a_figure(), "it", {"seeds": [0], "what": "β"}, folder)
    style.save_table(pd.DataFrame({"net": ["A|B"], "n": [3]}), "t", {}, folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == saved
    assert {path.name for path in saved} == {*("it.png", "it.svg", "it.json"), *("t.csv", "t.md", "t.json")}
    record = json.loads((folder / "it.json").read_text("utf-8"))
    assert (record["seeds"], record["what"]) == ([0], "β")
    assert record["versions"]["torch"] == torch.__version__
    assert (folder / "t.md").read_text("utf-8") == "| net | n |\n| --- | --- |\n| A\\|B | 3 |\n"


def test_what_cannot_be_replaced_stays(saved, monkeypatch):
    folder = next(iter(saved)).parent
    with files_of_at_most(1000), pytest.raises(OSError, match=r"cannot write .*it\.png"):
        style.save(a_figure(), "it", {}, folder)
    broken = a_figure()
    broken.suptitle("$\\nonsense$")  # found while it is drawn
    with pytest.raises(ValueError, match="nonsense"):
        style.save(broken, "it", {}, folder)
    monkeypatch.setattr(style, "markdown", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        style.save_table(pd.DataFrame({"new": [1]}), "t", {}, folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == saved


def test_the_style_does_not_depend_on_the_readers_settings():
    backend = plt.get_backend()
    with plt.rc_context():
        use_style()
        ours = dict(matplotlib.rcParams)
        matplotlib.rcParams.update({"text.usetex": True, "font.size": 30, "lines.linestyle": "--"})
        use_style()
        assert dict(matplotlib.rcParams) == ours
        assert plt.get_backend() == backend
