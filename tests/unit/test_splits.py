"""What is held out: a part of the training set, the same for every method and seed, and never the test set."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lcnn_utils import data
from lcnn_utils.training import DATASETS, METHODS, Recipe, measured_split, samples, splits, steps_an_epoch
from lcnn_utils.training.splits import epochs, held_out, images

MOONS = Recipe("moons", "lcnn", "mlp", width=4, held_out=0.2)
DIGITS = Recipe("digits", "lcnn", width=2, held_out=0.2)
BOTH = pytest.mark.parametrize("recipe", [MOONS, DIGITS], ids=["moons", "digits"])


def rows(x) -> list[bytes]:
    return [row.numpy().tobytes() for row in x]


@settings(deadline=None, max_examples=100)
@given(n=st.integers(2, 3000), share=st.floats(0, 1, exclude_max=True))
def test_the_parts_are_disjoint_and_cover(n, share):
    if share and not 0 < round(share * n) < n:
        with pytest.raises(ValueError, match=rf"^held_out=.* holds out ({n}|0) of {n} samples: leave at least one"):
            held_out(n, share)
        return
    kept, out = held_out(n, share)
    assert len(out) == round(share * n)
    assert torch.equal(torch.cat([kept, out]).sort().values, torch.arange(n))
    for part in (kept, out):
        assert (part.diff() > 0).all()


def test_a_larger_share_holds_out_the_same_and_more():
    small, large = (set(held_out(1000, share)[1].tolist()) for share in (0.1, 0.3))
    assert small < large


def test_the_choice_is_random_and_fixed():
    torch.manual_seed(7)
    state = torch.get_rng_state()
    _, out = held_out(1437, 0.2)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(8)
    assert torch.equal(out, held_out(1437, 0.2)[1])
    assert abs(out.double().mean() - 718) < 60, "from all over the training set: its standard error is 22"
    assert out[:6].tolist() == [2, 7, 14, 15, 24, 47], "another choice is another experiment"


@BOTH
def test_the_parts_of_a_recipe(recipe):
    """Together what a recipe trains on that holds nothing out; the test split is the same."""
    plain = replace(recipe, held_out=0.0)
    whole, train, out = samples(plain, "train"), samples(recipe, "train"), samples(recipe, "held_out")
    n = len(whole[1])
    assert n == splits.TRAINING[recipe.dataset]
    assert (len(train[1]), len(out[1])) == (n - round(0.2 * n), round(0.2 * n))
    assert sorted(rows(train[0]) + rows(out[0])) == sorted(rows(whole[0]))
    labelled = dict(zip(rows(whole[0]), whole[1].tolist(), strict=True))
    assert [labelled[row] for row in rows(out[0])] == out[1].tolist()
    for mine, plains in zip(samples(recipe, "test"), samples(plain, "test"), strict=True):
        assert torch.equal(mine, plains)


def test_all_methods_and_seeds_hold_out_the_same_images():
    first = images(DIGITS, "held_out")
    for method in METHODS:
        assert torch.equal(images(replace(DIGITS, method=method, seed=5), "held_out").x, first.x)


@BOTH
def test_the_moons_and_digits_numbers_are_those_of_the_choice(recipe):
    """Moons are drawn from the recipe's seed; which of the 400 are held out isn't."""
    for seed in (0, 3):
        one = replace(recipe, seed=seed)
        x, _ = samples(replace(one, held_out=0.0), "train")
        kept, out = held_out(len(x), 0.2)
        assert torch.equal(samples(one, "train")[0], x[kept])
        assert torch.equal(samples(one, "held_out")[0], x[out])


def test_images_stay_bytes(monkeypatch):
    """CIFAR's training set as float32 would be 600 MB."""
    fake = data.Images(torch.arange(50 * 12, dtype=torch.int64).reshape(50, 3, 2, 2).to(torch.uint8), torch.arange(50),
                       ("a",), "cifar10")  # fmt: skip
    monkeypatch.setattr(data, "load", lambda name, split: {"cifar10 train": fake}[f"{name} {split}"])
    monkeypatch.setattr(data.Images, "float", lambda _: pytest.fail("a whole split was turned into floats"))
    one = Recipe("cifar10", "lcnn", batch_size=8, augment=True, held_out=0.3)
    kept, out = images(one, "train"), images(one, "held_out")
    assert kept.x.dtype == out.x.dtype == torch.uint8
    assert sorted(kept.y.tolist() + out.y.tolist()) == list(range(50))
    make, steps, (probe, _) = epochs(one, torch.device("cpu"), torch.Generator().manual_seed(0))
    seen = torch.cat([y for _, y in make()]).tolist()
    assert steps == len(seen) // 8 == 35 // 8
    assert set(seen) < set(kept.y.tolist())
    assert torch.equal((probe * 255).round().to(torch.uint8), kept.x[:16])


def test_nothing_held_out_copies_nothing(monkeypatch):
    fake = data.Images(torch.zeros(9, 1, 8, 8, dtype=torch.uint8), torch.zeros(9, dtype=torch.int64), ("a",), "digits")
    monkeypatch.setattr(data, "load", lambda *_: fake)
    assert images(Recipe(), "train").x is fake.x


def test_what_a_net_is_judged_by():
    assert measured_split(DIGITS) == "held_out"
    assert measured_split(Recipe()) == "test"


@pytest.mark.parametrize(
    ("recipe", "split", "says"),
    [
        (DIGITS, "hold_out", r"unknown split 'hold_out': known are train, held_out, test; did you mean 'held_out'\?"),
        (MOONS, "tset", r"did you mean 'test'\?"),
        (Recipe(), "held_out", r"^this recipe holds nothing out: give it held_out=0\.2, say, or ask for 'test'$"),
        (replace(MOONS, held_out=0.001), "train", r"^held_out=0\.001 holds out 0 of 400 samples"),
        (replace(DIGITS, held_out=0.9999), "held_out", r"holds out 1437 of 1437 samples: leave at least one"),
    ],
)
def test_mistakes_are_explained(recipe, split, says):
    with pytest.raises(ValueError, match=says):
        samples(recipe, split)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.9])
@pytest.mark.parametrize("batch_size", [100, 512, 5000])
@pytest.mark.parametrize("dataset", ["moons", "digits"])
def test_steps_an_epoch_are_those_taken(dataset, batch_size, share):
    one = Recipe(dataset, "standard", "mlp", batch_size=batch_size, held_out=share)
    make, steps, _ = epochs(one, torch.device("cpu"), torch.Generator().manual_seed(0))
    assert steps_an_epoch(one) == steps == len(list(make()))


def test_every_dataset_has_its_number():
    assert tuple(splits.TRAINING) == DATASETS
