"""States on disk: what is written comes back, what is damaged is named, and one process at a time trains a recipe."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

from lcnn_utils.training import Recipe, build, fit, make_optimizer, state_path
from lcnn_utils.training.checkpoint import State, digest, finished, locked, reached, read, write

pytestmark = pytest.mark.usefixtures("store")
MOONS = Recipe("moons", "lcnn", "mlp", width=4, epochs=3)
CNN = Recipe("digits", "lcnn", "resnet10", width=2, epochs=3, batch_size=512, augment=True)


def train(recipe, **options):
    return fit(recipe, progress=False, **options)


def fingerprint(model, history) -> str:
    return digest(model.state_dict(), history.to_json(double_precision=15))


def test_what_is_written_is_read_and_every_change_is_noticed(tmp_path):
    tensors = {"double": torch.randn(3, 4).double(), "scalar": torch.tensor(7), "none": torch.zeros(0, 3)}
    path, metadata = tmp_path / "new" / "a.safetensors", {"one": "1", "text": '{"é": [0.1, null]}'}
    write(path, tensors, metadata)
    found, texts = read(path)
    assert texts == metadata
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    assert os.listdir(path.parent) == ["a.safetensors"]
    others = [digest(tensors, "texts"), digest(tensors), digest({"other": tensors["double"]}, "text")]
    for name in tensors:
        others.append(digest({key: value for key, value in tensors.items() if key != name}, "text"))
    tensors["double"][2, 3] += 1e-9
    assert len({digest(tensors, "text"), *others}) == len(others) + 1


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("recipe", [CNN, replace(CNN, momentum=0.0)], ids=["momentum", "none"])
def test_a_state_goes_back_in_place(recipe, layout, tmp_path):
    def state(seed) -> State:
        model = build(replace(recipe, seed=seed)).to(memory_format=layout)
        optimizer, momenta = make_optimizer(recipe, model)
        model(torch.rand(9, 1, 8, 8)).sum().backward()
        optimizer.step()
        return State(recipe, model, momenta, torch.Generator().manual_seed(seed))

    one, other = state(1), state(2)
    one.history, one.about = [{"epoch": 1, "loss": 0.1 + 0.2}], {"seconds": 12.346, "made_on": [{"device": "a"}]}
    one.save(tmp_path / "state")
    everything = lambda state: (*state.model.state_dict().values(), *state.momenta)
    places = [(value.data_ptr(), value.stride()) for value in everything(other)]
    other.load(tmp_path / "state")
    assert (other.history, other.about) == (one.history, one.about)
    assert [(value.data_ptr(), value.stride()) for value in everything(other)] == places
    assert all(torch.equal(a, b) for a, b in zip(everything(one), everything(other), strict=True))
    assert any(bool(value.any()) for value in one.momenta) == (recipe.momentum > 0)
    assert torch.equal(one.generator.get_state(), other.generator.get_state())
    assert reached(tmp_path / "state") == (1, one.about)
    assert finished(tmp_path / "state", 1)
    assert not finished(tmp_path / "state", 2)
    other.recipe = replace(recipe, seed=9)
    with pytest.raises(RuntimeError, match="state of another recipe"):
        other.load(tmp_path / "state")


def edited(change):
    def damage(path):
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        change(tensors, metadata)
        save_file(tensors, path, metadata=metadata)

    return damage


def flipped(at):
    def damage(path):
        content = bytearray(path.read_bytes())
        content[at if at < 1 else int(len(content) * at)] ^= 1
        path.write_bytes(content)

    return damage


def of_another_width(path):
    train(replace(MOONS, width=5))
    path.write_bytes(state_path(replace(MOONS, width=5)).read_bytes())


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "empty": lambda path: path.write_bytes(b""),
    "a page of HTML": lambda path: path.write_text("<html>404</html>" * 100),
    "a bit of the head": lambda path: path.write_bytes(path.read_bytes()[:12] + b"?" + path.read_bytes()[13:]),
    "the last bit": flipped(-1),
    "relabelled": lambda path: path.write_bytes(path.read_bytes().replace(b'"dtype":"F32"', b'"dtype":"I32"')),
    "foreign": lambda path: save_file({"weight": torch.zeros(3)}, path),
    "foreign with a checksum": lambda path: write(path, {"weight": torch.zeros(3)}, {"epoch": "1", "history": "[]"}),
    "no generator": edited(lambda tensors, _: tensors.pop("generator")),
    "another history": edited(lambda _, metadata: metadata.update(history="[]")),
    "other facts": edited(lambda _, metadata: metadata.update(about="{}")),
    "another width": of_another_width,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_named_with_the_way_out(damage):
    train(MOONS)
    path = state_path(MOONS)
    DAMAGES[damage](path)
    damaged = path.read_bytes()
    with pytest.raises(RuntimeError, match=r"delete it.*resume=False") as raised:
        train(MOONS)
    assert str(path) in str(raised.value)
    assert path.read_bytes() == damaged, "nothing of the user's is overwritten"


def test_a_state_from_before_a_field_went_or_came_is_read(monkeypatch):
    whole = fingerprint(*train(MOONS))
    tensors, metadata = read(state_path(MOONS))
    fields = json.loads(metadata["recipe"])
    fields = {name: value for name, value in fields.items() if name != "compile"} | {"penalty_eval": False}
    write(state_path(MOONS), tensors, metadata | {"recipe": json.dumps(fields)})
    assert fingerprint(*train(MOONS)) == whole
    write(state_path(MOONS), tensors, metadata | {"recipe": json.dumps(fields | {"penalty_eval": True})})
    with pytest.raises(RuntimeError, match="another version"):
        train(MOONS)


def test_who_waits_says_so_and_what_fails_gives_its_lock_back(tmp_path, capsys):
    path, free, order = tmp_path / "some-run.safetensors", threading.Event(), []

    def hold():
        with locked(path, progress=False), locked(tmp_path / "another"):
            order.append("held")
            free.wait(10)
            order.append("given back")

    holder = threading.Thread(target=hold)
    holder.start()
    while not order:
        time.sleep(0.001)
    threading.Timer(0.2, free.set).start()
    with pytest.raises(ZeroDivisionError), locked(path):
        _ = order.append("got") or 1 / 0
    holder.join()
    with locked(path):
        order.append("again")
    assert order == ["held", "given back", "got", "again"]
    assert capsys.readouterr().out == "another process is training some-run: waiting for it\n"


PAIRS = """
import os, sys, time, torch
from lcnn_utils import training
from lcnn_utils.training import OBJECTIVES, Recipe
from lcnn_utils.training.checkpoint import digest
torch.set_num_threads(1)
training.samples(Recipe(), "test")
torch.optim.SGD([torch.zeros(1)], 0.1)  # imports much of torch, once
log = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
for recipe in map(eval, sys.argv[2:]):
    for _ in range(2):
        if os.fork():
            continue
        real = OBJECTIVES[recipe.method]
        def logged(*args, **more):
            os.write(log, f"{recipe.seed} {os.getpid()}\\n".encode())
            time.sleep(0.02 if recipe.dataset == "moons" else 0.1)
            return real(*args, **more)
        OBJECTIVES[recipe.method] = logged
        model, history = training.fit(recipe, progress=False)
        made = digest(model.state_dict(), history.to_json(double_precision=15))
        os.write(1, f"{recipe.seed} {made}\\n".encode())
        os._exit(0)
for _ in range(2 * len(sys.argv[2:])):
    os.wait()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX only")
def test_two_processes_train_a_recipe_once(monkeypatch, tmp_path):
    """Where the one that trains is killed, by a real SIGKILL in its second epoch, the other goes on from the first.
    All models are those of a process alone, bit for bit."""
    killed = (replace(MOONS, seed=1), replace(CNN, seed=2))
    recipes = (MOONS, *killed)
    expected = [(recipe.seed, fingerprint(*train(recipe))) for recipe in recipes]
    monkeypatch.setenv("LCNN_STORE", str(tmp_path / "another"))
    log = tmp_path / "log"
    command = [sys.executable, "-c", PAIRS, str(log), *map(repr, recipes)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def trainers(recipe) -> list[int]:
        """The process of each of the recipe's steps so far."""
        lines = [line.split() for line in log.read_text().splitlines()]
        return [int(pid) for seed, pid in lines if int(seed) == recipe.seed]

    victims, deadline = {}, time.monotonic() + 60
    while len(victims) < len(killed) and time.monotonic() < deadline and parent.poll() is None:
        for recipe in killed:
            if recipe not in victims and state_path(recipe).exists():
                victims[recipe] = trainers(recipe)[0]
                os.kill(victims[recipe], signal.SIGKILL)
        time.sleep(0.002)
    output, errors = parent.communicate(timeout=60)
    assert parent.returncode == 0, errors
    assert trainers(MOONS) == trainers(MOONS)[:1] * 60, "3 epochs of 20 steps, all by one process"
    for recipe, epoch in zip(killed, (20, 2), strict=True):
        by_first = trainers(recipe).count(victims[recipe])
        by_other = len(trainers(recipe)) - by_first
        assert epoch <= by_first < epoch * recipe.epochs, "it was killed too late for this test to mean anything"
        assert by_other % epoch == 0, "whole epochs"
        assert 0 <= by_first + by_other - epoch * recipe.epochs <= epoch, "only the killed one's last is done twice"
    found = [(int(seed), value) for seed, value in map(str.split, output.splitlines())]
    assert sorted(found) == sorted([expected[0], *expected])
