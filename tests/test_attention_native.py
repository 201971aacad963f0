"""The C++ attention kernels against the reference in fp64, feature by feature and at random."""

import os
import subprocess
import sys

import pytest
import torch
from attention_cases import DTYPES, assert_close_to, random_case, results, truth_and_baseline
from memory_guard import guarded

import fastattn
from fastattn import reference
from fastattn.ops._backends import unavailable

REASON = unavailable("native", "cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no C++ kernels for the CPU: {REASON}")

SEEDS = 240
PARTS = 8  # pytest shows where it is


def check(monkeypatch, what, q, k, v, seed=0, factor=1.0, **kwargs):
    kwargs = {"softcap": 0.0} | kwargs
    truth, baseline = truth_and_baseline(monkeypatch, q, k, v, kwargs, seed)
    assert_close_to(results(q, k, v, kwargs, "native", seed), truth, baseline, what, kwargs, factor)


def normal(*shape, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).requires_grad_()


def qkv(batch, n_heads, seqlen_q, seqlen_k, head_dim, dtype=torch.float32, kv_heads=None, scale=1.0):
    kv_heads = kv_heads or n_heads
    return (
        normal(batch, n_heads, seqlen_q, head_dim, dtype=dtype, seed=1, scale=scale),
        normal(batch, kv_heads, seqlen_k, head_dim, dtype=dtype, seed=2, scale=scale),
        normal(batch, kv_heads, seqlen_k, head_dim, dtype=dtype, seed=3),
    )


@pytest.mark.parametrize("part", range(PARTS))
def test_random_combinations_of_features(part, monkeypatch):
    for seed in range(part, SEEDS, PARTS):
        q, k, v, kwargs = random_case(seed)
        truth, baseline = truth_and_baseline(monkeypatch, q, k, v, kwargs, seed)
        assert_close_to(results(q, k, v, kwargs, "native", seed), truth, baseline, f"seed {seed}", kwargs)


SHAPES = [
    (113, 203, 32), (128, 217, 40), (113, 211, 59), (108, 256, 64), (256, 512, 80), (512, 256, 96), (127, 128, 111),
    (128, 127, 128), (1, 203, 160), (203, 1, 192), (64, 130, 224), (130, 64, 256), (33, 70, 320),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_fixed_shapes(dtype, monkeypatch):
    for n, (seqlen_q, seqlen_k, head_dim) in enumerate(SHAPES):
        q, k, v = qkv(1, 2, seqlen_q, seqlen_k, head_dim, dtype, kv_heads=1 + n % 2)
        check(monkeypatch, f"{seqlen_q} {seqlen_k} {head_dim}", q, k, v, causal=(False, True, "top_left")[n % 3])


def test_few_heads_divide_their_keys(monkeypatch):
    """Below eight heads the pieces of the keys are tasks: dq waits for its turn, or has a pass of its own."""
    q, k, v = qkv(1, 1, 70, 1100, 32)
    check(monkeypatch, "one head", q, k, v, causal=True)
    check(monkeypatch, "window", q, k, v, window=(300, 5), seqlens_k=torch.tensor([1000], dtype=torch.int32))
    q, k, v = (normal(n, 2, 16, seed=n) for n in (600, 700, 700))
    ends = torch.tensor([0, 20, 600]).int(), torch.tensor([0, 600, 700]).int()
    check(monkeypatch, "packed", q, k, v, cu_seqlens_q=ends[0], cu_seqlens_k=ends[1])
    for dtype in DTYPES:
        q, k, v = qkv(1, 4, 130, 600, 24, dtype, kv_heads=2)
        check(monkeypatch, f"{dtype}", q, k, v, causal=True, softcap=5.0, sink=normal(4), dropout_p=0.1)
        check(monkeypatch, f"{dtype} bias", q, k, v, bias=normal(4, 130, 600, dtype=dtype), window=(200, 50))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_broadcast_of_a_bias_gets_its_gradient(dtype, monkeypatch):
    q, k, v = qkv(2, 2, 70, 65, 16, dtype)
    for pattern in range(16):
        shape = [full if pattern >> n & 1 else 1 for n, full in enumerate((2, 2, 70, 65))]
        bias = normal(*shape, dtype=torch.float32 if pattern % 2 else dtype, seed=pattern)
        check(monkeypatch, f"bias {shape}", q, k, v, bias=bias, causal=pattern % 3 == 0)
    alone = normal(70, 65)
    q, k, v = (t.detach() for t in (q, k, v))
    got = results(q, k, v, {"bias": alone}, "native", use_lse=False)
    expected = results(q, k, v, {"bias": alone}, "reference", use_lse=False)
    assert set(got) == {"out", "lse", "dbias"}  # only the bias requires grad
    torch.testing.assert_close(got["dbias"], expected["dbias"], atol=0.1, rtol=0.05)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_see_nothing(dtype):
    q, k, v = qkv(2, 2, 66, 70, 16, dtype)
    mask = torch.ones(2, 1, 66, 70, dtype=torch.bool)
    mask[0, :, 3] = False
    mask[1, :, 60:] = False
    for kwargs in ({"mask": mask}, {"bias": torch.where(mask, 0.0, -torch.inf).requires_grad_()}):
        got = results(q, k, v, kwargs, "native")
        rows = ~mask.any(-1).expand(2, 2, 66)
        assert (got["lse"] == -torch.inf).equal(rows)
        for name in ("out", "dq"):
            assert (got[name][rows] == 0).all()
        assert all(t.isfinite().all() for name, t in got.items() if name != "lse")
    sink = normal(2)
    out, lse = fastattn.attention(q, k, v, mask=mask, sink=sink, return_lse=True, backend="native")
    assert (out[rows] == 0).all()
    torch.testing.assert_close(lse[rows], sink.view(1, 2, 1).expand(2, 2, 66)[rows], atol=1e-6, rtol=1e-6)
    got = results(q, k, v, {"seqlens_k": torch.tensor([0, 70], dtype=torch.int32)}, "native")
    assert (got["out"][0] == 0).all()
    assert all((got[name][0] == 0).all() for name in ("dq", "dk", "dv"))
    assert (got["dk"][1] != 0).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_stands_in_hidden_keys_does_not_matter(dtype):
    clean = [t.detach() for t in qkv(2, 2, 70, 130, 16, dtype)]
    lengths = torch.tensor([65, 3], dtype=torch.int32)
    padding = torch.arange(130) < lengths[:, None]
    tall = padding.view(2, 1, 1, 130).expand(2, 1, 70, 130).clone()
    floats = torch.where(padding, 0.0, -torch.inf).view(2, 1, 1, 130)
    for bad in (torch.nan, torch.inf, -torch.inf):
        dirty = [clean[0]] + [t.masked_fill(~padding.view(2, 1, 130, 1), bad) for t in clean[1:]]
        for kwargs in (
            {"seqlens_k": lengths},
            {"mask": padding.view(2, 1, 1, 130)},
            {"mask": tall},
            {"bias": floats},
        ):
            got, expected = (
                results(*(t.clone().requires_grad_() for t in inputs), kwargs, "native") for inputs in (dirty, clean)
            )
            for name, value in expected.items():
                assert got[name].equal(value), f"{bad} {list(kwargs)} {name}"


def test_very_negative_and_very_large_scores(monkeypatch):
    """Keys past a tile's end must not come back as exp(0 - lse) where lse << -89."""
    q, k, v = qkv(1, 2, 64, 66, 16)
    for shift in (-200.0, -1e4):
        check(monkeypatch, f"bias {shift}", q, k, v, bias=torch.full((64, 66), shift))
    for dtype in DTYPES:
        q, k, v = qkv(1, 2, 65, 70, 16, dtype, scale=5.0)
        # p is made from lse, which for large scores has fewer digits left than s - max(s)
        check(monkeypatch, "large logits", q, k, v, scale=1.0, factor=2.0)


def test_nan_in_a_query_stays_in_its_row():
    q, k, v = (t.detach().clone() for t in qkv(1, 1, 70, 70, 16))
    q[0, 0, 5] = torch.nan
    out, lse = fastattn.attention(q, k, v, return_lse=True, backend="native")
    assert out[0, 0, 5].isnan().all()
    assert lse[0, 0, 5].isnan()
    assert out.isnan().any(-1).sum() == 1


def test_strides_layouts_and_memory(monkeypatch):
    base = qkv(2, 4, 66, 70, 24)
    expected = results(*base, {"causal": True}, "native")
    cotangent = normal(*expected["out"].shape).detach()

    def compare(q, k, v, what):
        got = results(q, k, v, {"causal": True}, "native")
        for name, value in expected.items():
            assert got[name].equal(value), f"{what} {name}"

    with torch.no_grad():
        variants = {
            "BSHD": [t.transpose(1, 2).contiguous().transpose(1, 2) for t in base],
            "inner stride 2": [torch.stack((t, t), -1)[..., 0] for t in base],
            "unaligned": [guarded(t, offset=3) for t in base],
            "gaps": [guarded(t, offset=1, gap=5) for t in base],
        }
    for what, inputs in variants.items():
        compare(*(t.detach().requires_grad_() for t in inputs), what)
    q, k, v = base
    out = fastattn.attention(q, k, v, causal=True, backend="native")
    one = torch.autograd.grad(out.sum(), base, retain_graph=True)  # gradients of stride 0
    other = torch.autograd.grad(out, base, torch.ones_like(out), retain_graph=True)
    assert all(a.equal(b) for a, b in zip(one, other, strict=True))
    swapped = cotangent.transpose(2, 3).contiguous().transpose(2, 3)
    one = torch.autograd.grad(out, base, swapped, retain_graph=True)
    other = torch.autograd.grad(out, base, cotangent)
    assert all(a.equal(b) for a, b in zip(one, other, strict=True))
    shared = torch.zeros(1, 1, 70, 24).expand(2, 4, 70, 24)  # stride 0 in batch and heads
    check(monkeypatch, "expanded", q, (shared + k.detach()[:1, :1]).requires_grad_(), shared.requires_grad_())


def test_offsets_beyond_two_gigabytes():
    """Rows 2^31 elements apart, of which only the first and the last are real memory that is read."""
    q, k, v = (t.detach() for t in qkv(1, 1, 4, 2, 16))
    far = torch.empty(2**31 + 16, dtype=torch.float16)  # reserved by the system, touched at both ends only
    k_far = far.as_strided((1, 1, 2, 16), (1, 1, 2**31, 1))
    k_far.copy_(k)
    out = fastattn.attention(q.half(), k_far, v.half(), backend="native")
    assert out.equal(fastattn.attention(q.half(), k.half(), v.half(), backend="native"))


@pytest.mark.parametrize("shape", [(0, 2, 5, 7), (2, 0, 5, 7), (2, 2, 0, 7), (2, 2, 5, 0)])
def test_empty_sizes(shape):
    batch, n_heads, seqlen_q, seqlen_k = shape
    q, k, v = (normal(batch, n_heads, n, 16) for n in (seqlen_q, seqlen_k, seqlen_k))
    for kwargs in ({}, {"sink": normal(n_heads), "causal": True}, {"bias": normal(seqlen_q, seqlen_k)}):
        got, expected = (results(q, k, v, kwargs, backend) for backend in ("native", "reference"))
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_keeps_exactly_what_the_reference_keeps(dtype):
    """With v the identity the output is the dropped weights themselves."""
    q, k, _ = qkv(2, 3, 70, 100, 16, dtype)
    v = torch.eye(100).to(dtype).expand(2, 3, 100, 100)
    torch.manual_seed(3)
    out = fastattn.attention(q, k, v, dropout_p=0.17, backend="native")
    torch.manual_seed(3)
    rng = torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64)
    keep = reference.philox_keep(rng, 0.17, torch.arange(70), torch.arange(6).view(2, 3, 1), 100)
    assert (out != 0).equal(keep)
    rate = keep.double().mean().item()
    assert abs(rate - 0.83) < 4 * (0.17 * 0.83 / keep.numel()) ** 0.5
    dropped = fastattn.attention(q, k, v, dropout_p=1.0, backend="native")
    assert (dropped == 0).all()
    for window in ((17, 3), (5, -1)):  # tiles that do not begin at a multiple of eight
        torch.manual_seed(3)
        visible = reference.attention_visible(70, 100, window=window)
        out = fastattn.attention(q, k, v, dropout_p=0.17, window=window, backend="native")
        assert (out != 0).equal(keep & visible)


def test_reruns_and_thread_counts_agree_bit_for_bit():
    q, k, v = qkv(1, 4, 150, 700, 32, kv_heads=2)
    kwargs = {"causal": True, "dropout_p": 0.1, "bias": normal(4, 150, 700), "sink": normal(4)}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = results(q, k, v, kwargs, "native")
        torch.set_num_threads(2)
        for repeat in range(20):
            got = results(q, k, v, kwargs, "native")
            assert all(got[name].equal(value) for name, value in expected.items()), f"repeat {repeat}"
    finally:
        torch.set_num_threads(before)


PEAK_TEST = """
import sys, torch, fastattn

def pages(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) * 1024

def step(seqlen):
    tensors = [torch.full((1, 1, seqlen, 32), 0.01, dtype=getattr(torch, sys.argv[1])) for _ in range(4)]
    *inputs, do = tensors
    out, lse = fastattn.attention(*(t.requires_grad_() for t in inputs), causal=True, return_lse=True, backend="native")
    tensors += [out, lse, *torch.autograd.grad(out, inputs, do)]
    return sum(t.nbytes for t in tensors)

torch.set_num_threads(2)
step(600)  # what stays resident once the code has run: libraries, threads, the arenas of the allocator
with open("/proc/self/clear_refs", "w") as reset:
    reset.write("5")
before = pages("VmRSS")
needed = step(16384)
print((pages("VmHWM") - before) / needed)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux alone tells the peak of a process")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_is_that_of_the_tensors(dtype):
    """Forward and backward at seqlen 16384: inputs, outputs, gradients and a tenth, in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", PEAK_TEST, dtype]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    assert 0.9 < float(run.stdout) <= 1.1


def test_backward_of_one_backend_after_forward_of_another():
    q, k, v = qkv(2, 4, 70, 90, 16, kv_heads=2)
    kwargs = {"causal": True, "dropout_p": 0.2}
    torch.manual_seed(0)
    ours, lse = fastattn.attention(q, k, v, **kwargs, return_lse=True, backend="native")
    torch.manual_seed(0)
    theirs, their_lse = fastattn.attention(q, k, v, **kwargs, return_lse=True, backend="reference")
    expected = torch.autograd.grad(theirs.square().sum(), (q, k, v))
    torch.manual_seed(0)
    rng = torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64)
    got = torch.ops.fastattn.attention_bwd.native(
        2 * theirs.detach(), None, q, k, v, theirs.detach(), their_lse.detach(), None, None, None, None, None, None,
        None, rng, 70, 90, -1, 0, False, 0.0, 0.2, 0.25, False,
    )  # fmt: skip
    torch.testing.assert_close(got[:3], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, their_lse, atol=1e-5, rtol=1e-5)


def test_double_backward_goes_through_the_reference():
    q, k, v = qkv(1, 2, 5, 6, 8)
    bias, sink = normal(5, 6), normal(2)

    def second(backend):
        torch.manual_seed(0)
        out = fastattn.attention(q, k, v, bias=bias, sink=sink, causal=True, dropout_p=0.2, backend=backend)
        grads = torch.autograd.grad(out.square().sum(), (q, k, v, bias, sink), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), (q, k, v, bias, sink))

    torch.testing.assert_close(second("native"), second("reference"), atol=1e-4, rtol=1e-4)


def raw_arguments(q, k, v, bias=None, sink=None, mask=None, window_right=-1):
    rest = (None, None, None, None, None, q.shape[2], k.shape[2], -1, window_right, False, 0.0, 0.0, 0.25)
    return q, k, v, bias, sink, mask, *rest


def test_raw_ops_pass_opcheck():
    q, k, v = (t.detach() for t in qkv(2, 4, 7, 9, 16, kv_heads=2))
    v = v[..., :8]
    swapped = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    bias, sink, mask = normal(4, 7, 9).detach()[None], normal(4).detach(), torch.rand(2, 1, 7, 9) > 0.9
    for arguments in (raw_arguments(q, k, v, bias, sink, mask), raw_arguments(*swapped, window_right=0)):
        torch.library.opcheck(torch.ops.fastattn.attention_fwd.native, arguments)
        out, lse = torch.ops.fastattn.attention_fwd.native(*arguments)
        need_dbias = arguments[3] is not None
        arguments = (torch.ones_like(out), lse, *arguments[:3], out, lse, *arguments[3:], need_dbias)
        torch.library.opcheck(torch.ops.fastattn.attention_bwd.native, arguments)


def test_raw_ops_check_their_arguments():
    q, k, v = (t.detach() for t in qkv(2, 4, 7, 9, 16))
    for bad in (
        raw_arguments(q, k[:1], v),
        raw_arguments(q[0], k, v),
        raw_arguments(q, k.half(), v),
        raw_arguments(q.double(), k.double(), v.double()),
        raw_arguments(q, k, v, bias=torch.ones(1, 1, 7, 8)),
        raw_arguments(q, k, v, mask=torch.ones(2, 1, 7, 9)),
        raw_arguments(q, k, v, sink=torch.ones(3)),
    ):
        with pytest.raises(RuntimeError):
            torch.ops.fastattn.attention_fwd.native(*bad)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic):
    torch._dynamo.reset()

    def call(q, k, v, bias):
        with fastattn.use_backend("native"):
            return fastattn.attention(q * 2, k, v, bias=bias, causal=True, return_lse=True)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for seqlen in (7, 12):
        q, k, v = qkv(2, 4, seqlen, 9, 16, kv_heads=2)
        bias = normal(seqlen, 9)
        got, expected = (f(q, k, v, bias) for f in (compiled, call))
        torch.testing.assert_close(got, expected)
        grads = (torch.autograd.grad(o.square().sum() + lse.sum(), (q, k, v, bias)) for o, lse in (got, expected))
        torch.testing.assert_close(*grads)


CAPABILITY_TEST = """
import sys, torch, fastattn
sys.path.insert(0, sys.argv[1])
from attention_cases import assert_close_to, random_case, results, truth_and_baseline
import pytest
for seed in range(1000, 1016):
    q, k, v, kwargs = random_case(seed)
    truth, baseline = truth_and_baseline(pytest.MonkeyPatch(), q, k, v, kwargs, seed)
    assert_close_to(results(q, k, v, kwargs, "native", seed), truth, baseline, f"seed {seed}", kwargs)
print(fastattn._native.cpu_capability())
"""


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_lower_instruction_sets(capability):
    """The one in use is tested above; a machine that lacks one runs the next lower, and says so."""
    environment = os.environ | {"FASTATTN_CPU_CAPABILITY": capability, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", "-c", CAPABILITY_TEST, os.path.dirname(__file__)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    used = run.stdout.strip()
    words = fastattn._native.CPU_CAPABILITIES
    assert words.index(used) <= words.index(capability)
