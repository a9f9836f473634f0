"""What the outputs of a step depend on, as one hash: the code that it uses and the data files that it reads.

Comments, docstrings and line breaks don't count, nor do versions of Python and packages: those are recorded beside
each figure, and a figure is not out of date because somebody else has a newer torch.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., object])


def reads(*patterns: str) -> Callable[[Function], Function]:
    """Declare which files of the project a step reads: ``@reads("data/results/digits_*")``."""

    def declare(step: Function) -> Function:
        step.reads = patterns  # type: ignore[attr-defined]
        return step

    return declare


def parts_of(*tables: str) -> list[str]:
    """The files of some tables of ``data/results``, for :func:`reads`."""
    return [f"data/results/{name}.{end}" for name in tables for end in ("csv", "csv.gz", "json")]


def fingerprint(step: Callable[..., object]) -> str:
    """Hash of all that decides what ``step`` makes: its code, the modules it uses, the style sheet, the data it reads.

    The same on every machine and Python.

    Raises:
        OSError: a source or data file cannot be read.
        SyntaxError: a source file is not Python.
    """
    names, code = uses(step)
    project = _package(step.__module__).parent
    files = {path for pattern in getattr(step, "reads", ()) for path in project.glob(pattern)}
    files |= set(_package(step.__module__).glob("*.mplstyle"))
    parts = sorted(code) + [f"{name} {_parsed(_source(name).read_text('utf-8'))[1]}" for name in sorted(names)]
    for path in sorted(files):
        text = path.read_bytes().replace(b"\r\n", b"\n")  # git may have changed the line ends
        parts.append(f"{path.relative_to(project).as_posix()} {_hash(text)}")
    return _hash("\n".join(parts).encode())[:16]


def uses(step: Callable[..., object]) -> tuple[set[str], set[str]]:
    """The modules of the package that a step uses, directly or not, and hashes of the definitions beside it.

    In the step's own folder only the definitions count that it uses; elsewhere a module counts as a whole, with all
    that it imports (a package's ``__init__`` only where something is taken from it). ``style``, which saves every
    output, always counts; the package's own ``__init__`` holds the version and never does.
    """
    here, top = step.__module__.rpartition(".")[0], step.__module__.partition(".")[0]
    names, code = {f"{top}.style"} if _is_module(f"{top}.style") else set(), set()
    waiting, seen = [(step.__module__, step.__name__)], set()
    while waiting:
        module, name = waiting.pop()
        if (module, name) in seen:
            continue
        seen.add((module, name))
        for definition, target in _definitions(module, name):
            if target is None:
                code.add(f"{module}.{name} {_hash(_dump(definition).encode())}")
                waiting += [(module, part.id) for part in ast.walk(definition) if isinstance(part, ast.Name)]
            elif (owner := _module_of(target)) and owner.rpartition(".")[0] == here and owner != target:
                waiting.append((owner, target.rpartition(".")[2]))
            elif owner:
                names.add(owner)
    todo = list(names)
    while todo:
        found = {owner for target in _imports(todo.pop()).values() if (owner := _module_of(target))}
        todo += found - names
        names |= found
    return names, code


def _definitions(module: str, name: str) -> Iterator[tuple[ast.AST, str | None]]:
    """What binds ``name`` at the top of a module: the statement, and its target where it is an import."""
    if target := _imports(module).get(name):
        yield ast.Pass(), target
    for node in _parsed(_source(module).read_text("utf-8"))[0].body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            if node.name == name:
                yield node, None
        elif any(isinstance(part, ast.Name) and part.id == name and isinstance(part.ctx, ast.Store)
                 for part in ast.walk(node)):  # fmt: skip
            yield node, None


def _imports(module: str) -> dict[str, str]:
    """Names that a module imports from its own package, anywhere in it → what they are, in full."""
    path = _source(module)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return _imports_of(path.read_text("utf-8"), package)


@functools.cache
def _imports_of(text: str, package: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for node in ast.walk(_parsed(text)[0]):
        if isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            found |= {alias.asname or alias.name: f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.asname or alias.name: alias.name for alias in node.names}
    return {name: target for name, target in found.items() if target.startswith(package.partition(".")[0] + ".")}


def _module_of(target: str) -> str | None:
    """The module that ``target`` is, or is defined in; None for the package itself."""
    owner = target if _is_module(target) else target.rpartition(".")[0]
    return owner if "." in owner and _is_module(owner) else None


def _is_module(name: str) -> bool:
    return _source(name).is_file()


def _source(module: str) -> Path:
    """Where the code of a module of the package is (or would be)."""
    path = _package(module).joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _package(module: str) -> Path:
    return Path(str(sys.modules[module.partition(".")[0]].__file__)).parent


@functools.cache
def _parsed(text: str) -> tuple[ast.Module, str]:
    tree = ast.parse(text)
    return tree, _hash(_dump(tree).encode())


def _dump(node: Any) -> str:
    """A syntax tree in words, without docstrings. Not ``ast.dump``, whose output differs from Python to Python."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return ""
    if isinstance(node, ast.AST):
        fields = ((name, value) for name, value in ast.iter_fields(node) if value is not None and value != [])
        return f"{type(node).__name__}({', '.join(f'{name}={_dump(value)}' for name, value in fields)})"
    return f"[{', '.join(filter(None, map(_dump, node)))}]" if isinstance(node, list) else repr(node)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
