"""The exercises' checks: right answers pass, and each likely mistake gets its own hint."""

import importlib
import inspect
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, hessian, jvp, vjp

from lcnn_utils import exercises as check
from lcnn_utils.nn import softplus as activations

LOG2 = math.log(2)


def autograd_derivatives(x, beta):
    x = x.detach().requires_grad_()
    (first,) = torch.autograd.grad(activations.centered_softplus(x, beta).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    return first, second


def slopes(x, beta):
    p = torch.sigmoid(beta * x)
    return p, beta * p * (1 - p)


def double_backward(f, x, v):
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(f(x), x, create_graph=True)
    return torch.autograd.grad(g @ v, x)[0]


def accumulating(f, x, v):
    x = x.detach().requires_grad_()
    f(x).backward(create_graph=True)
    (x.grad @ v).backward()
    return x.grad


def iterate(read, normalise=True):
    def estimate(hvp, v, steps):
        v = v / v.norm()
        for _ in range(steps):
            w = hvp(v)
            value = read(v, w)
            v = w / w.norm() if normalise else w
        return value

    return estimate


norm_of_product = iterate(lambda v, w: w.norm())


def causes(top=lambda c: c >= torch.quantile(c, 0.9), log=torch.log, inverted=False):
    def answer(g, h):
        low, high = log(g).median() - log(g), log(h) - log(h).median()
        return top(h / (g + 1e-6)) & ((low > high) ^ inverted)

    return answer


def top_k(c):  # N/10 samples by sorting instead of a quantile
    return torch.zeros_like(c, dtype=torch.bool).scatter(0, c.topk(len(c) // 10).indices, True)


RIGHT = [
    ("centered_softplus", activations.centered_softplus),
    ("centered_softplus", lambda x, beta: F.softplus(x, beta=beta) - LOG2 / beta),
    ("centered_softplus", lambda x, beta: (F.softplus(beta * x) - LOG2) / beta),
    ("centered_softplus", lambda x, beta: (torch.logaddexp(beta * x, torch.zeros(())) - LOG2) / beta),
    ("derivatives", autograd_derivatives),
    ("derivatives", slopes),
    ("derivatives", lambda x, beta: list(slopes(x, beta))),
    ("beta_for_curvature", lambda c: 4 * c),
    ("beta_for_curvature", lambda c: torch.tensor(4 * c, requires_grad=True)),
    ("beta_for_curvature", lambda c: np.float32(4 * c)),
    ("hessian_vector_product", double_backward),
    ("hessian_vector_product", lambda f, x, v: jvp(grad(f), (x,), (v,))[1]),
    ("hessian_vector_product", lambda f, x, v: vjp(grad(f), x)[1](v)[0]),
    ("hessian_vector_product", lambda f, x, v: torch.autograd.functional.hvp(f, x, v)[1]),
    ("power_iteration", norm_of_product),
    ("power_iteration", lambda hvp, v, steps: norm_of_product(hvp, v, steps).item()),
    ("power_iteration", iterate(lambda v, w: (w @ w).sqrt())),
    ("why_curved", causes()),
    ("why_curved", causes(top=lambda c: c > torch.quantile(c, 0.9))),
    ("why_curved", causes(top=top_k)),
    ("why_curved", causes(log=torch.log10)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "answer"), RIGHT)
def test_right_answers_pass(name, answer, capsys):
    assert getattr(check, name)(answer) is True
    out = capsys.readouterr().out
    assert out.startswith(f"✓ {name}: correct on ")
    assert "largest difference" in out


WRONG = [
    ("centered_softplus", lambda x, beta: F.softplus(x, beta=beta), "not centred"),
    ("centered_softplus", lambda x, beta: (1 + (beta * x).exp()).log() / beta, "not centred"),
    ("centered_softplus", lambda x, beta: F.softplus(x, beta=beta) - LOG2, "log 2/β, not log 2"),
    ("centered_softplus", lambda x, beta: F.softplus(beta * x) - LOG2, "divide by β"),
    ("centered_softplus", lambda x, beta: F.softplus(x) - LOG2, "β is not used"),
    ("centered_softplus", lambda x, beta: F.softplus(x), "plain softplus of β = 1"),
    ("centered_softplus", lambda x, beta: ((1 + (beta * x).exp()) / 2).log() / beta, "overflows"),
    ("centered_softplus", lambda x, beta: torch.log1p((beta * x).exp()) / beta - LOG2 / beta, "overflows"),
    ("derivatives", lambda x, b: (torch.sigmoid(b * x), slopes(b * x, 1)[1]), "lacks the β"),
    ("derivatives", lambda x, b: (slopes(x, 1)[0], b * slopes(x, 1)[1]), "σ(βx), not σ(x)"),
    ("derivatives", lambda x, b: slopes(x, 1), "so s₀″ has a factor β"),
    ("derivatives", lambda x, b: slopes(x, b)[0], "pair (s₀′, s₀″)"),
    ("derivatives", lambda x, b: autograd_derivatives(x, b)[::-1], "swapped"),
    ("derivatives", lambda x, b: (torch.sigmoid(b * x), b * torch.sigmoid(b * x)), "1 − σ(βx)"),
    ("derivatives", lambda x, b: (b * slopes(x, b)[0], b * slopes(x, b)[1]), "cancel"),
    ("derivatives", lambda x, b: ((e := (b * x).exp()) / (1 + e), b * e / (1 + e) ** 2), "overflows"),
    ("beta_for_curvature", lambda c: c, "c itself is too small"),
    ("beta_for_curvature", lambda c: c / 4, "inverted"),
    ("beta_for_curvature", lambda c: 2 * c, "not β/2"),
    ("beta_for_curvature", lambda c: 10.0, "f(c) → the number β"),
    ("beta_for_curvature", lambda c: 0.0, "finite number above 0"),
    ("beta_for_curvature", lambda c: -4 * c, "f(c) → the number β"),
    ("hessian_vector_product", lambda f, x, v: grad(f)(x), "this is the gradient:"),
    ("hessian_vector_product", lambda f, x, v: grad(f)(x) * v, "gradient times v"),
    ("hessian_vector_product", lambda f, x, v: grad(f)(x) @ v, "slope along v"),
    ("hessian_vector_product", lambda f, x, v: hessian(f)(x), "whole Hessian"),
    ("hessian_vector_product", lambda f, x, v: v @ double_backward(f, x, v), "vᵀHv"),
    ("hessian_vector_product", lambda f, x, v: double_backward(f, x, v)[:, None], "of shape (n,)"),
    ("hessian_vector_product", lambda f, x, v: grad(f)(x).outer(grad(f)(x)) @ v, "Gauss-Newton"),
    ("hessian_vector_product", accumulating, "accumulates"),
    ("hessian_vector_product", lambda f, x, v: (grad(f)(x + 1e-4 * v) - grad(f)(x)) / 1e-4, "finite difference"),
    ("power_iteration", iterate(lambda v, w: v @ w), "the eigenvalue is negative"),
    ("power_iteration", iterate(lambda v, w: (v @ w).abs()), "uᵀHu mixes them"),
    ("power_iteration", iterate(lambda v, w: w @ w), "this is λ²"),
    ("power_iteration", iterate(lambda v, w: (w / w.norm()).norm()), "has norm 1"),
    ("power_iteration", iterate(lambda v, w: w.norm(), normalise=False), "normalise in each step"),
    ("power_iteration", iterate(lambda v, w: (v @ w) / (v @ v), normalise=False), "normalise in each step"),
    ("power_iteration", lambda hvp, v, steps: hvp(v / v.norm()).norm(), "of the start"),
    ("power_iteration", lambda hvp, v, steps: norm_of_product(hvp, v, 100), "too few steps"),
    ("power_iteration", lambda hvp, v, steps: hvp(v), "the estimate of the largest"),
    ("why_curved", lambda g, h: g.log().median() - g.log() > h.log() - h.log().median(), "only the tenth"),
    ("why_curved", causes(log=lambda t: t), "compare logarithms"),
    ("why_curved", causes(inverted=True), "inverted"),
    ("why_curved", lambda g, h: top_k(h / g), "whole top tenth"),
    ("why_curved", lambda g, h: top_k(h) & (g.log().median() - g.log() > h.log() - h.log().median()), "not of H"),
    ("why_curved", lambda g, h: causes()(g, h).nonzero().squeeze(1), "bool (N,)"),
    ("why_curved", lambda g, h: causes()(g, h).float(), "bool (N,)"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "answer", "hint"), WRONG)
def test_a_wrong_answer_gets_its_hint(name, answer, hint, capsys):
    assert getattr(check, name)(answer) is False
    out = capsys.readouterr().out
    assert out.startswith(f"✗ {name}: ")
    assert "expected" in out
    assert "got" in out
    assert hint in out.split("hint: ")[1], out


def test_the_verdict_says_where_the_difference_is_largest(capsys):
    check.centered_softplus(lambda x, beta: activations.centered_softplus(x, beta) + (x == x.max()))
    out = capsys.readouterr().out
    assert "x = a float32 tensor of shape (7,), beta = 3" in out
    assert "(1 of 7 wrong)" in out
    expected, got, x = (
        float(out.split(f"{key} ")[-1].split(" ")[0].strip(",")) for key in ("expected", "got", "at x =")
    )
    assert got - expected == pytest.approx(1, abs=1e-4)
    assert expected == pytest.approx(activations.centered_softplus(torch.tensor(x), 3.0).item(), abs=1e-4)
    check.why_curved(lambda g, h: causes()(g, h) ^ (torch.arange(len(g)) == 5))
    out = capsys.readouterr().out
    assert "got True" in out or "got False" in out
    assert "at hessian_norm =" in out


def raising(error):
    def answer(*args):
        raise error

    return answer


@pytest.mark.parametrize("name", check.__all__)
class TestEvery:
    @pytest.mark.parametrize(
        "stub",
        [raising(NotImplementedError), raising(NotImplementedError("your turn")), lambda *_: ..., lambda *_: None],
    )
    def test_a_stub_is_no_attempt(self, name, stub, capsys):
        assert getattr(check, name)(stub) is None
        assert f"· {name}: not attempted yet: the rest uses lcnn_utils' version" in capsys.readouterr().out

    @pytest.mark.parametrize(
        "error",
        [ZeroDivisionError("oh"), KeyError(), RuntimeError(), AssertionError("no"), SystemExit(), SystemExit(2)],
    )
    def test_an_exception_is_reported(self, name, error, capsys):
        assert getattr(check, name)(raising(error)) is False
        out = capsys.readouterr().out
        assert f"it raised {type(error).__name__}: {error}, in the line `raise error`" in out
        assert "hint: f(" in out

    def test_an_interrupt_interrupts(self, name):
        with pytest.raises(KeyboardInterrupt):
            getattr(check, name)(raising(KeyboardInterrupt()))

    @pytest.mark.parametrize("other", [None, 3, "f", torch.ones(3), lambda: 0])
    def test_what_cannot_be_called_so_is_reported(self, name, other, capsys):
        assert getattr(check, name)(other) is False
        assert "it raised TypeError" in capsys.readouterr().out

    @pytest.mark.parametrize(
        "value", ["text", {}, (), (1,), [None, 2], np.zeros(3), torch.zeros(3, 5, 7), 1j, object()]
    )
    def test_another_type_or_shape_is_reported(self, name, value, capsys):
        assert getattr(check, name)(lambda *_: value) is False
        out = capsys.readouterr().out
        assert "got" in out or "it raised" in out

    @pytest.mark.parametrize("number", [0.0, 1.0, -1.0, math.nan, math.inf])
    def test_no_constant_passes(self, name, number, capsys):
        def like(*args):
            tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
            if name in ("beta_for_curvature", "power_iteration"):
                return number
            if name == "why_curved":
                return torch.full_like(tensors[0], number).bool()
            filled = torch.full_like(tensors[0], number)
            return (filled, filled) if name == "derivatives" else filled

        assert getattr(check, name)(like) is False
        out = capsys.readouterr().out
        if name != "why_curved" and not math.isfinite(number):
            assert "got nan" in out or "got inf" in out


def test_the_hints_for_errors(capsys):
    for name, answer, hint in [
        ("centered_softplus", lambda x, beta: math.log(1 + math.exp(x)), "math's functions take single numbers"),
        ("derivatives", lambda x, beta: torch.autograd.grad(x * x, x), "requires_grad_()"),
        ("derivatives", lambda x, b: torch.autograd.grad(x.requires_grad_() * x, x), "sum the values"),
        ("hessian_vector_product", lambda f, x, v: torch.autograd.grad(grad(f)(x) @ v, x), "create_graph=True"),
    ]:
        assert getattr(check, name)(answer) is False
        assert hint in capsys.readouterr().out


def test_none_at_a_later_input_and_torch_s_own_notimplementederror_are_wrong(capsys):
    assert (
        check.centered_softplus(lambda x, beta: activations.centered_softplus(x, beta) if beta == 3 else None) is False
    )
    assert "got None" in capsys.readouterr().out
    assert check.centered_softplus(lambda x, beta: torch.exp(x, out=torch.empty(0).to_sparse())) is False
    assert "NotImplementedError" in capsys.readouterr().out


def test_the_dtype_is_kept(capsys):
    assert check.centered_softplus(lambda x, beta: activations.centered_softplus(x.double(), beta)) is False
    assert "expected a float32 tensor of shape (7,), got a float64 tensor of shape (7,)" in capsys.readouterr().out


def test_inputs_changed_in_place_do_not_matter():
    assert check.centered_softplus(lambda x, beta: F.softplus(x.mul_(beta)).sub_(LOG2).div_(beta)) is True


def test_the_checks_are_what_is_public_and_do_not_touch_the_global_random_state():
    public = {
        n for n, v in vars(check).items() if inspect.isfunction(v) and v.__module__ == check.__name__ and n[0] != "_"
    }
    assert public == set(check.__all__)
    state = torch.random.get_rng_state()
    for name, answer in RIGHT:
        getattr(check, name)(answer)
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_stub_without_source_is_no_attempt_either():
    scope = {}
    exec("def stub(x, beta):\n    raise NotImplementedError('your turn')", scope)
    assert check.derivatives(scope["stub"]) is None


@pytest.mark.parametrize("page", ["", ".attacks", ".bounds", ".lipschitz", ".methods", ".paper", ".saliency"])
def test_every_help_states_the_exercise_and_names_a_solution_that_is_there(page):
    module = importlib.import_module("lcnn_utils.exercises" + page)
    for name in module.__all__:
        text = inspect.getdoc(getattr(module, name))
        assert text.startswith("f(")
        assert "Solution: " in text
        for dotted in re.findall(r"``lcnn_utils\.([\w.]*\w)", text.split("Solution: ")[1]):
            *path, last = dotted.split(".")
            owner = importlib.import_module(".".join(["lcnn_utils", *path]))
            assert hasattr(owner, last), f"{name}: lcnn_utils.{dotted}"
