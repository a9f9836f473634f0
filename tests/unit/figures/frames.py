"""A small frame for every figure function, measured where that is cheap, else made up."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import torch

from lcnn_utils.experiments import CLAIMS
from lcnn_utils.figures import attacks, bound, curvature, lipschitz, paper, saliency, softplus, training
from lcnn_utils.figures.style import METHOD, VARIANTS
from lcnn_utils.measurements.softplus import activation_frame, composition_frame, normalised_curvature_frame

NETS = ("standard", "lcnn", "gradreg", "lcnn_gradreg")
COLOURS = dict(zip(("Standard", "LCNN"), VARIANTS, strict=False))


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def every(**columns) -> pd.DataFrame:
    """A row for each combination of the columns' values."""
    return pd.DataFrame(itertools.product(*columns.values()), columns=list(columns))


def positive(frame: pd.DataFrame, **levels: float) -> pd.DataFrame:
    """Columns of random numbers around each level, over about a decade."""
    rng = random()
    return frame.assign(**{name: level * 10 ** rng.uniform(-0.5, 0.5, len(frame)) for name, level in levels.items()})


def with_interval(frame: pd.DataFrame, column: str, share: float = 0.1) -> pd.DataFrame:
    """low and high around a column, further above than below."""
    return frame.assign(low=frame[column] * (1 - share), high=frame[column] * (1 + 2 * share))


def labelled(frame: pd.DataFrame, column: str = "method") -> pd.DataFrame:
    return frame.assign(label=frame[column].map({name: look[0] for name, look in METHOD.items()}))


def field(**key) -> pd.DataFrame:
    """A grid on two moons whose margin is x1 − 0.5 and whose curvature is 10^(x1 + x2)."""
    x2, x1 = (axis.ravel() for axis in np.meshgrid(np.linspace(-1, 1, 5), np.linspace(-1, 2, 7), indexing="ij"))
    return pd.DataFrame(dict(x1=x1, x2=x2, margin=x1 - 0.5, curvature=10 ** (x1 + x2), accuracy=0.9) | key)


def moons() -> tuple[pd.DataFrame, pd.DataFrame]:
    points = pd.DataFrame(dict(x1=[0.1, 0.8, 0.9], x2=[0.0, 0.5, -0.5], label=[0, 1, 1]))
    return pd.concat([field(method="standard"), field(method="lcnn")]), points


def distribution() -> pd.DataFrame:
    runs = every(method=NETS[:2], seed=(0, 1, 2), image=range(20))
    return labelled(positive(runs, curvature=10.0, grad_norm=1.0, hessian_norm=10.0)).assign(
        accuracy=0.9 + 0.01 * runs.seed
    )


def taylor() -> pd.DataFrame:
    frame = every(order=(1, 2), length=(1e-3, 1e-2, 1e-1))
    return frame.assign(error=frame.length ** (frame.order + 1.1))


def audited() -> pd.DataFrame:
    """Some points fail the published bound; one has no gradient, one no curvature."""
    frame = positive(pd.DataFrame(index=range(60)), gradient=1.0, hessian=10.0, kappa=1.0)
    frame["curvature"] = frame.hessian / frame.gradient
    frame = frame.assign(local=3 * frame.hessian, data_free=30 * frame.hessian, normalised=9 * frame.curvature)
    frame["published"] = frame.curvature / frame.kappa
    odd = frame[:2].assign(curvature=[np.inf, 0.0], hessian=[1.0, 0.0], local=[2.0, 0.0], data_free=[5.0, 0.0])
    return pd.concat([frame, odd.assign(normalised=[np.inf, 0.0], kappa=[np.inf, 0.0])], ignore_index=True)


def cancellation() -> pd.DataFrame:
    x = np.geomspace(1e-3, 1, 10)
    return pd.DataFrame(dict(x=x, curvature=1 / x, normalised=3 / x, published=7.0, published_widths=14.0))


def depths() -> pd.DataFrame:
    frame = positive(every(quantity=("truth", "(A)", "(B)"), depth=(1, 2, 4), seed=range(5)), value=1.0)
    return frame.assign(value=frame.value * 10.0**frame.depth)


def layer_terms() -> pd.DataFrame:
    """Linear layers between the activations have no β and contribute nothing."""
    rows = []
    for net, i in itertools.product(("LCNN, MLP", "Standard, ResNet-10"), range(4)):
        rows.append((net, f"{2 * i}", np.nan, 2.0**i, 0.0))
        rows.append((net, f"{2 * i + 1}", 1.0 + i, 3.0**i, 40.0**i))
    return pd.DataFrame(rows, columns=["net", "layer", "beta", "before", "contribution"])


def certified() -> pd.DataFrame:
    """A ball, a misread image, and one that no attack moved."""
    rows = [(net, certified, attacked) for net in COLOURS for certified, attacked in ((0.1, 0.4), (0, 0), (0.2, np.inf))]
    return pd.DataFrame(rows, columns=["net", "certified", "attacked"])


def moons_balls() -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    points = pd.DataFrame(dict(x1=[0, 1, 0.2], x2=[0, 0.5, -0.5], label=[0, 1, 0], certified=[0.3, np.inf, 0],
                               found1=[0.5, np.nan, 0.2], found2=[0, np.nan, -0.5]))  # fmt: skip
    return (
        pd.concat([points.assign(net=net) for net in "ab"]),
        pd.concat([field(net=net) for net in "ab"]),
        ["Standard: K = 7", "LCNN: K = 2"],
    )


def layer_knobs() -> pd.DataFrame:
    frame = every(knob=("sharpness β", "slope × factor"), layer=("1", "3"), value=(0.1, 1.0, 10.0), trained=(1.0,))
    return positive(frame, bound=1e4, local=1e2, truth=10.0).assign(accuracy=0.9)


def norms() -> pd.DataFrame:
    frame = every(stride=(1, 2), size=(4, 8, 16), kernel=range(3), estimate=tuple(lipschitz.ESTIMATE))
    return frame.assign(true=1 + 0.1 * frame.kernel, ratio=0.9 + 0.1 * frame.kernel)


def spectra() -> pd.DataFrame:
    layers = ("stem", "block 1 conv 1", "block 1 conv 2", "block 2 shortcut")
    operators = ("convolution", "convolution, then BatchNorm")
    frame = every(method=NETS[:2], operator=operators, layer=layers, share=(0.2, 0.6, 1.0))
    return frame.assign(value=2 - frame.share)


def slopes() -> pd.DataFrame:
    frame = positive(every(method=NETS[:2], layer=("stem", "block 1 conv 1"), channel=range(4)), slope=3.0)
    return frame.assign(gamma=np.where(frame.method == "lcnn", 5.0, np.nan))


def gammas() -> pd.DataFrame:
    statistics = ("as trained", "taken again")
    frame = every(method=("lcnn", "lcnn_gradreg"), statistics=statistics, gamma=(1.0, 3.0, 10.0), layer=("a", "b"))
    return frame.assign(accuracy=0.8, curvature=frame.gamma, grad_norm=2 * frame.gamma)


def residual() -> pd.DataFrame:
    frame = positive(every(block=tuple(lipschitz.BLOCK), seed=(0, 1, 2), blocks=(1, 2, 3)), slope=1.0, signal=1.0)
    return frame.assign(bound=np.where(frame.block == "sum", 2.0**frame.blocks, np.nan))


def history() -> pd.DataFrame:
    return pd.DataFrame(dict(epoch=[1, 2, 3], loss=[2.0, 0.5, 0.1], accuracy=[0.3, 0.7, 0.9], curvature=[9.0, 5, 2]))


def trained_layers(**columns) -> pd.DataFrame:
    frame = every(kind=("beta", "gamma"), layer=(1, 2, 3, 4), **columns)
    return frame.assign(value=10 / frame.layer)


def runs(**columns) -> pd.DataFrame:
    """The ordinary ReLU net's margin has no curvature."""
    frame = positive(every(**columns, seed=(0, 1, 2)), curvature=10.0, margin_curvature=3.0)
    frame = frame.assign(accuracy=0.9 + 0.01 * frame.seed, images=287)
    if "method" in frame:
        frame.loc[frame.method == "relu", "margin_curvature"] = 0.0
        frame = labelled(frame)
    return frame


def stability(**columns) -> pd.DataFrame:
    return with_interval(positive(every(**columns), value=0.3), "value")


def robustness(published: bool = True) -> pd.DataFrame:
    frame = stability(label=[METHOD[net][0] for net in NETS], eps=(0.01, 0.1, 1.0))
    return frame[["label", "eps", "value"]] if published else frame.assign(theory=frame.eps)


def by_map() -> pd.DataFrame:
    return stability(net=NETS[:2], map=("Gradient", "SmoothGrad", "Occlusion"), weights=("trained", "random"),
                     noise=("random", "worst"), measure=("relative_change", "infidelity"))  # fmt: skip


def paths() -> list[dict]:
    grid = field()
    loss = grid.margin.to_numpy().reshape(5, 7)
    way = np.array([[0.0, 0.0], [0.2, 0.1], [0.5, 0.0]])
    shared = dict(x1=np.linspace(-1, 2, 7), x2=np.linspace(-1, 1, 5), loss=loss, path=way, eps=0.6)
    return [dict(shared, title=norm, norm=norm) for norm in ("l2", "linf")]


def curve(norm: str = "l2") -> pd.DataFrame:
    frame = every(method=tuple(METHOD)[:4], eps=(0.0, 0.1, 0.2))
    return with_interval(frame.assign(accuracy=0.8 - 3 * frame.eps, norm=norm), "accuracy")


def published_curve() -> pd.DataFrame:
    frame = every(label=("Standard", "LCNN"), eps=(0.0, 0.1, 0.2))
    return frame.assign(accuracy=70 - 200 * frame.eps, spread=1.0)


def example() -> dict:
    image = random().uniform(size=(8, 8))
    return dict(title="LCNN", image=image, found=image[::-1], before=0, after=1, confidence=0.9)


def claims(scale: float = 1.0) -> pd.DataFrame:
    """As ``experiments.claims`` gives them; ours lies inside its interval, and the first was not measured."""
    rows = []
    for number, claim in enumerate(CLAIMS):
        ours = np.nan if number == 0 else scale * (1.5 + number)
        rows.append(dict(claim=claim.text, value=claim.value, rule=claim.rule, low_bound=claim.low,
                         high_bound=claim.high, theirs=2.0 + number, ours=ours))  # fmt: skip
    return with_interval(pd.DataFrame(rows), "ours")


def seconds() -> pd.DataFrame:
    frame = labelled(every(method=NETS, seed=(0, 1)))
    return frame.assign(seconds=3.0 + frame.index, ratio=1 + 0.5 * frame.index)


FORMULAS = activation_frame((0.5, 4.0), torch.linspace(-3, 3, 31))
SIGNED = random().normal(size=(8, 8))
FIGURES = {
    softplus.activations: lambda: [FORMULAS],
    softplus.figure_1c: lambda: [FORMULAS],
    softplus.composition: lambda: [composition_frame((0.5, 4.0), (1, 5), torch.linspace(-3, 3, 31))],
    softplus.normalised_curvature: lambda: [normalised_curvature_frame((0.1, 1.0, 100.0), (-1.0, 0.0, 1.0))],
    curvature.moons: moons,
    curvature.beta_maps: lambda: [pd.concat([field(beta=1.0), field(beta=1000.0)])],
    curvature.curvature_distribution: lambda: [distribution()],
    curvature.taylor: lambda: [taylor()],
    curvature.gradient_and_hessian: lambda: [distribution()],
    curvature.convergence: lambda: [
        positive(every(estimator=("power", "Lanczos"), products=(1, 2, 3), sample=range(5)), error=0.1)
    ],
    bound.audit: lambda: [audited()],
    bound.cancellation: lambda: [cancellation()],
    bound.depth: lambda: [depths()],
    bound.waterfall: lambda: [layer_terms()],
    bound.loss_parts: lambda: [
        positive(every(net=("Standard", "LCNN, MLP"), sample=range(9)), total=9.0, softmax=3.0, activations=1.0)
    ],
    bound.robust_accuracy: lambda: [
        every(net=tuple(COLOURS), seed=(0, 1), eps=(0.0, 0.1, 0.5)).assign(certified=0.5, attacked=0.7), COLOURS
    ],
    bound.radii: lambda: [certified(), COLOURS],
    bound.moons_balls: moons_balls,
    bound.layer_knobs: lambda: [layer_knobs()],
    lipschitz.matrices: lambda: [torch.randn(3, 3), {1: torch.randn(16, 16), 2: torch.randn(4, 16)}],
    lipschitz.norms: lambda: [norms()],
    lipschitz.power: lambda: [every(kernel=(0, 1, 2), iterations=(1, 10, 100)).assign(ratio=0.99)],
    lipschitz.training_norms: lambda: [positive(every(step=(0, 4, 8), layer=("a", "b")), error=1e-3), 0.3],
    lipschitz.spectra: lambda: [spectra()],
    lipschitz.clips: lambda: [positive(every(rule=tuple(lipschitz.RULE), channel=(0, 1, 2)), slope=1.0), 3.0],
    lipschitz.slopes: lambda: [slopes()],
    lipschitz.gamma: lambda: [gammas()],
    lipschitz.residual: lambda: [residual()],
    training.training_curves: lambda: [{"standard": history(), "lcnn": history()}],
    training.layers: lambda: [trained_layers(epoch=(0, 1, 2))],
    training.accuracy_against_curvature: lambda: [runs(method=(*NETS, "relu"))],
    training.lambdas: lambda: [runs(lambda_beta=(0.0, 0.01, 0.3)), trained_layers(lambda_=(0.0, 0.01, 0.3))],
    training.lambda_search: lambda: [runs(lambda_=(0.0, 0.01, 0.03, 0.3)), 0.03],
    training.signal: lambda: [positive(every(net=("healthy", "both too large"), layer=(0, 1, 2)), spread=1.0)],
    training.cost: lambda: [labelled(positive(every(method=NETS, round=(0, 1, 2)), ratio=1.0))],
    saliency.maps: lambda: [[abs(SIGNED) / 4] * 2, {"LCNN": [SIGNED] * 2, "zero": [0 * SIGNED] * 2}, ["one", "two"]],
    saliency.gradient_robustness: lambda: [
        {f"digits, {noise} η": robustness(published=False) for noise in ("random", "worst")},
        {f"published: {name}": robustness() for name in ("CIFAR-10", "CIFAR-100")},
    ],
    saliency.by_map: lambda: [by_map().query("weights == 'trained'"), ("relative_change", "infidelity")],
    saliency.stable_or_right: lambda: [by_map()],
    saliency.random_meets: lambda: [
        positive(pd.DataFrame(index=range(9)), spectral=10.0, frobenius=1.0, measured=1.0)
    ],
    attacks.paths: lambda: [paths()],
    attacks.step_sizes: lambda: [every(rule=("2ε, falling to 0", "ε/20"), eps=(0.1, 0.5)).assign(accuracy=0.5)],
    attacks.logit_scale: lambda: [
        with_interval(every(loss=("ce", "margin"), scale=(0.1, 1.0, 100.0)).assign(accuracy=0.5), "accuracy")
    ],
    attacks.curves: lambda: [{"digits, L2": curve(), "digits, L∞": curve("linf")}, published_curve()],
    attacks.examples: lambda: [[example()] * 2, ["zero", "one"]],
    paper.claims: lambda: [{"digits": claims(), "CIFAR-10": claims(0.1)}],
    paper.cost: lambda: [{"digits": seconds(), "CIFAR-10": seconds()[:4]}],
    paper.layers: lambda: [{"digits": labelled(trained_layers(method=NETS[1:3], seed=(0, 1)))}],
    paper.train_test: lambda: [
        {"digits": labelled(positive(every(method=NETS, seed=(0, 1)), train=3.0, test=3.0))}
    ],
}
