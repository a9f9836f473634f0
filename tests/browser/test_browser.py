"""Two notebooks in JupyterLab, in a real browser: a slider moved by keyboard, and an exercise typed in."""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect, sync_playwright

from lcnn_utils.cli.commands import lab_command, lab_environment

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
pytestmark = pytest.mark.slow
SECONDS = 120  # that anything here may take
IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
FLAGS = ["--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]
SETTINGS = {
    # every cell is rendered, not only those on the screen
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},
}
READY = """() => {
    const kernel = window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel;
    return kernel?.connectionStatus === 'connected' && kernel.status === 'idle';
}"""


def environment(home: Path) -> dict[str, str]:
    """An environment in which JupyterLab sees nothing of the user's own, with our settings in it."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "IPYTHON", "LCNN_"))}
    env["JUPYTER_CONFIG_PATH"] = lab_environment()["JUPYTER_CONFIG_PATH"]
    for name in ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR"):
        env[f"JUPYTER_{name}"] = str(home / name.lower())
    for name in ("SETTINGS_DIR", "WORKSPACES_DIR"):
        env[f"JUPYTERLAB_{name}"] = str(home / name.lower())
    env |= {"HOME": str(home), "IPYTHONDIR": str(home / "ipython"), "MPLCONFIGDIR": str(home / "mpl")}
    env |= {"LCNN_FAST": "1", "LCNN_STORE": str(home / "store"), "LCNN_DATA": str(home / "no-datasets")}
    for name, value in SETTINGS.items():
        file = home / "settings_dir" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(value), encoding="utf-8")
    return env


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    """JupyterLab as ``lcnn lab`` starts it, on a free port, with copies of the notebooks and a home of its own."""
    home = tmp_path_factory.mktemp("lab")
    root = shutil.copytree(NOTEBOOKS, home / "root")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    ours = [
        *("--no-browser", f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--ServerApp.ip=127.0.0.1"),
        *(f"--ServerApp.root_dir={root}", f"--IdentityProvider.token={token}", "--LabApp.expose_app_in_browser=True"),
    ]
    usual = [part for part in lab_command() if not part.startswith("--ServerApp.root_dir")]  # Jupyter takes one
    with (home / "lab.log").open("w") as log:
        process = subprocess.Popen([*usual, *ours], env=environment(home), cwd=root, stdout=log, stderr=log)
    try:
        end = time.monotonic() + SECONDS
        while time.monotonic() < end and process.poll() is None:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status?token={token}"):
                break
            time.sleep(0.1)
        else:
            pytest.fail(f"JupyterLab did not start:\n{(home / 'lab.log').read_text()[-4000:]}")
        yield f"http://127.0.0.1:{port}/lab/tree/{{}}?token={token}&reset"
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    """A page of a headless browser; without one, and only then, the tests here are skipped."""
    usual = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge")
    names = [os.environ["LCNN_BROWSER"]] if os.environ.get("LCNN_BROWSER") else usual
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no browser found: install Chromium, Chrome or Edge, or name one in LCNN_BROWSER")
    flags = [*FLAGS, *(["--no-sandbox"] if IS_ROOT and sys.platform.startswith("linux") else [])]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=flags)
        page = chromium.new_page(viewport={"width": 1200, "height": 1400})
        page.set_default_timeout(1000 * SECONDS)
        yield page
        chromium.close()


def cell_with(page: Page, code: str) -> Locator:
    """The first code cell of the open notebook in which this stands now; it may be overwritten."""
    cells = page.locator(".jp-NotebookPanel:visible .jp-CodeCell")
    texts = [cell.locator(".cm-content").all_inner_texts() for cell in cells.all()]  # of a hidden input none
    return cells.nth(next(number for number, text in enumerate(texts) if code in "".join(text)))


def run(page: Page, cell: Locator, source: str | None = None) -> Locator:
    """Type ``source`` into a cell if it is given, run the cell by keyboard, and return its outputs."""
    cell.locator(".cm-content").click()
    if source is not None:
        page.keyboard.press("Control+A")
        page.keyboard.insert_text(source)
    before = cell.locator(".jp-InputPrompt").inner_text()
    page.keyboard.press("Control+Enter")
    prompt = cell.locator(".jp-InputPrompt").element_handle()
    finished = "([prompt, before]) => /\\d/.test(prompt.innerText) && prompt.innerText !== before"
    page.wait_for_function(finished, arg=[prompt, before])
    page.wait_for_function(READY)
    return cell.locator(".jp-OutputArea-output")


def open_notebook(page: Page, url: str, name: str) -> None:
    """Open a notebook and run its imports; outputs that are stored in it are cleared first."""
    page.goto(url.format(name))
    page.wait_for_function(READY)
    page.evaluate("() => window.jupyterapp.commands.execute('notebook:clear-all-cell-outputs')")
    run(page, cell_with(page, "import"))
    run(page, cell_with(page, "setup("))


def changed(image: Locator, before: bytes) -> bytes:
    """What an image shows as soon as it is other than ``before``."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        shown = image.screenshot()
        if shown != before:
            return shown
    pytest.fail("the picture did not change")


def test_sliders(page, url):
    open_notebook(page, url, "01_softplus_and_beta.ipynb")
    cell = cell_with(page, "beta_explorer()")
    run(page, cell)
    assert page.locator(".Toastify__toast, .jp-Dialog").count() == 0, "nothing is asked"
    image, handles = cell.locator("img.widget-image"), cell.locator(".noUi-handle")
    image.wait_for()
    picture = image.screenshot()
    assert handles.count() == 3
    for handle in handles.all():
        for key in ("End", "Home"):
            handle.press(key)
            picture = changed(image, picture)
    expect(handles.first).to_have_attribute("aria-label", "β: sharpness")
    expect(handles.first).to_have_attribute("aria-valuetext", "β = 0.01")
    expect(image).to_have_attribute("alt", re.compile("β = 0.01: largest curvature 0.0025"))
    run(page, cell)
    pictures = "sum(type(thing).__name__ == 'Picture' for thing in gc.get_objects())"
    outputs = run(page, cell_with(page, "setup("), f"import gc\ngc.collect()\nprint({pictures}, 'in the kernel')")
    assert outputs.inner_text().strip() == "1 in the kernel", "run again, a cell frees what it showed"


def test_exercises(page, url):
    open_notebook(page, url, "06_saliency_stability.ipynb")
    cell = cell_with(page, "def my_relative_change")
    answer = "def my_relative_change(before, after): return {}\nrelative_change = check.use(my_relative_change)"
    wrong = run(page, cell, answer.format("(after - before).flatten(1).norm(dim=1)")).inner_text()
    assert "✗" in wrong
    assert "hint:" in wrong
    right = "(after - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)"
    assert "✓" in run(page, cell, answer.format(right)).inner_text()
