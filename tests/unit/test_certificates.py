"""No attack inside a certified ball: PGD with 100 steps and 10 restarts on every test image of digits."""

import pytest

from lcnn_utils.attacks import pgd
from lcnn_utils.curvature import bounds
from lcnn_utils.studies.bounds import certificate_recipe
from lcnn_utils.training import fit, samples


@pytest.mark.parametrize(("method", "penalty"), [("standard", 0.01), ("lcnn", 0.01), ("lcnn", 0.1)])
def test_no_attack_succeeds_inside_a_certified_ball(store, method, penalty):
    recipe = certificate_recipe(method, penalty=penalty, epochs=8)
    model, _ = fit(recipe, progress=False)
    x, y = samples(recipe, "test")
    radius = bounds.certified_radius(model, x, y)
    right = model(x).argmax(1) == y
    assert len(x) == 360
    assert ((radius > 0) == right).all()
    attack = dict(steps=100, restarts=10, box=None)  # the ball doesn't stop at the pixel range: neither does the attack
    for step_size in (None, radius[right].median().item()):  # small steps, and steps that reach the sphere at once
        inside = pgd(model, x[right], y[right], radius[right], step_size=step_size, **attack)
        assert ((inside - x[right]).flatten(1).norm(dim=1) <= radius[right] * (1 + 1e-6)).all()
        assert (model(inside).argmax(1) == y[right]).all()
    if method == "lcnn":  # the attack is able to succeed, not far outside
        outside = pgd(model, x[right], y[right], radius[right] * (8 if penalty < 0.1 else 3), **attack)
        assert (model(outside).argmax(1) != y[right]).float().mean() > 0.5
