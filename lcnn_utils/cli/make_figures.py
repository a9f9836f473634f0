"""``lcnn figures``: run the steps of ``figure_steps``, save what they make, and write the page that shows it, in the
order of ``captions.toml`` and with its texts."""

from __future__ import annotations

import json
import os
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import matplotlib
from matplotlib.figure import Figure
from tqdm import tqdm

from ..experiments.results import RESULTS
from ..figures.style import save, save_table
from ..files import PROJECT, write_text
from ..lab import check_choice, one_thread, use_style
from ..measurements.paper import NAME, datasets
from . import figure_steps

HEAD = """# Figures and tables

Everything here, this page too, is made by `make figures` (or `lcnn figures`) on a CPU, offline, in about three minutes;
`lcnn figures --only NAME` makes one figure or table, with what is made together with it. Beside each of them, NAME.json
says what produced it.
"""


@dataclass(frozen=True)
class Entry:
    """A figure or table of the page, the step that makes it, and what ``captions.toml`` says of it."""

    section: str
    step: str
    name: str
    title: str
    alt: str
    reading: str


def entries() -> list[Entry]:
    """All figures and tables in the order of the page; where ``captions.toml`` says DATASET, one for each dataset."""
    listed = []
    for section in tomllib.loads((Path(__file__).parent / "captions.toml").read_text(encoding="utf-8")).values():
        heading = section.pop("title")
        for step, captions in section.items():
            for name, caption in captions.items():
                title, alt, reading = (" ".join(caption[key].split()) for key in ("title", "alt", "reading"))
                for dataset in datasets() if "DATASET" in name else ["digits"]:
                    full = title.replace("DATASET", NAME[dataset])
                    listed.append(Entry(heading, step, name.replace("DATASET", dataset), full, alt, reading))
    return listed


def make(only: Sequence[str] = (), folder: Path | None = None) -> None:
    """Run the steps (those that make ``only``; ValueError: an unknown name), write what they make, and the page, into
    ``folder`` (default ``figures/``; OSError: it can't be written)."""
    if not RESULTS.is_dir():
        raise FileNotFoundError(f"{RESULTS} is missing: figures are drawn from results that come with a clone")
    folder, known = folder or PROJECT / "figures", entries()
    names = [entry.name for entry in known]
    wanted = [check_choice(name, names, "figure or table") for name in only] or names
    steps = dict.fromkeys(entry.step for entry in known if entry.name in wanted)
    matplotlib.use("agg")
    use_style()
    one_thread()
    with tempfile.TemporaryDirectory() as store, mock.patch.dict(os.environ, LCNN_STORE=store, LCNN_DEVICE="cpu"):
        try:
            for step in (bar := tqdm(steps)):
                bar.set_description(step)
                run(step, folder)
        finally:
            write_page(folder)


def run(step: str, folder: Path) -> None:
    """Save what a step makes, each figure or table as soon as it is there."""
    for name, what, about in getattr(figure_steps, step)():
        provenance = {"command": f"lcnn figures --only {name}", "step": step, **about}
        if isinstance(what, Figure):
            save(what, name, provenance, folder)
        else:
            save_table(what, name, provenance, folder)


def write_page(folder: Path) -> None:
    """Write ``README.md`` of a folder: the figures and tables that are there."""
    parts, section = [HEAD], ""
    for entry in entries():
        if (folder / f"{entry.name}.json").is_file():
            if entry.section != section:
                section = entry.section
                parts.append(f"## {section}\n")
            parts.append(shown(entry, folder / entry.name))
    write_text(folder / "README.md", "\n".join(parts), "choose another folder by --out")


def shown(entry: Entry, path: Path) -> str:
    """A figure or table with its caption, where its numbers come from, and links to its files."""
    if path.with_suffix(".png").is_file():
        body, links = f"![{entry.alt}]({entry.name}.png)", {"SVG": "svg", "provenance": "json"}
    else:
        table = path.with_suffix(".md").read_text(encoding="utf-8").rstrip()
        body, links = f"{entry.alt}\n\n{table}", {"CSV": "csv", "provenance": "json"}
    record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    words = {"dataset": "", "n": "n = ", "seeds": "seeds ", "source": ""}
    origin = "; ".join(f"{word}{record[key]}" for key, word in words.items() if key in record)
    files = ", ".join(f"[{label}]({entry.name}.{end})" for label, end in links.items())
    return f"### {entry.title}\n\n{body}\n\n*{entry.reading}*\n\n`{record['command']}` ({origin}): {files}\n"
