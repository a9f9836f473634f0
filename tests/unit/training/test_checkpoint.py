"""States on disk: what is written comes back, what is damaged is named, and one process at a time trains a recipe."""

import contextlib
import os
import threading

import pytest
import torch

from lcnn_utils.training import Recipe, fit_recipe, state_path
from lcnn_utils.training.checkpoint import locked, read, write

pytestmark = pytest.mark.usefixtures("store")
MOONS = Recipe(dataset="moons", method="lcnn", model="mlp", width=4, epochs=3)


def test_what_is_written_is_read(tmp_path):
    tensors = {"double": torch.randn(3, 4).double(), "scalar": torch.tensor(7), "none": torch.zeros(0, 3)}
    path, metadata = tmp_path / "new" / "a.safetensors", {"one": "1", "text": '{"é": [0.1, null]}'}
    write(path, tensors, metadata)
    found, texts = read(path)
    assert texts == metadata
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    assert os.listdir(path.parent) == ["a.safetensors"]


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "foreign": lambda path: write(path, {"weight": torch.zeros(3)}, {"epoch": "1", "history": "[]"}),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of MOONS: the bytes of its state."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LCNN_STORE", str(tmp_path_factory.mktemp("trained")))
        fit_recipe(MOONS, progress=False)
        return state_path(MOONS).read_bytes()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_named_with_the_way_out(damage, trained):
    path = state_path(MOONS)
    path.parent.mkdir(parents=True)
    path.write_bytes(trained)
    DAMAGES[damage](path)
    damaged = path.read_bytes()
    with pytest.raises(RuntimeError, match=r"delete it.*resume=False") as raised:
        fit_recipe(MOONS, progress=False)
    assert str(path) in str(raised.value)
    assert path.read_bytes() == damaged, "nothing of the user's is overwritten"


def test_who_waits_says_so_and_what_fails_gives_its_lock_back(tmp_path, capsys):
    path, is_held, free, order = tmp_path / "some-run.safetensors", threading.Event(), threading.Event(), []

    def hold():
        with locked(path):
            is_held.set()
            free.wait(10)
            order.append("given back")

    holder = threading.Thread(target=hold)
    holder.start()
    is_held.wait(10)
    threading.Timer(0.2, free.set).start()
    with contextlib.suppress(ZeroDivisionError), locked(path):
        order.append("got")
        raise ZeroDivisionError
    holder.join()
    with locked(path):
        order.append("again")
    assert order == ["given back", "got", "again"]
    assert "waiting for it" in capsys.readouterr().out
