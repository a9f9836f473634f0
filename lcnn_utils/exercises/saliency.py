"""The checks of notebook 06; see :mod:`lcnn_utils.exercises.engine`."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..curvature import scalar_of
from .engine import randn, verdict

__all__ = ["random_meets", "relative_change", "saliency"]


def _net(seed: int, classes: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # what Linear draws is replaced
        net = nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.Softplus(), nn.Linear(7, classes)).double()
    for i, p in enumerate(net.parameters()):
        p.data = randn(seed + i, *p.shape)
    return net


def saliency(f: Callable) -> bool | None:
    """f(model, x, y) → the signed gradient of each sample's own logit z_y by its pixels, like x and detached: images x
    (N, C, H, W), labels y (N,). Solution: ``lcnn_utils.saliency.explain(model, x, y, "gradient")``."""

    def gradient(model: nn.Module, x: Tensor, y: Tensor, scalar: str = "logit") -> Tensor:
        at = x.detach().clone().requires_grad_()
        return torch.autograd.grad(scalar_of(model(at), y, scalar).sum(), at)[0]

    truth = lambda model, x, y: gradient(model, x, y)
    mistakes = {
        "keep the sign: for or against is half of the map": lambda m, x, y: gradient(m, x, y).abs(),
        "of the label's logit, not of the loss": lambda m, x, y: gradient(m, x, y, "loss"),
        "of the label's logit, not of the predicted class's": lambda m, x, y: gradient(m, x, m(x).argmax(1)),
        "sum the logits over the samples, don't average": lambda m, x, y: gradient(m, x, y) / len(x),
        "the gradient alone: times x it is another method": lambda m, x, y: gradient(m, x, y) * x,
    }

    def detached(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        found = f(model, x, y)
        return found.detach() if isinstance(found, Tensor) else found

    shapes = [(4, (3, 2, 2), 5), (1, (1, 3, 4), 2), (6, (1, 4, 3), 3)]
    inputs = [(_net(10 * i, k), torch.sigmoid(randn(i + 50, n, *s)), torch.arange(n) % k)
              for i, (n, s, k) in enumerate(shapes)]  # fmt: skip
    return verdict(saliency, detached, inputs, truth, mistakes)


def relative_change(f: Callable) -> bool | None:
    """f(before, after) → ‖after − before‖₂ / ‖before‖₂ of each sample's map, (N,): maps (N, C, H, W).
    Solution: ``lcnn_utils.saliency.compare``."""
    size = lambda m: m.flatten(1).norm(dim=1)
    truth = lambda before, after: size(after - before) / size(before)
    mistakes = {
        "relative to the map before, not to the one after": lambda b, a: size(a - b) / size(a),
        "a number a sample: the norm over C, H and W only": lambda b, a: (a - b).norm() / b.norm(),
        "divide the norms, don't take the norm of a ratio": lambda b, a: size((a - b) / b),
        "the change of the map, not of its length": lambda b, a: (size(a) - size(b)).abs() / size(b),
        "divide by the size of the map: without it nets with large gradients look unsteady": lambda b, a: size(a - b),
        "norms, not their squares": lambda b, a: size(a - b).square() / size(b).square(),
    }
    shapes = [(3, 1, 4, 4), (1, 3, 2, 2), (5, 2, 3, 1)]
    inputs = [(randn(i, *s), randn(i, *s) + 0.3 * randn(i + 30, *s)) for i, s in enumerate(shapes)]
    return verdict(relative_change, f, inputs, truth, mistakes)


def random_meets(f: Callable) -> bool | None:
    """f(hessian) → the root mean square of ‖Hu‖ over random directions u of length 1, ‖H‖_F/√d, a number: hessian is
    symmetric, (d, d). Solution: ``lcnn_utils.measurements.saliency.random_meets``."""
    truth = lambda hessian: hessian.norm() / len(hessian) ** 0.5
    mistakes = {
        "the worst direction: a random one meets all eigenvalues alike": lambda h: torch.linalg.matrix_norm(h, 2),
        "u has length 1, so each of its d entries has mean square 1/d": lambda h: h.norm(),
        "divide by √d, not by d": lambda h: h.norm() / len(h),
        "the mean of squares comes before the root": lambda h: torch.linalg.eigvalsh(h).abs().mean(),
        "eigenvalues of both signs count: square them first": lambda h: torch.linalg.eigvalsh(h).mean().abs(),
    }
    inputs = [(a + a.mT,) for a in (randn(i, d, d) for i, d in enumerate((4, 9, 1, 16)))]
    inputs.append((torch.diag(torch.tensor([3.0, -3.0, 1.0, 0.0, 0.0], dtype=torch.float64)),))
    return verdict(random_meets, f, inputs, truth, mistakes)
