"""The checks of notebook 07: right answers pass, each likely mistake gets its own hint, the package agrees."""

import inspect
import math

import numpy as np
import pytest
import torch

from lcnn_utils.attacks import project
from lcnn_utils.curvature import scalar_of
from lcnn_utils.exercises import attacks as check


def norms(v):
    return v.flatten(1).norm(dim=1).reshape(len(v), *[1] * (v.ndim - 1))


def shortened(step, eps):
    """As one writes it: a mask for the long ones."""
    length = norms(step)
    return torch.where(length > eps, step * eps / length, step)


def one_by_one(step, eps):
    rows = [s if s.norm() <= eps else eps * s / s.norm() for s in step]
    return torch.stack(rows)


def in_place(step, eps):
    long = norms(step).flatten() > eps
    step[long] *= eps / norms(step[long])
    return step


def ahead(at, gradient, length):
    return at + length * gradient / norms(gradient)


def next_point(x, at, gradient, length, eps):
    moved = shortened(ahead(at, gradient, length) - x, eps)
    return torch.clamp(x + moved, 0, 1)


def margin(logits, y):
    others = logits.clone()
    others[torch.arange(len(y)), y] = -float("inf")
    return others.max(dim=1).values - logits[torch.arange(len(y)), y]


def margin_in_a_loop(logits, y):
    return torch.stack([torch.cat([z[:k], z[k + 1 :]]).max() - z[k] for z, k in zip(logits, y, strict=True)])


def margin_by_top2(logits, y):
    top = logits.topk(2, dim=1)
    other = torch.where(top.indices[:, 0] == y, top.values[:, 1], top.values[:, 0])
    return other - logits.gather(1, y[:, None])[:, 0]


RIGHT = [
    ("project", shortened),
    ("project", one_by_one),
    ("project", in_place),
    ("project", lambda step, eps: step * torch.clamp(eps / (norms(step) + 1e-12), max=1)),
    ("project", lambda step, eps: step * (eps / norms(step)).clamp(max=1)),  # eps/0 is infinite, hence 1
    ("project", lambda step, eps: step / torch.clamp(norms(step) / eps, min=1)),
    ("project", lambda step, eps: project(step, torch.full((len(step),), eps).to(step), "l2")),
    ("pgd_step", next_point),
    ("pgd_step", lambda x, at, g, length, eps: (x + shortened(ahead(at, g, length) - x, eps)).clip(min=0).clip(max=1)),
    ("margin_loss", margin),
    ("margin_loss", margin_in_a_loop),
    ("margin_loss", margin_by_top2),
    ("margin_loss", lambda logits, y: -scalar_of(logits, y, "margin")),
]
WRONG = [
    ("project", lambda s, e: s * e / norms(s), "steps inside the ball stay as they are"),
    ("project", lambda s, e: s * min(1, e / s.norm()), "each sample's own step, not of the whole batch"),
    ("project", lambda s, e: s.clamp(-e, e), "this is the ball of L∞"),
    ("project", lambda s, e: s * (e / s.norm(dim=-1, keepdim=True)).clamp(max=1), "not over the last axis"),
    ("project", lambda s, e: s * (e / norms(s) ** 2).clamp(max=1), "by the length, not by its square"),
    ("project", lambda s, e: torch.where(norms(s) > e, torch.zeros_like(s), s), "the nearest step of L2 length"),
    ("project", lambda s, e: s, "the nearest step of L2 length"),
    ("project", lambda s, e: shortened(s, e).flatten(1), "the nearest step of L2 length"),
    ("project", lambda s, e: shortened(s, e).float(), "the nearest step of L2 length"),
    ("pgd_step", lambda x, at, g, n, e: x + shortened(ahead(at, g, n) - x, e), "the sum must be an image"),
    (
        "pgd_step",
        lambda x, at, g, n, e: (at + shortened(ahead(at, g, n) - at, e)).clamp(0, 1),
        "around x, not around the last point",
    ),
    (
        "pgd_step",
        lambda x, at, g, n, e: (x + shortened(at + n * g - x, e)).clamp(0, 1),
        "divide the gradient by its norm",
    ),
    ("pgd_step", lambda x, at, g, n, e: next_point(x, at, -g, n, e), "the attacker wants the loss to grow"),
    ("pgd_step", lambda x, at, g, n, e: ahead(at, g, n).clamp(0, 1), "project back onto the ball"),
    (
        "pgd_step",
        lambda x, at, g, n, e: (x + shortened(at + n * g.sign() - x, e)).clamp(0, 1),
        "sign steps belong to L∞",
    ),
    ("pgd_step", lambda x, at, g, n, e: next_point(x, x, g, n, e), "start from `at`, the last point"),
    ("pgd_step", lambda x, at, g, n, e: next_point(x, at, g, n, e)[0], "the next point"),
    ("pgd_step", lambda x, at, g, n, e: next_point(x, at, g, n, e).float(), "the next point"),
    ("margin_loss", lambda z, y: z.max(1).values - z[range(len(y)), y], "leave the label's own logit out"),
    ("margin_loss", lambda z, y: -margin(z, y), "it grows when the network gets worse"),
    ("margin_loss", lambda z, y: margin(z.softmax(1), y), "logits, not probabilities"),
    ("margin_loss", lambda z, y: margin(z, y).mean(), "don't sum or average over the batch"),
    (
        "margin_loss",
        lambda z, y: (z.sum(1) - z[range(len(y)), y]) / (z.shape[1] - 1) - z[range(len(y)), y],
        "the largest other logit, not their mean",
    ),
    ("margin_loss", lambda z, y: torch.nn.functional.cross_entropy(z, y, reduction="none"), "positive exactly where"),
    ("margin_loss", lambda z, y: margin(z, y)[:, None], "of each sample, (N,)"),
    ("margin_loss", lambda z, y: margin(z, y) > 0, "of each sample, (N,)"),
]


@pytest.mark.parametrize(("name", "answer"), RIGHT)
def test_right_answers_pass(name, answer, capsys):
    assert getattr(check, name)(answer) is True, capsys.readouterr().out
    assert capsys.readouterr().out.startswith(f"✓ {name}: correct on ")


@pytest.mark.parametrize(("name", "answer", "hint"), WRONG)
def test_a_wrong_answer_gets_its_hint(name, answer, hint, capsys):
    assert getattr(check, name)(answer) is False
    out = capsys.readouterr().out
    assert out.startswith(f"✗ {name}: ")
    assert hint in out.split("hint: ")[1], out


@pytest.mark.parametrize("name", check.__all__)
def test_stubs_errors_and_nonsense(name, capsys):
    def raising(error):
        def answer(*args):
            raise error

        return answer

    def passing(*args):
        pass

    for stub in (raising(NotImplementedError), passing, lambda *_: ..., lambda *_: None):
        assert getattr(check, name)(stub) is None
        assert f"· {name}: not attempted yet" in capsys.readouterr().out
    assert getattr(check, name)(raising(KeyError("oh"))) is False
    assert "it raised KeyError: 'oh', in the line `raise error`" in capsys.readouterr().out
    for value in ("text", (), np.zeros(3), torch.zeros(3, 5, 7), torch.zeros(()), math.nan, 0.0, 2.0, True):
        assert getattr(check, name)(lambda *_, value=value: value) is False, value
        assert "hint: " in capsys.readouterr().out
    assert getattr(check, name)(lambda: None) is False, "too few arguments"
    assert "it raised TypeError" in capsys.readouterr().out
    text = inspect.getdoc(getattr(check, name))
    assert text.startswith("f(")
    assert "Solution: " in text


def test_every_check_is_here():
    public = {n for n, v in vars(check).items() if inspect.isfunction(v) and v.__module__ == check.__name__}
    assert {n for n in public if n[0] != "_"} == set(check.__all__)
    assert {name for name, _ in RIGHT} == {name for name, *_ in WRONG} == set(check.__all__)


def test_the_random_state_is_left_alone_and_spoiling_the_inputs_spoils_nothing():
    state = torch.random.get_rng_state()

    def spoil(*args):
        for arg in args:
            if isinstance(arg, torch.Tensor) and arg.is_floating_point():
                arg.fill_(math.nan)

    for name in check.__all__:
        assert getattr(check, name)(spoil) is None
    for name, answer in RIGHT:
        assert getattr(check, name)(answer) is True
    assert torch.equal(state, torch.random.get_rng_state())
