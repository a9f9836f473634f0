"""Every exercise: its reference passes and is right, each wrong answer gets its own hint, nothing raises."""

import importlib
import inspect
import json
import math
import re
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.func import grad
from torch.nn import Identity

from lcnn_utils import attacks, curvature, nn, saliency
from lcnn_utils.cli.copies import guide_sections, instructor_copy, source, tagged
from lcnn_utils.exercises.engine import Exercise, choice_of, exercise
from lcnn_utils.experiments import Claim
from lcnn_utils.measurements.softplus import composition
from lcnn_utils.nn.convert import _lipschitz_from
from lcnn_utils.training.objectives import gradreg, squared_gradient

PROJECT = Path(__file__).parents[3]
NOTEBOOKS = {int(path.name[:2]): path for path in PROJECT.glob("notebooks/*.ipynb")}
PAGES = ["softplus", "curvature", "bound", "lipschitz", "training", "saliency", "attacks", "paper", "own_network"]
EXERCISES: dict[str, Exercise] = {
    f"{page}.{name}": value
    for page in PAGES
    for name, value in vars(importlib.import_module(f"lcnn_utils.exercises.{page}")).items()
    if isinstance(value, Exercise)
}
OVERFLOWS = {  # answers that are nan or infinite
    "softplus.centered_softplus": lambda x, beta: ((1 + (beta * x).exp()).log() - math.log(2)) / beta,
    "softplus.derivatives": lambda x, b: ((b * x).exp() / (1 + (b * x).exp()), autograd_derivatives(x, b)[1]),
    "curvature.softmax_part": lambda z, y, g: (lambda p: p / (1 - p) * g)(z.softmax(1).gather(1, y[:, None])[:, 0]),
    "curvature.power_iteration": lambda hvp, v, n: reduce(lambda u, _: hvp(u), range(n), v).norm() ** (1 / n),
    "bound.certified_radius": lambda m, g, k: ((g**2 + 2 * k * m.clamp(min=0)).sqrt() - g) / k,
    "attacks.margin_loss": lambda z, y: (lambda rest: rest.amax(1) - rest.gather(1, y[:, None]).squeeze(1))(
        z.scatter(1, y[:, None], -math.inf)
    ),
    "attacks.project": lambda step, eps: torch.stack([s / s.norm() * s.norm().clamp(max=eps) for s in step]),
    "attacks.pgd_step": lambda x, x_adv, g, length, eps: (
        pgd_step_by_package(x, x_adv, g / g.sum().abs(), length, eps)
        + 0 * g / g.flatten(1).norm(dim=1)[:, None, None, None]
    ),
}
MISTAKES = [(name, hint, wrong) for name, check in EXERCISES.items() for hint, wrong in check.mistakes.items()]
MISTAKES += [(name, EXERCISES[name].wild, wrong) for name, wrong in OVERFLOWS.items()]


def hint_of(text: str) -> str:
    return text.split("\n  hint: ")[1]


# ------------------------------------------------------------------------------------------------- for all exercises
@pytest.mark.parametrize("name", EXERCISES)
def test_the_reference_passes_and_a_stub_is_no_attempt(name):
    check = EXERCISES[name]

    def unwritten(*args):
        raise NotImplementedError("your turn")

    verdict, text = check.judge(check.reference)
    assert verdict is True, text
    for stub in (unwritten, lambda *args: None, lambda *args: ..., lambda *args: (None, None)):
        assert check.judge(stub)[0] is None


@pytest.mark.parametrize(("name", "hint", "wrong"), MISTAKES)
def test_a_wrong_answer_gets_its_own_hint(name, hint, wrong):
    verdict, text = EXERCISES[name].judge(wrong)
    assert verdict is False
    assert hint_of(text) == hint


def test_every_hint_for_nan_has_an_answer_that_gets_it():
    assert {name for name, check in EXERCISES.items() if check.wild} == set(OVERFLOWS)


@pytest.mark.parametrize("name", EXERCISES)
def test_nonsense_is_wrong(name):
    for value in ("text", (1,), [None, 2], np.zeros(3), torch.zeros(3, 5, 7), math.nan, 1j, 10**400, True, object()):
        verdict, text = EXERCISES[name].judge(lambda *args, value=value: value)
        assert verdict is False, value
        assert "expected" in text
    for other in (None, 3, "f", torch.ones(3), lambda: 0):
        verdict, text = EXERCISES[name].judge(other)
        assert verdict is False
        assert "it raised TypeError" in text


@pytest.mark.parametrize("name", EXERCISES)
def test_the_statement_has_the_arguments_names_and_a_solution_that_is_there(name):
    check = EXERCISES[name]
    parameters = inspect.signature(check.reference).parameters
    assert check.statement.startswith(f"f({', '.join(parameters)}) → ")
    assert inspect.getdoc(check).startswith("f("), "which `?` shows"
    assert "Solution" not in inspect.getdoc(check)
    for dotted in re.findall(r"``lcnn_utils\.([\w.]*\w)", check.solution):
        *path, last = dotted.split(".")
        assert hasattr(importlib.import_module(".".join(["lcnn_utils", *path])), last), dotted


def test_inputs_spoiled_by_a_student_and_the_random_state_do_not_matter():
    def spoil(*args):
        for arg in args:
            for tensor in arg.parameters() if isinstance(arg, torch.nn.Module) else [arg]:
                if isinstance(tensor, torch.Tensor) and tensor.is_leaf and tensor.is_floating_point():
                    tensor.data.fill_(math.nan)

    state = torch.random.get_rng_state()
    for check in EXERCISES.values():
        assert check.judge(spoil)[0] is None
        assert check.judge(check.reference)[0] is True
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(("number", "page"), list(enumerate(PAGES, start=1)))
def test_the_notebook_uses_each_exercise_of_its_file(number, page):
    cells = json.loads(NOTEBOOKS[number].read_text(encoding="utf-8"))["cells"]
    source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert f"from lcnn_utils.exercises import {page} as check" in source
    used = re.findall(r"^(\w+) = check\.use\(my_(\w+)\)$", source, re.MULTILINE)
    assert [f"{page}.{name}" for name, _ in used] == [name for name in EXERCISES if name.startswith(f"{page}.")]
    for name, student in used:
        assert name == student
        stub = re.search(rf"^def my_{name}\((.*)\):", source, re.MULTILINE)[1].split(", ")
        assert stub == list(inspect.signature(EXERCISES[f"{page}.{name}"].reference).parameters)


@pytest.mark.parametrize(("number", "page"), list(enumerate(PAGES, start=1)))
def test_the_guide_answers_every_predict_and_its_solutions_pass(number, page, capsys):
    notebook = json.loads(NOTEBOOKS[number].read_text(encoding="utf-8"))
    copy = instructor_copy(notebook, guide_sections(PROJECT)[f"{number:02}"])
    assert all(source(cell).startswith("*Expected answer:*") for cell in tagged(copy, "answer"))
    code = [source(cell) for cell in copy["cells"] if cell["cell_type"] == "code"]
    names: dict = {}
    exec(code[0], names)
    for cell in code:
        if "check.use(" in cell:
            exec(cell, names)
    verdicts = re.findall(r"^(.) my_(\w+):", capsys.readouterr().out, re.MULTILINE)
    assert verdicts == [("✓", name.split(".")[1]) for name in EXERCISES if name.startswith(f"{page}.")]


# ---------------------------------------------- independent right answers: closed forms, autograd, loops, the package
norm = lambda matrix: torch.linalg.matrix_norm(matrix, 2)


def autograd_derivatives(x, beta):
    x = x.detach().requires_grad_()
    (first,) = torch.autograd.grad(nn.centered_softplus(x, beta).sum(), x, create_graph=True)
    return first, torch.autograd.grad(first.sum(), x)[0]


def double_backward(f, x, v):
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(f(x), x, create_graph=True)
    return torch.autograd.grad(gradient @ v, x)[0]


def lanczos_step_by_projection(hvp, v, v_before, beta):
    """Without the recurrence: all of span(v, v_before) is projected out of Hv."""
    plane = torch.linalg.qr(torch.stack([v, v_before + 0], 1)).Q if v_before.any() else v[:, None]
    rest = hvp(v) - plane @ (plane.T @ hvp(v))
    v_next = rest / rest.norm()
    return hvp(v) @ v, v @ hvp(v_next), v_next


def lanczos_in_krylov_space(hvp, v, steps):
    """Without a tridiagonal matrix: H in an orthonormal basis of v, Hv, H²v, …"""
    krylov = [v]
    while len(krylov) < steps:
        krylov.append(hvp(krylov[-1]) / hvp(krylov[-1]).norm())
    basis = torch.linalg.qr(torch.stack(krylov, 1)).Q
    return norm(basis.T @ torch.stack([hvp(u) for u in basis.T], 1))


def bisected_radius(m, g, k):
    low, high = torch.zeros_like(m), 10 * m.clamp(min=0) / g
    for _ in range(200):
        middle = (low + high) / 2
        inside = m - g * middle - k * middle**2 / 2 > 0
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return torch.where(m > 0, low, 0)


def summed_bound(lips, curvs):
    return lips.prod(), sum(c * lips[:i].prod() ** 2 * lips[i + 1 :].prod() for i, c in enumerate(curvs))


def matrix_of(conv, shape):
    pixels = torch.eye(math.prod(shape), dtype=conv.weight.dtype).view(-1, *shape[1:])
    return F.conv2d(pixels, conv.weight, None, conv.stride, conv.padding).flatten(1).T


def adjoint_by_autograd(conv, y, shape):
    x = torch.zeros(shape, dtype=y.dtype, requires_grad=True)
    return torch.autograd.grad(conv(x), x, y)[0]  # the bias falls out


def power_step_by_matrix(conv, x):
    matrix = matrix_of(conv, x.shape)
    return F.normalize(matrix.T @ matrix @ x.flatten(), dim=0).view(x.shape)


def conv_slope_by_matrix(conv, x, steps):
    matrix = matrix_of(conv, x.shape)
    v = F.normalize(torch.linalg.matrix_power(matrix.T @ matrix, steps) @ x.flatten(), dim=0)
    return (matrix @ v).norm().item()


def package_slopes(var, gamma, eps):
    layer = nn.LipschitzBatchNorm2d(len(var), gamma, eps=eps).double()
    layer.running_var.copy_(var)
    return layer.channel_slopes()


def penalty_by_loops(log_beta, log_gamma, lambda_beta, lambda_gamma):
    """A layer at a time, |log γ| as the larger of ± log γ."""
    return sum(lambda_beta * math.e**b for b in log_beta) + sum(lambda_gamma * torch.maximum(g, -g) for g in log_gamma)


def package_objective(model, x, y, log_beta, log_gamma, lambdas):
    loss, _ = gradreg(model, x, y, lambda_grad=lambdas[2])
    return loss + penalty_by_loops(log_beta, log_gamma, *lambdas[:2])


def descended_gamma(gamma, rates, lam, momentum):
    """By gradient descent, without a sign change at 1, and then long enough for momentum to run out."""
    log_gamma, velocity = math.log(gamma), 0.0
    for rate in [*rates.tolist(), *[0.0] * 2000]:
        velocity = momentum * velocity + lam * rate
        log_gamma -= velocity
    return max(1.0, math.exp(log_gamma))


def saliency_one_by_one(model, x, y):
    x.requires_grad_()
    for pixels, label in zip(x, y, strict=True):
        model(pixels[None])[0, label].backward()
    return x.grad


def instability_by_package(model, x, y, noise):
    noisy = (noise + x).clamp(0, 1).flatten(0, 1)
    before = saliency.explain(model, x.repeat(len(noise), 1, 1, 1), y.repeat(len(noise)))
    after = saliency.explain(model, noisy, y.repeat(len(noise)))
    change = torch.from_numpy(saliency.compare(before, after)["relative_change"])
    return change.view(len(noise), len(x)).mean(0)


def softmax_part_by_loops(logits, y, grad_norm):
    """p/(1 − p) in float64, 1 − p as the sum of the other probabilities."""
    odds = []
    for row, label in zip(logits.double().softmax(1).tolist(), y.tolist(), strict=True):
        odds.append(row[label] / sum(row[:label] + row[label + 1 :]))
    return (torch.tensor(odds) * grad_norm).float()


def pgd_step_by_package(x, x_adv, gradient, length, eps):
    radius = torch.full((len(x),), eps).to(x)
    step = x_adv + length * attacks.direction(gradient, "l2") - x
    return attacks.move(x, attacks.project(step, radius, "l2"), (0.0, 1.0))


def attack_one_by_one(model, x, y, eps, lengths):
    ends = []
    for start, label in zip(x.split(1), y.split(1), strict=True):
        end = start
        for length in lengths:
            gradient = grad(lambda at, label=label: -curvature.scalar_of(model(at), label, "margin").sum())(end)
            end = pgd_step_by_package(start, end, gradient, length, eps)
        ends.append(end)
    return torch.cat(ends)


def verdict_by_claims(low, high, at_least, at_most):
    code = {"holds": 1.0, "fails": -1.0, "open": 0.0, "one run": 0.0}
    rows = torch.stack([low, high, at_least, at_most], 1).tolist()
    return torch.tensor([code[Claim("", "", "", "", c, d).verdict((0.0, a, b))] for a, b, c, d in rows])


def fold_norm_by_convert(sigma, mean, var, eps):
    before = torch.nn.BatchNorm2d(len(mean), eps).double()
    before.load_state_dict({"running_mean": mean, "running_var": var}, strict=False)
    after = _lipschitz_from(before, 1e3, sigma)
    return after.running_mean, after.running_var, after.eps


def chosen_by_sorting(lambdas, accuracy, n):
    best = max(accuracy.tolist())
    for lam, share in sorted(zip(lambdas.tolist(), accuracy.tolist(), strict=True), reverse=True):
        if n * (best - share) ** 2 <= best * (1 - best):
            return lam


RIGHT = {
    "softplus.centered_softplus": nn.centered_softplus,
    "softplus.derivatives": autograd_derivatives,
    "softplus.beta_for_curvature": lambda c: np.float32(4 * c),
    "softplus.next_exponential": lambda E, centered: math.exp(math.log1p(E) - math.log(2) * centered),
    "softplus.plain_stack": lambda x, beta, n: composition(x, beta, n)[0],
    "softplus.centered_stack": lambda x, beta, n: composition(x, beta, n)[1],
    "curvature.hessian_vector_product": double_backward,
    "curvature.power_iteration": lambda hvp, v, steps: norm(torch.stack([hvp(e) for e in torch.eye(len(v)).to(v)])),
    "curvature.lanczos_step": lanczos_step_by_projection,
    "curvature.lanczos": lanczos_in_krylov_space,
    "curvature.softmax_part": softmax_part_by_loops,
    "bound.layer_term": lambda a, g, b: sum(g[k] * b[k] * torch.outer(a[k], a[k]) for k in range(len(g))),
    "bound.composition": lambda lg, cg, lh, ch: [torch.tensor(lg * lh), lg * ch + lh * cg * lh],
    "bound.stack_bound": summed_bound,
    "bound.certified_radius": bisected_radius,
    "lipschitz.adjoint": adjoint_by_autograd,
    "lipschitz.power_step": power_step_by_matrix,
    "lipschitz.conv_slope": conv_slope_by_matrix,
    "lipschitz.batchnorm_slopes": package_slopes,
    "lipschitz.block_bound": lambda b, s, averaged: (math.prod(b) + math.prod(s)) / (8**0.5 if averaged else 1),
    "training.layer_penalty": penalty_by_loops,
    "training.gradient_penalty": lambda losses, x: squared_gradient(Identity(), x, x, losses.mean(), "exact")[1],
    "training.lowest_gamma": descended_gamma,
    "training.objective": package_objective,
    "saliency.saliency": saliency_one_by_one,
    "saliency.relative_change": lambda b, a: torch.from_numpy(saliency.compare(b, a)["relative_change"]),
    "saliency.instability": instability_by_package,
    "saliency.random_meets": lambda h: torch.stack([row.square().sum() for row in h]).mean().sqrt(),  # over a basis
    "attacks.project": lambda step, eps: torch.stack([s if s.norm() <= eps else eps * s / s.norm() for s in step]),
    "attacks.pgd_step": pgd_step_by_package,
    "attacks.attack": attack_one_by_one,
    "attacks.margin_loss": lambda logits, y: -curvature.scalar_of(logits, y, "margin"),
    "paper.mean_curvature": lambda g, h, eps: sum(hi / (gi + eps) for gi, hi in zip(g, h, strict=True)) / len(g),
    "paper.inside": lambda a, s, b, t: (a - b) ** 2 <= s**2 + t**2,
    "paper.verdict": verdict_by_claims,
    "own_network.fold_norm": fold_norm_by_convert,
    "own_network.standard_error": lambda p, n: (n * p * (1 - p)) ** 0.5 / n,  # of a count, as a share
    "own_network.within_one_error": lambda p, n: n * (p.max() - p) ** 2 <= p.max() * (1 - p.max()),
    "own_network.choose_lambda": chosen_by_sorting,
}


@pytest.mark.parametrize(("name", "answer"), RIGHT.items())
def test_an_independent_right_answer_passes(name, answer):
    verdict, text = EXERCISES[name].judge(answer)
    assert verdict is True, text


def test_all_have_an_independent_answer_and_the_curvature_is_the_packages():
    assert RIGHT.keys() == EXERCISES.keys()
    net, x = nn.mlp((4, 6, 3), lcnn=True).eval(), torch.rand(9, 4)
    measured = curvature.geometry(net, x, torch.arange(9) % 3, method="exact")
    mean = EXERCISES["paper.mean_curvature"].reference(measured.grad_norm, measured.hessian_norm, 1e-6)
    torch.testing.assert_close(mean, measured.curvature.mean())


@pytest.mark.parametrize("averaged", [False, True])
def test_the_bound_of_a_block_is_attained_and_never_broken(averaged):
    """By linear maps in parallel: by multiples of the identity; and random ones stay below."""
    bound, by = EXERCISES["lipschitz.block_bound"].reference, 2 * math.sqrt(2) if averaged else 1
    for seed in range(50):
        a, b, c = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        slopes = torch.stack([norm(a), norm(b)])
        assert norm((a @ b + c) / by) <= bound(slopes, norm(c)[None], averaged) * (1 + 1e-12)
        attained = norm((slopes.prod() + 1) * torch.eye(4, dtype=torch.float64) / by)
        torch.testing.assert_close(attained, bound(slopes, slopes[:0], averaged))


# ------------------------------------------------------------------------------------------------------ the engine
@exercise(inputs=[(torch.tensor([1.0, 2.0, 3.0]), 2)], mistakes={"not cubed": lambda x, n: x**3}, wild="look at nan")
def power(x, n):
    """f(x, n) → xⁿ. Solution: ``**``."""
    return x**n


def raising(error):
    def answer(*args):
        raise error

    return answer


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("oh"), KeyError(), SystemExit(2), GeneratorExit(), RecursionError()]
)
def test_what_a_student_raises_is_reported_with_what_was_expected_and_the_line(error):
    verdict, text = power.judge(raising(error))
    assert verdict is False
    assert f"{type(error).__name__}" in text
    assert "expected a float32 tensor of shape (3,)" in text
    assert "in the line `raise error`" in text
    assert "hint" not in text


def test_an_interrupt_interrupts():
    with pytest.raises(KeyboardInterrupt):
        power.judge(raising(KeyboardInterrupt()))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda x, n: x[:2] ** n, "got a float32 tensor of shape (2,)"),
        (lambda x, n: x.double() ** n, "the type of its entries is to be torch.float32"),
        (lambda x, n: (x**n,), "of torch.autograd.grad, with an entry for each input"),
        (lambda x, n: (x**n, None), "got a tuple in which a part is missing"),
        (lambda x, n: x.norm(), "along which dimension did you sum?"),
        (lambda x, n: x[:, None] ** n - 0 * x, "too many dimensions"),
        (lambda x, n: x**n + torch.tensor([0, 0, 1]), "expected [1, 4, 9]\n  got      [1, 4, 10]   (1 of 3 entries"),
        (lambda x, n: x**n + 1e-3, "nearly right"),
        (lambda x, n: x**n / 0, "look at nan"),
        (lambda x, n: (x**n).numpy(), "stay with torch"),
        (lambda x, n: x.pow_(n), "your function changes x itself"),
        (lambda x, n: x.unsqueeze_(0).pow(n)[0], "your function changes x itself"),
        (lambda x, n: math.exp(x), "math's functions take single numbers"),
        (lambda x, n: torch.nn.Module()(x), "NotImplementedError"),  # torch's own: no stub
    ],
)
def test_what_is_wrong_is_said(answer, said):
    verdict, text = power.judge(answer)
    assert verdict is False
    assert said in text
    assert text.startswith("for x = [1, 2, 3] (float32), n = 2:")


def test_of_a_large_answer_the_worst_entry_is_shown():
    large = exercise(inputs=[(torch.arange(20.0).view(4, 5), 2)], mistakes={})(power.reference)
    text = large.judge(lambda x, n: x**n + (x == 7))[1]
    assert "expected 49, got 50, at x = 7, entry [1, 2] (1 of 20 entries differ)" in text


def test_use_gives_the_students_function_back_once_it_is_right(capsys):
    def other(x, n):
        return x**n

    use = choice_of(power)
    answers = {"✓": lambda x, n: x**n, "✗": lambda x, n: x**3, "·": lambda x, n: ...}
    for mark, student in answers.items():
        student.__name__ = "my_power"
        assert use(student) is (student if mark == "✓" else power.reference)
        assert capsys.readouterr().out.startswith(f"{mark} my_power: ")
    with pytest.raises(ValueError, match="unknown function 'other': known are my_power"):
        use(other)


def test_answers_of_other_forms_pass_and_a_stub_may_be_without_source():
    assert power.judge(lambda x, n: (x.requires_grad_() ** n).to_sparse())[0] is True
    with torch.no_grad():
        assert EXERCISES["curvature.hessian_vector_product"].judge(double_backward)[0] is True
    scope = {}
    exec("def stub(x, n):\n    raise NotImplementedError", scope)
    assert power.judge(scope["stub"])[0] is None


def test_a_number_without_a_graph_is_no_error_of_the_student():
    check = EXERCISES["training.layer_penalty"]
    for answer in (lambda *args: check.reference(*args).item(), lambda *args: check.reference(*args).detach()):
        verdict, text = check.judge(answer)
        assert verdict is False
        assert "stay with tensors" in text
        assert "raised" not in text


def test_a_derivative_is_checked_where_the_value_is_right():
    right = EXERCISES["training.gradient_penalty"].reference
    answer = lambda losses, x: losses.mean() + (right(losses, x) - losses.mean()).detach()
    assert EXERCISES["training.gradient_penalty"].judge(answer)[0] is False
