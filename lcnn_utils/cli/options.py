"""What several commands share: fields of a recipe given as NAME=VALUE, and a port to listen on."""

from __future__ import annotations

import dataclasses
import socket


def parsed(changes: tuple[str, ...]) -> dict[str, object]:
    """``("lr=0.2", "augment=true")`` → ``{"lr": 0.2, "augment": True}``, each value of its field's type (ValueError: no
    such field, or another type). Dataset, method and seed have options of their own."""
    from ..lab import check_choice
    from ..training import Recipe

    defaults = dataclasses.asdict(Recipe())
    kinds = {name: bool if value is None else type(value) for name, value in defaults.items()}
    values: dict[str, object] = {}
    for change in changes:
        name, _, text = change.partition("=")
        kind = kinds[check_choice(name, tuple(kinds), "field of a recipe")]
        if name in ("dataset", "method", "seed"):
            raise ValueError(f"{change}: the command has an option of its own for the {name}")
        try:
            values[name] = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError):
            what = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
            raise ValueError(f"{change}: write {name}=VALUE, where VALUE is {what}") from None
    return values


def require_free(port: int, way_out: str) -> None:
    """Raise an OSError unless a program could listen on ``port`` of this machine."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise OSError(f"port {port} cannot be used ({error}): {way_out}") from None
