"""Fixtures of the unit tests."""

import importlib
import shutil
import warnings

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


@pytest.fixture
def shipped(monkeypatch, tmp_path):
    """An empty folder for the runs that are shipped."""
    from lcnn_utils.experiments import runs

    monkeypatch.setattr(runs, "SHIPPED", tmp_path / "shipped")
    return tmp_path / "shipped"


@pytest.fixture
def results(store, monkeypatch):
    """No tables but those that the test stores; the folder of these."""
    module = importlib.import_module("lcnn_utils.experiments.results")  # whose name in the package is a function
    monkeypatch.setattr(module, "RESULTS", store / "shipped results")
    return store / "results"


@pytest.fixture
def no_training(monkeypatch):
    """From ``no_training()`` on, a step of training fails the test."""
    from lcnn_utils.training import OBJECTIVES

    def refuse():
        for method in OBJECTIVES:
            monkeypatch.setitem(OBJECTIVES, method, lambda *_, **__: pytest.fail("it was trained again"))

    return refuse


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """One thread a module, whatever a test before it set."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def drawing(monkeypatch, tmp_path):
    """Figures are drawn without a screen, in our look, warn of nothing, and save nothing."""
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure

    from lcnn_utils.lab import use_style

    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: pytest.fail("a figure function saved"))
    monkeypatch.chdir(tmp_path)
    backend = plt.get_backend()
    plt.switch_backend("agg")
    with plt.rc_context(), warnings.catch_warnings():
        use_style()
        warnings.simplefilter("error")
        yield
    plt.close("all")
    plt.switch_backend(backend)
    assert not list(tmp_path.iterdir())
