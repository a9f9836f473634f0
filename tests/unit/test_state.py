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

from lcnn_utils.training import OBJECTIVES, Recipe, build, fit, make_optimizer, state_path
from lcnn_utils.training.checkpoint import Held, digest, load_state, locked, read, save_state, write
from lcnn_utils.training.fit import made_on

pytestmark = pytest.mark.usefixtures("store")
MOONS = Recipe("moons", "lcnn", "mlp", width=6, epochs=4)


def train(recipe, **options):
    return fit(recipe, progress=False, **options)


def fingerprint(model, history) -> str:
    return digest(model.state_dict(), history.to_json(double_precision=15))


# ---- written and read --------------------------------------------------------------------------------------------


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "double": torch.randn(3, 4).double(), "scalar": torch.tensor(7), "bytes": torch.arange(5, dtype=torch.uint8),
        "none": torch.zeros(0, 3), "nan": torch.tensor([float("nan"), 1.0]),
    }  # fmt: skip


def test_what_is_written_is_read(tmp_path):
    path, metadata = tmp_path / "new" / "a.safetensors", {"one": "1", "text": '{"é": [0.1, null]}'}
    write(path, tensors(), metadata)
    found, texts = read(path)
    assert texts == metadata
    assert found.keys() == tensors().keys()
    for name, value in tensors().items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True)
    assert os.listdir(path.parent) == ["a.safetensors"]


def test_the_digest_notices_every_change():
    start = digest(tensors(), "text")
    assert digest(dict(reversed(tensors().items())), "text") == start
    others = [digest(tensors(), "texts"), digest(tensors())]
    for name in tensors():
        others.append(digest({key: value for key, value in tensors().items() if key != name}, "text"))
        others.append(digest({key if key != name else "other": value for key, value in tensors().items()}, "text"))
    for name in ("double", "bytes", "scalar"):
        changed = tensors()
        changed[name].view(-1)[-1] += 1
        others.append(digest(changed, "text"))
    assert len({start, *others}) == len(others) + 1


CNN = Recipe("digits", "lcnn", "resnet10", width=2)


@pytest.mark.parametrize(
    ("recipe", "layout"),
    [
        (MOONS, torch.preserve_format),
        (replace(MOONS, momentum=0.0), torch.preserve_format),
        (CNN, torch.preserve_format),
        (CNN, torch.channels_last),  # as on a GPU
    ],
    ids=["mlp", "no-momentum", "cnn", "channels-last"],
)
def test_a_state_goes_back_in_place(recipe, layout, tmp_path):
    path = tmp_path / "state.safetensors"

    def parts(seed):
        model = build(replace(recipe, seed=seed)).to(memory_format=layout)
        optimizer, momenta = make_optimizer(recipe, model)
        model(torch.rand(9, *((2,) if recipe.model == "mlp" else (1, 8, 8)))).sum().backward()
        optimizer.step()
        return model, momenta, torch.Generator().manual_seed(seed)

    history = [{"epoch": 1, "loss": 0.1 + 0.2}, {"epoch": 2, "loss": 1e-300}]
    one, other = parts(1), parts(2)
    about = {"seconds": 12.346, "made_on": [{"device": "a"}]}
    save_state(path, recipe, *one, history, about)
    everything = lambda part: (*part[0].state_dict().values(), *part[1])
    places = [(value.data_ptr(), value.stride()) for value in everything(other)]
    assert load_state(path, recipe, *other) == (history, about)
    with pytest.raises(RuntimeError, match="state of another recipe"):
        load_state(path, replace(recipe, seed=9), *other)
    assert [(value.data_ptr(), value.stride()) for value in everything(other)] == places
    assert all(torch.equal(a, b) for a, b in zip(everything(one), everything(other), strict=True))
    assert any(bool(value.any()) for value in one[1]) == (recipe.momentum > 0)
    assert torch.equal(one[2].get_state(), other[2].get_state())


def test_the_state_says_what_it_holds():
    _, history = train(MOONS)
    with safe_open(state_path(MOONS), "pt") as file:
        metadata = file.metadata()
    assert metadata["epoch"] == "4"
    assert json.loads(metadata["history"]) == history.to_dict("records")
    about = json.loads(metadata["about"])
    assert 0 < about["seconds"] <= history.attrs["seconds"] + 1e-3
    assert about["made_on"] == history.attrs["made_on"] == [made_on(torch.device("cpu"))]
    assert Recipe(**json.loads(metadata["recipe"])) == MOONS


# ---- damaged -----------------------------------------------------------------------------------------------------


def truncated(path):
    path.write_bytes(path.read_bytes()[:-10])


def header_only(path):
    path.write_bytes(path.read_bytes()[:20])


def empty(path):
    path.write_bytes(b"")


def text(path):
    path.write_text("<html>404</html>" * 100)


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 0x55
    path.write_bytes(content)


def flipped_in_the_header(path):
    flip(path, 12)


def flipped_in_a_weight(path):
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    flip(path, start + (path.stat().st_size - start) // 2)


def flipped_in_the_last_byte(path):
    flip(path, -1)


def relabelled(path):
    """All bytes of the weights as they were, but said to be whole numbers."""
    path.write_bytes(path.read_bytes().replace(b'"dtype":"F32"', b'"dtype":"I32"'))


def foreign(path):
    save_file({"weight": torch.zeros(3)}, path)


def foreign_with_our_metadata(path):
    save_file({"weight": torch.zeros(3)}, path, metadata={"epoch": "1", "history": "[]", "about": "{}"})


def foreign_with_its_own_checksum(path):
    write(path, {"weight": torch.zeros(3)}, {"epoch": "1", "history": "[]", "about": "{}"})


def edited(path, change):
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


def without_its_generator(path):
    edited(path, lambda tensors, metadata: tensors.pop("generator"))


def without_its_momentum(path):
    edited(path, lambda tensors, _: [tensors.pop(name) for name in list(tensors) if name.startswith("momentum")])


def with_another_history(path):
    edited(path, lambda _, metadata: metadata.update(history=metadata["history"].replace('"epoch": 1', '"epoch": 2')))


def with_other_seconds(path):
    edited(path, lambda _, metadata: metadata.update(about=metadata["about"].replace("0.", "1.")))


def without_its_seconds(path):
    edited(path, lambda _, metadata: metadata.pop("about"))


def of_another_width(path):
    other = replace(MOONS, width=5)
    train(other)
    path.write_bytes(state_path(other).read_bytes())


@pytest.mark.parametrize(
    "damage",
    [
        truncated, header_only, empty, text, flipped_in_the_header, flipped_in_a_weight, flipped_in_the_last_byte,
        relabelled, foreign, foreign_with_our_metadata, foreign_with_its_own_checksum, without_its_generator,
        without_its_momentum, with_another_history, with_other_seconds, without_its_seconds, of_another_width,
    ],
    ids=lambda damage: damage.__name__,
)  # fmt: skip
def test_a_damaged_state_is_named_with_the_way_out(damage):
    train(MOONS)
    path = state_path(MOONS)
    damage(path)
    damaged = path.read_bytes()
    with pytest.raises(RuntimeError, match=r"delete it.*resume=False") as raised:
        train(MOONS)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert path.read_bytes() == damaged, "nothing of the user's is overwritten"


# ---- one at a time -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("progress", [True, False])
def test_who_waits_says_so(tmp_path, capsys, progress):
    path, free, order = tmp_path / "some-run.safetensors", threading.Event(), []

    def hold():
        with locked(path, progress=False):
            order.append("held")
            free.wait(10)
            order.append("given back")

    holder = threading.Thread(target=hold)
    holder.start()
    while not order:
        time.sleep(0.001)
    threading.Timer(0.2, free.set).start()
    with locked(path, progress):
        order.append("got")
    holder.join()
    assert order == ["held", "given back", "got"]
    assert capsys.readouterr().out == "another process is training some-run: waiting for it\n" * progress
    assert not path.exists()


def test_who_will_not_wait_is_told(tmp_path):
    path = tmp_path / "some-run.safetensors"
    with locked(path), pytest.raises(Held, match="some-run"), locked(path, wait=False):
        pytest.fail("two hold it")
    with locked(tmp_path / "some-run.safetensors", wait=False):
        pass


def test_another_run_does_not_wait(tmp_path):
    with locked(tmp_path / "one"), locked(tmp_path / "other"):
        assert {name.removesuffix(".lock") for name in os.listdir(tmp_path / "locks")} == {"one", "other"}


def test_what_fails_gives_its_lock_back(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), locked(tmp_path / "run"):
            _ = 1 / 0


PAIRS = """
import os, sys, time, torch
from lcnn_utils import state, training
from lcnn_utils.objectives import OBJECTIVES
from lcnn_utils.recipe import Recipe
torch.set_num_threads(1)
training.samples(Recipe(), "test")
torch.optim.SGD([torch.zeros(1)], 0.1)  # imports scikit-learn and much of torch, once
log = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
for recipe in map(eval, sys.argv[2:]):
    for _ in range(2):
        if os.fork():
            continue
        real = OBJECTIVES[recipe.method]
        def logged(*args, **more):
            os.write(log, f"{recipe.seed} {os.getpid()}\\n".encode())
            time.sleep(0.02 if recipe.dataset == "moons" else 0.15)
            return real(*args, **more)
        OBJECTIVES[recipe.method] = logged
        model, history = training.fit(recipe, progress=False)
        made = state.digest(model.state_dict(), history.to_json(double_precision=15))
        os.write(1, f"{recipe.seed} {made}\\n".encode())
        os._exit(0)
for _ in range(2 * len(sys.argv[2:])):
    os.wait()
"""


def test_two_processes_train_a_recipe_once(monkeypatch, tmp_path):
    """Where the one that trains is killed, by a real SIGKILL at whatever point of the second epoch it falls, the other
    goes on from the first. All models are those of a process alone, bit for bit."""
    if not hasattr(signal, "SIGKILL"):
        pytest.skip("POSIX only")
    killed = (replace(MOONS, seed=1), replace(CNN, seed=2, epochs=3, batch_size=512, augment=True))
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
    assert trainers(MOONS) == trainers(MOONS)[:1] * 80, "4 epochs of 20 steps, all by one process"
    for recipe, epoch in zip(killed, (20, 2), strict=True):
        by_first = trainers(recipe).count(victims[recipe])
        by_other = len(trainers(recipe)) - by_first
        assert epoch <= by_first < epoch * recipe.epochs, "it was killed too late for this test to mean anything"
        assert by_other % epoch == 0, "whole epochs"
        assert 0 <= by_first + by_other - epoch * recipe.epochs <= epoch, "only the killed one's last is done twice"
    found = [(int(seed), value) for seed, value in map(str.split, output.splitlines())]
    assert sorted(found) == sorted([expected[0], *expected])


def test_a_lock_file_left_behind_keeps_nobody_waiting(monkeypatch):
    lock = state_path(MOONS).parent / "locks" / f"{state_path(MOONS).stem}.lock"
    lock.parent.mkdir(parents=True)
    lock.write_text("99999999")
    whole = fingerprint(*train(MOONS))
    monkeypatch.setitem(OBJECTIVES, "lcnn", None)
    assert fingerprint(*train(MOONS)) == whole, "read back: None cannot be called"


def test_a_store_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LCNN_STORE", str(tmp_path / "file" / "store"))
    with pytest.raises(OSError, match=r"cannot write .*moons-lcnn.*set LCNN_STORE"):
        train(MOONS)
    assert os.listdir(tmp_path) == ["file"]
