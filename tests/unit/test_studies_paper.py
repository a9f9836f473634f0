"""Ours beside the paper's: tables by hand, and the stored measurements made again from the checkpoints."""

import importlib

import numpy as np
import pandas as pd
import pytest
import torch

from lcnn_utils import data
from lcnn_utils.experiments import append, comparison, has, measured, published, run
from lcnn_utils.figures.style import METHOD
from lcnn_utils.measurements import paper
from lcnn_utils.measurements.saliency import Scene, shipped
from lcnn_utils.training import SCALES, accuracy, recipe, samples

stored_results = importlib.import_module("lcnn_utils.experiments.results")


@pytest.fixture
def results(monkeypatch, tmp_path):
    monkeypatch.setattr(stored_results, "RESULTS", tmp_path / "results")
    monkeypatch.setenv("LCNN_STORE", str(tmp_path))
    return tmp_path / "results"


def runs(**columns) -> pd.DataFrame:
    """A row a run, as ``benchmarks/evaluate.py`` stores them."""
    geometry = dict.fromkeys((*stored_results.GEOMETRY, "curvature_median"), 1.0)
    return pd.DataFrame(geometry | {"accuracy": 0.7, "images": 100, "seconds": 10.0, "epochs": 2} | columns)


# ---------------------------------------------------------------------------------------------------------- numbers
@pytest.mark.parametrize(
    ("mean", "spread", "text"),
    [
        (270.89, 75.04, "270.9 ± 75.0"),
        (6061.96, 968.05, "6062 ± 968"),
        (0.0766, 0.00383, "0.07660 ± 0.00383"),
        (5.18, np.nan, "5.180"),
        (0.0, 0.0, "0.0 ± 0.0"),
        (np.nan, np.nan, "–"),
    ],
)
def test_plus_minus(mean, spread, text):
    assert paper.plus_minus(mean, spread) == text


def test_names_fit_the_recipes(results):
    assert set(paper.TABLES) == {"paper table 1", "paper table 2", "paper gradient-robustness"}
    quantities = {quantity for source in paper.TABLES for quantity in published(source).quantity}
    assert set(paper.SYMBOL) == quantities, "a symbol for all that is printed"
    assert {d for source in paper.TABLES for d in published(source).dataset} <= set(paper.NAME)
    for scale, text in paper.SCALE.items():
        dataset = "digits" if scale == "lab" else "cifar10"
        one = recipe(dataset, "lcnn", 0, scale)
        assert text == f"ResNet-{one.model.removeprefix('resnet')} of width {one.width}"
    assert set(paper.SCALE) == set(SCALES)


# ----------------------------------------------------------------------------------------------------------- tables
def test_datasets_are_those_measured(results):
    assert paper.datasets() == []
    rows = runs(label=["Standard"], method=["standard"], seed=[0])
    for name, scale in (("cifar10_small_runs", "small"), ("svhn_tiny_runs", "tiny"), ("digits_runs", "lab")):
        append(rows, name, {"scale": scale})
    masking = pd.DataFrame({"method": ["standard"], "check": ["one"], "value": [0.5]})
    append(masking, "cifar100_tiny_masking", {})
    assert paper.datasets() == ["digits", "cifar10"]
    assert paper.title("digits") == "digits, ResNet-10 of width 8"
    assert paper.title("cifar10") == "CIFAR-10, ResNet-18 of width 16"
    with pytest.raises(FileNotFoundError, match="cifar100_runs"):
        paper.title("cifar100")


def made() -> pd.DataFrame:
    """Cells of which ours has two seeds, one, none."""
    frame = comparison("cifar10", "paper table 1").assign(table="Table 1")
    frame.loc[:, ["ours", "ours_spread", "difference", "joint_spread"]] = np.nan
    for method, quantity, ours, spread in (
        ("Standard", "accuracy", 77.0, 0.5), ("LCNN", "accuracy", 60.0, 0.0), ("GradReg", "accuracy", 77.2, np.nan)
    ):  # fmt: skip
        at = (frame.method == method) & (frame.quantity == quantity)
        frame.loc[at, ["ours", "ours_spread"]] = ours, spread
    frame["difference"] = frame.ours - frame.theirs
    frame["joint_spread"] = np.hypot(frame.ours_spread, frame.theirs_spread)
    known = frame.joint_spread.notna()
    frame["within"] = (frame.difference.abs() <= frame.joint_spread).astype("boolean").where(known)
    return frame


def test_cells_table(results):
    frame = made()
    table = paper.cells_table(frame)
    assert list(table.columns) == ["table", "net", "", "ε", "ours", "published", "published on", "difference",
                                   "joint spread"]  # fmt: skip
    assert len(table) == len(frame) == 28
    rows = {row.net: row for row in table[table[""] == "accuracy %"].itertuples()}
    at = lambda net: table.loc[rows[net].Index, ["ours", "published", "difference", "joint spread"]].tolist()
    assert at("Standard") == ["77.00 ± 0.50", "77.42 ± 0.11", "-0.42", "inside"]
    assert at("LCNN") == ["60.00 ± 0.00", "77.30 ± 0.11", "-17.3", "outside"]
    assert at("GradReg") == ["77.20", "77.20 ± 0.26", "+0", "one run"]
    assert at("CURE") == ["–", "76.48 ± 0.07", "–", "not measured"]
    assert set(table["published on"]) == {"CIFAR-100"}
    assert set(table["ε"]) == {""}
    assert (table["joint spread"] == "not measured").sum() == 25


@pytest.mark.parametrize("dataset", ["digits", "cifar10", "cifar100"])
def test_cells(results, dataset):
    frame = paper.cells(dataset)
    assert frame.groupby("table", sort=False).size().to_dict() == {
        "Table 1": 28, "Table 2": 35, "gradient robustness": 56 if dataset == "digits" else 28,
    }  # fmt: skip
    table = paper.cells_table(frame)
    assert set(table["joint spread"]) == {"not measured"}
    assert set(table.ours) == {"–"}
    assert not table.published.str.contains("–").any(), "all that is printed stays in"
    assert set(table["published on"]) <= set(paper.NAME.values())
    name = "digits_runs" if dataset == "digits" else f"{dataset}_tiny_runs"
    nets = dict(label=["LCNN", "LCNN", "Standard"], method=["lcnn", "lcnn", "standard"], seed=[0, 1, 0])
    append(runs(**nets), name, {})
    table = paper.cells_table(paper.cells(dataset))
    assert (table["joint spread"] == "outside").sum() == 4
    assert len(table) == len(frame)


def test_side_by_side(results):
    table = paper.side_by_side(made(), "Table 1")
    assert list(table.columns) == ["net", "‖∇f‖", "‖∇²f‖", "C", "accuracy %"], "as the paper prints it"
    assert table.net.tolist() == [METHOD[m][0] for m in ("standard", "lcnn", "gradreg", "lcnn_gradreg", "cure",
                                                         "softplus_wd", "adversarial")]  # fmt: skip
    assert not table.isna().any(axis=None)
    at = table.set_index("net")["accuracy %"]
    assert at["Standard"] == "77.00 ± 0.50 [77.42 ± 0.11]"
    assert at["GradReg"] == "77.20 [77.20 ± 0.26]"
    assert at["Adversarial training"] == "– [76.96 ± 0.26]"
    assert table.C[0] == "– [270.89 ± 75.04]"
    table = paper.side_by_side(paper.cells("cifar10"), "Table 2")
    assert list(table.columns) == ["net", "clean", "ε = 0.05", "ε = 0.1", "ε = 0.15", "ε = 0.2"]
    assert table["ε = 0.2"].tolist()[-1] == "– [44.98 ± 0.57]"
    assert len(table) == 7
    for dataset, value in (("cifar10", "0.0075 ± 5 %"), ("cifar100", "0.0099 ± 5 %")):
        table = paper.side_by_side(paper.cells(dataset), "gradient robustness")
        assert len(table) == 4
        assert table["ε = 0.001"][0] == f"– [{value}]"


def test_cost_frame(results):
    """Standard's median over seeds is the unit: a process's first run is slow."""
    frame = runs(label=["Standard"] * 3 + ["LCNN"], method=["standard"] * 3 + ["lcnn"], seed=[0, 1, 2, 0],
                 seconds=[40.0, 8.0, 10.0, 30.0], epochs=[2, 2, 2, 3])  # fmt: skip
    append(frame, "digits_runs", {})
    found = paper.cost_frame("digits")
    assert list(found.columns) == ["label", "seed", "seconds", "ratio"]
    assert found.seconds.tolist() == [20, 4, 5, 10]
    assert found.ratio.tolist() == [4, 0.8, 1, 2]
    append(frame[frame.label == "LCNN"], "digits_runs", {})
    assert paper.cost_frame("digits").ratio.isna().all(), "no Standard, no ratio"
    with pytest.raises(FileNotFoundError, match="no results called 'svhn_runs'"):
        paper.cost_frame("svhn")


def geometry(**parts) -> pd.DataFrame:
    """``METHOD_SPLIT_SEED=values of C`` → a geometry frame, a row an image."""
    rows = []
    for name, values in parts.items():
        method, split, seed = name.rsplit("_", 2)
        about = dict(method=method, label=METHOD[method][0], split=split, seed=int(seed))
        rows += [
            about | dict(image=i, curvature=c, margin_curvature=2 * c, hessian_norm=10 * c)
            for i, c in enumerate(values)
        ]
    return pd.DataFrame(rows)


def test_train_test():
    frame = geometry(
        standard_test_0=[1.0, 3.0], standard_train_0=[4.0, 6.0], standard_test_1=[10.0], standard_train_1=[20.0, 40.0],
        relu_reading_test_0=[7.0], lcnn_test_0=[1.0], lcnn_train_0=[2.0], cure_test_0=[5.0],
    )  # fmt: skip
    found = paper.train_test(frame)
    assert list(found.columns) == ["label", "method", "seed", "test", "train"]
    rows = [("Standard", 0, 2.0, 5.0), ("Standard", 1, 10.0, 30.0), ("LCNN", 0, 1.0, 2.0)]
    assert list(found[["label", "seed", "test", "train"]].itertuples(index=False, name=None)) == rows
    assert paper.train_test(frame, "hessian_norm").test.tolist() == [20, 100, 10]


def test_readings():
    frame = geometry(
        standard_test_0=[1.0, 2.0, 9.0], standard_test_1=[3.0, 6.0, 9.0], standard_train_0=[99.0],
        relu_reading_test_0=[0.5, 0.5, 2.0], lcnn_test_0=[50.0],
    )  # fmt: skip
    found = paper.readings(frame).set_index("net")
    assert found.index.tolist() == ["Standard", "Standard, read as ReLU"]
    assert found["C of the loss, mean"]["Standard"] == "5.000 ± 1.414", "means of 4 and 6"
    assert found["C of the loss, median"]["Standard"] == "4.000 ± 2.828", "medians of 2 and 6"
    assert found["C of the margin, mean"]["Standard"] == "10.00 ± 2.83"
    assert found["‖∇²f‖, mean"]["Standard"] == "50.00 ± 14.14"
    assert found["C of the loss, mean"]["Standard, read as ReLU"] == "1.000", "one seed has no ±"
    assert len(paper.readings(geometry(lcnn_test_0=[1.0]))) == 0


def test_trained_layers():
    recipes = [one for seed in (0, 1) if shipped([one := recipe("digits", "lcnn", seed)])]
    found = paper.trained_layers(recipes)
    assert set(found.label) == {"LCNN"}
    assert set(found.seed) == {one.seed for one in recipes}
    net = run(recipes[0], progress=False, device="cpu").model
    betas = [p.exp().item() for name, p in net.named_parameters() if name.endswith("log_beta")]
    part = found[(found.seed == recipes[0].seed) & (found.kind == "beta")].sort_values("layer")
    np.testing.assert_allclose(part.value, betas, rtol=2e-3)  # the checkpoint's log β is in float16
    assert part.layer.tolist() == list(range(1, len(betas) + 1))


def test_saliency_gallery():
    """Images that all nets get right, a column a map and net."""
    torch.manual_seed(0)
    x = torch.rand(6, 1, 4, 4)
    nets = {m: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)).eval() for m in ("standard", "lcnn")}
    y = nets["standard"](x).argmax(1)
    with torch.no_grad():
        nets["lcnn"].load_state_dict(nets["standard"].state_dict())
    y[[0, 3]] = (y[[0, 3]] + 1) % 3  # both are wrong there
    scene = Scene("digits", "lab", nets, x, y, ("a", "b", "c"))
    images, columns, names = paper.saliency_gallery(scene, {"gradient": "gradient", "smoothgrad": "SmoothGrad"}, 3)
    assert list(columns) == [f"{net},\n{m}" for m in ("gradient", "SmoothGrad") for net in ("Standard", "LCNN")]
    for image, index in zip(images, (1, 2, 4), strict=True):
        np.testing.assert_array_equal(image, x[index, 0])
    assert names == ["abc"[i] for i in y[[1, 2, 4]].tolist()]
    for maps in columns.values():
        assert [m.shape for m in maps] == [(4, 4)] * 3


# ------------------------------------------------------------------------------------- the measurements, made again
def again(one, split: str, images: int) -> pd.DataFrame:
    net = run(one, device="cpu", progress=False).model
    x, y = samples(one, split, torch.device("cpu"))
    return paper.net_frame(net, x[:images], y[:images])


def compare(found: pd.DataFrame, dataset: str, method: str, seed: int, split: str) -> None:
    """Lanczos stops at an estimated 1 % (here and there, in other batches); five digits are stored."""
    stored = measured(f"{dataset}_geometry")
    stored = stored[(stored.method == method) & (stored.seed == seed) & (stored.split == split)]
    stored = stored.set_index("image").loc[found.image]
    np.testing.assert_allclose(found.grad_norm, stored.grad_norm, rtol=1e-3)
    for column in ("hessian_norm", "curvature", "margin_curvature"):
        np.testing.assert_allclose(found[column], stored[column], rtol=0.02, err_msg=column)
    np.testing.assert_array_equal(found.correct, stored.correct)


@pytest.mark.parametrize(("method", "seed", "split"), [("standard", 0, "test"), ("lcnn_gradreg", 2, "train")])
def test_stored_digits_come_from_the_checkpoints(method, seed, split):
    compare(again(recipe("digits", method, seed), split, 2), "digits", method, seed, split)


@pytest.mark.parametrize("method", ["standard", "lcnn"])
def test_stored_accuracy_of_digits_comes_from_the_checkpoints(method):
    one = recipe("digits", method, 1)
    x, y = samples(one, "test", torch.device("cpu"))
    stored = measured("digits_runs").set_index(["method", "seed"]).loc[(method, 1)]
    found = accuracy(run(one, device="cpu", progress=False).model, x, y)
    assert len(y) == stored.images
    assert abs(found - stored.accuracy) < 1.5 / len(y), "the whole test split; one digit may stand on the edge"


def test_stored_cifar10_comes_from_the_checkpoints():
    if data.available()["cifar10"] == "missing":
        pytest.skip("CIFAR-10 is not on the disk: `lcnn data cifar10` brings it")
    if not has("cifar10_tiny_geometry"):
        pytest.skip("there are no results of CIFAR-10 at the scale tiny in data/results")
    compare(again(recipe("cifar10", "lcnn", 0, "tiny"), "test", 2), "cifar10_tiny", "lcnn", 0, "test")


def test_geometry_frame():
    """Every image of each split, Standard in both readings; in pieces or at once."""
    standard, lcnn = recipe("digits", "standard", 0), recipe("digits", "lcnn", 0)
    frame = paper.geometry_frame([standard, lcnn], images=2, train=1, device=torch.device("cpu"))
    counts = frame.groupby(["method", "split"], sort=False).size().to_dict()
    assert counts == {("standard", "test"): 2, ("relu_reading", "test"): 2, ("standard", "train"): 1,
                      ("lcnn", "test"): 2, ("lcnn", "train"): 1}  # fmt: skip
    assert set(frame.label) == {METHOD[m][0] for m in ("standard", "relu_reading", "lcnn")}
    assert (set(frame.dataset), set(frame.seed)) == ({"digits"}, {0})
    assert frame.groupby(["method", "split"]).image.apply(list).map(lambda i: i == list(range(len(i)))).all()
    read = frame.set_index(["method", "split", "image"]).sort_index()
    same = read.loc["standard", "test"].grad_norm
    np.testing.assert_allclose(read.loc["relu_reading", "test"].grad_norm, same, rtol=0.2)
    x, y = samples(lcnn, "test", torch.device("cpu"))
    net = run(lcnn, device="cpu", progress=False).model
    whole, pieces = (paper.net_frame(net, x[:2], y[:2], chunk=chunk) for chunk in (100, 1))
    assert pieces.image.tolist() == list(range(2))
    np.testing.assert_allclose(pieces.drop(columns="correct"), whole.drop(columns="correct"), rtol=0.02)
    np.testing.assert_array_equal(whole.curvature, read.loc["lcnn", "test"].curvature)
    wrong = paper.net_frame(net, x[:2], (y[:2] + 1) % 10)
    assert not wrong.correct.any()
    assert (wrong.grad_norm > whole.grad_norm).all(), "the loss of the label that was given"
