"""What counts as a success of an attack, in whatever form the logits come."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lcnn_utils.attacks import minimal_radius, robustness_curve


class Wrapped(nn.Module):
    def __init__(self, net, forward):
        super().__init__()
        self.net, self.function = net, forward

    def forward(self, x):
        return self.function(self.net(x))


@pytest.mark.parametrize("shift", [1e3, 1e6])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_what_all_logits_have_in_common_or_a_class_that_is_ruled_out_hides_nothing(norm, shift):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 30), nn.Softplus(), nn.Linear(30, 5))
    x = torch.rand(200, 20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        net[2].bias -= net(x).mean(0)
    y, eps = net(x).argmax(1), {"l2": [0.2], "linf": [0.05]}[norm]
    survive = lambda net: robustness_curve(net, (x, y), eps, norm=norm).accuracy.iloc[-1]
    plain = survive(net)
    assert 0.1 < plain < 0.9
    for change in (lambda z: z + shift, lambda z: z.bfloat16(), lambda z: F.pad(z, (0, 1), value=-(shift**2))):
        assert survive(Wrapped(net, change)) <= plain + 0.02


@pytest.mark.parametrize("lowest", [1.0, 0.0, -10.0])
def test_an_exact_tie_counts_against_the_network(lowest):
    """[1, 1, lowest], whatever argmax makes of it; where another class leads, it is wrong at x without an attack."""
    tied, led = (
        Wrapped(nn.Linear(3, 3), lambda z, first=first: 0 * z + torch.tensor([1.0, first, lowest]))
        for first in (1.0, 1.0 + 1e-6)
    )
    x, y = torch.rand(5, 3), torch.tensor([0, 1, 0, 1, 0])
    assert torch.equal(minimal_radius(tied, x, y, restarts=1)[0], torch.zeros(5))
    assert torch.equal(minimal_radius(led, x, y, restarts=1)[0] == 0, y == 0)
