"""figures/README.md: every figure and table with its description, what it says and what made it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..lab import write_text
from . import records
from .caption import Caption
from .captions import SECTIONS

HEAD = """# Figures and tables

Everything here, this page too, is made by `make figures` (or `lcnn figures`) on a CPU, offline: what is missing, or
whose code or data has changed. `lcnn figures --all` makes everything anew, `lcnn figures --only NAME` what makes this
figure or table. Beside each of them, NAME.json says what produced it.
"""


def write(folder: Path) -> list[Path]:
    """Write the page of a folder if it changed; returns it if so.

    Raises:
        OSError: the folder cannot be written.
    """
    path, new = folder / "README.md", text(folder)
    old = path.read_text(encoding="utf-8") if path.is_file() else None
    return [] if new == old else [write_text(path, new)]


def text(folder: Path) -> str:
    """The page, of those figures and tables with a caption whose files are all there."""
    known, parts = records.read(folder), [HEAD]
    for title, captions in SECTIONS.items():
        there = [name for name in captions if name in known and records.complete(folder, name)]
        if there:
            parts.append(f"## {title}\n")
            parts += [_entry(folder, name, captions[name], known[name]) for name in there]
    return "\n".join(parts)


def _entry(folder: Path, name: str, caption: Caption, record: dict[str, Any]) -> str:
    if (folder / f"{name}.png").is_file():
        body, links = f"![{caption.alt}]({name}.png)", {"SVG": "svg", "provenance": "json"}
    else:
        table = (folder / f"{name}.md").read_text(encoding="utf-8")
        body, links = f"{caption.alt}\n\n{table.rstrip()}", {"CSV": "csv", "LaTeX": "tex", "provenance": "json"}
    files = ", ".join(f"[{label}]({name}.{end})" for label, end in links.items())
    return f"### {caption.title}\n\n{body}\n\n*{caption.reading}*\n\n{_source(record)}: {files}\n"


def _source(record: dict[str, Any]) -> str:
    """How it was made: the command, then dataset, seeds and source, where its record says them."""
    seeds = record.get("seeds")
    facts = [str(record[key]) for key in ("dataset", "source") if record.get(key) not in (None, "none")]
    if seeds not in (None, []):
        facts.insert(min(len(facts), 1), f"seeds {_words(seeds)}")
    return f"`{record.get('made_by', 'lcnn figures')}`" + (f" ({'; '.join(facts)})" if facts else "")


def _words(seeds: Any) -> str:
    if isinstance(seeds, dict):
        return ", ".join(f"{_words(part)} ({name})" for name, part in seeds.items())
    return ", ".join(map(str, seeds)) if isinstance(seeds, list | tuple) else str(seeds)
