"""Shared by all tests: the real CIFAR images, where this machine has them or can rebuild them without a network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two spinning threads on shared cores cost far more

PROJECT = Path(__file__).resolve().parent.parent
FOLDERS = ("cifar-10-batches-py", "cifar-100-python")


@pytest.fixture(scope="session")
def cifar_root() -> Path:
    """Folder with CIFAR-10 and CIFAR-100: ``LCNN_DATA``, or ``data/`` (rebuilt from packed copies beside the checkout).

    The test is skipped where neither has them; nothing is downloaded.
    """
    packed = PROJECT.parent / "shared" / "data" / "unpack.py"
    root = Path(os.environ.get("LCNN_DATA") or PROJECT / "data").expanduser()
    if not all((root / folder).is_dir() for folder in FOLDERS):
        root = PROJECT / "data"
        if packed.exists():
            done = subprocess.run([sys.executable, packed, "--out", root], capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"unpacking CIFAR failed: {done.stderr}"
    if not all((root / folder).is_dir() for folder in FOLDERS):
        pytest.skip("CIFAR is not on this machine: run `lcnn data cifar10` and `lcnn data cifar100`, or set LCNN_DATA")
    return root
