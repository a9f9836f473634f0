"""The checks of notebook 06: right answers pass, each likely mistake gets its own hint, the package agrees."""

import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lcnn_utils.exercises import saliency as check
from lcnn_utils.saliency import compare, explain


def by_backward(model, x, y):
    x.requires_grad_(True)
    model(x).gather(1, y.view(-1, 1)).sum().backward()
    return x.grad


def by_autograd(model, x, y):
    x = x.clone().detach().requires_grad_()
    logit = model(x)[torch.arange(len(y)), y]
    return torch.autograd.grad(logit.sum(), x)[0]


def one_by_one(model, x, y):
    maps = []
    for pixels, label in zip(x, y, strict=True):
        at = pixels[None].clone().requires_grad_()
        model(at)[0, label].backward()
        maps.append(at.grad[0])
    return torch.stack(maps)


def of_the_loss(model, x, y):
    x = x.requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)[0]


def length(v):
    return v.reshape(len(v), -1).norm(dim=1)


def in_a_loop(before, after):
    return torch.stack([(a - b).norm() / b.norm() for b, a in zip(before, after, strict=True)])


def over_a_basis(hessian):
    """The directions of an orthonormal basis give the mean over all directions exactly."""
    return torch.stack([row.square().sum() for row in hessian]).mean().sqrt()


RIGHT = [
    ("saliency", by_backward),
    ("saliency", by_autograd),
    ("saliency", one_by_one),
    ("saliency", lambda model, x, y: explain(model, x, y, "gradient")),
    ("relative_change", lambda before, after: length(after - before) / length(before)),
    ("relative_change", in_a_loop),
    ("relative_change", lambda b, a: ((a - b) ** 2).sum((1, 2, 3)).sqrt() / (b**2).sum((1, 2, 3)).sqrt()),
    ("relative_change", lambda b, a: torch.from_numpy(compare(b, a)["relative_change"])),
    ("random_meets", lambda h: (h**2).sum().sqrt() / math.sqrt(len(h))),
    ("random_meets", lambda h: torch.linalg.eigvalsh(h).square().mean().sqrt()),
    ("random_meets", lambda h: (torch.trace(h @ h) / h.shape[0]).sqrt().item()),
    ("random_meets", over_a_basis),
]
WRONG = [
    ("saliency", lambda m, x, y: by_autograd(m, x, y).abs(), "keep the sign"),
    ("saliency", of_the_loss, "of the label's logit, not of the loss"),
    ("saliency", lambda m, x, y: by_autograd(m, x, m(x).argmax(1)), "not of the predicted class's"),
    ("saliency", lambda m, x, y: by_autograd(m, x, y) / len(x), "don't average"),
    ("saliency", lambda m, x, y: x * by_autograd(m, x, y), "times x it is another method"),
    ("saliency", lambda m, x, y: by_autograd(m, x, y).sum(1), "like x and detached"),
    ("saliency", lambda m, x, y: by_autograd(m, x, y).float(), "like x and detached"),
    ("saliency", lambda m, x, y: by_autograd(m, x, y).abs().amax(1, keepdim=True), "like x and detached"),
    ("saliency", lambda m, x, y: torch.autograd.grad(m(x).sum(), x), "x.detach().requires_grad_()"),
    ("saliency", lambda m, x, y: torch.autograd.grad(m(x.requires_grad_()), x)[0], "only a number can be"),
    ("relative_change", lambda b, a: length(a - b) / length(a), "relative to the map before"),
    ("relative_change", lambda b, a: (a - b).norm() / b.norm(), "a number a sample"),
    ("relative_change", lambda b, a: length((a - b) / b), "don't take the norm of a ratio"),
    ("relative_change", lambda b, a: (length(a) - length(b)).abs() / length(b), "not of its length"),
    ("relative_change", lambda b, a: length(a - b), "divide by the size of the map"),
    ("relative_change", lambda b, a: length(a - b) ** 2 / length(b) ** 2, "norms, not their squares"),
    ("relative_change", lambda b, a: 1 - F.cosine_similarity(a.flatten(1), b.flatten(1)), "of each sample's map, (N,)"),
    ("relative_change", lambda b, a: (a - b).norm(dim=(2, 3)) / b.norm(dim=(2, 3)), "of each sample's map, (N,)"),
    ("relative_change", lambda b, a: (length(a - b) / length(b)).tolist(), "of each sample's map, (N,)"),
    ("random_meets", lambda h: torch.linalg.eigvalsh(h).abs().max(), "a random one meets all eigenvalues alike"),
    ("random_meets", lambda h: (h**2).sum().sqrt(), "each of its d entries has mean square 1/d"),
    ("random_meets", lambda h: h.norm() / len(h), "divide by √d, not by d"),
    ("random_meets", lambda h: torch.linalg.eigvalsh(h).abs().mean(), "the mean of squares comes before the root"),
    ("random_meets", lambda h: torch.linalg.eigvalsh(h).mean().abs(), "square them first"),
    ("random_meets", lambda h: (h**2).sum() / len(h), "the root mean square of ‖Hu‖"),
    ("random_meets", lambda h: h.norm(dim=1), "a number"),
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


def test_spoiling_the_inputs_spoils_nothing():
    def spoil(*args):
        for arg in args:
            if isinstance(arg, torch.Tensor) and arg.is_floating_point():
                arg.fill_(math.nan)

    for name in check.__all__:
        assert getattr(check, name)(spoil) is None
    for name, answer in RIGHT:
        assert getattr(check, name)(answer) is True
