"""Notebook 03's checks: right answers pass, likely mistakes get their own hint."""

import pytest
import torch

from lcnn_utils.exercises import bound as check


def conjugate(m, g, k):
    m = m.clamp(min=0)
    return 2 * m / (g + (g**2 + 2 * k * m).sqrt())


def by_bisection(m, g, k):
    low, high = torch.zeros_like(m), 10 * m.clamp(min=0) / g
    for _ in range(200):
        middle = (low + high) / 2
        inside = m - g * middle - k * middle**2 / 2 > 0
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return torch.where(m > 0, low, 0)


RIGHT = [
    ("layer_term", lambda a, g, b: a.T @ torch.diag(g * b) @ a),
    ("layer_term", lambda a, g, b: sum(g[k] * b[k] * torch.outer(a[k], a[k]) for k in range(len(g)))),
    ("composition", lambda lg, cg, lh, ch: (lg * lh, cg * lh**2 + lg * ch)),
    ("composition", lambda lg, cg, lh, ch: [torch.tensor(lg * lh), lg * ch + lh * cg * lh]),
    ("certified_radius", conjugate),
    ("certified_radius", by_bisection),
]
WRONG = [
    ("layer_term", lambda a, g, b: a.T @ torch.diag(b) @ a, "g is missing"),
    ("layer_term", lambda a, g, b: a.T @ torch.diag(g) @ a, "φ″ is missing"),
    ("layer_term", lambda a, g, b: torch.diag(g * b) @ a, "one A only"),
    ("layer_term", lambda a, g, b: a.T @ torch.diag(g * b) ** 2 @ a, "not squared"),
    ("layer_term", lambda a, g, b: a @ a.T, "over inputs"),
    ("composition", lambda lg, cg, lh, ch: (lg * lh, cg * lh + lg * ch), "twice"),
    ("composition", lambda lg, cg, lh, ch: (lg * lh, cg * lh**2), "second term is missing"),
    ("composition", lambda lg, cg, lh, ch: (lg * lh, lg * ch), "first term is missing"),
    ("composition", lambda lg, cg, lh, ch: (lg * lh, ch * lg**2 + lh * cg), "h comes first"),
    ("composition", lambda lg, cg, lh, ch: (cg * lh**2 + lg * ch, lg * lh), "swapped"),
    ("composition", lambda lg, cg, lh, ch: (lg + lh, cg * lh**2 + lg * ch), "slopes multiply"),
    ("composition", lambda lg, cg, lh, ch: lg * lh, "expected a float64 tensor of shape"),
    ("certified_radius", lambda m, g, k: conjugate(m, g, k) * (m > 0) + m * (m < 0), "expected"),
    ("certified_radius", lambda m, g, k: m.clamp(min=0) / g, "ignores the curvature"),
    ("certified_radius", lambda m, g, k: conjugate(m, g, 2 * k), "remainder is K·r²/2"),
    ("certified_radius", lambda m, g, k: (g + (g**2 + 2 * k * m.clamp(min=0)).sqrt()) / k, "other root"),
    ("certified_radius", lambda m, g, k: ((g**2 + 2 * k * m.clamp(min=0)).sqrt() - g) / (2 * k), "not by 2K"),
    ("certified_radius", lambda m, g, k: ((g**2 + 2 * k * m.clamp(min=0)).sqrt() - g) / k, "conjugate|nearly right"),
    ("certified_radius", lambda m, g, k: 2 * m / (g + (g**2 + 2 * k * m).clamp(min=0).sqrt()), "wrong already"),
]


@pytest.mark.parametrize(("name", "answer"), RIGHT)
def test_a_right_answer_passes(name, answer, capsys):
    assert getattr(check, name)(answer) is True, capsys.readouterr().out
    assert capsys.readouterr().out.startswith(f"✓ {name}")


@pytest.mark.parametrize(("name", "answer", "hint"), WRONG)
def test_a_wrong_answer_gets_its_hint(name, answer, hint, capsys):
    assert getattr(check, name)(answer) is False
    out = capsys.readouterr().out
    assert any(part in out for part in hint.split("|")), out


@pytest.mark.parametrize("name", check.__all__)
def test_an_untouched_stub_goes_on(name, capsys):
    def stub(*args):
        raise NotImplementedError

    assert getattr(check, name)(stub) is None
    assert "not attempted yet" in capsys.readouterr().out


def test_an_error_names_the_line_of_the_student(capsys):
    def wrong(*numbers):
        return numbers[7]

    assert check.composition(wrong) is False
    assert "in the line `return numbers[7]`" in capsys.readouterr().out
