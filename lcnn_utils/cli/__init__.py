"""The command ``lcnn``."""

from .commands import main as main
