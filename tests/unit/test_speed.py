"""Steps that are compiled or recorded compute what the step as it is written does; and a lack of memory is named."""

import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter

from lcnn_utils.nn import norms_once_a_step
from lcnn_utils.training import (
    METHODS,
    OBJECTIVES,
    Recipe,
    accuracy,
    build,
    fit,
    make_optimizer,
    samples,
    speed,
    state_path,
    training_step,
)
from lcnn_utils.training.speed import (
    as_written,
    autocast,
    compiled,
    fast_step,
    largest_batch,
    memory,
    worth_compiling,
    worth_recording,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TINY = Recipe("moons", "lcnn", "mlp", width=4)
DIGITS = Recipe("digits", "lcnn", "resnet10", width=2, epochs=1, batch_size=512)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: there is none here")


def parts(recipe=TINY, device=CPU):
    """A net after a few steps, its optimiser, a step of it, and a batch."""
    model = build(recipe).to(device)
    optimizer, _ = make_optimizer(recipe, model)
    step = training_step(recipe, model, optimizer, lambda: None, {}, [])
    x, y = (part[:32] for part in samples(recipe, "train", device))
    for _ in range(3):
        step(x, y)
    return model, optimizer, step, x, y


def everything(model, optimizer) -> list[torch.Tensor]:
    momenta = [state["momentum_buffer"] for state in optimizer.state.values()]
    return [value.detach().clone() for value in (*model.state_dict().values(), *momenta)]


def same(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(one, two) for one, two in zip(a, b, strict=True))


# ---- what is worth it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("derivative", ["exact", "difference"])
def test_what_is_compiled_and_recorded(method, derivative):
    recipe = Recipe(method=method, derivative=derivative)
    second = method in ("gradreg", "lcnn_gradreg", "minimal", "cure") and derivative == "exact"
    assert worth_compiling(recipe, GPU) == (not second), "compiled code has no second derivative"
    assert worth_recording(recipe, GPU) == (method not in ("cure", "adversarial")), "steps that are all alike"
    assert not worth_compiling(replace(recipe, model="mlp"), GPU)
    assert not worth_compiling(replace(recipe, dataset="cifar10"), CPU), "the fused kernels are faster"
    assert not worth_recording(recipe, CPU)


def test_a_cpu_computes_in_float32():
    with autocast(CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert not torch.is_autocast_enabled("cpu")


# ---- compiled, and not -------------------------------------------------------------------------------------------


@pytest.fixture
def fake_compiler(monkeypatch):
    """A compiler whose code only notes that it ran."""
    ran = []

    def compile(function, **options):
        assert options == {"dynamic": False}
        return lambda *args: (ran.append(args), function(*args))[1]

    monkeypatch.setattr(torch, "compile", compile)
    return ran


def test_compiled_is_for_a_while_and_as_written_within_it(fake_compiler):
    model, x = build(TINY).eval(), torch.randn(3, 2)
    plain = model(x)
    with compiled(model, wanted=True):
        assert torch.equal(model(x), plain)
        assert len(fake_compiler) == 1
        with as_written(model):
            model(x)
            assert len(fake_compiler) == 1
        model(x)
        assert len(fake_compiler) == 2
    model(x)
    with compiled(model, wanted=False):
        model(x)
    with as_written(model):
        model(x)
    assert len(fake_compiler) == 2


def test_both_end_with_an_error(fake_compiler):
    model, x = build(TINY).eval(), torch.randn(3, 2)

    def stopped(context):
        with context:
            raise KeyboardInterrupt

    with compiled(model, wanted=True):
        with pytest.raises(KeyboardInterrupt):
            stopped(as_written(model))
        model(x)
        assert len(fake_compiler) == 1
    with pytest.raises(KeyboardInterrupt):
        stopped(compiled(model, wanted=True))
    model(x)
    assert len(fake_compiler) == 1


@pytest.mark.parametrize("method", ["standard", "lcnn"])
def test_the_compiler_gets_a_training_net_whole(method, monkeypatch):
    """In one graph: a root nn.Sequential, parametrised weights and all."""
    graphs, real = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, backend=graphs, **options))
    torch._dynamo.reset()
    model, x = build(Recipe("digits", method, "resnet10", width=2)).train(), torch.rand(4, 1, 8, 8)
    with norms_once_a_step(model) as advance, compiled(model, wanted=True):
        for _ in range(2):
            advance()
            model(x).sum().backward()
    assert graphs.frame_count == 1


def test_compiled_for_real(needs_compiler):
    """Some steps, norms once in each: losses, gradients, weights, statistics, directions; and a Hessian in between."""
    torch._dynamo.reset()
    x, y = torch.rand(6, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1] * 3)
    found = []
    for wanted in (False, True):
        model = build(TINY)
        with norms_once_a_step(model) as advance, compiled(model, wanted), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            losses = []
            for _ in range(3):
                advance()
                loss, _ = OBJECTIVES["lcnn"](model, x, y, TINY)
                gradients = torch.autograd.grad(loss, list(model.parameters()))
                for p, g in zip(model.parameters(), gradients, strict=True):
                    p.data -= 0.1 * g
                losses.append(loss.item())
            with as_written(model.eval()):
                hessian = torch.func.hessian(lambda z, net=model: net(z).sum())(x[:1])
        found.append([torch.tensor(losses), *gradients, *model.state_dict().values(), hessian])
    for plain, by_compiler in zip(*found, strict=True):
        torch.testing.assert_close(by_compiler, plain, rtol=1e-4, atol=1e-6)


# ---- fast_step ---------------------------------------------------------------------------------------------------


def test_a_fast_step_on_a_cpu_is_the_step_and_leaves_no_trace():
    model, optimizer, step, x, y = parts()
    before = everything(model, optimizer)
    assert fast_step(step, x, y, model, optimizer, TINY) is step
    assert same(everything(model, optimizer), before)
    step(x, y)
    assert not same(everything(model, optimizer), before), "a step does leave traces"


def broken(after: int, step, error):
    """The step, which fails at its call after so many, with all that it changes changed."""
    calls = [0]

    def run(x, y):
        calls[0] += 1
        terms = step(x, y)
        if calls[0] > after:
            raise error
        return terms

    return run


def test_a_compiler_that_fails_is_told_and_leaves_no_trace():
    model, optimizer, step, x, y = parts()
    model._compiled_call_impl = model._call_impl
    before = everything(model, optimizer)
    failing = broken(0, step, ValueError("no such kernel\nat line 3"))
    with pytest.warns(RuntimeWarning, match=r"^training goes on without torch\.compile: no such kernel$") as caught:
        run = fast_step(failing, x, y, model, optimizer, TINY)
    assert len(caught) == 1
    assert run is failing
    assert model._compiled_call_impl is None
    assert same(everything(model, optimizer), before)


@pytest.mark.parametrize("error", [RuntimeError("cudaErrorStreamCapture\nunsupported"), NotImplementedError()])
def test_a_recording_that_fails_is_told_and_leaves_no_trace(error, monkeypatch):
    model, optimizer, step, x, y = parts()
    monkeypatch.setattr(speed, "worth_recording", lambda *_: True)
    monkeypatch.setattr(speed, "recorded", lambda step, x, y: broken(0, step, error)(x, y))
    before = everything(model, optimizer)
    reason = str(error).split("\n")[0] or "NotImplementedError"
    with pytest.warns(RuntimeWarning, match=f"^training goes on without a CUDA graph: {reason}$") as caught:
        assert fast_step(step, x, y, model, optimizer, TINY) is step
    assert len(caught) == 1
    assert same(everything(model, optimizer), before)


def test_a_recording_that_works_is_used_and_leaves_no_trace(monkeypatch):
    model, optimizer, step, x, y = parts()
    replay = lambda x, y: step(x, y)
    monkeypatch.setattr(speed, "worth_recording", lambda *_: True)
    monkeypatch.setattr(speed, "recorded", lambda step, x, y: [step(x, y) for _ in range(3)] and replay)
    before = everything(model, optimizer)
    assert fast_step(step, x, y, model, optimizer, TINY) is replay
    assert same(everything(model, optimizer), before)


@pytest.mark.parametrize("calls", [0, 1], ids=["compiling", "recording"])
def test_a_lack_of_memory_is_no_fault_of_the_compilers(calls, monkeypatch):
    model, optimizer, step, x, y = parts()
    failing = broken(calls, step, torch.OutOfMemoryError("CUDA out of memory"))
    monkeypatch.setattr(speed, "worth_recording", lambda *_: True)
    monkeypatch.setattr(speed, "recorded", lambda step, x, y: step(x, y))
    with pytest.raises(torch.OutOfMemoryError):
        fast_step(failing, x, y, model, optimizer, TINY)


# ---- memory ------------------------------------------------------------------------------------------------------


def hungry(limit: int, refuse):
    """The objective, for at most so many samples; more are refused."""

    def objective(model, x, y, recipe, **more):
        if len(x) > limit:
            refuse(len(x))
        return OBJECTIVES["lcnn"](model, x, y, recipe, **more)

    return objective


def like_a_gpu(_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def like_a_cpu(n):
    torch.empty(n * 10**14)  # more than any machine has: a real refusal


@pytest.mark.parametrize("refuse", [like_a_gpu, like_a_cpu])
def test_training_says_which_batch_would_fit(refuse, store, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "standard", hungry(100, refuse))
    recipe = replace(DIGITS, method="standard")
    says = (
        r"^there is not enough memory on cpu for batch_size=512 with resnet10 of width 2: "
        r"batch_size=64 would fit, as in dataclasses\.replace\(recipe, …\)$"
    )
    with pytest.raises(RuntimeError, match=says) as raised:
        fit(recipe, progress=False)
    assert not isinstance(raised.value, torch.OutOfMemoryError)
    assert raised.value.__suppress_context__
    assert not state_path(recipe).exists()
    _, history = fit(replace(recipe, batch_size=64), progress=False)
    assert history.epoch.tolist() == [1]


@pytest.mark.parametrize(("limit", "fits"), [(1000, 64), (64, 64), (63, 32), (5, 4), (2, 2), (1, 0)])
def test_the_largest_batch(limit, fits, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "standard", hungry(limit, like_a_gpu))
    recipe = replace(DIGITS, method="standard", batch_size=128)
    model = build(recipe)
    weights = [p.detach().clone() for p in model.parameters()]
    assert largest_batch(recipe, model, CPU) == fits
    assert same(weights, [p.detach() for p in model.parameters()])
    assert all(p.grad is None for p in model.parameters())


def test_no_batch_fits_or_the_error_is_another(monkeypatch):
    recipe = replace(DIGITS, method="standard")
    monkeypatch.setitem(OBJECTIVES, "standard", hungry(0, like_a_gpu))

    def run(error):
        with memory(recipe, build(recipe), CPU):
            raise error

    with pytest.raises(RuntimeError, match=r"batch_size=512 .*: no smaller batch fits either: use a smaller model"):
        run(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2 shapes$"):
        run(RuntimeError("mat1 and mat2 shapes"))
    with memory(recipe, build(recipe), CPU):
        pass


# ---- on a GPU ----------------------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu(store, monkeypatch):
    monkeypatch.setenv("LCNN_DEVICE", "cuda")


@needs_gpu
@pytest.mark.parametrize("method", METHODS)
def test_a_gpu_learns_what_a_cpu_does(method, on_gpu, monkeypatch, tmp_path):
    """And silently: everything compiles and is recorded."""
    recipe = Recipe("digits", method, "resnet10", width=4, epochs=5, batch_size=64, derivative="difference")
    found = []
    for device in ("cpu", "cuda"):
        monkeypatch.setenv("LCNN_STORE", str(tmp_path / device))
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            model, history = fit(recipe, device=device, progress=False)
        assert next(model.parameters()).device.type == device
        found.append((accuracy(model, *samples(recipe, "test", device)), history.loss.iloc[-1]))
    (cpu, cpu_loss), (gpu, gpu_loss) = found
    assert gpu == pytest.approx(cpu, abs=0.06)
    assert gpu_loss == pytest.approx(cpu_loss, rel=0.2, abs=0.05)


@needs_gpu
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("derivative", ["exact", "difference"])
def test_resumed_on_a_gpu_is_the_uninterrupted_run_but_for_rounding(method, derivative, on_gpu, monkeypatch, tmp_path):
    recipe = Recipe("digits", method, "resnet10", width=4, epochs=3, batch_size=256, derivative=derivative)
    model, whole = fit(recipe, progress=False)
    draws = lambda: load_file(state_path(recipe))["generator"].tolist()
    drawn = draws()
    monkeypatch.setenv("LCNN_STORE", str(tmp_path / "another"))

    def stop(history):
        if len(history) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(recipe, progress=False, watch=stop)
    resumed, history = fit(recipe, progress=False)
    assert history.epoch.tolist() == [1, 2, 3]
    assert draws() == drawn, "the same batches and random starts, warming up or not"
    assert history.loss.tolist() == pytest.approx(whole.loss.tolist(), rel=0.03, abs=0.01)
    x, _ = samples(recipe, "test", "cuda")
    with torch.no_grad():
        assert (model(x).argmax(1) == resumed(x).argmax(1)).float().mean() > 0.95


@needs_gpu
@pytest.mark.parametrize("method", [method for method in METHODS if worth_recording(Recipe(method=method), GPU)])
def test_a_recorded_step_is_the_step(method):
    """Both from one state, over batches and learning rates that change from step to step."""
    recipe = Recipe("digits", method, "resnet10", width=2)
    x, y = samples(recipe, "train", GPU)
    found = []
    for record in (False, True):
        model, log = build(recipe).to(GPU), []
        optimizer, _ = make_optimizer(recipe, model)
        with norms_once_a_step(model) as advance:
            run = training_step(recipe, model, optimizer, advance, {}, [])
            if record:
                run = fast_step(run, x[:64], y[:64], model, optimizer, recipe)
            for index, (xs, ys) in enumerate(zip(x[:640].split(64), y[:640].split(64), strict=True)):
                for group in optimizer.param_groups:
                    group["lr"].fill_(0.02 * (1 + index % 3))
                log.append(run(xs, ys))
        found.append([torch.stack(log), *everything(model, optimizer)])
    for eager, recorded in zip(*found, strict=True):
        torch.testing.assert_close(recorded, eager, rtol=2e-2, atol=2e-3)


@needs_gpu
def test_a_real_lack_of_gpu_memory(on_gpu, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "standard", hungry(100, lambda n: torch.empty(n * 10**13, device="cuda")))
    with pytest.raises(RuntimeError, match=r"not enough memory on cuda.* batch_size=64 would fit"):
        fit(replace(DIGITS, method="standard"), progress=False)
