"""Our attacks against other people's, on networks that are shipped: never weaker than foolbox at equal steps."""

import pytest
import torch
from torch import nn

from lcnn_utils.attacks import autoattack, first_success, margin_loss, minimal_radius
from lcnn_utils.curvature import evaluating
from lcnn_utils.data import load
from lcnn_utils.experiments import run
from lcnn_utils.training import recipe

pytestmark = pytest.mark.slow
METHODS = ("standard", "lcnn", "adversarial")
STEPS = 20
BALLS = [("l2", 0.5, "L2PGD"), ("linf", 0.1, "LinfPGD")]


def shipped(method: str, n: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    images = load("digits", "test", subset=n)
    return run(recipe("digits", method), device="cpu", progress=False).model.eval(), images.float(), images.y


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("norm", "eps", "name"), BALLS)
def test_foolbox_leaves_no_fewer_at_equal_steps(method, norm, eps, name):
    """Its own step size and ours, cross-entropy, a random start; one image may fall by the luck of the start."""
    foolbox = pytest.importorskip("foolbox")
    model, x, y = shipped(method, 200)
    ours = first_success(model, x, y, [eps], norm=norm, steps=STEPS).isinf().sum().item()
    torch.manual_seed(0)
    theirs = {}
    for size in (None, 2.5 / STEPS):
        attack = getattr(foolbox.attacks, name)(steps=STEPS, **({} if size is None else {"rel_stepsize": size}))
        fooled = attack(foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), x, y, epsilons=eps)[2]
        theirs[size] = (~fooled).sum().item()
    print(f"{method}, {norm} {eps}: of {len(x)} images ours leaves {ours}, foolbox {theirs}")
    assert ours <= min(theirs.values()) + 1
    assert 0 < ours < len(x), "nothing to compare"


@pytest.mark.parametrize("method", METHODS)
def test_foolbox_finds_no_shorter_steps(method):
    """The median of DDN's steps, as many as ours has in one ball."""
    foolbox = pytest.importorskip("foolbox")
    model, x, y = shipped(method, 30)
    radius, _ = minimal_radius(model, x, y, steps=50)
    points = foolbox.attacks.DDNAttack(steps=50)(foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), x, y,
                                                 epsilons=None)[1]  # fmt: skip
    theirs = (points - x).flatten(1).norm(dim=1)
    print(f"{method}: median of the smallest steps ours {radius.median():.4f}, DDN {theirs.median():.4f}")
    assert radius.median() <= 1.001 * theirs.median()


@pytest.mark.parametrize("method", METHODS)
def test_the_gap_to_autoattack(method):
    pytest.importorskip("pyautoattack")
    model, x, y = shipped(method, 40)
    ours = first_success(model, x, y, [0.5], restarts=5).isinf().sum().item()
    point = autoattack(model, x, y, 0.5)
    with evaluating(model), torch.no_grad():
        theirs = (margin_loss(model(point), y) < 0).sum().item()
    print(f"{method}, l2 0.5: of {len(x)} images ours leaves {ours}, AutoAttack {theirs}")
    assert theirs <= ours + 1
    assert ours - theirs <= 2
