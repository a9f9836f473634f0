"""The notebooks in JupyterLab, in a real browser: run all, move each slider by keyboard, see the picture change.

Screenshots go to ``shots/`` beside this file. One JupyterLab and one browser serve all tests here; the first of them
opens a notebook with faults on purpose, and asks whether they are seen.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import Browser, ElementHandle, JSHandle, Page, sync_playwright

from lcnn_utils.cli.commands import lab_command

HERE = Path(__file__).parent
NOTEBOOKS = sorted((HERE.parents[1] / "notebooks").glob("*.ipynb"))
IN_THE_BROWSER = [path for path in NOTEBOOKS if path.stem[:2] in ("01", "07")]  # all of them run in tests/notebooks
SHOTS = HERE / "shots"
HELPERS = (HERE / "lab.js").read_text(encoding="utf-8")
PRESSES = 16  # to measure the latency of a slider; even, so that it ends where it began
RUN_MS, KERNEL_MS, DRAW_MS, START_S = 300_000, 90_000, 30_000, 90
IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
FLAGS = [
    *("--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
    *(["--no-sandbox"] if IS_ROOT and sys.platform.startswith("linux") else []),
]
SETTINGS = {
    # no question about news over the page, no look for updates
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    # every cell is rendered, not only those on the screen
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},
}
# Once connected, the widget manager asks the kernel for its widgets, at a moment of its own. A kernel that hasn't
# imported ipywidgets yet answers "No such comm target" on the stderr of whichever cell is running then.
READY_FOR_WIDGETS = """async () => {
    await lcnn.kernel().requestExecute({ code: 'import ipywidgets', silent: true, store_history: false }).done
}"""
HANDLES = ".jp-OutputArea-output .noUi-handle"
CHOICES = ", ".join(
    f".jp-OutputArea-output {kind}"
    for kind in (
        *(".widget-dropdown select", ".widget-select select", ".widget-checkbox input"),
        *(".widget-toggle-button:not(.widget-toggle-buttons *)", ".widget-toggle-buttons", ".widget-radio"),
    )
)
PROGRESS = re.compile(r"\d+%\||\d+it \[|^stderr:\s*$")  # what tqdm writes


# ------------------------------------------------------------------------------------------- JupyterLab, browser
@dataclass(frozen=True)
class Server:
    """A running JupyterLab."""

    url: str
    token: str
    root: Path
    log: Path


def settings_and_environment(home: Path) -> dict[str, str]:
    """An environment in which JupyterLab sees nothing of the user's own, with our settings in it."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "IPYTHON", "LCNN_"))}
    folders = ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR")
    env |= {f"JUPYTER_{name}": str(home / name.lower()) for name in folders}
    env |= {f"JUPYTERLAB_{name}": str(home / name.lower()) for name in ("SETTINGS_DIR", "WORKSPACES_DIR")}
    env |= {"HOME": str(home), "IPYTHONDIR": str(home / "ipython"), "MPLCONFIGDIR": str(home / "mpl")}
    env |= {"LCNN_FAST": "1", "LCNN_STORE": str(home / "store"), "LCNN_DATA": str(home / "no-datasets")}
    for name, value in SETTINGS.items():
        file = home / "settings_dir" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(value), encoding="utf-8")
    return env


@pytest.fixture(scope="module")
def browser_path() -> str:
    """The browser to test with; without one, and only then, the tests here are skipped."""
    usual = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge")
    names = [os.environ["LCNN_BROWSER"]] if os.environ.get("LCNN_BROWSER") else usual
    if not (found := next(filter(None, map(shutil.which, names)), None)):
        pytest.skip("no browser found: install Chromium, Chrome or Edge, or name one in LCNN_BROWSER")
    return found


@pytest.fixture(scope="module")
def server(browser_path, tmp_path_factory) -> Iterator[Server]:
    """JupyterLab as ``lcnn lab`` starts it, on a free port, with copies of the notebooks and a home of its own."""
    home = tmp_path_factory.mktemp("lab")
    root = home / "root"
    root.mkdir()
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":  # whatever is seen was made here
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, root / path.name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token, log = secrets.token_hex(16), home / "lab.log"
    ours = [
        *("--ServerApp.ip=127.0.0.1", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={root}"),
        "--LabApp.expose_app_in_browser=True",
    ]
    usual = [part for part in lab_command() if not part.startswith("--ServerApp.root_dir")]  # Jupyter takes one
    command = [*usual, "--no-browser", f"--ServerApp.port={port}", "--ServerApp.port_retries=0", *ours]
    with log.open("w") as to:
        process = subprocess.Popen(
            command, env=settings_and_environment(home), cwd=root, stdout=to, stderr=subprocess.STDOUT
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for_server(f"{url}/api/status?token={token}", process, log)
        yield Server(url, token, root, log)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for_server(url: str, process: subprocess.Popen, log: Path) -> None:
    """Return as soon as JupyterLab answers; fail with its log if it ends or takes too long."""
    end = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.1)
    raise AssertionError(f"JupyterLab did not start:\n{log.read_text()[-4000:]}")


@pytest.fixture(scope="module")
def chromium(browser_path) -> Iterator[Browser]:
    """The headless browser."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=FLAGS)
        yield browser
        browser.close()


# ------------------------------------------------------------------------------------------------- one notebook
@dataclass(frozen=True)
class Slider:
    """A slider on the page."""

    label: str
    handle: ElementHandle
    images: JSHandle  # that it redraws

    @property
    def value(self) -> float:
        """Where it stands; of a logarithmic one the exponent."""
        return self.handle.evaluate("handle => lcnn.slider(handle).value")


@dataclass
class Open:
    """A notebook that is open in JupyterLab, and what went wrong on its page so far."""

    page: Page
    stem: str
    console: list[str] = field(default_factory=list)

    def wait(self, condition: str, *args: object, timeout: float = DRAW_MS) -> None:
        """Until the JavaScript condition holds."""
        self.page.wait_for_function(condition, arg=list(args), timeout=timeout, polling=50)

    def run_all(self) -> None:
        """Run every cell, and wait until the last has been run and the kernel has nothing left to do."""
        self.page.evaluate("() => { lcnn.listen(); lcnn.start(); }")
        self.wait("() => lcnn.run !== 'running'", timeout=RUN_MS)
        self.wait("() => lcnn.idle()", timeout=RUN_MS)
        assert self.problems() == []
        assert self.page.evaluate("() => lcnn.run") == "ended"
        run, code = self.page.evaluate("() => lcnn.counts()")
        assert run == code > 0, f"{run} of {code} cells were run"

    def problems(self) -> list[str]:
        """Errors on the page, in the kernel's messages (callbacks included), and in the browser's console."""
        shown = self.page.locator("[data-mime-type='application/vnd.jupyter.error']").all_inner_texts()
        stderr = self.page.locator("[data-mime-type='application/vnd.jupyter.stderr']").all_inner_texts()
        said = self.page.evaluate("() => lcnn.said")
        found = [*shown, *(f"stderr: {text}" for text in stderr), *said]
        return [text for text in found if not PROGRESS.search(text)] + self.console

    def images(self, control: ElementHandle) -> JSHandle:
        """The images that a control redraws."""
        return control.evaluate_handle("control => lcnn.images(control)")

    def pixels(self, images: JSHandle) -> str:
        """What the images show, once they have loaded."""
        return self.other(images, "", DRAW_MS) or pytest.fail("an image did not load")

    def other(self, images: JSHandle, before: str, timeout: float) -> str | None:
        """What the images show as soon as it is other than ``before``; None if that takes too long."""
        # not wait_for_function: to that, a promise is as good as its outcome
        return self.page.evaluate("([images, before, ms]) => lcnn.other(images, before, ms)", [images, before, timeout])

    def changed(self, images: JSHandle, before: str, timeout: float = DRAW_MS) -> bool:
        """Wait until the images show something else than ``before``, and the kernel is done; False if they never do."""
        found = self.other(images, before, timeout)
        self.wait("() => lcnn.idle()")
        return found is not None

    def shoot(self, control: ElementHandle, name: str) -> None:
        """A screenshot of the explorer that holds the control."""
        output = control.evaluate_handle("control => control.closest('.jp-OutputArea-output')").as_element()
        slug = re.sub(r"\W+", "-", name).strip("-")
        output.screenshot(path=SHOTS / f"{self.stem}_{slug}.png")

    def shoot_pages(self) -> int:
        """Screenshots of the whole notebook, a screenful each; returns how many."""
        panel = self.page.locator(".jp-NotebookPanel:visible .jp-WindowedPanel-outer")
        height, window = panel.evaluate("panel => [panel.scrollHeight, panel.clientHeight]")
        tops = range(0, height, max(window - 100, 100))
        for number, top in enumerate(tops, 1):
            panel.evaluate("(panel, top) => new Promise(r => { panel.scrollTop = top; requestAnimationFrame(r) })", top)
            self.page.screenshot(path=SHOTS / f"{self.stem}_page-{number:02d}.png")
        panel.evaluate("panel => { panel.scrollTop = 0 }")
        return len(tops)

    def latency(self, slider: Slider) -> list[float]:
        """Milliseconds from keydown to the new picture on the screen, for single steps to and fro."""
        place = slider.handle.evaluate("handle => lcnn.slider(handle)")
        keys = ("ArrowLeft", "ArrowRight") if place["value"] >= place["max"] else ("ArrowRight", "ArrowLeft")
        times = []
        for press in range(PRESSES):
            self.page.evaluate("([h, images]) => { lcnn.time(h, images) }", [slider.handle, slider.images])
            slider.handle.press(keys[press % 2])
            if (ms := self.page.evaluate("() => lcnn.timing")) is None:
                break  # no new picture within 10 s
            times.append(ms)
            self.wait("() => lcnn.idle()")
        return times

    def go(self, slider: Slider, key: str, end: str) -> None:
        """Press End or Home: the slider must get there, the picture must change, and nothing may go wrong."""
        before, was = self.pixels(slider.images), slider.value
        slider.handle.press(key)
        self.wait("([h, end]) => Math.abs(lcnn.slider(h).value - lcnn.slider(h)[end]) < 1e-9", slider.handle, end)
        if slider.value != was:
            drawn = self.changed(slider.images, before)
            assert self.problems() == [], f"{slider.label}: {key}"
            assert drawn, f"{slider.label}: {key} changed no picture"
        self.shoot(slider.handle, f"{slider.label}_{end}")

    def go_through(self, slider: Slider) -> None:
        """Move a slider to both ends by keyboard, and back by typing into its readout, where it has one."""
        readout = slider.handle.evaluate_handle(
            "handle => handle.closest('.jupyter-widgets').querySelector('.widget-readout')"
        ).as_element()
        start, text = slider.value, readout.inner_text().replace("\N{MINUS SIGN}", "-") if readout else ""
        for key, end in (("End", "max"), ("Home", "min"), ("End", "max")):
            self.go(slider, key, end)
        if readout and slider.value != start and "\N{EN DASH}" not in text:  # which stands between two values
            before = self.pixels(slider.images)
            readout.fill(text)
            readout.press("Enter")
            assert self.changed(slider.images, before), f"{slider.label}: typing {text} changed no picture"
            assert self.problems() == [], f"{slider.label}: typing {text}"

    def choose(self, control: ElementHandle) -> None:
        """Bring a choice to each of its states, by keyboard, and back; at least one of them must change the picture."""
        label, images = control.evaluate("control => lcnn.label(control)"), self.images(control)
        buttons = control.query_selector_all("button, input")
        acts: list[Callable[[], object]]
        if control.evaluate("control => control.tagName") == "SELECT":
            count, first = control.evaluate("control => [control.options.length, control.selectedIndex]")
            acts = [
                partial(control.select_option, index=index) for index in [*set(range(count)).difference([first]), first]
            ]
        elif buttons:  # a group, of which one is on
            on = [button.evaluate("b => b.checked || b.classList.contains('mod-active')") for button in buttons]
            acts = [
                partial(button.press, "Space") for _, button in sorted(zip(on, buttons, strict=True), key=itemgetter(0))
            ]
        else:
            acts = [partial(control.press, "Space")] * 2
        changes = 0
        for act in acts:
            before = self.pixels(images)
            act()
            changes += self.changed(images, before, timeout=5000)
            assert self.problems() == [], label
        assert changes or len(acts) < 2, f"{label}: no choice changed the picture"


@contextlib.contextmanager
def opened(server: Server, chromium: Browser, name: str) -> Iterator[Open]:
    """Open a notebook on a fresh page and wait for its kernel; end the kernel afterwards."""
    page = chromium.new_page(viewport={"width": 1200, "height": 1400})
    page.set_default_timeout(60_000)
    page.add_init_script(HELPERS)
    book = Open(page, Path(name).stem)
    page.on("pageerror", lambda error: book.console.append(f"page: {error}"))
    page.on("console", lambda message: message.type == "error" and book.console.append(f"console: {message.text}"))
    SHOTS.mkdir(exist_ok=True)
    for old in SHOTS.glob(f"{book.stem}_*.png"):
        old.unlink()
    try:
        page.goto(f"{server.url}/lab/tree/{name}?token={server.token}&reset")
        page.wait_for_selector(".jp-NotebookPanel .jp-Cell")
        book.wait("() => lcnn.panel()?.content?.widgets?.length && lcnn.idle()", timeout=KERNEL_MS)
        page.evaluate(READY_FOR_WIDGETS)
        page.evaluate("() => window.jupyterapp.shell.collapseLeft()")
        yield book
        page.evaluate("() => window.jupyterapp.serviceManager.sessions.shutdownAll()")
    except BaseException:
        with contextlib.suppress(Exception):
            page.screenshot(path=SHOTS / f"{book.stem}_failed.png")
        print(f"end of JupyterLab's log:\n{server.log.read_text()[-3000:]}")
        raise
    finally:
        page.close()


def sliders(book: Open) -> list[Slider]:
    """The visible sliders of the page."""
    handles = [handle for handle in book.page.query_selector_all(HANDLES) if handle.is_visible()]
    labels = [handle.evaluate("handle => lcnn.label(handle)") for handle in handles]
    for i, label in enumerate(labels):  # two sliders may well have the same
        if label in labels[:i]:
            labels[i] = f"{label} {i + 1}"
    return [Slider(label, handle, book.images(handle)) for label, handle in zip(labels, handles, strict=True)]


# ---------------------------------------------------------------------------------------- the tests of the test
KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}}
FAULTY = """
import io
import ipywidgets as widgets
from PIL import Image

def png(level):
    file = io.BytesIO()
    Image.new("RGB", (60, 40), (int(level) % 256, 80, 80)).save(file, "png")
    return file.getvalue()

def explorer(name, draw):
    slider, image = widgets.IntSlider(value=2, min=0, max=9, description=name), widgets.Image(value=png(2))
    slider.observe(lambda change: draw(image, change.new), "value")
    return widgets.VBox([slider, image])

def fine(image, value):
    image.value = png(20 * value)

def same(image, value):  # another file, the same picture
    image.value = png(2) + bytes([value])

def breaks(image, value):
    image.value = png(20 * value)
    if value == 9:
        raise ZeroDivisionError("only at the end")
"""


def test_faults_are_seen(server, chromium):
    """A picture that stays the same, and a callback that breaks only at one end, after drawing: both must be seen."""
    shows = ["explorer('fine', fine)", "explorer('same', same)", "explorer('breaks', breaks)"]
    cells = [new_code_cell(source) for source in (FAULTY, *shows)]
    nbformat.write(new_notebook(cells=cells, metadata=KERNEL), server.root / "faulty.ipynb")
    with opened(server, chromium, "faulty.ipynb") as book:
        book.run_all()
        fine, same, breaks = sliders(book)
        assert [slider.label for slider in (fine, same, breaks)] == ["fine", "same", "breaks"]
        book.go_through(fine)
        assert book.latency(fine)
        before = book.pixels(same.images)
        same.handle.press("End")
        assert not book.changed(same.images, before, timeout=1000)
        assert book.problems() == []
        book.go(breaks, "Home", "min")
        with pytest.raises(AssertionError, match="ZeroDivisionError: only at the end"):
            book.go(breaks, "End", "max")


def test_a_cell_that_fails_is_seen(server, chromium):
    cells = [new_code_cell("1 / 0"), new_code_cell("2")]
    nbformat.write(new_notebook(cells=cells, metadata=KERNEL), server.root / "failing.ipynb")
    with opened(server, chromium, "failing.ipynb") as book, pytest.raises(AssertionError, match="ZeroDivisionError"):
        book.run_all()


# ------------------------------------------------------------------------------------------------- the notebooks
@pytest.mark.parametrize("path", IN_THE_BROWSER, ids=lambda path: path.stem)
def test_notebook_in_the_browser(path, server, chromium, record_property):
    began = time.perf_counter()
    with opened(server, chromium, path.name) as book:
        ready = time.perf_counter()
        book.run_all()
        ran = time.perf_counter()
        pages = book.shoot_pages()
        for choice in [choice for choice in book.page.query_selector_all(CHOICES) if choice.is_visible()]:
            book.choose(choice)
        found = sliders(book)
        hidden = len(book.page.query_selector_all(HANDLES)) - len(found)
        assert found or not book.page.query_selector(".jp-OutputArea-output .jupyter-widgets"), "widgets, but no slider"
        latencies = {}
        for slider in found:
            book.shoot(slider.handle, f"{slider.label}_start")
            latencies[slider.label] = book.latency(slider)
            book.go_through(slider)
        assert book.problems() == []
    seconds = {"open": ready - began, "run": ran - ready, "move": time.perf_counter() - ran}
    print(f"\n{path.stem}: {', '.join(f'{what} {value:.1f} s' for what, value in seconds.items())}; {pages} pages; "
          f"{len(found)} sliders, {hidden} hidden")  # fmt: skip
    for key, times in latencies.items():
        middle = round(statistics.median(times)) if times else None
        record_property(f"latency_ms {key}", middle)
        print(f"  {key}: keydown to new picture {middle} ms (median of {len(times)}; "
              f"{min(times, default=0):.0f} to {max(times, default=0):.0f})")  # fmt: skip
