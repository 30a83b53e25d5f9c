"""The LoRA feed-forward network: every path against plain PyTorch in float64, values and all gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gsforget.errors import RequestError
from gsforget.kernels.lora_ffn import ACTIVATIONS, Layer, dispatch, lora_ffn, naive_lora_ffn, torch_path

torch.set_num_threads(1)
FLOOR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def layer(rng, fan_in: int, fan_out: int, rank: int, bias: bool = True) -> Layer:
    def draw(*shape, scale):
        return torch.randn(*shape, generator=rng, dtype=torch.float64) * scale

    return Layer(
        draw(fan_out, fan_in, scale=fan_in**-0.5),
        draw(fan_out, scale=0.1) if bias else None,
        draw(rank, fan_in, scale=fan_in**-0.5),
        draw(fan_out, rank, scale=0.3),
    )


def network(seed: int, rows: int, k: int, n: int, out: int, ranks, gated: bool, bias: bool = True):
    rng = torch.Generator().manual_seed(seed)
    firsts = [layer(rng, k, n, r, bias) for r in ranks[: 1 + gated]]
    x = torch.randn(rows, k, generator=rng, dtype=torch.float64)
    return x, firsts, layer(rng, n, out, ranks[-1], bias), torch.randn(rows, out, generator=rng, dtype=torch.float64)


def run(function, dtype, x, firsts, last, dy, activation, poison=False, **options):
    """y and the gradients of x and of all factors, in float64, of a call in another type."""

    def cast(t, grad=False):
        return None if t is None else t.detach().clone().to(dtype).requires_grad_(grad)

    here = [Layer(cast(w), cast(c), cast(a, True), cast(b, True)) for w, c, a, b in [*firsts, last]]
    given = cast(x, True)
    y = function(given, tuple(here[:-1]), here[-1], activation, **options)
    y.backward(dy.to(dtype))
    return [t.double().detach() for t in (y, given.grad, *[g.grad for la in here for g in (la.a, la.b)])]


def assert_as_exact(got, plain, truth, floor):
    """The rule: no further from the truth than twice what plain PyTorch is at that precision, and NaN nowhere."""
    assert len(got) == len(plain) == len(truth)
    for i, (g, p, t) in enumerate(zip(got, plain, truth)):
        assert g.shape == t.shape
        assert torch.isfinite(g).all(), i
        scale = t.abs().max().clamp_min(1e-3)
        assert (g - t).abs().max() <= 2 * (p - t).abs().max() + floor * scale, i


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that the kernels ask for is full of NaN until they write it."""
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, _real=real, **k: _real(*a, **k).fill_(torch.nan))
    real_new = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: real_new(*a, **k).fill_(torch.nan))


WAYS = [{"up": "fused"}, {"up": "vendor"}, {"up": "fused", "down": "fused", "slope": "fused", "back": "fused"}]


@pytest.mark.parametrize("ways", WAYS, ids=["default", "vendor", "fused"])
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 70),
    widths=st.tuples(st.integers(8, 40), st.integers(8, 40), st.integers(8, 40)),
    ranks=st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8)),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    gated=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
@settings(max_examples=8, deadline=None, derandomize=True)
def test_kernels_in_the_interpreter(ways, seed, rows, widths, ranks, activation, gated, bias, dtype):
    if dtype == torch.float16:
        rows += 15  # of a single row's few roundings one may well be three times as lucky as another
    net = network(seed, rows, *widths, ranks, gated, bias)
    truth = run(naive_lora_ffn, torch.float64, *net, activation)
    plain = run(naive_lora_ffn, dtype, *net, activation)
    with dispatch.forced(**ways):
        got = run(lora_ffn, dtype, *net, activation, backend="interpret")
    assert_as_exact(got, plain, truth, FLOOR[dtype])


@pytest.mark.parametrize("ways", WAYS, ids=["default", "vendor", "fused"])
@pytest.mark.parametrize("gated", [False, True])
def test_every_output_is_written_and_a_second_call_gives_the_same_bits(ways, gated, poisoned):
    net = network(3, 37, 24, 40, 18, (5, 3, 4), gated)
    with dispatch.forced(**ways):
        once, again = [run(lora_ffn, torch.float32, *net, "gelu", backend="interpret") for _ in range(2)]
    assert all(torch.isfinite(t).all() for t in once)
    assert all(torch.equal(a, b) for a, b in zip(once, again))


@pytest.mark.parametrize(("first", "then"), [("fused", "vendor"), ("vendor", "fused")])
def test_the_backward_goes_by_what_the_forward_chose(first, then):
    """A table that changed in between, or another thread's, must not make it take z for something else."""
    x, firsts, last, dy = network(12, 21, 16, 24, 16, (4, 3), False)
    found = []
    for way in (first, then):
        here = [Layer(*(t.float() for t in la)) for la in (firsts[0], last)]
        here = [la._replace(a=la.a.requires_grad_(), b=la.b.requires_grad_()) for la in here]
        with dispatch.forced(up=first, slope="vendor"):
            y = lora_ffn(x.float(), *here, backend="interpret")
        with dispatch.forced(up=way, slope="vendor"):
            found.append(torch.autograd.grad(y, [t for la in here for t in (la.a, la.b)], dy.float()))
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_ranks_up_to_the_largest(monkeypatch):
    net = network(4, 20, 70, 66, 68, (64, 33, 64), True)
    truth, plain = (run(naive_lora_ffn, d, *net, "silu") for d in (torch.float64, torch.float32))
    assert_as_exact(run(lora_ffn, torch.float32, *net, "silu", backend="interpret"), plain, truth, 1e-6)


def test_bfloat16_within_its_own_rounding():
    """The interpreter truncates where hardware rounds, so that the bound is looser here."""
    net = network(5, 33, 32, 48, 32, (4, 4), False)
    truth, plain = (run(naive_lora_ffn, d, *net, "gelu") for d in (torch.float64, torch.bfloat16))
    got = run(lora_ffn, torch.bfloat16, *net, "gelu", backend="interpret")
    for g, p, t in zip(got, plain, truth):
        assert (g - t).abs().max() <= 4 * (p - t).abs().max() + 8e-3 * t.abs().max()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_torch_path(gated, activation, dtype):
    net = network(6, 50, 24, 64, 20, (7, 2, 3), gated)
    truth = run(naive_lora_ffn, torch.float64, *net, activation)
    plain = run(naive_lora_ffn, dtype, *net, activation)
    assert_as_exact(run(lora_ffn, dtype, *net, activation, backend="torch"), plain, truth, FLOOR[dtype])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "quick_gelu"])
def test_gradients_of_the_torch_path_are_those_of_its_values(activation, gated):
    x, firsts, last, _ = network(7, 3, 5, 6, 4, (2, 3, 2), gated)
    leaves = [t.requires_grad_() for t in (x, *[t for la in (*firsts, last) for t in (la.a, la.b)])]

    def call(x, *pairs):
        layers = [la._replace(a=pairs[2 * i], b=pairs[2 * i + 1]) for i, la in enumerate([*firsts, last])]
        return lora_ffn(x, layers[:-1], layers[-1], activation, backend="torch")

    assert torch.autograd.gradcheck(call, leaves)


def test_a_pair_of_zeros_leaves_the_layer_bit_for_bit():
    x, firsts, last, _ = network(8, 30, 24, 96, 24, (4, 4), False)
    x, last = x.float(), Layer(*(t.float() for t in last))
    first = Layer(*(t.float() for t in firsts[0]))
    first, last = first._replace(b=torch.zeros_like(first.b)), last._replace(b=torch.zeros_like(last.b))
    plain = torch.nn.functional.linear(x, first.weight, first.bias)
    plain = torch.nn.functional.linear(torch.nn.functional.gelu(plain), last.weight, last.bias)
    assert torch.equal(lora_ffn(x, first, last), plain)


@pytest.mark.parametrize("backend", ["torch", "interpret"])
def test_strides_and_leading_shapes(backend):
    x, firsts, last, _ = network(9, 2 * 3 * 5, 12, 20, 16, (3, 3), False)
    x, first, last = x.float(), *(Layer(*(t.float() for t in la)) for la in (firsts[0], last))
    want = naive_lora_ffn(x, (first,), last)
    batch = want.view(2, 3, 5, 16)
    for strided in (x.view(2, 3, 5, 12), torch.stack([x, x], -1)[..., 0].view(2, 3, 5, 12), x.t().contiguous().t()):
        got = lora_ffn(strided, first, last, backend=backend)
        torch.testing.assert_close(got, batch if strided.ndim == 4 else want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "interpret"])
def test_zero_stride_gradients_and_no_gradient_to_the_input(backend):
    x, firsts, last, _ = network(10, 17, 12, 20, 16, (3, 3), False)
    layers = [la._replace(a=la.a.float().requires_grad_(), b=la.b.float().requires_grad_(), weight=la.weight.float(),
                          bias=la.bias.float()) for la in (firsts[0], last)]  # fmt: skip
    lora_ffn(x.float(), *layers, backend=backend).sum().backward()
    got = [g.grad.clone() for la in layers for g in (la.a, la.b)]
    for la in layers:
        la.a.grad = la.b.grad = None
    naive_lora_ffn(x.float(), (layers[0],), layers[1]).sum().backward()
    for a, b in zip(got, [g.grad for la in layers for g in (la.a, la.b)]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_weight_that_wants_a_gradient_gets_one():
    x, firsts, last, _ = network(11, 6, 5, 7, 4, (2, 2), False)
    first = firsts[0]._replace(weight=firsts[0].weight.requires_grad_())
    got = torch.autograd.grad(lora_ffn(x, first, last).sum(), first.weight)[0]
    want = torch.autograd.grad(naive_lora_ffn(x, (first,), last).sum(), first.weight)[0]
    assert torch.equal(got, want)


@pytest.mark.parametrize("backend", ["torch", "interpret"])
def test_an_empty_batch(backend):
    x, firsts, last, _ = network(12, 0, 5, 7, 4, (2, 2), False)
    a = firsts[0].a.requires_grad_()
    y = lora_ffn(x, firsts[0], last, backend=backend)
    y.sum().backward()
    assert y.shape == (0, 4)
    assert not a.grad.any()


def test_autocast_computes_in_its_type_and_gives_float32_gradients():
    x, firsts, last, _ = network(13, 9, 16, 32, 16, (3, 3), False)
    layers = [Layer(*(t.float() for t in la)) for la in (firsts[0], last)]
    layers = [la._replace(a=la.a.requires_grad_(), b=la.b.requires_grad_()) for la in layers]
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_ffn(x.float(), *layers)
        want = naive_lora_ffn(x.float(), (layers[0],), layers[1])
    assert y.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(y, want, rtol=2e-2, atol=2e-2)
    y.float().sum().backward()
    assert layers[0].a.grad.dtype == torch.float32


def test_gradient_accumulation_and_a_kept_graph():
    x, firsts, last, dy = network(14, 9, 6, 8, 4, (2, 2), False)
    a = firsts[0].a.requires_grad_()
    y = lora_ffn(x, firsts[0], last)
    y.backward(dy, retain_graph=True)
    once = a.grad.clone()
    y.backward(dy)
    assert torch.equal(a.grad, 2 * once)


def test_compile_sees_one_operation_and_no_break():
    x, firsts, last, dy = network(15, 9, 6, 8, 4, (2, 2, 3), True)
    leaves = [t.requires_grad_() for t in (x, *[t for la in (*firsts, last) for t in (la.a, la.b)])]

    def step(x):
        return 2 * lora_ffn(x.sin(), firsts, last, "silu") + 1

    y = step(x)
    want = torch.autograd.grad(y, leaves, dy)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    out = compiled(x)
    torch.testing.assert_close(out, y)
    for a, b in zip(torch.autograd.grad(out, leaves, dy), want):
        torch.testing.assert_close(a, b)


def test_compiled_too_an_input_without_gradient_costs_none(monkeypatch):
    x, firsts, last, dy = network(19, 9, 6, 8, 4, (2, 3), False)
    leaves = [t.requires_grad_() for la in (*firsts, last) for t in (la.a, la.b)]
    asked, real = [], torch_path.backward

    def backward(*args):
        asked.append(args[6])
        return real(*args)

    monkeypatch.setattr(torch_path, "backward", backward)
    compiled = torch.compile(lambda x: lora_ffn(x, firsts, last), fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(x), leaves, dy)
    wanted = torch.autograd.grad(lora_ffn(x, firsts, last), leaves, dy)
    assert asked == [False, False]
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("path", ["torch_path", "triton_path"])
def test_the_registered_operation_keeps_its_promises(path):
    x, firsts, last, _ = network(16, 5, 6, 8, 4, (2, 3), False)
    flat = [t.float() for la in (*firsts, last) for t in la]
    for i in (2, 3, 6, 7):
        flat[i].requires_grad_()
    from gsforget.kernels.lora_ffn.function import _compiled

    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(_compiled, (x.float().requires_grad_(), flat, "gelu", path), test_utils=tests)


def test_what_does_not_fit_is_said():
    x, firsts, last, _ = network(17, 9, 6, 8, 4, (2, 2), False)
    first = firsts[0]
    cases = {
        "no activation named swish": lambda: lora_ffn(x, first, last, "swish"),
        "reads 5 features": lambda: lora_ffn(x[:, :5], first, last),
        "bias \\[4\\] beside": lambda: lora_ffn(x, first._replace(bias=last.bias), last),
        "factors \\[2, 8\\]": lambda: lora_ffn(x, first._replace(a=last.a), last),
        "rank 7 beside": lambda: lora_ffn(
            x, first._replace(a=torch.zeros(7, 6).double(), b=torch.zeros(8, 7).double()), last
        ),
        "not torch.float32 like": lambda: lora_ffn(x.float(), first, last),
        "not wholly on": lambda: lora_ffn(x, first._replace(weight=first.weight.to("meta")), last),
        "3 first layers": lambda: lora_ffn(x, [first] * 3, last),
        "input is torch.int64": lambda: lora_ffn(x.long(), first, last),
        "input is torch.float64 \\[\\]": lambda: lora_ffn(x[0, 0], first, last),
    }
    for words, call in cases.items():
        with pytest.raises(RequestError, match=words) as told:
            call()
        assert told.value.kind == "kernel_input"
        assert told.value.hint


def test_rows_that_lie_more_than_two_to_the_31_elements_apart():
    """Of a tensor that is never filled: only the rows in use take memory."""
    rows, width = 40, 16
    try:
        store = torch.empty(2**31 + 2**27, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("the machine promises no 4 GB")
    x, firsts, last, _ = network(18, rows, width, 24, 16, (4, 4), False)
    far = store.as_strided((rows, width), (len(store) // rows // 16 * 16, 1))
    assert far.stride(0) * (rows - 1) > 2**31
    far.copy_(x)
    here = [Layer(*(t.half() for t in layer)) for layer in (firsts[0], last)]
    for backend in ("torch", "interpret"):
        near = lora_ffn(far.clone(memory_format=torch.contiguous_format), *here, backend=backend)
        assert torch.equal(lora_ffn(far, *here, backend=backend), near)


def test_the_nearest_measured_shape_decides():
    rows = [
        {"m": 10000, "n": 3072, "k": 768, "way": "fused"},
        {"m": 200, "n": 3072, "k": 768, "way": "vendor"},
        {"m": 10000, "n": 768, "k": 3072, "way": "vendor"},
    ]
    assert dispatch.nearest(rows, 9850, 4096, 1024)["way"] == "fused"
    assert dispatch.nearest(rows, 394, 3072, 768)["m"] == 200
    assert dispatch.nearest(rows, 9850, 800, 3000)["way"] == "vendor"
    assert dispatch.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_only_known_stages_can_be_forced():
    with pytest.raises(ValueError, match="no such"):
        dispatch.forced(sideways="fused")
    with dispatch.forced(up="vendor"):
        assert dispatch.choose("up", torch.zeros(1), 1, 1, 1) == "vendor"
    assert dispatch.choose("up", torch.zeros(1), 1, 1, 1) == "fused"
