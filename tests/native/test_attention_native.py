"""The C++ attention kernels against the reference in fp64, feature by feature and in random combinations."""

import functools
import os

import attention_cases
import pytest
import torch
from attention_cases import DTYPES, normal, qkv, random_case, raw_arguments, results
from memory_guard import at_the_end_of_memory, far, guarded
from processes import LOWER_CAPABILITIES, run_code, run_on_instruction_set
from threads import same_bits

import fastattn
from fastattn import reference
from fastattn.ops._backends import why_not_available
from fastattn.ops.attention import _ops, _reference

REASON = why_not_available("native", "cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no C++ kernels for the CPU: {REASON}")

SEEDS = 500
PARTS = 8  # so that pytest shows the progress


check = functools.partial(attention_cases.check, backend="native")


@pytest.mark.parametrize("part", range(PARTS))
def test_random_combinations_of_features(part, monkeypatch):
    for seed in range(part, SEEDS, PARTS):
        q, k, v, kwargs = random_case(seed)
        check(monkeypatch, f"seed {seed}", q, k, v, seed, **kwargs)


SHAPES = [
    (113, 203, 32), (128, 217, 40), (113, 211, 59), (108, 256, 64), (256, 512, 80), (512, 256, 96), (127, 128, 111),
    (128, 127, 128), (1, 203, 160), (203, 1, 192), (64, 130, 224), (130, 64, 256), (33, 70, 320),
]  # fmt: skip
VALUE_HEAD_DIMS = [(192, 128), (128, 192), (64, 256), (40, 111), (8, 320)]  # (head_dim, head_dim_v)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fixed_shapes(dtype, monkeypatch):
    for n, (seqlen_q, seqlen_k, head_dim) in enumerate(SHAPES):
        q, k, v = qkv(1, 2, seqlen_q, seqlen_k, head_dim, dtype, kv_heads=1 + n % 2)
        check(monkeypatch, f"{seqlen_q} {seqlen_k} {head_dim}", q, k, v, causal=(False, True, "top_left")[n % 3])
    for head_dim, head_dim_v in VALUE_HEAD_DIMS:
        q, k, v = qkv(1, 4, 65, 130, head_dim, dtype, kv_heads=2, head_dim_v=head_dim_v)
        check(monkeypatch, f"{head_dim} {head_dim_v}", q, k, v, causal=True)


# in fp16 the products of PyTorch, which set the error bound, take seconds
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_thousand_keys(dtype, monkeypatch):
    for seqlen_q, seqlen_k in ((1023, 1024), (1024, 1023)):
        q, k, v = qkv(1, 1, seqlen_q, seqlen_k, 64, dtype)
        check(monkeypatch, f"{seqlen_q} {seqlen_k}", q, k, v, causal=True)


def test_few_heads_divide_their_keys(monkeypatch):
    """With fewer than eight heads each piece of the keys is a task: dq is added in order, or in a separate pass."""
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_tiles_of_a_bias(dtype, monkeypatch):
    """64 queries by 64 keys without a mask: the bias is read in place, also from rows with an odd stride."""
    q, k, v = qkv(2, 4, 130, 200, 16, dtype, kv_heads=2)
    for batch in (1, 2):
        bias = normal(batch, 4, 130, 201, dtype=dtype).detach()[..., :200].requires_grad_()
        assert bias.stride(2) == 201
        for kwargs in ({}, {"causal": True, "alibi_slopes": torch.rand(4)}, {"window": (90, 20), "dropout_p": 0.1}):
            check(monkeypatch, f"{batch} {list(kwargs)}", q, k, v, bias=bias, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", [None, torch.float32])
def test_minus_infinity_in_whole_tiles_of_a_bias(bias_dtype, dtype):
    """A tile hides keys partly or completely, at its beginning or not, and the hidden keys are NaN."""
    clean = [t.detach() for t in qkv(1, 2, 128, 192, 16, dtype)]
    hidden = torch.zeros(192, dtype=torch.bool)
    hidden[[3, 70, 71]] = True
    hidden[128:] = True
    bias = normal(2, 128, 192, dtype=bias_dtype or dtype).detach()
    bias[..., 5:64, 40] = -torch.inf
    bias = bias.masked_fill(hidden, -torch.inf).requires_grad_()
    dirty = [clean[0]] + [t.masked_fill(hidden.view(192, 1), torch.nan) for t in clean[1:]]
    got, expected = (
        results(*(t.clone().requires_grad_() for t in inputs), {"bias": bias}, backend)
        for inputs, backend in ((dirty, "native"), (clean, "reference"))
    )
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=1e-5 if dtype == torch.float32 else 5e-2, rtol=1e-2)


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
    """Keys past the end of a tile must not contribute exp(0 - lse) if lse is far below -89."""
    q, k, v = qkv(1, 2, 64, 66, 16)
    for shift in (-200.0, -1e4):
        check(monkeypatch, f"bias {shift}", q, k, v, bias=torch.full((64, 66), shift))
    for dtype in DTYPES:
        q, k, v = qkv(1, 2, 65, 70, 16, dtype, scale=5.0)
        check(monkeypatch, "large logits", q, k, v, scale=1.0)


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


@pytest.mark.parametrize("dim", range(3))
@pytest.mark.parametrize("name", ["q", "k", "v", "mask", "bias", "do"])
def test_offsets_beyond_two_to_the_31(name, dim):
    """One dimension is spread over 2^31 elements, in memory that is reserved and mostly untouched."""
    q, k, v = (t.detach() for t in qkv(3, 3, 3, 3, 16, torch.float16))
    tensors = {"q": q, "k": k, "v": v, "do": normal(3, 3, 3, 16).half(), "bias": normal(3, 3, 3, 3).half()}
    tensors = {label: t.detach() for label, t in tensors.items()} | {"mask": normal(3, 3, 3, 3, seed=1) > -0.3}

    def run(q, k, v, do, bias, mask):
        arguments = raw_arguments(q, k, v, bias, mask=mask)
        saved = torch.ops.fastattn.attention_fwd.native(*arguments, True)
        bwd = torch.ops.fastattn.attention_bwd.native(do, None, *arguments[:3], *saved, *arguments[3:], True, False)
        return *saved, *bwd

    got = run(**(tensors | {name: far(tensors[name], dim)}))
    assert all(a.equal(b) for a, b in zip(got, run(**tensors), strict=True))


SIZES_AT_THE_END = [(64, 128, 64), (70, 90, 40), (17, 33, 31), (1, 5, 8)]  # queries, keys, head_dim


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES_AT_THE_END)
def test_nothing_is_read_past_the_end_of_an_operand(sizes, dtype):
    """Such a read ends the process, so pytest says that this test crashed."""
    inputs = qkv(1, 2, *sizes, dtype)
    kwargs = {"bias": normal(2, *sizes[:2], dtype=dtype), "causal": True}
    expected = results(*inputs, kwargs, "native")
    moved = [at_the_end_of_memory(t.detach()).requires_grad_() for t in (*inputs, kwargs["bias"])]
    got = results(*moved[:3], kwargs | {"bias": moved[3]}, "native")
    assert all(got[name].equal(value) for name, value in expected.items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_memory_held_before_does_not_matter(dtype):
    """Much of a tile above the diagonal is never written. Here the memory that the kernels allocate is full of NaN."""
    q, k, v = qkv(1, 4, 100, 150, 16, dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # uses the memory of this thread
        for features in ({}, {"softcap": 2.0}, {"bias": normal(100, 150, dtype=dtype), "sink": normal(4)}):
            for kwargs in ({"causal": True}, {"window": (20, 3), "dropout_p": 0.2}):
                first = results(q, k, v, features | kwargs, "native")
                for _ in range(5):
                    [torch.full((1 << n,), torch.nan) for n in range(12, 22)]
                    again = results(q, k, v, features | kwargs, "native")
                    assert all(again[name].equal(value) for name, value in first.items()), (list(features), kwargs)
                assert all(first[name].isfinite().all() for name in first)
    finally:
        torch.set_num_threads(before)


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
    """With v = identity, the output is the matrix of dropped weights."""
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


RERUNS = {
    "grouped heads, a bias of the batch": lambda: (
        qkv(1, 4, 150, 300, 32, kv_heads=2), {"causal": True, "bias": normal(4, 150, 300), "sink": normal(4)}
    ),
    "the same in 16 bits": lambda: (
        qkv(3, 2, 130, 300, 32, torch.bfloat16), {"bias": normal(2, 130, 300, dtype=torch.bfloat16)}
    ),
    "one head, its keys divided": lambda: (qkv(1, 1, 70, 1100, 16), {"window": (400, -1), "softcap": 3.0}),
    "a bias summed over everything": lambda: (
        qkv(2, 3, 66, 130, 16, torch.bfloat16), {"bias": normal(1, 130), "alibi_slopes": torch.rand(3)}
    ),
    "packed": lambda: (
        [normal(n, 2, 16, seed=n) for n in (600, 700, 700)],
        {"cu_seqlens_q": torch.tensor([0, 20, 600]).int(), "cu_seqlens_k": torch.tensor([0, 600, 700]).int()},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RERUNS)
def test_reruns_and_thread_counts_agree_bit_for_bit(name):
    inputs, kwargs = RERUNS[name]()
    kwargs["dropout_p"] = 0.1
    same_bits(lambda: results(*inputs, kwargs, "native"), (1, *[2] * 20))


def test_backward_continues_a_forward_of_the_reference(monkeypatch):
    monkeypatch.setitem(_ops["fwd"].direct, "native", _reference)
    for seed in range(2000, 2024):
        q, k, v, kwargs = random_case(seed, dtypes=(torch.float32,))
        check(monkeypatch, f"seed {seed}", q, k, v, seed, **kwargs)


PEAK_TEST = """
import ctypes, sys, torch, fastattn

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
trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
if trim is not None:
    trim(0)  # memory that is free but resident would not be counted
with open("/proc/self/clear_refs", "w") as reset:
    reset.write("5")
before = pages("VmRSS")
needed = step(16384)
print((pages("VmHWM") - before) / needed)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux alone tells the peak of a process")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_is_that_of_the_tensors(dtype):
    """Forward and backward at seqlen 16384 need inputs, outputs, gradients and a tenth more, in a separate process."""
    assert 0.9 < float(run_code(PEAK_TEST, dtype)) <= 1.1


CAPABILITY_TEST = """
import fastattn, pytest
from attention_cases import DTYPES, check, normal, qkv, random_case
import test_attention_finite_masks as finite
for seed in range(1000, 1016):
    q, k, v, kwargs = random_case(seed)
    check(pytest.MonkeyPatch(), f"seed {seed}", q, k, v, seed, backend="native", **kwargs)
for dtype in DTYPES:
    q, k, v = qkv(2, 1, 64, 128, 8, dtype)
    for causal in (False, True):
        bias = normal(1, 64, 128, dtype=dtype)
        check(pytest.MonkeyPatch(), "bias", q, k, v, backend="native", bias=bias, causal=causal)
    for scores in ("zero", "random"):
        bias = finite.bias_of_all_kinds((2, finite.SQ, finite.SK))
        finite.check(scores, *finite.inputs(scores, dtype), bias=bias, backend="native", device="cpu")
"""


@pytest.mark.parametrize("capability", LOWER_CAPABILITIES)
def test_lower_instruction_sets(capability):
    run_on_instruction_set(capability, CAPABILITY_TEST)
