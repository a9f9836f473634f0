"""States on disk: what is written comes back, what is damaged is named, and one process at a time trains a recipe."""

import contextlib
import os
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

from lcnn_utils.training import Recipe, build, fit_recipe, make_optimizer, state_path
from lcnn_utils.training.checkpoint import State, digest, epochs_done, locked, read, write

pytestmark = pytest.mark.usefixtures("store")
MOONS = Recipe(dataset="moons", method="lcnn", model="mlp", width=4, epochs=3)
CNN = Recipe(dataset="digits", method="lcnn", model="resnet10", width=2, epochs=3, batch_size=512, augment=True)


def train(recipe, **options):
    return fit_recipe(recipe, progress=False, **options)


def test_what_is_written_is_read_and_every_change_is_noticed(tmp_path):
    tensors = {"double": torch.randn(3, 4).double(), "scalar": torch.tensor(7), "none": torch.zeros(0, 3)}
    path, metadata = tmp_path / "new" / "a.safetensors", {"one": "1", "text": '{"é": [0.1, null]}'}
    write(path, tensors, metadata)
    found, texts = read(path)
    assert texts == metadata
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    assert os.listdir(path.parent) == ["a.safetensors"]
    others = [digest(tensors, {"a": "texts"}), digest({"other": tensors["double"]}, {"a": "text"})]
    for name in tensors:
        others.append(digest({key: value for key, value in tensors.items() if key != name}, {"a": "text"}))
    tensors["double"][2, 3] += 1e-9
    assert len({digest(tensors, {"a": "text"}), *others}) == len(others) + 1


def test_a_state_goes_back_in_place(tmp_path):
    def state(seed) -> State:
        model = build(replace(CNN, seed=seed)).to(memory_format=torch.channels_last)
        optimizer, momenta = make_optimizer(CNN, model)
        model(torch.rand(9, 1, 8, 8)).sum().backward()
        optimizer.step()
        return State(CNN, model, momenta, torch.Generator().manual_seed(seed), torch.get_rng_state())

    one, other = state(1), state(2)
    one.history, one.about = [{"epoch": 1, "loss": 0.1 + 0.2}], {"seconds": 12.346, "made_on": [{"device": "a"}]}
    one.save(tmp_path / "state")
    everything = lambda state: (*state.model.state_dict().values(), *state.momenta)
    places = [(value.data_ptr(), value.stride()) for value in everything(other)]
    other.load(tmp_path / "state")
    assert (other.history, other.about) == (one.history, one.about)
    assert [(value.data_ptr(), value.stride()) for value in everything(other)] == places
    assert all(torch.equal(a, b) for a, b in zip(everything(one), everything(other), strict=True))
    assert any(bool(value.any()) for value in one.momenta)
    assert torch.equal(one.generator.get_state(), other.generator.get_state())
    assert (epochs_done(tmp_path / "state"), epochs_done(tmp_path / "none")) == (1, 0)
    other.recipe = replace(CNN, seed=9)
    with pytest.raises(ValueError, match="seed=0, not 9"):
        other.load(tmp_path / "state")


def edited(change):
    def damage(path):
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        change(tensors, metadata)
        save_file(tensors, path, metadata=metadata)

    return damage


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "empty": lambda path: path.write_bytes(b""),
    "the last bit": lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
    "foreign": lambda path: write(path, {"weight": torch.zeros(3)}, {"epoch": "1", "history": "[]"}),
    "no generator": edited(lambda tensors, _: tensors.pop("generator")),
    "another history": edited(lambda _, metadata: metadata.update(history="[]")),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of MOONS: the bytes of its state."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LCNN_STORE", str(tmp_path_factory.mktemp("trained")))
        train(MOONS)
        return state_path(MOONS).read_bytes()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_named_with_the_way_out(damage, trained):
    path = state_path(MOONS)
    path.parent.mkdir(parents=True)
    path.write_bytes(trained)
    DAMAGES[damage](path)
    damaged = path.read_bytes()
    with pytest.raises(RuntimeError, match=r"delete it.*resume=False") as raised:
        train(MOONS)
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
