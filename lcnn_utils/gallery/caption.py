"""What a figure or table is called, shows and says."""

from __future__ import annotations

from typing import NamedTuple


class Caption(NamedTuple):
    """Title; alt text of a figure, or what rows and columns of a table are; one sentence that reads it."""

    title: str
    alt: str
    reading: str
