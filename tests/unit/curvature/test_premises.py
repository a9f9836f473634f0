"""What every public measure asks of a network and of torch: it gets it, or says what is missing; no number is wrong."""

import math

import pytest
import torch
import torch.nn.functional as F
from networks import Once
from torch import nn

from lcnn_utils import curvature
from lcnn_utils.attacks import masking_checks, minimal_radius, pgd, robustness_curve
from lcnn_utils.curvature import evaluating, geometry, scalar_of
from lcnn_utils.nn import CenteredSoftplus
from lcnn_utils.saliency import explain, stability

CALLS = {
    "geometry": lambda net, x, y: geometry(net, x, y).curvature,
    "local_bound": curvature.local_bound,
    "normalised_bound": lambda net, x, y: curvature.normalised_bound(net, x, y)[0],
    "certified_radius": curvature.certified_radius,
    "stability": lambda net, x, y: numbers(stability(net, (x, y), [0.1])),
    "explain": explain,
    "pgd": lambda net, x, y: pgd(net, x, y, 0.3, steps=2),
    "minimal_radius": lambda net, x, y: minimal_radius(net, x, y, steps=1, restarts=1)[0],
    "robustness_curve": lambda net, x, y: numbers(robustness_curve(net, (x, y), [0.1, 0.5], steps=2)),
    "masking_checks": lambda net, x, y: numbers(masking_checks(net, (x, y), 0.3, steps=2, restarts=1)),
}


def numbers(frame) -> torch.Tensor:
    return torch.from_numpy(frame.select_dtypes("number").to_numpy(float))


def problem(dtype=torch.float32) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A net with bounds, four images and what it says of them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), CenteredSoftplus(5.0), nn.Linear(8, 3)).to(dtype).eval()
    x = torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=dtype)
    with torch.no_grad():
        return net, x, net(x).argmax(1)


class Wrapped(nn.Module):
    """A net whose logits are something else made of (net, x)."""

    def __init__(self, net, forward):
        super().__init__()
        self.net, self.function = net, forward

    def forward(self, x):
        return self.function(self.net, x)


@pytest.mark.parametrize("name", list(CALLS)[:-1])
def test_how_torch_and_the_network_are_set_changes_nothing(name):
    net, x, y = problem()
    want = CALLS[name](net, x, y)
    for mode in (torch.no_grad, torch.inference_mode, lambda: torch.device("meta")):
        with mode():
            torch.testing.assert_close(CALLS[name](net, x, y), want, equal_nan=True)
    with torch.inference_mode():  # images made there
        torch.testing.assert_close(CALLS[name](net, x.clone(), y.clone()), want, equal_nan=True)
    assert all(p.grad is None for p in net.parameters())
    net.train()[2].eval()
    torch.testing.assert_close(CALLS[name](net.requires_grad_(False), x, y), want, equal_nan=True)
    assert [module.training for module in net] == [True, True, False, True]
    torch.testing.assert_close(CALLS[name](nn.DataParallel(net), x, y), want, equal_nan=True)


COUNT = iter(range(10**6))
BAD = {
    "no_grad inside": (lambda net, x: torch.no_grad()(net)(x), "cuts the graph"),
    "a threshold": (lambda net, x: net((x > 0.5).to(x)), "cuts the graph"),
    "a mean of the batch": (lambda net, x: net(x - x.mean(0)), "rest of its batch"),
    "hardly a part": (lambda net, x: net(x + 1e-5 * x.mean(0)), "rest of its batch"),
    "a root of 0": (lambda net, x: net(x * 0 + (x - x).sqrt()), "gradient of the logits is not finite"),
    "rare dropout": (lambda net, x: net(F.dropout(x, 0.001)), "random"),
    "counting": (lambda net, x: net(x) + next(COUNT), "random"),
    "changed in place": (lambda net, x: net(x.mul_(0.5)), "in-place"),
    "too few": (lambda net, x: net(x)[:, :1], r"K >= 2"),
    "infinite": (lambda net, x: net(x) * math.inf, "not finite"),
}


PAIRS = [("geometry", kind) for kind in BAD] + [(name, "counting") for name in CALLS]


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_networks_that_break_a_premise_are_refused(name, kind):
    net, x, y = problem()
    forward, message = BAD[kind]
    with pytest.raises(ValueError, match=message):
        CALLS[name](Wrapped(net, forward), x, y)


@pytest.mark.parametrize("name", CALLS)
def test_arguments_of_another_kind_are_named(name):
    net, x, y = problem()
    for change, message in [
        ((x.numpy(), y), "ndarray|tuple"),
        ((x, y + 3), "3 classes"),
        ((x.double(), y), "float64"),
        (((255 * x).byte(), y), "uint8|divide by 255"),
        ((x * 2, y), r"\[0, 1\]"),
        ((x * math.nan, y), "nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            CALLS[name](net, *change)


def test_loss_is_cross_entropy_and_keeps_its_gradient_where_p_rounds_to_one():
    """−log p_y of a linear net in float32: ∇ = −(1−p)·Δw, and 1−p = e^{−80} is far below float32's ulp of 1."""
    logits, y = torch.randn(50, 7).double() * 9, torch.randint(0, 7, (50,))
    torch.testing.assert_close(scalar_of(logits, y), F.cross_entropy(logits, y, reduction="none"))
    for confidence in (1.0, 20.0, 80.0):
        logits = torch.tensor([[confidence, 0.0]], requires_grad=True)
        (grad,) = torch.autograd.grad(scalar_of(logits, torch.tensor([0])), logits)
        assert grad[0, 1].item() == pytest.approx(1 / (1 + math.exp(confidence)), rel=1e-4)
        wrong = scalar_of(torch.tensor([[0.0, confidence]]), torch.tensor([0]))
        assert wrong.item() == pytest.approx(confidence + math.log1p(math.exp(-confidence)), rel=1e-6)


@pytest.mark.parametrize("before", [True, False])
def test_convolutions_on_a_gpu_are_measured_in_float32_not_tf32(before, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", before)
    with evaluating(nn.Identity()):
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == before


def test_a_second_derivative_that_is_left_out_is_named():
    net, x, y = problem()
    for forward in (lambda net, x: Once.apply(net(x)), lambda net, x: net(Once.apply(x))):
        with pytest.raises(ValueError, match=r"twice.*autograd function"):
            geometry(Wrapped(net, forward), x, y)
