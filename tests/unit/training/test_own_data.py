"""``fit`` for any network on any data: torchvision's, from tensors, bytes and datasets; refused, stopped, resumed."""

import copy
import functools
import warnings

import pytest
import torch
from networks import same_weights
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.models import get_model
from torchvision.transforms import ToTensor
from torchvision.transforms.functional import to_pil_image

from lcnn_utils.data import Images
from lcnn_utils.nn import CenteredSoftplus, LipschitzBatchNorm2d, softened, to_low_curvature
from lcnn_utils.training import Recipe, accuracy, build, fit, fit_recipe, samples

pytestmark = pytest.mark.usefixtures("store")
EACH = ("standard", "lcnn", "gradreg", "lcnn_gradreg", "cure", "adversarial")
CASES = [(name, method) for name in ("resnet18", "mobilenet_v2") for method in EACH]
CASES += [("vgg11_bn", "lcnn"), ("densenet121", "lcnn_gradreg")]  # the first has 130 million weights


def images(n: int, size: int = 64, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))
    return x, torch.arange(n) % classes


def small_net(dropout: float = 0.2) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Dropout(dropout), nn.Linear(16, 3),
    )  # fmt: skip


@functools.cache
def network_and_converted(name: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    network = get_model(name, num_classes=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some keep their max pooling
        return network, to_low_curvature(network, images(2)[0], iterations=5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), CASES)
def test_torchvisions_networks_train_by_each_objective(name, method):
    network, converted = network_and_converted(name)
    model = copy.deepcopy(converted if "lcnn" in method else network)
    before = copy.deepcopy(model.state_dict())
    trained, history = fit(model, images(6), method=method, epochs=1, batch_size=6, lr=1e-3, progress=False)
    assert trained is model
    assert not any(module.training for module in model.modules())
    assert history.loss.notna().all()
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert any(name.endswith("weight") or "original" in name for name in moved)
    assert any("log_beta" in name for name in moved) == ("lcnn" in method)


def test_a_recipe_is_a_thin_layer_over_it():
    """Network and samples of a recipe, handed in, come to the same weights; statistics are then taken again."""
    recipe = Recipe(method="lcnn_gradreg", width=2, epochs=2, batch_size=512)
    mine, history = fit(build(recipe), samples(recipe, "train"), training=recipe, progress=False)
    theirs, expected = fit_recipe(recipe, progress=False)
    for (name, ours), expected_weight in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(ours, expected_weight), name
    assert history.loss.tolist() == expected.loss.tolist()


def test_tensors_bytes_and_datasets_are_one(tmp_path):
    """The same eight images as numbers, as bytes, as a Dataset and as a folder."""
    x, y = images(8, size=8)
    x = (255 * x).round().byte()
    for index, (image, label) in enumerate(zip(x, y, strict=True)):
        folder = tmp_path / "folder" / f"class {label}"
        folder.mkdir(parents=True, exist_ok=True)
        to_pil_image(image).save(folder / f"{index}.png")
    order = y.argsort(stable=True)  # as in the folder
    x, y = x[order], y[order]
    results = []
    for train in (
        (x / 255, y),
        Images(x, y, ("a", "b", "c"), "mine"),
        TensorDataset(x / 255, y),
        ImageFolder(tmp_path / "folder", ToTensor()),
    ):
        model, history = fit(
            small_net(dropout=0.0), train, method="standard", epochs=2, batch_size=8, progress=False, val=train
        )
        results.append(history.loss.iloc[-1])
        assert history.val_accuracy.iloc[-1] == pytest.approx(accuracy(model, x / 255, y))
    assert results == pytest.approx([results[0]] * 4, rel=1e-5), "one batch, whatever its order"


BAD = {
    "labels out of range": (dict(y=torch.arange(8) % 4), "labels are 0 to 3|3 classes|out of|0..2"),
    "one class": (dict(y=torch.ones(8, dtype=torch.int64)), "all 8 labels are 1"),
    "float labels": (dict(y=torch.zeros(8)), "labels are torch.float32"),
    "too few labels": (dict(y=torch.arange(7) % 3), "8 samples and 7 labels"),
    "not in [0, 1]": (dict(x=2 * images(8)[0]), r"outside \[0, 1\]"),
    "channels": (dict(x=images(8)[0][:, :1]), r"can't be trained on batches of shape \(2, 1, 64, 64\)"),
    "nothing": (dict(x=torch.zeros(0, 3, 8, 8), y=torch.zeros(0, dtype=torch.int64)), "expected|empty"),
    "one sample a batch": (dict(batch_size=1, model=nn.Sequential(nn.Flatten(), nn.LazyLinear(3), nn.BatchNorm1d(3))),
                           "more than 1 value per channel"),
    "no net for it": (dict(method="lcnn"), "to_low_curvature"),
    "fixed β": (dict(method="lcnn", model=softened(small_net(), 5.0)), "none that are trained"),
    "nothing to train": (dict(model=small_net().requires_grad_(False)), "requires_grad"),
    "validation": (dict(val=(images(4)[0], torch.full((4,), 3))), "0..2|3 classes|out of"),
    "no validation": (dict(val=TensorDataset(torch.zeros(0, 3, 64, 64), torch.zeros(0))), "val has no samples"),
    "its size": (dict(val=(images(4)[0][:, :1], images(4)[1])), "does not run on val"),
    "its classes": (dict(x=Images(torch.zeros(4, 3, 64, 64).byte(), torch.arange(4) % 3, ("a", "b", "c"), "1"), y=None,
                         val=Images(torch.zeros(4, 3, 64, 64).byte(), torch.arange(4) % 3, ("b", "c", "d"), "2")),
                    "train has the classes"),
    "augmented points": (dict(x=torch.rand(8, 5), model=nn.Linear(5, 3), augment=True), "augment"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_training(case):
    changed, message = BAD[case]
    x, y = images(8)
    options = dict(model=small_net(), x=x, y=y, method="standard", epochs=1, progress=False) | changed
    x, y = options.pop("x"), options.pop("y")
    with pytest.raises(ValueError, match=message):
        fit(options.pop("model"), x if y is None else (x, y), watch=lambda *_: pytest.fail("it was trained"), **options)


def test_folders_that_can_not_be_used(tmp_path):
    (tmp_path / "a").mkdir()
    to_pil_image(torch.rand(3, 8, 8)).save(tmp_path / "a" / "1.png")
    to_pil_image(torch.rand(3, 9, 8)).save(tmp_path / "a" / "2.png")
    for transform, message in ((None, "PIL.*ToTensor"), (ToTensor(), "equal size")):
        with pytest.raises(ValueError, match=message):
            fit(small_net(), ImageFolder(tmp_path, transform), method="standard")
    to_pil_image(torch.rand(3, 8, 8)).save(tmp_path / "a" / "2.png")
    with pytest.raises(ValueError, match="all 2 labels are 0"):
        fit(small_net(), ImageFolder(tmp_path, ToTensor()), method="standard")
    for train, message in (
        (TensorDataset(torch.zeros(0, 3, 8, 8), torch.zeros(0)), "has 0 samples"),
        (TensorDataset(*images(8), torch.zeros(8)), "no pairs"),
        (TensorDataset(images(8)[0], torch.zeros(8, 3)), "no pairs"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(small_net(), train, method="standard")


def test_a_state_of_other_data_settings_or_weights_is_refused_and_nothing_changed(tmp_path):
    options = dict(method="standard", epochs=1, state=tmp_path / "new" / "state", progress=False)
    fit(small_net(), images(8), **options)
    fit(small_net(), images(8), **options, watch=lambda *_: pytest.fail("it was trained again"))
    x, y = images(8)
    other_net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 3))
    for model, train, changed, message in (
        (small_net(), (1 - x, y), {}, "trained on 8 samples, .*, not 8 samples, "),
        (small_net(), (x, y), {"epochs": 5}, "epochs=1, not 5"),
        (other_net, (x, y), {}, "another network"),
    ):
        before, random = copy.deepcopy(model.eval()), torch.get_rng_state()
        with pytest.raises(ValueError, match=message):
            fit(model, train, **options | changed)
        assert same_weights(model, before)
        assert not any(module.training for module in model.modules())
        assert torch.equal(torch.get_rng_state(), random)


def test_ceilings_fall_to_where_they_should_and_hold():
    model = to_low_curvature(small_net(), images(2)[0], beta=1000, gamma=50)
    seen = []

    def watch(history, model):
        betas = [m.beta.item() for m in model.modules() if isinstance(m, CenteredSoftplus)]
        gammas = [m.gamma.item() for m in model.modules() if isinstance(m, LipschitzBatchNorm2d)]
        seen.append((max(betas), max(gammas)))

    fit(model, images(16), epochs=4, batch_size=4, max_beta=10, max_gamma=2, watch=watch, progress=False,
        lambda_beta=0, lambda_gamma=0)  # fmt: skip
    (beta, gamma), *_ = seen
    assert beta == pytest.approx(100, rel=0.01), "half of the way from 1000 to 10, on a log scale"
    assert gamma == pytest.approx(10, rel=0.05)
    assert all(beta <= 10.001 and gamma <= 2.001 for beta, gamma in seen[1:])


def test_interrupted_the_same_ceilings_hold(tmp_path):
    """In a notebook the model that is handed in again has been trained: the ceilings start where they started."""
    options = dict(epochs=4, batch_size=4, max_beta=3, max_gamma=2, progress=False)
    converted = lambda: to_low_curvature(small_net(), images(2)[0], beta=1000, gamma=50)
    whole, expected = fit(converted(), images(16), **options)

    def stop(history, model):
        raise KeyboardInterrupt

    model = converted()
    with pytest.raises(KeyboardInterrupt):
        fit(model, images(16), **options, state=tmp_path / "state", watch=stop)
    resumed, history = fit(model, images(16), **options, state=tmp_path / "state")
    assert same_weights(whole, resumed)
    assert history.equals(expected)


def test_what_is_frozen_stays():
    """Only the read-out is trained where only it has gradients; frozen BatchNorms keep their statistics."""
    model = small_net()
    model[:-1].requires_grad_(False)
    before = copy.deepcopy(model)
    fit(model, images(8), method="standard", epochs=1, progress=False)
    assert same_weights(model[:-1], before[:-1])
    assert not torch.equal(model[-1].weight, before[-1].weight)
