"""Runs as the last cell of a notebook under test: moves every control, and displays what happened.

An exception in a widget's callback fails no cell: ``interact`` and ``Output`` catch it and show it, a click's is caught
by the dispatcher. All of them end in IPython's ``showtraceback``, which is replaced here by one that keeps a record.
What is written to stderr meanwhile (warnings, logged exceptions) is recorded too.

Uses ``lcnn_utils.widgets.CONTROLS``, a list of (control, the Image that it redraws, or None).
"""

import contextlib
import io
import sys
import time

import IPython
import ipywidgets

record = {"prefix": sys.prefix, "executable": sys.executable, "controls": [], "raised": [], "still": [], "slowest": 0.0}
shell = IPython.get_ipython()
doing = "nothing yet"


def note(text):
    record["raised"].append(f"{doing}: {text}")


def showtraceback(exc_tuple=None, *args, **kwargs):
    kind, value = (exc_tuple or sys.exc_info())[:2]
    note(f"{getattr(kind, '__name__', kind)}: {value}")


def name_of(control):
    return f"{type(control).__name__} {getattr(control, 'description', '') or control.model_id[:6]}"


def perform(what, action):
    """Do one thing to a control as a reader would, and record whatever it raises or writes to stderr."""
    global doing
    doing, written, began = what, io.StringIO(), time.perf_counter()
    with contextlib.redirect_stderr(written):
        try:
            action()
        except Exception as error:
            note(f"{type(error).__name__}: {error}")
    record["slowest"] = max(record["slowest"], time.perf_counter() - began)
    # a progress bar is rewritten with \r; anything else there is a warning or a traceback
    if text := "\n".join(line for line in written.getvalue().splitlines() if line.strip() and "%|" not in line):
        note(f"on stderr: {text.strip().splitlines()[-1]}")


def ends(control):
    """The states of a control to try: (trait, value) of both ends, of each choice, of on and off."""
    if isinstance(control, ipywidgets.SelectMultiple):
        return [("index", ()), ("index", tuple(range(len(control.options))))]
    if hasattr(control, "options"):
        return [("index", i) for i in range(len(control.options))]
    if isinstance(control.value, bool):
        return [("value", False), ("value", True)]
    if hasattr(control, "base"):  # a logarithmic slider: min and max are exponents
        return [("value", control.base**control.min), ("value", control.base**control.max)]
    if isinstance(control.value, tuple):
        middle = type(control.value[0])((control.min + control.max) / 2)
        return [("value", (control.min, middle)), ("value", (middle, control.max))]
    if hasattr(control, "min") and hasattr(control, "max"):
        return [("value", control.min), ("value", control.max)]
    raise TypeError(f"the test knows no ends of a {type(control).__name__}")


def picture(image):
    """The bytes that an Image shows now, which must be a PNG."""
    data = bytes(image.value)
    if not data.startswith(b"\x89PNG"):
        note(f"the image holds no PNG but {data[:8]!r}")
    return data


def go_through(control, image):
    """Bring a control to each of its states and back; record it as still if its picture is always the same."""
    name, seen = name_of(control), set()
    if isinstance(control, ipywidgets.Button):
        perform(f"{name}, clicked", control.click)
        return
    try:
        states = ends(control)
    except TypeError as error:
        note(str(error))
        return
    trait = states[0][0]
    start = getattr(control, trait)
    for _, value in states:
        perform(f"{name} → {value!r}", lambda value=value: setattr(control, trait, value))
        if image is not None:
            seen.add(picture(image))
    perform(f"{name} back → {start!r}", lambda: setattr(control, trait, start))
    if image is not None and len(states) > 1 and len(seen) < 2:
        record["still"].append(name)


def corners(controls):
    """Bring all controls of one image to their first, then to their last state: some break only together."""
    for end in (0, -1):
        for control in controls:
            trait, value = ends(control)[end]
            perform(
                f"all to an end, {name_of(control)} → {value!r}",
                lambda control=control, trait=trait, value=value: setattr(control, trait, value),
            )


module = sys.modules.get("lcnn_utils.widgets")
pairs = list(module.CONTROLS) if module is not None else []
shell.showtraceback, keep = showtraceback, shell.showtraceback
try:
    for control, image in pairs:
        record["controls"].append({"name": name_of(control), "id": control.model_id, "redraws": image is not None})
        go_through(control, image)
    movable = [(c, i) for c, i in pairs if i is not None and not isinstance(c, ipywidgets.Button)]
    for image in {id(i): i for _, i in movable}.values():
        with contextlib.suppress(TypeError):  # of an unknown kind: noted above
            corners([control for control, own in movable if own is image])
finally:
    shell.showtraceback = keep
IPython.display.display({"application/vnd.lcnn.probe+json": record}, raw=True)
