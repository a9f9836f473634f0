"""What notebooks 06 and 07 let one move: every control does something, and the words say what the networks do."""

import re

import numpy as np
import pytest
import torch
from test_explorers import ends, numbers, parts, pixels

from lcnn_utils import data, explorers
from lcnn_utils import nn as models
from lcnn_utils.attacks import pgd
from lcnn_utils.widgets import attacks, saliency
from lcnn_utils.figures.style import METHOD
from lcnn_utils.saliency import MAPS, compare, explain
from lcnn_utils.measurements.saliency import Scene

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine of a long name")


@pytest.fixture(autouse=True)
def seen(monkeypatch):
    pictures = []

    class Seen(explorers.Picture):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            pictures.append(self)

    for module in (attacks, saliency):
        monkeypatch.setattr(module, "Picture", Seen)
    monkeypatch.setattr(explorers, "CONTROLS", [])
    return pictures


@pytest.fixture(scope="module")
def moons():
    """A net of two moons, trained, and the points that it gets right, the surest first."""
    torch.manual_seed(0)
    net = models.mlp([2, 8, 2], beta=5.0)
    x, y = data.two_moons(100, noise=0.1, seed=0)
    for _ in range(150):  # by hand: torch.optim takes seconds to import
        loss = torch.nn.functional.cross_entropy(net(x), y)
        for p, slope in zip(net.parameters(), torch.autograd.grad(loss, [*net.parameters()]), strict=True):
            p.data -= 2 * slope
    with torch.no_grad():
        margin = (net(x)[:, 1] - net(x)[:, 0]) * (2 * y - 1)
    order = margin.argsort(descending=True)[: int((margin > 0).sum())]
    assert len(order) > 60
    return net.eval(), x[order][::8], y[order][::8]


def made(channels: int) -> Scene:
    """Untrained nets, with random images about whose classes they agree."""
    torch.manual_seed(0)
    settings = dict(num_classes=10, width=4, in_channels=channels, image_size=8)
    nets = {name: models.resnet(10, lcnn=name == "lcnn", **settings).eval() for name in ("standard", "lcnn")}
    x = torch.rand(100, channels, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for net in nets.values():
            net.train()
            for _ in range(20):
                net(x)  # else signals fade away from layer to layer, down to rounding
            net.eval()
            net[-1].bias -= net(x).mean(0)  # all classes occur
        y, other = (net(x).argmax(1) for net in nets.values())
    x, y = x[y == other][:3], y[y == other][:3]
    assert len(x) == 3
    return Scene("digits", "lab", nets, x, y, CLASSES)


@pytest.fixture(scope="module")
def grey():
    return made(1)


@pytest.fixture(scope="module")
def colour():
    return made(3)


def moved_to_its_ends(box) -> None:
    """Each control changes the picture or the words, neither changes in size, and the way back leads back."""
    controls, image, text = parts(box)
    assert [(control, image) for control in controls] == explorers.CONTROLS
    assert all(control.description for control in controls)
    assert len({control.description for control in controls}) == len(controls)
    first, words = pixels(image), text.value
    assert first.std() > 0
    assert numbers(text)
    for control in controls:
        start = control.value
        limits = [control.min, control.max] if hasattr(control, "min") and not hasattr(control, "base") else None
        values = [value for value in limits or ends(control) if value != start]
        assert values, control.description
        for value in values:
            before, said = image.value, text.value
            control.value = value  # outside a kernel, what a callback raises comes out here
            assert image.value != before or text.value != said, f"{control.description} at {value}"
            assert pixels(image).shape == first.shape
            assert "nan" not in text.value
        control.value = start
    np.testing.assert_array_equal(pixels(image), first)
    assert text.value == words


# ---- PGD's way on two moons --------------------------------------------------------------------------------------


def test_path_controls(moons):
    moved_to_its_ends(attacks.path_explorer(*moons, resolution=12))


@pytest.mark.parametrize(("norm", "eps"), [("L2", 0.05), ("L∞", 1.2)])
def test_path_says_whether_pgd_got_there(moons, norm, eps, seen):
    net, x, y = moons
    (point, kind, radius, steps, length), _, text = parts(attacks.path_explorer(net, x, y, resolution=12))
    steps.value, length.value, kind.value, radius.value = 40, 0.1, norm, eps
    name = {"L2": "l2", "L∞": "linf"}[norm]
    verdicts = set()
    for number in range(0, len(x), 3):
        point.value = number
        at, label = x[number : number + 1], y[number : number + 1]
        found = pgd(net, at, label, eps, norm=name, steps=40, step_size=length.value * eps, box=None)
        with torch.no_grad():
            wrong = (net(found).argmax(1) != label).item()
        verdicts.add(wrong)
        assert numbers(text) == ["wrong" if wrong else "still right"]
        ring, way, begin, end = (line.get_xydata() for line in seen[0].moving)
        np.testing.assert_allclose(begin, at)
        steps_away = np.linalg.norm(ring - at.numpy(), ord=2 if norm == "L2" else np.inf, axis=1)
        np.testing.assert_allclose(steps_away, eps, rtol=1e-5)
        np.testing.assert_array_equal(end, way[-1:])
        if wrong:
            np.testing.assert_allclose(end, found, rtol=1e-5)
        taken = len(way) - 1
        assert taken <= 40
        assert wrong or taken == 40, "it goes on while the network is right"
        assert f"{taken} step{'' if taken == 1 else 's'} of {length.value * eps:.3g}:" in text.value
    assert verdicts == ({True} if eps == 1.2 else {False}), "the settings above show both"


# ---- an image under attack ---------------------------------------------------------------------------------------


def test_attack_controls(grey):
    moved_to_its_ends(attacks.attack_explorer(grey, steps=3))


@pytest.mark.parametrize(("norm", "images"), [("L2", "grey"), ("L∞", "colour")])
def test_attack_shows_what_pgd_found(norm, images, seen, request):
    scene = request.getfixturevalue(images)
    (net, number, kind, eps), _, text = parts(attacks.attack_explorer(scene, steps=3))
    assert list(net.options) == [METHOD[name][0] for name in scene.nets]
    kind.value, number.value, eps.value = norm, 2, 1.0
    x, y = scene.x[2:3], scene.y[2:3]
    radius, name = (1.0, "l2") if norm == "L2" else (0.1, "linf")
    for method, model in scene.nets.items():
        net.value = METHOD[method][0]
        found = pgd(model, x, y, radius, norm=name, steps=3)
        with torch.no_grad():
            before, after = model(torch.cat([x, found])).softmax(1).numpy()
        image, added, total = (np.asarray(artist.get_array()) for artist in seen[0].moving[:3])
        for shown, expected in ((image, x), (total, found)):
            expected = expected[0, 0] if len(expected[0]) == 1 else expected[0].permute(1, 2, 0)
            np.testing.assert_allclose(shown, expected, atol=1e-6)
        step = (found - x)[0]
        np.testing.assert_allclose(added, step.sum(0) / step.abs().sum(0).max(), atol=1e-6)
        widths = [bar.get_width() for bar in seen[0].moving[3:]]
        np.testing.assert_allclose(widths, np.concatenate([before, after]), atol=1e-6)
        top = after.argmax()
        assert numbers(text) == [scene.classes[top]]
        assert ("still seen as" if top == y.item() else "now seen as") in text.value
        assert text.value.startswith(f"{METHOD[method][0]}: a {scene.classes[y.item()]}, ")
        assert f"({after[top]:.0%} sure; before {before[y.item()]:.0%})" in text.value
        assert f"Radius {radius:.3g} in {norm}; the largest change of a pixel is {step.abs().max():.3g}." in text.value


def test_no_attack_changes_nothing(grey, seen):
    (*_, eps), _, text = parts(attacks.attack_explorer(grey, steps=3))
    eps.value = 0.0
    image, added, total = (np.asarray(artist.get_array()) for artist in seen[0].moving[:3])
    np.testing.assert_array_equal(image, total)
    assert not added.any()
    assert "still seen as" in text.value
    assert "Radius 0 in L2" in text.value


# ---- maps under noise --------------------------------------------------------------------------------------------


def test_noise_controls(grey):
    moved_to_its_ends(saliency.noise_explorer(grey, methods=("gradient", "input_x_gradient")))


@pytest.mark.parametrize(
    ("channels", "kind", "method"),
    [(3, "random noise", "input_x_gradient"), (1, "worst noise found", "gradient")],
)
def test_noise_shows_and_says_how_much_the_map_moves(channels, kind, method, seen, request):
    """With the image that is shown: the step has the length it says, and the map there differs as much as it says."""
    scene = request.getfixturevalue({1: "grey", 3: "colour"}[channels])
    controls, _, text = parts(saliency.noise_explorer(scene, methods=("gradient", "input_x_gradient")))
    number, map_, noise, length = controls
    assert list(map_.options) == [MAPS["gradient"], MAPS["input_x_gradient"]]
    number.value, map_.value, noise.value, length.value = 1, MAPS[method], kind, 0.5
    x, y = scene.x[1:2], scene.y[1:2]
    arrays = [np.asarray(artist.get_array()) for artist in seen[0].moving]
    assert len(arrays) == 6
    first, after = (torch.as_tensor(a).reshape(8, 8, -1).permute(2, 0, 1)[None].contiguous() for a in arrays[:2])
    torch.testing.assert_close(first, x)
    assert ((after >= 0) & (after <= 1)).all()
    size = (after - x).norm().item()
    assert size == pytest.approx(0.5, rel=1e-3) if kind == "random noise" else size < 0.5 * (1 + 1e-4)
    found = re.findall(r"([^;—]+): changed by <b>(.*?)%</b> of its size, cosine <b>(.*?)</b>", text.value)
    assert [name.strip() for name, *_ in found] == [METHOD[name][0] for name in scene.nets]
    nets = list(scene.nets.values()) if kind == "random noise" else [scene.nets["standard"]]  # the worst is each's own
    for net, (_, change, cosine) in zip(nets, found, strict=kind == "random noise"):
        pair = [explain(net, at, y, method) for at in (x, after)]
        measured = compare(*pair)
        assert float(change) == pytest.approx(100 * measured["relative_change"][0], abs=0.6, rel=1e-2)
        assert float(cosine) == pytest.approx(measured["cosine"][0], abs=2e-3)
    before, moved = (explain(nets[0], at, y, method)[0] for at in (x, after))
    top = before.abs().sum(0).max()
    for shown, expected in zip(arrays[2:4], (before, moved), strict=True):
        np.testing.assert_allclose(shown, (expected.sum(0) / top).clamp(-1, 1), atol=1e-2)
    assert "‖η‖ = 0.5" in text.value
    assert ("each network has its own" in text.value) == (kind != "random noise")


def test_random_noise_keeps_its_direction(grey, seen):
    (*_, length), _, _ = parts(saliency.noise_explorer(grey, methods=("gradient",)))
    steps = []
    for value in (0.01, 0.02):
        length.value = value
        x, moved = (torch.as_tensor(np.asarray(artist.get_array())) for artist in seen[0].moving[:2])
        steps.append(moved - x)
    torch.testing.assert_close(2 * steps[0], steps[1], atol=1e-6, rtol=1e-3)


def test_noise_compares_two_networks_at_most(grey, seen):
    more = {"standard": grey.nets["standard"], "lcnn": grey.nets["lcnn"], "gradreg": grey.nets["standard"]}
    scene = Scene("digits", "lab", more, grey.x[:1], grey.y[:1], grey.classes)
    (number, map_, *_), _, text = parts(saliency.noise_explorer(scene))
    assert len(seen[0].moving) == 6
    assert METHOD["gradreg"][0] not in text.value.replace(METHOD["lcnn_gradreg"][0], "")
    assert (number.min, number.max) == (0, 0)
    assert list(map_.options) == [MAPS[m] for m in ("gradient", "smoothgrad", "integrated_gradients")]
