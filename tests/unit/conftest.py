"""Fixtures of the unit tests."""

import shutil

import pytest


@pytest.fixture
def needs_compiler():
    """Skip where torch.compile cannot build its kernels."""
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")):
        pytest.skip("torch.compile on the CPU needs a C++ compiler (g++, clang++ or MSVC): none found")
