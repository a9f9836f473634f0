"""The last cell of a notebook under test: moves every control to its ends, or to each of its choices, and back.

What a callback raises comes out here, and fails the cell: only a kernel that hears from a browser swallows it.
"""

import ipywidgets
from ipywidgets.widgets.widget import _instances


def states(control):
    if hasattr(control, "options"):
        return [("index", i) for i in range(len(control.options))]
    return [("value", control.min), ("value", control.max)]


def go_through(controls, image):
    for control in controls:
        trait = states(control)[0][0]
        start, pictures = getattr(control, trait), set()
        for _, value in states(control):
            setattr(control, trait, value)
            pictures.add(image.value)
        assert len(pictures) > 1 or len(states(control)) == 1, f"{control.description!r} changes no picture"
        setattr(control, trait, start)
    for end in (0, -1):  # some break only together
        for control in controls:
            setattr(control, *states(control)[end])


moved = []
for box in [widget for widget in _instances.values() if isinstance(widget, ipywidgets.VBox)]:
    images = [child for child in box.children if isinstance(child, ipywidgets.Image)]
    if images:
        controls = [child for child in box.children if hasattr(child, "disabled")]
        go_through(controls, images[0])
        moved += controls
# of ipywidgets exactly those that a reader can operate can be disabled
left_out = [widget for widget in _instances.values() if hasattr(widget, "disabled") and widget not in moved]
assert not left_out, f"these belong to no explorer: {left_out}"
print(f"moved {len(moved)} controls")
