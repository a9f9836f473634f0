"""Instant checks of the notebooks' exercises: ``from lcnn_utils.exercises import softplus as check``.

``derivatives = check.use(my_derivatives)`` compares the answers of a student's function with those of a reference,
prints a verdict (✓ right, ✗ wrong, with a hint, · not attempted yet) and returns the student's function if it is right,
otherwise the reference. Nothing that the student's code does raises out of it. ``check.derivatives?`` shows what is
asked for, ``check.derivatives??`` the reference, which is a solution.
"""

import copy
import functools
import inspect
import itertools
import operator
import os
import reprlib
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..lab import check_choice

ERRORS = {  # a part of an error's message: what it usually means
    "does not require grad": "autograd has lost track: does x require a gradient, and do you ask for the graph of it?",
    "implicitly created only for scalar": "only a number can be differentiated backward: make one of the values",
    "Boolean value of Tensor": "Python's if, min and max look at one number: which of torch's does it for each?",
    "converted to": "math's functions take single numbers, torch's take tensors",
    "'NoneType'": ".grad is None of a tensor that was computed: detach it, then let it require a gradient",
    "appears to not have been used": "the value doesn't depend on that tensor: which one did it see?",
    "scalar type": "two precisions meet: give what you make the dtype of the inputs",
    "return_types": "max and min along a dimension return values and indices",
    "for ^:": "Python writes a power as **",
    "'tuple'": "torch.autograd.grad returns a tuple, with one entry for each input",
    "must match the size": "print the shapes: beside images, one number for each sample needs dimensions of size 1",
    "dim must be a 2-tuple": "torch's norm takes one dimension, or two: flatten the others first",
    "shapes cannot be multiplied": "print the shapes: for A @ B the last size of A is the first of B",
}
SMALL = 8  # entries of an answer that is shown whole
LIBRARIES = (  # the folders of this package, of torch and its neighbours, of Python
    os.path.dirname(os.path.dirname(__file__)),
    os.path.dirname(os.path.dirname(torch.__file__)),
    os.path.dirname(os.__file__),
)


def randn(seed: int, *shape: int) -> Tensor:
    """Normal random numbers in float64, the same at each call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(seed: int, *sizes: int) -> nn.Sequential:
    """Random affine maps between these sizes, with a softplus after each but the last, in float64."""
    layers: list[nn.Module] = [nn.Flatten()]
    for number, (before, behind) in enumerate(itertools.pairwise(sizes)):
        linear = nn.utils.skip_init(nn.Linear, before, behind, dtype=torch.float64)
        linear.weight.data, linear.bias.data = randn(seed + number, behind, before), randn(seed - number - 1, behind)
        layers += [linear, nn.Softplus(beta=5)]
    return nn.Sequential(*layers[:-1])


def attempt(function: Callable, *arguments: Any) -> Any:
    """A function's answer, or the error that it raises.

    Tensors come without their graph, from any device, numbers as tensors in float64.
    """
    try:
        with torch.enable_grad():
            answer = function(*arguments)
        if isinstance(answer, Real):
            answer = torch.tensor(float(answer), dtype=torch.float64)
        return answer.detach().cpu().to_dense() if isinstance(answer, Tensor) else answer
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # quit() in a student's function is an answer, too
        return error


def message(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(error)).strip()


def student_lines(error: BaseException) -> list[str]:
    """The student's own lines that led to an error, up to a library's; empty texts where they are not known."""
    library = lambda frame: frame.filename.startswith(LIBRARIES)
    below = itertools.dropwhile(library, traceback.extract_tb(error.__traceback__))
    return [frame.line or "" for frame in itertools.takewhile(lambda frame: not library(frame), below)]


def is_absent(part: Any) -> bool:
    return part is None or part is ...


def is_stub(answer: Any) -> bool:
    """Whether a function is as the notebook has it: it returns nothing or ``...``, or raises NotImplementedError."""
    if isinstance(answer, NotImplementedError):  # torch raises it, too, in a line of its own
        lines = student_lines(answer)
        return lines != [] and (lines[-1] == "" or lines[-1].startswith("raise"))
    parts = answer if isinstance(answer, tuple) else [answer]
    return all(is_absent(part) for part in parts)


def kind(value: Any) -> str:
    """What a value is, in words: of tensors the dtype and the shape."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"a {dtype} tensor of shape {tuple(value.shape)}" if value.dim() else f"a {dtype} number"
    if isinstance(value, Real | list):
        return reprlib.repr(value)
    if isinstance(value, tuple) and any(is_absent(part) for part in value):
        return "a tuple in which a part is missing"
    return "None (is a `return` missing?)" if value is None else f"a {type(value).__name__}"


def shown(argument: Any) -> str:
    """An argument of a call: a small tensor's entries, otherwise what it is."""
    if isinstance(argument, Tensor) and argument.numel() <= SMALL:
        return f"{written(argument)} ({str(argument.dtype).removeprefix('torch.')})"
    return "a function" if inspect.isroutine(argument) else kind(argument)


def differs(before: Any, after: Any) -> bool:
    """Whether an argument is a tensor that has other entries after the call."""
    if not isinstance(before, Tensor):
        return False
    return before.shape != after.shape or not torch.allclose(before, after, rtol=0, atol=0, equal_nan=True)


def gaps(answer: Tensor, expected: Tensor) -> Tensor:
    """How far each entry is off, relative to the largest expected one; infinite where only one of both is finite."""
    answer, expected = answer.double(), expected.double()
    scale = expected.abs().nan_to_num(0, 0).max().clamp(min=1e-300)
    equal = (answer == expected) | (answer.isnan() & expected.isnan())
    return ((answer - expected).abs() / scale).nan_to_num(torch.inf).masked_fill(equal, 0)


def is_mistake(answer: Any, mistaken: Any) -> bool:
    """Whether an answer is that of a known mistake: the same numbers, not all nan or infinite, or the same error."""
    if isinstance(answer, BaseException) and isinstance(mistaken, BaseException):
        return message(answer) == message(mistaken)
    if not isinstance(mistaken, Tensor) or kind(answer) != kind(mistaken):
        return False
    return bool(mistaken.isfinite().any() and (gaps(answer, mistaken) < 1e-4).all())


def written(values: Tensor) -> str:
    """The entries of a small tensor, to five digits, in brackets as Python writes lists."""
    if values.dim():
        return f"[{', '.join(written(part) for part in values)}]"
    return str(values.item()) if values.dtype == torch.bool else format(values.item(), ".5g")


def difference(answer: Tensor, expected: Tensor, wrong: Tensor, arguments: dict[str, Any]) -> str:
    """What was expected and what was got: of a small answer all of it, otherwise the entry that is furthest off, with
    the arguments' entries that belong to it."""
    count = f"{int(wrong.sum())} of {wrong.numel()} entries differ"
    if wrong.numel() <= SMALL:
        where = f"   ({count})" if wrong.numel() > 1 else ""
        return f"expected {written(expected)}\n  got      {written(answer)}{where}"
    worst = int(gaps(answer, expected).argmax())
    entries = {"expected": expected, "got": answer}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.dim() and value.shape == answer.shape[-value.dim() :]:
            entries[f"at {name} ="] = value.expand(answer.shape)
    texts = ", ".join(f"{name} {written(values.flatten()[worst])}" for name, values in entries.items())
    index = ", ".join(str(int(i)) for i in torch.unravel_index(torch.tensor(worst), answer.shape))
    return f"{texts}, entry [{index}] ({count})"


def joined(function: Callable, *arguments: Any) -> Any:
    """The parts of the tuple that a function answers, stacked if they are alike, else in a row: an exercise's call."""
    answer = function(*arguments)
    if not isinstance(answer, tuple | list) or any(is_absent(part) for part in answer):
        return answer
    for part in answer:
        if isinstance(part, tuple | np.ndarray):
            return part
    parts = [torch.as_tensor(part, dtype=torch.float64) for part in answer]
    alike = all(part.shape == parts[0].shape for part in parts)
    return torch.stack(parts) if alike else torch.cat([part.flatten() for part in parts])


class Unusable(Exception):
    """What was expected, and why an exercise's call can do nothing with what the student's function returned."""


@dataclass(eq=False, repr=False)
class Exercise:
    """A function for students to write; :meth:`judge` compares theirs with the reference."""

    reference: Callable
    inputs: list[tuple]  # the arguments of each call
    mistakes: dict[str, Callable]  # hint: a wrong function that gets it
    wild: str = ""  # the hint for nan and infinity
    call: Callable = operator.call  # (function, *arguments) → what is compared
    compared: str = ""  # what that is, where it is not the answer itself

    def __post_init__(self) -> None:
        functools.update_wrapper(cast(Callable, self), self.reference)  # for the `?` and `??` of notebooks
        self.statement, _, self.solution = " ".join((self.reference.__doc__ or "").split()).partition(" Solution: ")
        self.__doc__ = self.statement

    def __repr__(self) -> str:
        return self.statement

    def judge(self, student: Callable) -> tuple[bool | None, str]:
        """The verdict on a student's function: right, wrong, or None: not attempted; and the text that says so."""
        for arguments in self.inputs:
            given = copy.deepcopy(arguments)
            answer = attempt(self.call, student, *given)
            if arguments is self.inputs[0] and is_stub(answer):
                missing = " (it returned None: once written, it needs a `return`)" if answer is None else ""
                return None, f"not attempted yet{missing}"
            named = dict(zip(inspect.signature(self.reference).parameters, arguments, strict=True))
            expected = attempt(self.call, self.reference, *copy.deepcopy(arguments))
            problem, hint = self.examine(answer, expected, named)
            changed = [name for name, after in zip(named, given, strict=True) if differs(named[name], after)]
            if changed and not problem:
                problem = f"the answer is right, but your function changes {' and '.join(changed)} itself"
                hint = "leave what you are given as it is: work on a copy"
            if problem:
                asked = ", ".join(f"{name} = {shown(value)}" for name, value in named.items())
                hint = self.likely_mistake(answer, expected, arguments) or hint
                return False, f"for {asked}:\n  {problem}" + (f"\n  hint: {hint}" if hint else "")
        return True, f"correct on {len(self.inputs)} inputs. Compare with {self.solution.replace('``', '')}"

    def examine(self, answer: Any, expected: Tensor, arguments: dict[str, Any]) -> tuple[str, str]:
        """What is wrong with an answer, empty if nothing is, and a hint, empty if there is none."""
        if isinstance(answer, Unusable):
            return str(answer), "stay with tensors, and keep their graph"
        if isinstance(answer, BaseException):
            line = "".join(f", in the line `{line}`" for line in student_lines(answer)[:1])
            hints = [hint for part, hint in ERRORS.items() if part in message(answer)]
            wanted = "" if self.compared and line else f"expected {kind(expected)}, but "
            return f"{wanted}it raised {message(answer)}{line}", "".join(hints[:1])
        if kind(answer) != kind(expected):
            hint = ""
            if isinstance(answer, tuple) and not any(is_absent(part) for part in answer):
                hint = "a tuple: of torch.autograd.grad, with an entry for each input, or of a comma too many?"
            elif isinstance(answer, np.ndarray):
                hint = "stay with torch"
            elif isinstance(answer, Tensor) and answer.dim() < expected.dim():
                hint = "several parts are asked for" if self.call is joined else "along which dimension did you sum?"
            elif isinstance(answer, Tensor) and answer.dim() > expected.dim():
                hint = "too many dimensions: do two shapes broadcast against each other, or is a sum missing?"
            elif isinstance(answer, Tensor) and answer.shape == expected.shape:
                hint = f"the type of its entries is to be {expected.dtype}"
            return f"{self.compared}expected {kind(expected)}, got {kind(answer)}", hint
        gap, allowed = gaps(answer, expected), 2e-5 if expected.dtype == torch.float32 else 1e-6
        if not bool((gap > allowed).any()):
            return "", ""
        problem = self.compared + difference(answer, expected, gap > allowed, arguments)
        if not bool(answer.isfinite().all()):
            return problem, self.wild or "where could it divide by 0, take the logarithm of 0, or overflow?"
        nearly = "nearly right: float32 inside, a finite difference, too few steps?"
        return problem, nearly if gap.max() < 0.01 else ""

    def likely_mistake(self, answer: Any, expected: Tensor, arguments: tuple) -> str:
        """The hint of the first known mistake that gives this answer, and not the right one; empty if there is none."""
        for hint, wrong in self.mistakes.items():
            mistaken = attempt(self.call, wrong, *copy.deepcopy(arguments))
            if is_mistake(answer, mistaken) and not is_mistake(expected, mistaken):
                return hint
        return ""


def exercise(**parts: Any) -> Callable[[Callable], Exercise]:
    """An :class:`Exercise` made of these parts and the reference below, whose docstring says what is asked for."""
    return lambda reference: Exercise(reference, **parts)


def choice_of(*exercises: Exercise) -> Callable[[Callable], Callable]:
    """``check.use`` of a notebook with these exercises: a function for the cells below, the student's if it is right.

    ``use(my_NAME)`` prints the verdict of the exercise NAME. ValueError: there is none of that name.
    """
    known = {f"my_{each.reference.__name__}": each for each in exercises}

    def use(student: Callable) -> Callable:
        name = check_choice(getattr(student, "__name__", repr(student)), tuple(known), "function")
        verdict, text = known[name].judge(student)
        mark = {True: "✓", False: "✗", None: "·"}[verdict]
        print(f"{mark} {name}: {text}" + ("" if verdict else "\n  (the cells below use the lab's)"))
        return student if verdict else known[name].reference

    return use
