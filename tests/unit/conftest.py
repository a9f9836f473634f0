"""Fixtures of the unit tests."""

import shutil

import pytest
import torch


@pytest.fixture
def needs_compiler():
    """Skip where torch.compile cannot build its kernels."""
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")):
        pytest.skip("torch.compile on the CPU needs a C++ compiler (g++, clang++ or MSVC): none found")


@pytest.fixture
def store(monkeypatch, tmp_path):
    """A fresh folder for what the test trains, on the CPU."""
    monkeypatch.setenv("LCNN_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("LCNN_DEVICE", "cpu")
    return tmp_path / "store"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """One thread a module, whatever a test before it set."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
