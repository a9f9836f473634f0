"""What every public measure asks of a network and of torch: it gets it, or says what is missing; no number is wrong."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lcnn_utils.attacks import fgsm, first_success, masking_checks, minimal_radius, pgd, robustness_curve
from lcnn_utils.curvature import bound_graph as walk
from lcnn_utils.curvature import (
    bounds,
    certified_radius,
    curvature_bound,
    geometry,
    layer_terms,
    local_bound,
    normalised_bound,
    top_direction,
)
from lcnn_utils.curvature import hessian as curvature
from lcnn_utils.nn import CenteredSoftplus
from lcnn_utils.saliency import explain, stability, worst_step

CALLS = {
    "geometry": lambda net, x, y: geometry(net, x, y).curvature,
    "exact": lambda net, x, y: geometry(net, x, y, method="exact").hessian_norm,
    "top_direction": lambda net, x, y: top_direction(net, x, y)[1],
    "worst_step": lambda net, x, y: worst_step(net, x, y, 0.1)[1],
    "stability": lambda net, x, y: numbers(stability(net, (x, y), [0.1], worst_steps=1)),
    "explain": lambda net, x, y: explain(net, x, y),
    "smoothgrad": lambda net, x, y: explain(net, x, y, "smoothgrad", samples=2),
    "pgd": lambda net, x, y: pgd(net, x, y, 0.3, steps=3),
    "fgsm": lambda net, x, y: fgsm(net, x, y, 0.3),
    "minimal_radius": lambda net, x, y: minimal_radius(net, x, y, steps=4, restarts=1, bisections=3)[0],
    "first_success": lambda net, x, y: first_success(net, x, y, [0.1, 0.5], steps=3),
    "robustness_curve": lambda net, x, y: numbers(robustness_curve(net, (x, y), [0.1, 0.5], steps=3)),
    "masking_checks": lambda net, x, y: numbers(masking_checks(net, (x, y), 0.3, steps=2, restarts=1)),
    "local_bound": lambda net, x, y: local_bound(net, x, y),
    "normalised_bound": lambda net, x, y: normalised_bound(net, x, y).bound,
    "layer_terms": lambda net, x, y: numbers(layer_terms(net, x, y)),
    "certified_radius": lambda net, x, y: certified_radius(net, x, y),
}
SECOND = ("geometry", "exact", "top_direction", "worst_step", "stability", "local_bound", "certified_radius")
BOUNDS = ("local_bound", "normalised_bound", "layer_terms", "certified_radius")


def numbers(frame) -> torch.Tensor:
    return torch.from_numpy(frame.select_dtypes("number").to_numpy(float))


def problem(dtype=torch.float32) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A net with bounds, four images and what it says of them."""
    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(16, 8), CenteredSoftplus(5.0), nn.Linear(8, 3)
    net = nn.Sequential(*layers).to(dtype).eval()
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


@contextlib.contextmanager
def switched(change, back):
    change()
    try:
        yield
    finally:
        back()


MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "gradients off": lambda: switched(lambda: torch.set_grad_enabled(False), lambda: torch.set_grad_enabled(True)),
    "default dtype": lambda: switched(
        lambda: torch.set_default_dtype(torch.float64), lambda: torch.set_default_dtype(torch.float32)
    ),
    "default device": lambda: torch.device("meta"),
    "deterministic": lambda: switched(
        lambda: torch.use_deterministic_algorithms(True), lambda: torch.use_deterministic_algorithms(False)
    ),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("mode", MODES)
def test_what_torch_is_set_to_changes_nothing(name, mode):
    net, x, y = problem()
    want = CALLS[name](net, x, y)
    with MODES[mode]():
        got = CALLS[name](net, x, y)
        if (name, mode) == ("smoothgrad", "default dtype"):  # other noise
            want = got
        if mode == "inference_mode":  # images made there, too
            torch.testing.assert_close(CALLS[name](net, x.clone(), y.clone()), want, equal_nan=True)
    torch.testing.assert_close(got, want, equal_nan=True)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("name", CALLS)
def test_frozen_and_wrapped_networks(name):
    net, x, y = problem()
    want = CALLS[name](net, x, y)
    torch.testing.assert_close(CALLS[name](net.requires_grad_(False), x, y), want, equal_nan=True)
    torch.testing.assert_close(CALLS[name](nn.DataParallel(net), x, y), want, equal_nan=True)


def quiet(net, x):
    with torch.no_grad():
        return net(x)


def changed(net, x):
    return net(x.mul_(0.5))


def tangled(net, x):
    return net(x - x.mean(0))


def secretly(net, x):
    return net(x - x.mean(0).detach())


def half_quiet(net, x):
    return net(x / x.max())


BATCHED = nn.BatchNorm2d(1, track_running_stats=False)
BAD = {
    "no_grad inside": (quiet, "cuts the graph"),
    "detached": (lambda net, x: net(x).detach(), "cuts the graph"),
    "a threshold": (lambda net, x: net((x > 0.5).to(x)), "cuts the graph"),
    "numpy": (lambda net, x: net(torch.from_numpy(x.detach().numpy())), "cuts the graph"),
    "batch statistics": (lambda net, x: net(BATCHED(x)), "samples of a batch"),
    "a mean of the batch": (tangled, "samples of a batch"),
    "a detached mean": (secretly, "samples of a batch"),
    "the largest of all": (half_quiet, "samples of a batch"),
    "the one before": (lambda net, x: net(x.cumsum(0)), "samples of a batch"),
    "its place": (
        lambda net, x: net(x * torch.arange(len(x), device=x.device).view(-1, 1, 1, 1)),
        "samples of a batch",
    ),
    "a root of 0": (lambda net, x: net(x * 0 + (x - x).sqrt()), "gradient of the logits is not finite"),
    "rare dropout": (lambda net, x: net(F.dropout(x, 0.001)), "random"),
    "another error": (lambda net, x: [][1], "does not take"),
    "functional dropout": (lambda net, x: net(F.dropout(x)), "random"),
    "noise": (lambda net, x: net(x) + 0.01 * torch.randn(len(x), 3), "random"),
    "changed in place": (changed, "in place"),
    "a tuple": (lambda net, x: (net(x), x), "tuple"),
    "a dictionary": (lambda net, x: {"out": net(x)}, "dict"),
    "too few": (lambda net, x: net(x)[:, :1], r"K >= 2"),
    "infinite": (lambda net, x: net(x) * math.inf, "not finite"),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kind", BAD)
def test_networks_that_break_a_premise_are_refused(name, kind):
    net, x, y = problem()
    given = x.clone()
    forward, message = BAD[kind]
    with pytest.raises(ValueError, match=message):
        CALLS[name](Wrapped(net, forward), x, y)
    assert torch.equal(x, given)


def test_a_batchnorm_without_running_statistics_is_named():
    net, x, y = problem()
    with pytest.raises(ValueError, match=r"0 \(BatchNorm\)"):
        geometry(nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), net), x, y)


@pytest.mark.parametrize("name", CALLS)
def test_a_network_made_in_inference_mode_is_named(name):
    with torch.inference_mode():
        net, x, y = problem()
    with pytest.raises(ValueError, match="inference_mode"):
        CALLS[name](net, x, y)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x.numpy(), y), "ndarray"),
        (lambda x, y: (x, y.numpy()), "ndarray|array"),
        (lambda x, y: (x, y.int()), "int32"),
        (lambda x, y: (x[0, 0], y), "shape|x\\[None\\]"),
        (lambda x, y: ((255 * x).byte(), y), "uint8|divide by 255"),
    ],
    ids=["numpy", "numpy labels", "int32 labels", "one image", "uint8"],
)
def test_arguments_of_another_kind_are_named(name, change, message):
    net, x, y = problem()
    with pytest.raises(ValueError, match=message):
        CALLS[name](net, *change(x, y))


# ------------------------------------------------------------------------------------------------------- precision
HALF = [n for n in CALLS if n not in (*SECOND, *BOUNDS)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CALLS)
def test_half_precision_is_attacked_as_it_is_and_second_derivatives_are_refused(name, dtype):
    net, x, y = problem(dtype)
    if name in HALF:
        assert CALLS[name](net, x, y) is not None
    else:
        with pytest.raises(ValueError, match=str(dtype)):
            CALLS[name](net, x, y)


@pytest.mark.parametrize("kind", ["autocast", "a float64 head", "a bfloat16 head"])
@pytest.mark.parametrize("name", HALF)
def test_logits_of_another_dtype(name, kind):
    net, x, y = problem()
    if kind == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert CALLS[name](net, x, y) is not None
        return
    dtype = torch.float64 if "64" in kind else torch.bfloat16
    got = CALLS[name](Wrapped(net, lambda net, x: net(x).to(dtype)), x, y)
    torch.testing.assert_close(got, CALLS[name](net, x, y), equal_nan=True, rtol=1, atol=1)


@pytest.mark.parametrize("name", SECOND)
def test_second_derivatives_through_logits_in_half_precision_are_refused(name):
    net, x, y = problem()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="autocast"):
        CALLS[name](net, x, y)


def test_curvature_of_bfloat16_is_measured_after_float():
    net, x, y = problem()
    want = geometry(net, x, y).hessian_norm
    half = net.bfloat16().float()
    assert ((geometry(half, x, y).hessian_norm - want).abs() < 0.1 * want).all()


# --------------------------------------------------------------------------------------------- derivatives of layers
class Squared(torch.autograd.Function):
    """An autograd function in the old style: its forward takes the context."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(16, 3)

    def forward(self, x):
        q, k, v = self.qkv(x.flatten(1, 2)).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v).flatten(1))


def test_attention_checkpoints_and_old_functions_have_second_derivatives():
    net, x, y = problem(torch.float64)
    torch.manual_seed(0)
    nets = [
        Attention().double(),
        nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, activation="gelu").double(),
        Wrapped(net, lambda net, x: net(Squared.apply(x))),
        Wrapped(net, lambda net, x: checkpoint(net, x, use_reentrant=False)),
    ]
    nets[1] = nn.Sequential(nn.Flatten(1, 2), nets[1], nn.Flatten(), nn.Linear(16, 3).double())
    plain = [None, None, Wrapped(net, lambda net, x: net(x**2)), net]
    for net, same in zip(nets, plain, strict=True):
        got = geometry(net.eval(), x, y, tol=1e-8).hessian_norm
        if same is not None:
            want = geometry(same, x, y, method="exact").hessian_norm
        else:
            f = lambda x, y, net=net: F.cross_entropy(net(x[None]), y[None])
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                hessians = [
                    torch.autograd.functional.hessian(lambda v, t=t, f=f: f(v, t), s) for s, t in zip(x, y, strict=True)
                ]
            want = torch.stack([torch.linalg.matrix_norm(h.reshape(16, 16), 2) for h in hessians])
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


class Detached(Squared):
    """Saves a number where a tensor is needed."""

    @staticmethod
    def forward(ctx, x):
        ctx.slope = 2 * x.detach()
        return x**2

    @staticmethod
    def backward(ctx, grad):
        return ctx.slope * grad


class Once(Squared):
    backward = staticmethod(torch.autograd.function.once_differentiable(Squared.backward))


class Quiet(Squared):
    backward = staticmethod(torch.no_grad()(Squared.backward))


@pytest.mark.parametrize("scalar", ["loss", "margin"])
@pytest.mark.parametrize("function", [Detached, Once, Quiet])
@pytest.mark.parametrize("name", ["at x", "inside"])
def test_a_second_derivative_that_is_left_out_is_named(name, function, scalar):
    net, x, y = problem()
    forward = {"inside": lambda net, x: function.apply(net(x)), "at x": lambda net, x: net(function.apply(x))}[name]
    with pytest.raises(ValueError, match=r"twice.*autograd function"):
        geometry(Wrapped(net, forward), x, y, scalar=scalar)


@pytest.mark.parametrize("eps", [-1e-6, math.nan, math.inf])
def test_an_epsilon_that_is_none_is_named(eps):
    with pytest.raises(ValueError, match=f"eps.*{eps}"):
        geometry(*problem(), eps=eps)


def test_power_iteration_confirms_what_it_finds():
    """The start holds 1e-3 of the top eigenvector: the first small residual is at another eigenvalue."""
    found = []
    for seed in range(200):
        values = torch.tensor([3.0, 1.0, *[1e-3] * 30], dtype=torch.float64)
        rotation = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(seed)).double()).Q
        matrix = rotation @ values.diag() @ rotation.T
        quadratic = lambda x, m=matrix: torch.stack([torch.einsum("ni,ij,nj->n", x, m, x) / 2, 0 * x[:, 0]], 1)
        net = Wrapped(nn.Identity(), lambda _, x, q=quadratic: q(x))
        found.append(geometry(net, torch.rand(1, 32).double(), torch.zeros(1).long(), scalar="logit", method="power"))
    error = torch.stack([1 - one.hessian_norm[0] / 3 for one in found])
    assert error.max() < 0.02


def test_a_sample_that_is_wrong_by_twenty_logits_has_its_curvature():
    """σ(−20) of the loss of a quadratic margin: F.softplus is linear beyond its threshold."""
    net = nn.Linear(2, 2)
    net.weight.data = torch.tensor([[0.0, 0.0], [20.0, 0.0]])
    net.bias.data.zero_()
    for dtype in (torch.float32, torch.float64):
        for behind in (-30.0, -5.0, 0.0, 5.0, 19.0, 21.0, 60.0):
            x, y = torch.tensor([[behind / 20, 0.0]], dtype=dtype), torch.tensor([0])
            measured = geometry(net.to(dtype), x, y, method="exact")
            up, down = 1 / (1 + math.exp(-behind)), 1 / (1 + math.exp(behind))
            assert measured.hessian_norm.item() == pytest.approx(400 * up * down, rel=1e-4)
            assert measured.grad_norm.item() == pytest.approx(20 * up, rel=1e-4)


# ----------------------------------------------------------------------------------------------- decisions of attacks
@pytest.mark.parametrize("ruled_out", [-1e4, -1e9, torch.finfo(torch.float32).min])
def test_a_class_that_is_ruled_out_hides_nothing(ruled_out):
    torch.manual_seed(0)
    net, x, y = nn.Linear(5, 4), torch.rand(100, 5), torch.randint(4, (100,))
    masked = Wrapped(net, lambda net, x: F.pad(net(x), (0, 1), value=ruled_out))
    for call in (lambda m: first_success(m, x, y, [0.05, 10.0]), lambda m: minimal_radius(m, x, y, restarts=1)[0]):
        torch.testing.assert_close(call(masked), call(net))


@pytest.mark.parametrize("shift", [0.0, 1e3, 1e5, 1e6])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_what_all_logits_have_in_common_hides_nothing(norm, shift):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 30), nn.Softplus(), nn.Linear(30, 5))
    x = torch.rand(200, 20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        net[2].bias -= net(x).mean(0)
    y = net(x).argmax(1)
    eps = {"l2": [0.2], "linf": [0.05]}[norm]
    survive = lambda net: first_success(net, x, y, eps, norm=norm).isinf().double().mean().item()
    plain = survive(net)
    assert 0.1 < plain < 0.9
    assert survive(Wrapped(net, lambda net, x: net(x) + shift)) <= plain + 0.02
    assert survive(Wrapped(net, lambda net, x: net(x).bfloat16())) <= plain + 0.02


@pytest.mark.parametrize("lowest", [1.0, 0.0, -10.0])
def test_an_exact_tie_counts_against_the_network(lowest):
    """[1, 1, lowest], whatever argmax makes of it; where another class leads, it is wrong at x without an attack."""
    tied = Wrapped(nn.Linear(3, 3), lambda net, x: 0 * net(x) + torch.tensor([1.0, 1.0, lowest]))
    led = Wrapped(nn.Linear(3, 3), lambda net, x: 0 * net(x) + torch.tensor([1.0, 1.0 + 1e-6, lowest]))
    x, y = torch.rand(5, 3), torch.tensor([0, 1, 0, 1, 0])
    assert torch.equal(first_success(tied, x, y, [0.1]), torch.zeros(5))
    assert torch.equal(minimal_radius(tied, x, y)[0], torch.zeros(5))
    assert torch.equal(first_success(led, x, y, [0.1]) == 0, y == 0)
    assert torch.equal(minimal_radius(led, x, y, restarts=1)[0] == 0, y == 0)


@pytest.mark.parametrize("eps", [1e4, 1e25])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_ball_larger_than_the_box_is_the_box(norm, eps):
    net, x, y = problem()
    whole = 4.0 if norm == "l2" else 1.0
    assert torch.equal(pgd(net, x, y, eps, norm=norm), pgd(net, x, y, whole, norm=norm))
    assert torch.equal(pgd(net, x, y, 0.3, norm=norm, step_size=eps), pgd(net, x, y, 0.3, norm=norm, step_size=1e4))
    plain = minimal_radius(net, x, y, norm=norm, start=whole)[0]
    assert torch.equal(minimal_radius(net, x, y, norm=norm, start=eps)[0], plain)


# ------------------------------------------------------------------------------------- a device that has no float64
class NoFloat64(torch.overrides.TorchFunctionMode):
    """Pretends that all tensors of float32 are on a device without float64, but for copies made by ``.cpu()``."""

    def __init__(self):
        super().__init__()
        self.copies = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        on_cpu = bool(tensors) and any(tensors[0] is copy for copy in self.copies)
        wide = torch.float64 in (*args, *kwargs.values()) and (tensors or kwargs.get("device") not in (None, "cpu"))
        if (name == "double" or wide) and not on_cpu and not any(t.dtype == torch.float64 for t in tensors):
            raise TypeError(f"{name}: this device has no float64")
        if name not in ("to", "copy_") and {torch.float32, torch.float64} <= {t.dtype for t in tensors if t.dim()}:
            raise RuntimeError(f"{name}: tensors are on different devices")
        out = func(*args, **kwargs)
        if name == "cpu":
            out = out.clone()
        if name == "cpu" or (on_cpu and isinstance(out, torch.Tensor)):
            self.copies.append(out)
        return out


@pytest.mark.parametrize("name", [*CALLS, "curvature_bound", "all of it"])
def test_no_float64_on_a_device_that_has_none(name, monkeypatch):
    if name == "certified_radius":
        pytest.skip("it moves the whole network to the CPU, which the pretence does not see")
    net, x, y = problem()
    more = {
        "curvature_bound": lambda net, x, y: torch.tensor(curvature_bound(net, x.shape[1:])),
        "all of it": lambda net, x, y: numbers(layer_terms(net, input_shape=x.shape[1:])),
    }
    call = (CALLS | more)[name]
    want = call(net, x, y)
    for room in (bounds, curvature, walk):
        monkeypatch.setattr(room, "double", lambda t: t.cpu().double())  # as on Apple's MPS
    with NoFloat64():
        got = call(net, x, y)
    torch.testing.assert_close(got, want, equal_nan=True)


def test_the_pretended_device_notices():
    x = torch.rand(3)
    with NoFloat64():
        assert torch.equal(x.cpu().flatten().double(), x.cpu().to(torch.float64))
        for attempt in (x.double, lambda: x.to(torch.float64), lambda: x + x.cpu().double()):
            with pytest.raises((TypeError, RuntimeError), match="device"):
                attempt()


@pytest.mark.parametrize("method", ["lanczos", "power", "exact"])
@pytest.mark.parametrize("margin", [1.0, 30.0, 60.0, 66.0, 90.0])
def test_derivatives_of_confident_samples(method, margin):
    """Their squares vanish in float32; where they vanish themselves, the residual says so."""
    net = nn.Linear(4, 3)
    net.weight.data = torch.tensor([[2.0, 1.0, 0.0, 0.0], [0.0, 0.0, 3.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    net.bias.data = torch.tensor([margin, 0.0, -1.0])
    x, y = torch.full((2, 4), 0.01), torch.tensor([0, 0])
    got = geometry(net, x, y, method=method, eps=0)
    want = geometry(net.double(), x.double(), y, method="exact", eps=0)
    if margin > 70:
        assert got.residual.isinf().all()
    else:
        for name in ("grad_norm", "hessian_norm", "curvature"):
            torch.testing.assert_close(getattr(got, name).double(), getattr(want, name), rtol=1e-2, atol=0)
