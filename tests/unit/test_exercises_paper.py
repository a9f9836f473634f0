"""The checks of notebook 08: right answers pass, each likely mistake gets its own hint, the package agrees."""

import pytest
import torch

from lcnn_utils import nn as models
from lcnn_utils.curvature import geometry
from lcnn_utils.exercises import paper as check

RIGHT = [
    ("mean_curvature", lambda g, h, eps: (h / (g + eps)).mean()),
    ("mean_curvature", lambda g, h, eps: sum(hi / (gi + eps) for gi, hi in zip(g, h, strict=True)) / len(g)),
    ("inside", lambda a, s, b, t: (a - b).abs() <= torch.hypot(s, t)),
    ("inside", lambda a, s, b, t: (a - b) ** 2 <= s**2 + t**2),
    ("inside", lambda a, s, b, t: torch.stack([abs(p - q) <= (u * u + v * v) ** 0.5 for p, u, q, v in
                                               zip(a, s, b, t, strict=True)])),
]  # fmt: skip
WRONG = [
    ("mean_curvature", lambda g, h, eps: h.mean() / g.mean(), None),
    ("mean_curvature", lambda g, h, eps: h.mean() / (g.mean() + eps), "not the quotient of the means"),
    ("mean_curvature", lambda g, h, eps: (h / g).mean(), "don't forget ε"),
    ("mean_curvature", lambda g, h, eps: (h / (g + eps)).median(), "the mean, not the median"),
    ("mean_curvature", lambda g, h, eps: ((h + eps) / g).mean(), "ε is added to the gradient's norm"),
    ("mean_curvature", lambda g, h, eps: (g / (h + eps)).mean(), "Hessian over gradient"),
    ("mean_curvature", lambda g, h, eps: h / (g + eps), None),
    ("inside", lambda a, s, b, t: a - b <= torch.hypot(s, t), "take its absolute value"),
    ("inside", lambda a, s, b, t: (a - b).abs() <= s + t, "not s + t"),
    ("inside", lambda a, s, b, t: (a - b).abs() <= t, "ours too"),
    ("inside", lambda a, s, b, t: (a - b).abs() <= s, "theirs too"),
    ("inside", lambda a, s, b, t: (a - b).abs() <= s**2 + t**2, "don't forget the root"),
    ("inside", lambda a, s, b, t: (a - b).abs() > torch.hypot(s, t), "True where it is inside"),
    ("inside", lambda a, s, b, t: (a - b).abs() - torch.hypot(s, t), None),
]


@pytest.mark.parametrize(("name", "answer"), RIGHT)
def test_right_answers_pass(name, answer, capsys):
    assert getattr(check, name)(answer) is True, capsys.readouterr().out


@pytest.mark.parametrize(("name", "answer", "hint"), WRONG)
def test_a_wrong_answer_gets_its_hint(name, answer, hint, capsys):
    assert getattr(check, name)(answer) is False
    out = capsys.readouterr().out
    assert out.startswith(f"✗ {name}: ")
    if hint is not None:
        assert hint in out.split("hint: ")[1], out


@pytest.mark.parametrize("name", check.__all__)
def test_stubs_and_errors(name, capsys):
    def fails(*args):
        raise ZeroDivisionError("mine")

    assert getattr(check, name)(lambda *args: None) is None
    assert "not attempted yet" in capsys.readouterr().out
    assert getattr(check, name)(fails) is False
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_the_package_means_the_same():
    """geometry's ε is 1e-6 and its C a quotient for each sample, as the exercise has it."""
    net, x = models.mlp((4, 6, 3), lcnn=True).eval(), torch.rand(9, 4)
    g = geometry(net, x, torch.arange(9) % 3, method="exact")
    seen = []
    check.mean_curvature(lambda grad, hess, eps: seen.append((grad, hess, eps)) or (hess / (grad + eps)).mean())
    assert len(seen) >= 4
    torch.testing.assert_close((g.hessian_norm / (g.grad_norm + 1e-6)).mean(), g.curvature.mean())
