"""The checks of notebook 04: right answers pass, each likely mistake gets its own hint, the package agrees."""

import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.grad import conv2d_input

from lcnn_utils.exercises import lipschitz as check
from lcnn_utils.nn import LipschitzBatchNorm2d
from lcnn_utils.nn.spectral_norm import _power


def by_autograd(conv, x):
    x = x.detach().requires_grad_()
    y = F.conv2d(x, conv.weight, None, conv.stride, conv.padding)
    (back,) = torch.autograd.grad(y, x, y.detach())
    return back / back.norm()


def forward(conv, x):
    return F.conv2d(x, conv.weight, None, conv.stride, conv.padding)


def step(conv, x, forward=forward, norm=torch.norm):
    back = conv2d_input(x.shape, conv.weight, forward(conv, x), conv.stride, conv.padding)
    return back / norm(back)


def by_package(conv, x):
    geometry = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation, "groups": conv.groups}
    return _power(conv.weight, x, geometry, 1)


def by_layer(var, gamma, eps):
    layer = LipschitzBatchNorm2d(len(var), gamma, eps=eps).double()
    layer.running_var.copy_(var)
    return layer.channel_slopes()


def published(var, gamma, eps):
    sigma = (var + eps).sqrt()
    return 1 / sigma * min(1.0, gamma * sigma.min().item())


def bound(branch, shortcut, averaged):
    total = torch.prod(branch) + torch.prod(shortcut)
    return total / (2 * math.sqrt(2)) if averaged else total


RIGHT = [
    ("power_step", by_autograd),
    ("power_step", step),
    ("power_step", by_package),
    ("batchnorm_slopes", by_layer),
    ("batchnorm_slopes", lambda var, gamma, eps: torch.minimum(1 / torch.sqrt(var + eps), torch.tensor(gamma))),
    ("block_bound", bound),
    ("block_bound", lambda b, s, averaged: bound(b, s, averaged).item()),
    ("block_bound", lambda b, s, averaged: (math.prod(b) + math.prod(s)) / (8**0.5 if averaged else 1)),
]
WRONG = [
    ("power_step", lambda c, x: step(c, x, norm=lambda t: 1.0), "not normalised"),
    ("power_step", lambda c, x: step(c, x, forward=lambda c, x: c(x)), "the bias belongs to no linear map"),
    ("power_step", forward, "this is Ax: the adjoint"),
    ("power_step", lambda c, x: F.normalize(forward(c, x).flatten(), dim=0).view_as(x), "this is Ax, normalised"),
    ("power_step", lambda c, x: (y := forward(c, forward(c, x))) / y.norm(), "this is A twice"),
    ("power_step", lambda c, x: F.normalize(step(c, x)), "take the norm of everything"),
    (
        "power_step",
        lambda c, x: (y := F.conv_transpose2d(forward(c, x), c.weight, None, c.stride, c.padding)) / y.norm(),
        "output_padding",
    ),
    ("power_step", lambda c, x: step(c, x).norm(), "of shape (1, C, H, W)"),
    ("batchnorm_slopes", lambda var, gamma, eps: torch.rsqrt(var + eps), "γ is not used"),
    ("batchnorm_slopes", published, "published rule"),
    ("batchnorm_slopes", lambda var, gamma, eps: 1 / (var + eps).sqrt().clamp(max=gamma), "not σ"),
    ("batchnorm_slopes", lambda var, gamma, eps: (var + eps).sqrt().clamp(max=gamma), "this is σ"),
    ("batchnorm_slopes", lambda var, gamma, eps: torch.rsqrt(var + eps).clamp(min=gamma), "the other way round"),
    ("batchnorm_slopes", lambda var, gamma, eps: (1 / (var + eps)).clamp(max=gamma), "square root"),
    ("batchnorm_slopes", lambda var, gamma, eps: var.rsqrt().clamp(max=gamma), "eps is added to the variance: without"),
    ("batchnorm_slopes", lambda var, gamma, eps: (1 / (var.sqrt() + eps)).clamp(max=gamma), "under the root"),
    ("block_bound", lambda b, s, a: (b.sum() + (s.sum() if len(s) else 1)) / (8**0.5 if a else 1), "are multiplied"),
    ("block_bound", lambda b, s, a: bound(b, s, False) / (2**0.5 if a else 1), "an average divides by 2"),
    ("block_bound", lambda b, s, a: bound(b, s, False) / (2 if a else 1), "divided by √2 too"),
    ("block_bound", lambda b, s, a: bound(b, s, False) / (4 if a else 1), "once, not twice"),
    ("block_bound", lambda b, s, a: b.prod() * s.prod() / (8**0.5 if a else 1), "side by side add"),
    ("block_bound", lambda b, s, a: max(b.prod(), s.prod()) / 2**0.5 if a else bound(b, s, a), "not tight"),
    ("block_bound", lambda b, s, a: max(b.prod(), s.prod()) / (8**0.5 if a else 1), "pull the same way"),
    ("block_bound", lambda b, s, a: (b.prod() + (s.prod() if len(s) else 0)) / (8**0.5 if a else 1), "a path of its"),
    ("block_bound", lambda b, s, a: torch.hypot(b.prod(), s.prod()) / (8**0.5 if a else 1), "orthogonal"),
    ("block_bound", lambda b, s, a: bound(b, s, False), "averaged is not used"),
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

    for stub in (raising(NotImplementedError), lambda *_: ..., lambda *_: None):
        assert getattr(check, name)(stub) is None
        assert f"· {name}: not attempted yet" in capsys.readouterr().out
    assert getattr(check, name)(raising(KeyError("oh"))) is False
    assert "it raised KeyError: 'oh', in the line `raise error`" in capsys.readouterr().out
    for value in ("text", (), np.zeros(3), torch.zeros(3, 5, 7), math.nan, 0.0, 1.0):
        assert getattr(check, name)(lambda *_, value=value: value) is False
    text = inspect.getdoc(getattr(check, name))
    assert text.startswith("f(")
    assert "Solution: " in text


def test_the_bound_of_a_block_is_attained_and_never_broken():
    """Of linear maps in parallel: by multiples of the identity; and random ones stay below."""
    for seed in range(50):
        a, b, c = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        slopes = torch.linalg.matrix_norm(torch.stack([a, b]), 2)
        for averaged in (False, True):
            f = lambda m, averaged=averaged: m / (2 * math.sqrt(2)) if averaged else m
            exact = torch.linalg.matrix_norm(f(a @ b + c), 2)
            limit = bound(slopes, torch.linalg.matrix_norm(c, 2)[None], averaged)
            assert exact <= limit * (1 + 1e-12)
            eye = torch.linalg.matrix_norm(f(slopes.prod() * torch.eye(4) + torch.eye(4)).double(), 2)
            torch.testing.assert_close(eye, bound(slopes, slopes[:0], averaged))


def test_the_global_random_state_and_the_inputs_are_left_alone():
    state = torch.random.get_rng_state()
    for name, answer in RIGHT:
        getattr(check, name)(answer)
    assert torch.equal(state, torch.random.get_rng_state())
    public = {n for n, v in vars(check).items() if inspect.isfunction(v) and v.__module__ == check.__name__}
    assert {n for n in public if n[0] != "_"} == set(check.__all__)
