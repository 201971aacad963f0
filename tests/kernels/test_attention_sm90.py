"""The attention kernels for Hopper through the public function: on a Hopper GPU, or their sources in the emulation.

The error rule is that of the other backends. Gradients come from one kernel that adds dq in any order, or from two if
the same bits are required in every run. Emulated products and copies happen as late as possible, operands are read
through the descriptors, and a change to data in use is an error. So a pass means more than equal numbers.
"""

import ctypes
import importlib
import random

import emulate_cuda
import pytest
import torch
from attention_cases import assert_close_to, results, truth_and_baseline
from hopper import DEVICE, HOPPER, use_hopper_kernels
from memory_guard import guarded, leave_nan

import fastattn
from fastattn import reference
from fastattn.ops._backends import why_not_available

BF16, FP16 = torch.bfloat16, torch.float16
# the module; fastattn.ops.attention is the function
attention_module = importlib.import_module("fastattn.ops.attention")


@pytest.fixture(autouse=True)
def native(monkeypatch):
    table = attention_module._ops
    places = [(table[direction], f"attention_{direction}") for direction in ("fwd", "bwd")]
    use_hopper_kernels(monkeypatch, emulate_cuda.ATTENTION, places)
    if not HOPPER:  # on a GPU, calls that these kernels serve save no lse_low
        monkeypatch.setattr(attention_module, "_needs_low", lambda call: False)


def on_device(value):
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().to(DEVICE).requires_grad_(value.requires_grad)


def run(q, k, v, kwargs, use_lse=True):
    moved = results(*map(on_device, (q, k, v)), {n: on_device(t) for n, t in kwargs.items()}, "native", 0, use_lse)
    return {name: t.cpu() for name, t in moved.items()}


def check(monkeypatch, what, q, k, v, **kwargs):
    kwargs = {"softcap": 0.0} | kwargs
    truth, baseline = truth_and_baseline(monkeypatch, q, k, v, kwargs)
    got = run(q, k, v, kwargs)
    assert_close_to(got, truth, baseline, what)
    return got


def assert_same(value, expected, name, deterministic):
    """Equal bits, except for dq if several blocks of threads add to it."""
    if deterministic or name != "dq":
        assert torch.equal(value, expected), name
    else:
        torch.testing.assert_close(value, expected, atol=4e-3, rtol=2e-2, msg=name)


def normal(*shape, dtype=BF16, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def qkv(batch, n_heads, kv_heads, seqlen_q, seqlen_k, head_dim, dtype=BF16):
    return (
        normal(batch, n_heads, seqlen_q, head_dim, dtype=dtype, seed=1),
        normal(batch, kv_heads, seqlen_k, head_dim, dtype=dtype, seed=2),
        normal(batch, kv_heads, seqlen_k, head_dim, dtype=dtype, seed=3),
    )


@pytest.mark.skipif(HOPPER, reason="about the order of the source, which the emulation follows")
@pytest.mark.parametrize(("head_dim", "block"), [(64, 128), (96, 128), (128, 176), (192, 112), (256, 80)])
def test_the_forward_makes_its_exponentials_under_a_product(head_dim, block):
    """Those of the first block of keys have no product to run under. tests/kernels/test_attention_sm90_build.py checks
    the order in the machine code."""
    blocks = 3
    q, k, v = qkv(1, 1, 1, 64, blocks * block, head_dim)
    found = (ctypes.c_int64 * 2)()
    emulate_cuda.load.exponentials(found)
    fastattn.attention(q, k, v, backend="native")
    emulate_cuda.load.exponentials(found)
    alone, under = found
    assert alone > 0
    assert under == alone * (blocks - 1)


BACKWARDS = pytest.mark.parametrize("deterministic", [False, True], ids=["one kernel", "two kernels"])


def random_call(seed, head_dim=None):
    rng = random.Random(seed)
    dtype, kv_heads, group = rng.choice((BF16, FP16)), rng.choice((1, 1, 2)), rng.choice((1, 1, 2, 3))
    head_dim = head_dim or (64, 96, 64, 128)[seed % 4]
    lengths = (1, 2, 63, 64, 65, 127, 128, 129, 191, 193, 256, 300)
    kwargs = {
        "causal": rng.choice((False, True, True, "top_left")),
        "window": rng.choice((None, None, (0, 0), (20, 3), (70, -1), (-1, 40), (200, 130))),
        "scale": rng.choice((None, None, 0.5, -0.2, 0.0)),
        "deterministic": seed // 4 % 2 == 1,
    }
    if rng.random() < 0.25:
        lens = [[rng.choice((0, 1, 5, 64, 130, 200)) for _ in range(3)] for _ in range(2)]
        q, k, v = (
            normal(sum(lens[side]), heads, head_dim, dtype=dtype, seed=seed + n)
            for n, (side, heads) in enumerate(((0, kv_heads * group), (1, kv_heads), (1, kv_heads)))
        )
        kwargs |= {
            name: torch.tensor([0, *side]).cumsum(0).int()
            for name, side in zip(("cu_seqlens_q", "cu_seqlens_k"), lens, strict=True)
        }
        tops = lens[1]
    else:
        batch = rng.choice((1, 2))
        q, k, v = qkv(batch, kv_heads * group, kv_heads, rng.choice(lengths), rng.choice(lengths), head_dim, dtype)
        tops = [k.shape[2]] * batch
    if rng.random() < 0.3:
        kwargs["seqlens_k"] = torch.tensor([rng.randint(0, top) for top in tops], dtype=torch.int32)
    return q, k, v, kwargs


@pytest.mark.parametrize("part", range(8))
def test_random_calls(part, monkeypatch):
    for seed in range(4 * part, 4 * part + 4):  # every head dim; the parts alternate with the backward
        q, k, v, kwargs = random_call(seed)
        check(monkeypatch, f"seed {seed}", q, k, v, **kwargs)


@BACKWARDS
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_lengths_around_a_tile(head_dim, deterministic, monkeypatch):
    for seqlen_q, seqlen_k, causal in (
        (1, 1, False), (192, 128, True), (193, 257, True), (128, 129, "top_left"), (65, 384, False), (300, 40, True),
        (65, 175, False), (130, 351, False),
    ):  # fmt: skip
        q, k, v = qkv(1, 1, 1, seqlen_q, seqlen_k, head_dim)
        check(monkeypatch, f"{seqlen_q} {seqlen_k} {causal}", q, k, v, causal=causal, deterministic=deterministic)


@pytest.mark.parametrize("head_dim", [192, 256])
def test_head_dims_with_a_forward_only(head_dim, monkeypatch):
    """Blocks of 112 and 80 keys. The gradients come from another backend."""
    for seed in range(4):
        q, k, v, kwargs = random_call(seed, head_dim)
        truth, baseline = truth_and_baseline(monkeypatch, q, k, v, {"softcap": 0.0} | kwargs)
        moved = {name: on_device(t) for name, t in kwargs.items()}
        with torch.no_grad():
            got = fastattn.attention(*map(on_device, (q, k, v)), **moved, return_lse=True, backend="native")
        named = dict(zip(("out", "lse"), (t.cpu() for t in got), strict=True))
        truth = {name: truth[name] for name in named}
        assert_close_to(named, truth, baseline, f"head dim {head_dim}, seed {seed}")


def test_gradients_where_native_has_a_forward_only(monkeypatch):
    """The gradients come from the Triton kernels, which read out and lse of this forward."""
    reason = why_not_available("triton", DEVICE)
    if reason:
        pytest.skip(reason)
    if not HOPPER:  # on Hopper, the device of the call decides
        monkeypatch.setattr(attention_module, "_has_backward", lambda backend, q: backend == "triton")
    check(monkeypatch, "head dim 192", *qkv(1, 2, 1, 20, 30, 192, FP16), causal=True)


@BACKWARDS
@pytest.mark.parametrize("head_dim", [64, 128])
def test_more_blocks_than_stages(head_dim, deterministic, monkeypatch):
    """Every ring wraps around more than once within a tile and continues in the next tile."""
    q, k, v = qkv(1, 2, 1, 70, 1400 if head_dim == 64 else 700, head_dim)
    check(monkeypatch, "many keys", q, k, v, deterministic=deterministic)
    q, k, v = qkv(1, 2, 1, 400, 70, head_dim)
    check(monkeypatch, "many queries", q, k, v, deterministic=deterministic)


@pytest.mark.parametrize("head_dim", [64, 96])
def test_packed_sequences_are_what_each_is_alone(head_dim):
    """Equal bits, with NaN in the tensors wherever there is no sequence."""
    lens_q, lens_k = (130, 0, 70, 1), (200, 64, 0, 129)
    ends_q, ends_k = (torch.tensor([0, *lens]).cumsum(0).int() for lens in (lens_q, lens_k))
    tensors = [normal(sum(n), heads, head_dim, seed=heads) for n, heads in ((lens_q, 2), (lens_k, 1), (lens_k, 1))]
    kwargs = {"cu_seqlens_q": ends_q, "cu_seqlens_k": ends_k, "causal": True, "softcap": 0.0, "deterministic": True}
    together = run(*tensors, kwargs, use_lse=False)
    generator = torch.Generator().manual_seed(1)
    do = torch.randn(together["out"].shape, generator=generator)
    for b in range(4):
        rows_q, rows_k = slice(ends_q[b], ends_q[b + 1]), slice(ends_k[b], ends_k[b + 1])
        alone = [
            on_device(t[rows].detach().transpose(0, 1)[None].requires_grad_())
            for t, rows in zip(tensors, (rows_q, rows_k, rows_k), strict=True)
        ]
        out = fastattn.attention(*alone, causal=True, deterministic=True, backend="native")
        grads = torch.autograd.grad(out.double(), alone, do[rows_q].transpose(0, 1)[None].double().to(DEVICE))
        for name, rows, got in zip(
            ("out", "dq", "dk", "dv"), (rows_q, rows_q, rows_k, rows_k), (out, *grads), strict=True
        ):
            assert torch.equal(together[name][rows].transpose(0, 1)[None], got.detach().cpu()), f"{name} of {b}"


@BACKWARDS
@pytest.mark.parametrize(("lens_q", "lens_k", "behind_q", "behind_k"), [
    ((70, 0, 130), (129, 3, 64), 200, 0), ((5,), (7,), 3, 300), ((), (), 70, 3),
])  # fmt: skip
def test_rows_of_no_sequence_are_zeros_and_touch_nothing(lens_q, lens_k, behind_q, behind_k, deterministic):
    """The inputs after the last sequence are NaN, and so is free memory that the results may get."""
    ends = [torch.tensor([0, *lens]).cumsum(0).int() for lens in (lens_q, lens_k)]
    kwargs = {"cu_seqlens_q": ends[0], "cu_seqlens_k": ends[1], "causal": True, "softcap": 0.0,
              "deterministic": deterministic}  # fmt: skip
    total_q, total_k = sum(lens_q), sum(lens_k)
    q, k, v = (
        normal(sum(lens) + behind, heads, 64, seed=heads + n).detach()
        for n, (lens, behind, heads) in enumerate(((lens_q, behind_q, 2), (lens_k, behind_k, 1), (lens_k, behind_k, 1)))
    )
    for t, total in ((q, total_q), (k, total_k), (v, total_k)):
        t[total:] = torch.nan
    leave_nan(*(t.shape for t in (q, q, k, k)))
    got = run(*(t.requires_grad_() for t in (q, k, v)), kwargs, use_lse=False)
    assert (got["out"][total_q:] == 0).all()
    assert (got["lse"][:, total_q:] == -torch.inf).all()
    for name, total in (("dq", total_q), ("dk", total_k), ("dv", total_k)):
        assert (got[name][total:] == 0).all(), name
    if not lens_q:
        return
    cut = [t.detach()[:total].requires_grad_() for t, total in ((q, total_q), (k, total_k), (v, total_k))]
    expected = results_of_prefix(*cut, kwargs, got["out"].shape)
    for name, value in expected.items():
        rows = got[name].transpose(0, 1) if name == "lse" else got[name]
        assert_same(rows[: len(value)], value, name, deterministic)


def results_of_prefix(q, k, v, kwargs, shape):
    """The results for the first rows of a longer call whose output has this shape, with the same cotangent."""
    q, k, v = (on_device(t) for t in (q, k, v))
    out, lse = fastattn.attention(
        q, k, v, return_lse=True, backend="native", **{name: on_device(t) for name, t in kwargs.items()}
    )
    do = torch.randn(shape, generator=torch.Generator().manual_seed(1))[: len(out)].double().to(DEVICE)
    grads = torch.autograd.grad(out.double(), (q, k, v), do)
    named = {"out": out, "lse": lse.transpose(0, 1)} | dict(zip(("dq", "dk", "dv"), grads, strict=True))
    return {name: t.detach().cpu() for name, t in named.items()}


def test_columns_past_head_dim_96_are_neither_read_nor_written():
    """With NaN after every row of the inputs, the results are those of dense inputs."""
    base = [t.detach() for t in qkv(1, 2, 1, 70, 90, 96)]
    gaps = [torch.cat((t, t * torch.nan), -1)[..., :96] for t in base]
    kwargs = {"causal": True, "deterministic": True}
    expected = run(*(t.requires_grad_() for t in base), kwargs)
    for name, value in run(*(t.requires_grad_() for t in gaps), kwargs).items():
        assert torch.equal(value, expected[name]), name


@BACKWARDS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_stands_in_hidden_keys_does_not_matter(bad, deterministic):
    lengths = torch.tensor([65, 3], dtype=torch.int32)
    q, k, v = qkv(2, 2, 1, 70, 130, 64)
    hidden = (torch.arange(130) >= lengths[:, None]).view(2, 1, 130, 1)
    dirty = [t.detach().masked_fill(hidden, bad).requires_grad_() for t in (k, v)]
    kwargs = {"seqlens_k": lengths, "softcap": 0.0, "deterministic": deterministic}
    clean = run(q, k, v, kwargs)
    for name, value in run(q, *dirty, kwargs).items():
        assert_same(value, clean[name], name, deterministic)
    assert (clean["dk"].masked_select(hidden) == 0).all()


@BACKWARDS
def test_tiles_far_behind_the_last_visible_key(deterministic, monkeypatch):
    """Such tiles have no valid row, by more rows than shared memory holds."""
    q, k, v = qkv(1, 1, 1, 64, 1024, 64)
    lengths = torch.tensor([3], dtype=torch.int32)
    got = check(monkeypatch, "3 of 1024", q, k, v, seqlens_k=lengths, deterministic=deterministic)
    assert (got["dk"][:, :, 3:] == 0).all()


@BACKWARDS
def test_nan_in_one_packed_sequence_stays_there(deterministic):
    ends = torch.tensor([0, 70, 150], dtype=torch.int32)
    q, k, v = (normal(150, 1, 64, seed=n) for n in range(3))
    kwargs = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "softcap": 0.0, "deterministic": deterministic}
    clean = run(q, k, v, kwargs, use_lse=False)
    second = (torch.arange(150) >= 70).view(150, 1, 1)
    dirty = [t.detach().masked_fill(second, torch.nan).requires_grad_() for t in (q, k, v)]
    for name, value in run(*dirty, kwargs, use_lse=False).items():
        rows, expected = ((t if name != "lse" else t.transpose(0, 1))[:70] for t in (value, clean[name]))
        assert_same(rows, expected, name, deterministic)


@BACKWARDS
def test_rows_that_see_nothing(deterministic):
    kwargs = {"causal": True, "softcap": 0.0, "deterministic": deterministic}
    got = run(*qkv(1, 1, 1, 200, 70, 64), kwargs)  # bottom-right: 130 rows see no key
    assert (got["lse"][:, :, :130] == -torch.inf).all()
    assert (got["out"][:, :, :130] == 0).all()
    assert (got["dq"][:, :, :130] == 0).all()
    assert all(t.isfinite().all() for name, t in got.items() if name != "lse")


def test_strides_and_memory():
    base = [t.detach() for t in qkv(2, 2, 1, 70, 90, 64)]
    kwargs = {"causal": True, "softcap": 0.0, "deterministic": True}
    expected = run(*(t.requires_grad_() for t in base), kwargs)
    with torch.no_grad():
        variants = {
            "BSHD": [t.transpose(1, 2).contiguous().transpose(1, 2) for t in base],
            "aligned gaps": [torch.cat((t, t * torch.nan), -1)[..., :64] for t in base],
            "unaligned": [guarded(t, offset=3) for t in base],
            "inner stride 2": [torch.stack((t, t), -1)[..., 0] for t in base],
        }
    for what, inputs in variants.items():
        got = run(*(t.detach().requires_grad_() for t in inputs), kwargs)
        for name, value in expected.items():
            assert torch.equal(got[name], value), f"{what} {name}"
    q, k, v = (on_device(t.detach().requires_grad_()) for t in base)
    out = fastattn.attention(q, k, v, causal=True, deterministic=True, backend="native")
    one = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)  # gradients of stride 0
    other = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    wide = base[1].detach()[:1, :, :1].expand(2, 1, 90, 64)  # stride 0 in batch and rows
    got = fastattn.attention(q.detach(), wide.to(DEVICE), v.detach(), backend="native")
    assert torch.equal(got, fastattn.attention(q.detach(), wide.contiguous().to(DEVICE), v.detach(), backend="native"))


@pytest.mark.parametrize("shape", [(0, 2, 5, 7), (2, 0, 5, 7), (2, 2, 0, 7), (2, 2, 5, 0)])
def test_empty_sizes(shape):
    batch, n_heads, seqlen_q, seqlen_k = shape
    q, k, v = qkv(batch, n_heads, n_heads, seqlen_q, seqlen_k, 64)
    got, expected = run(q, k, v, {}), results(q, k, v, {}, "reference")
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@BACKWARDS
@pytest.mark.parametrize("head_dim", [64, 128])
def test_same_bits_again(head_dim, deterministic):
    q, k, v = qkv(1, 2, 1, 200, 300, head_dim)
    kwargs = {"causal": True, "deterministic": deterministic}
    expected = run(q, k, v, kwargs)
    for _ in range(250 if HOPPER else 1):
        for name, value in run(q, k, v, kwargs).items():
            assert_same(value, expected[name], name, deterministic)


def test_deterministic_none_follows_torch():
    q, k, v = qkv(1, 2, 1, 200, 300, 128)
    one, two = (run(q, k, v, {"deterministic": flag})["dq"] for flag in (False, True))
    assert not torch.equal(one, two)  # otherwise the rest would show nothing
    assert not torch.equal(run(q, k, v, {})["dq"], two)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(run(q, k, v, {})["dq"], two)
    finally:
        torch.use_deterministic_algorithms(False)


def test_backward_after_the_forward_of_another_backend():
    q, k, v = (on_device(t) for t in qkv(1, 2, 1, 70, 90, 64))
    out, lse = reference.attention(q, k, v, causal=True)
    do = torch.ones_like(out)
    expected = torch.autograd.grad(out, (q, k, v), do)
    rest = (None, None, None, None, None, None, None, None, 70, 90, -1, 0, False, 0.0, 0.0, 0.125)
    for deterministic in (False, True):
        tensors = (do, None, q, k, v, out.detach(), lse.detach(), lse.new_empty(0))
        got = attention_module._ops["bwd"]["native"](*tensors, *rest, False, deterministic)
        for a, b in zip(got, expected, strict=False):
            torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)


def test_raw_op_refuses_what_it_does_not_serve():
    q, k, v = (on_device(t.detach()) for t in qkv(1, 2, 1, 8, 8, 64))
    rest = [None, None, None, None, None, None, None, None, 8, 8, -1, -1, False, 0.0, 0.0, 0.125]
    sink = torch.zeros(2, device=DEVICE)
    for place, value in ((0, q), (1, sink), (2, q.bool()), (6, sink), (13, 5.0), (14, 0.1)):
        bad = [*rest]
        bad[place] = value
        with pytest.raises(RuntimeError, match="takes no bias, sink, mask, ALiBi slopes, softcap or dropout"):
            attention_module._ops["fwd"]["native"](q, k, v, *bad, False)
    for inputs in ((q[..., :32], k[..., :32], v[..., :32]), (q.float(), k.float(), v.float()), (q, k, v[..., :32])):
        with pytest.raises(RuntimeError, match="half precision and head dims 64, 96, 128, 192 and 256"):
            attention_module._ops["fwd"]["native"](*inputs, *rest, False)
    with pytest.raises(RuntimeError, match="does not compute lse_low"):
        attention_module._ops["fwd"]["native"](q, k, v, *rest, True)
