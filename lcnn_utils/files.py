"""Where the project is, and files that are written whole or not at all. Starts without torch."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

CLONE = Path(__file__).resolve().parent.parent
PROJECT = CLONE if (CLONE / "notebooks").is_dir() else Path.cwd()  # where a wheel is at work


@contextlib.contextmanager
def atomic_path(path: Path, way_out: str = "set LCNN_STORE to a folder of yours") -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` on success, delete it on failure. No reader ever
    sees a half-written file (OSError: the folder can't be written or the disk is full; names it and the way out)."""
    temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        reason = f"cannot write {path} ({error.strerror}): free some space, or {way_out}"
        raise type(error)(error.errno, reason) from error
    finally:
        with contextlib.suppress(OSError):  # replaced, or never made
            temporary.unlink()


def write_text(path: Path, text: str, way_out: str = "choose another folder") -> Path:
    """Write ``text`` to ``path`` in UTF-8, whole or not at all; see :func:`atomic_path`."""
    with atomic_path(path, way_out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path
