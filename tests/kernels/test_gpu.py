"""What only a GPU can show: streams, graphs, devices, sizes beyond 32 bits, and that nothing waits for the host.

The numerical results on CUDA tensors are tested in the files of the ops, whose fixtures include the device.
"""

import pytest
import torch

import fastattn
from fastattn import reference
from fastattn.ops._backends import why_not

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
RAW = torch.ops.fastattn
BACKENDS = ("native", "triton")


@pytest.fixture(params=BACKENDS)
def backend(request):
    reason = fastattn.backends()["cuda"][request.param]
    if reason != "available":
        pytest.skip(reason)
    with fastattn.use_backend(request.param):
        yield request.param


def operands(rows=512, cols=1024, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    return randn(rows, cols), randn(rows, cols), randn(cols), randn(cols), randn(rows, cols)


def step(x, residual, weight, bias, dy, rng, backend):
    """Forward and backward on the raw ops."""
    y, r, stats = getattr(RAW.norm_fwd, backend)(x, residual, weight, bias, rng, 0.1, 1e-5, False)
    grads = getattr(RAW.norm_bwd, backend)(dy, dy, r, weight, stats, rng, 0.1, False, True, True, True)
    dropped = getattr(RAW.dropout_fwd, backend)(x, residual, rng, 0.1)
    return y, r, stats, *grads, dropped


def new_rng(seed=1):
    return torch.tensor([seed, seed + 2**34], device="cuda")


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_the_automatic_choice_is_native():
    x = torch.randn(4, 64, device="cuda")
    assert "native: runs" in fastattn.explain("layer_norm", x)


def test_other_stream(backend):
    inputs = operands()
    want = step(*inputs, new_rng(), backend)
    stale = [torch.zeros_like(t) for t in inputs]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a kernel on another stream would read the zeros
        for old, new in zip(stale, inputs, strict=True):
            old.copy_(new)
        got = step(*stale, new_rng(), backend)
    stream.synchronize()
    assert_same(got, want)


def test_graph_replay_with_new_inputs(backend):
    static, rng = operands(), new_rng()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(*static, rng, backend)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(*static, rng, backend)
    for seed in (2, 3):
        fresh = operands(seed=seed)
        for old, new in zip(static, fresh, strict=True):
            old.copy_(new)
        rng.copy_(new_rng(seed))
        graph.replay()
        assert_same(outputs, step(*fresh, new_rng(seed), backend))


def test_graph_replay_draws_dropout_anew(backend):
    x = torch.ones(256, 512, device="cuda")
    fastattn.dropout(x, 0.5)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fastattn.dropout(x, 0.5)
    masks = []
    for _ in range(3):
        graph.replay()
        masks.append(out != 0)
    assert all(0.45 < mask.float().mean() < 0.55 for mask in masks)
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])


def test_no_synchronisation(backend):
    inputs, rng = operands(), new_rng()
    step(*inputs, rng, backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*inputs, rng, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_same_bits_in_fifty_runs(backend):
    inputs = operands(3000, 1536)
    want = step(*inputs, new_rng(), backend)
    for _ in range(50):
        assert_same(step(*inputs, new_rng(), backend), want)


def test_memory_is_given_back(backend):
    inputs, rng = operands(), new_rng()
    step(*inputs, rng, backend)
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        step(*inputs, rng, backend)
    assert torch.cuda.memory_allocated() == before


def test_backends_continue_each_other():
    if any(fastattn.backends()["cuda"][name] != "available" for name in BACKENDS):
        pytest.skip("needs both backends")
    x, residual, weight, bias, dy = operands(dtype=torch.float32)
    rng = new_rng()
    saved = [getattr(RAW.norm_fwd, b)(x, residual, weight, bias, rng, 0.3, 1e-5, False)[1:] for b in BACKENDS]
    results = [
        getattr(RAW.norm_bwd, b)(dy, None, r, weight, stats, rng, 0.3, False, True, True, True)
        for r, stats in saved
        for b in BACKENDS
    ]
    keep = reference.philox_keep(rng, 0.3, torch.arange(512, device="cuda"), torch.zeros_like(rng[:1]), 1024)
    for result in results:
        dx, dresidual, *_ = result
        assert torch.equal(dx != 0, keep & (dresidual != 0))
        for got, want in zip(result, results[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_tensors_on_a_device_that_is_not_current(backend):
    inputs = operands()
    want = step(*inputs, new_rng(), backend)
    other = [t.to("cuda:1") for t in inputs]
    assert torch.cuda.current_device() == 0
    got = step(*other, new_rng().to("cuda:1"), backend)
    assert_same([t.cpu() for t in got], [t.cpu() for t in want])


def test_more_than_two_to_the_31_elements(backend):
    rows, cols = 2**25 + 3, 72  # 2.4e9 elements
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("less than 24 GiB of GPU memory free")
    x = torch.randn(3, cols, device="cuda").bfloat16()
    weight = torch.randn(cols, device="cuda").bfloat16()
    many = x[:1].expand(rows, cols)
    y, _, stats = getattr(RAW.norm_fwd, backend)(many, None, weight, None, None, 0.0, 1e-5, False)
    assert torch.equal(y[-1], y[0])
    assert torch.equal(y[rows // 2], y[0])
    dx, *_ = getattr(RAW.norm_bwd, backend)(
        many, None, many, weight, stats, None, 0.0, False, False, True, True
    )  # dy = x
    assert torch.equal(dx[-1], dx[0])
    del y, dx
    out = getattr(RAW.dropout_fwd, backend)(many, None, new_rng(), 0.5)
    last = torch.arange(rows - 64, rows, device="cuda")
    keep = reference.philox_keep(new_rng(), 0.5, last, torch.zeros_like(last), cols)
    assert torch.equal(out[-64:] != 0, keep & (x[0] != 0))


def loss_step(x, weight, target, backend, reduction="mean"):
    """Loss, dx and dweight of linear_cross_entropy over several chunks."""
    loss = fastattn.linear_cross_entropy(x, weight, target, reduction=reduction, chunk_size=100, backend=backend)
    return loss, *torch.autograd.grad(loss, (x, weight), torch.ones_like(loss))


def loss_operands(dtype=torch.bfloat16, seed=0):
    x, *_ = operands(256, 128, dtype, seed)
    weight, *_ = operands(5000, 128, dtype, seed + 1)
    target = torch.randint(5000, (256,), generator=torch.Generator("cuda").manual_seed(seed), device="cuda")
    return x.requires_grad_(), weight.requires_grad_(), target


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_linear_cross_entropy_adds_chunks_in_fp32(dtype):
    x, weight, target = loss_operands(dtype)
    loss, dx, dweight = loss_step(x, weight, target, "triton")
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = reference.linear_cross_entropy(*wide, target)
    tolerance = 4 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-3  # TF32 is off by default
    for got, want in zip((loss, dx, dweight), (expected, *torch.autograd.grad(expected, wide)), strict=True):
        assert ((got.double() - want).norm() / want.norm()).item() < tolerance


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_cross_entropy_does_not_synchronise(reduction):
    args = loss_operands()
    loss_step(*args, "triton", reduction)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_step(*args, "triton", reduction)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_linear_cross_entropy_target_out_of_range_is_nan():
    x, weight, target = loss_operands()
    target[3] = 5000
    loss = fastattn.linear_cross_entropy(x, weight, target, reduction="none", backend="triton")
    assert loss.isnan().nonzero().tolist() == [[3]]


def test_linear_cross_entropy_peak_memory():
    """At most 15 % of the memory of F.linear and F.cross_entropy, in excess of inputs and gradients."""
    x = torch.randn(16384, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(50304, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(50304, (16384,), device="cuda")
    functions = (
        lambda: fastattn.linear_cross_entropy(x, weight, target),
        lambda: torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, weight), target),
    )
    peaks = []
    for function in functions:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        grads = torch.autograd.grad(function(), (x, weight))
        peaks.append(torch.cuda.max_memory_allocated() - before - sum(g.nbytes for g in grads))
        del grads
    assert peaks[0] < 0.15 * peaks[1]


def test_attention_memory_is_that_of_the_tensors():
    """Forward and backward at seqlen 16384 need inputs, outputs, gradients and a tenth more."""
    q, k, v, do = torch.randn(4, 1, 8, 16384, 64, device="cuda", dtype=torch.bfloat16)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, lse = fastattn.attention(*inputs, causal=True, return_lse=True)
    grads = torch.autograd.grad(out, inputs, do)
    tensors = sum(t.nbytes for t in (*inputs, do, out, lse, *grads))
    made = sum(t.nbytes for t in (out, lse, *grads))
    assert torch.cuda.max_memory_allocated() - before - made <= 0.1 * tensors


def test_attention_in_a_graph_without_synchronisation_takes_new_inputs(attention_backend):
    """Forward and backward. The tile counters of the kernels for Hopper must restart in every replay."""
    q, k, v = torch.randn(3, 2, 4, 700, 64, device="cuda", dtype=torch.bfloat16).unbind()

    def step():
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = fastattn.attention(*leaves, causal=True, backend=attention_backend)
        return out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    for seed in range(3):
        torch.manual_seed(seed)
        for t in (q, k, v):
            t.normal_()
        graph.replay()
        assert_same(outputs, step())


def decode_call(dtype=torch.bfloat16, seed=0):
    """attention_decode on shuffled pages to which it appends. The caller owns the caches."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    q, k, v = randn(4, 16, 1, 128), randn(4, 4, 1, 128), randn(4, 4, 1, 128)
    caches = [randn(40, 4, 64, 128) for _ in range(2)]
    table = torch.randperm(40, generator=generator, device="cuda").view(4, 10).int()
    lengths = torch.tensor([600, 1, 64, 317], dtype=torch.int32, device="cuda")
    return (q, *caches), {"k": k, "v": v, "cache_seqlens": lengths, "block_table": table, "return_lse": True}


@pytest.fixture(params=BACKENDS)
def attention_backend(request):
    """A backend that serves attention and attention_decode in bf16 at head dims 64 and 128."""
    reason = why_not("attention_decode", request.param, ("cuda", torch.bfloat16, False, True))
    return pytest.skip(reason) if reason else request.param


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decode_numbers(dtype, attention_backend):
    inputs, kwargs = decode_call(dtype)
    exact = [t.double() for t in inputs], {n: t.double() if n in "kv" else t for n, t in kwargs.items()}
    want, want_lse = fastattn.attention_decode(*exact[0], **exact[1], backend="reference")
    for splits in (0, 1, 5):
        out, lse = fastattn.attention_decode(*inputs, **kwargs, num_splits=splits, backend=attention_backend)
        torch.testing.assert_close(out.double(), want, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-4)
        for ours, expected in zip(inputs[1:], exact[0][1:], strict=True):
            assert torch.equal(ours.double(), expected)


def test_decode_in_a_graph_without_synchronisation_takes_new_lengths(attention_backend):
    inputs, kwargs = decode_call()
    fastattn.attention_decode(*inputs, **kwargs, backend=attention_backend)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fastattn.attention_decode(*inputs, **kwargs, backend=attention_backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = fastattn.attention_decode(*inputs, **kwargs, backend=attention_backend)
    for step in range(3):
        kwargs["cache_seqlens"] += step
        graph.replay()
        assert_same(outputs, fastattn.attention_decode(*inputs, **kwargs, backend=attention_backend))


def test_decode_gives_the_same_bits_in_fifty_runs(attention_backend):
    inputs, kwargs = decode_call()
    want = fastattn.attention_decode(*inputs, **kwargs, backend=attention_backend)
    for _ in range(50):
        assert_same(fastattn.attention_decode(*inputs, **kwargs, backend=attention_backend), want)


def test_decode_drops_what_the_cache_has_no_room_for(attention_backend):
    (q, k_cache, v_cache), kwargs = decode_call()
    kwargs["cache_seqlens"] = torch.tensor([640, 639, 0, 700], dtype=torch.int32, device="cuda")
    before = k_cache.clone()
    out, _ = fastattn.attention_decode(q, k_cache, v_cache, **kwargs, backend=attention_backend)
    assert out.isfinite().all()
    changed = (k_cache != before).any(-1).any(1).sum()
    assert changed == 2  # one key of sequence 1, one of sequence 2
