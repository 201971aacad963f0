"""The products with the activation pass in their epilogue (kernels/feed_forward_gemm.py), and the choice of them.

In the interpreter, in processes of their own: FASTATTN_FUSED_GEMM=1 takes them for every ungated block.
"""

import itertools
import os

import pytest
import torch
from oracle import BACKWARD, assert_accurate
from processes import run_tests
from test_feed_forward import keep_factor

import fastattn
from fastattn import reference
from fastattn.ops import _gemm
from fastattn.ops.feed_forward import ACTIVATIONS

pytest.importorskip("triton", reason="Triton is not installed")
import aot

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
FORCED = os.environ.get("FASTATTN_FUSED_GEMM") == "1"
OPS = torch.ops.fastattn
here = pytest.mark.skipif(
    not (CUDA or FORCED), reason="runs in the process that test_in_the_interpreter starts, or on a GPU"
)


def randn(*shape, dtype=torch.float16, scale=1.0):
    return (torch.randn(shape) * scale).to(DEVICE, dtype)


def weights(rows, d_model, d_ff, dtype=torch.float16, seed=0):
    torch.manual_seed(seed)
    x, w = randn(rows, d_model, dtype=dtype), randn(d_ff, d_model, dtype=dtype, scale=d_model**-0.5)
    return x, w, randn(d_ff, dtype=dtype)


def factor(rng, p, shape, dtype):
    return 1 if rng is None else keep_factor(rng.cpu(), p, torch.Size(shape)).to(DEVICE, dtype)


# one tile and several in each direction, edges in all three sizes, more tiles than programs, more than a group of rows
SIZES = ((1, 8, 16), (33, 40, 72), (300, 16, 40) if CUDA else (70, 16, 40))


@here
@pytest.mark.parametrize(("activation", "dtype"), [("gelu", torch.float16), ("relu", torch.float32)])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_forward(sizes, activation, dtype):
    for p, biased in ((0.0, True), (0.3, False)):
        x, w, b = weights(*sizes, dtype)
        b = b if biased else None
        rng = torch.tensor([-(2**40), 2**33 + 1], device=DEVICE) if p else None
        act = reference.ACTIVATIONS[activation]
        results = []
        for t in (torch.float64, dtype):
            preact = torch.nn.functional.linear(x.to(t), w.to(t), None if b is None else b.to(t))
            results.append((preact, act(preact) * factor(rng, p, preact.shape, t)))
        index = ACTIVATIONS.index(activation)
        preact, hidden = OPS.linear_activation_fwd.triton(x, w, b, rng, p, index, True)
        assert_accurate(preact, results[0][0], results[1][0], what="preact", slack=1e-6)
        assert_accurate(hidden, results[0][1], results[1][1], what="hidden", slack=1e-6)
        # hidden is that of the preact that is saved, from which the backward makes it again
        again = OPS.activation_fwd.triton(preact, None, rng, p, index)
        torch.testing.assert_close(hidden, again, rtol=2 * torch.finfo(dtype).eps if CUDA else 0, atol=0)
    nothing, same = OPS.linear_activation_fwd.triton(x, w, b, rng, p, index, False)
    assert nothing.shape == (0,)
    assert torch.equal(same, hidden)


@here
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_backward(sizes, dtype):
    rows, _, d_ff = sizes
    for p, activation in ((0.0, "silu"), (0.3, "gelu_tanh")):
        dy, w, _ = weights(*sizes, dtype)
        w = w.t().contiguous()  # (d_model, d_ff), as w2
        preact = randn(rows, d_ff, dtype=dtype)
        rng = torch.tensor([77, 2**33 + 1], device=DEVICE) if p else None
        results = []
        for t in (torch.float64, dtype):
            leaf = preact.to(t).requires_grad_()
            hidden = reference.ACTIVATIONS[activation](leaf) * factor(rng, p, preact.shape, t)
            (dpreact,) = torch.autograd.grad(hidden, leaf, dy.to(t) @ w.to(t))
            results.append((dpreact, hidden.detach(), dpreact.sum(0)))
        index = ACTIVATIONS.index(activation)
        ours = OPS.linear_activation_bwd.triton(dy, w, preact, rng, p, index, True, True)
        for name, got, exact, own in zip(("dpreact", "hidden", "dbias"), ours, *results, strict=True):
            assert_accurate(got, exact, own, BACKWARD, name, slack=1e-6)
    few = OPS.linear_activation_bwd.triton(dy, w, preact, rng, p, index, False, False)
    assert torch.equal(few[0], ours[0])
    assert [t.shape for t in few[1:]] == [(0,), (0,)]


@here
def test_masks_are_the_reference_ones():
    rng = torch.tensor([5, -6], device=DEVICE)
    x, w = torch.ones(70, 16, device=DEVICE), torch.eye(16, device=DEVICE)[:1].repeat(90, 1)
    relu = ACTIVATIONS.index("relu")
    preact, hidden = OPS.linear_activation_fwd.triton(x, w, None, rng, 0.4, relu, True)
    dpreact, again, _ = OPS.linear_activation_bwd.triton(x, w.t(), preact, rng, 0.4, relu, True, False)
    expected = factor(rng, 0.4, preact.shape, torch.float32)
    for result in (hidden, dpreact, again):
        assert torch.equal(result, expected)


@here
def test_strides_and_empty():
    x, w, b = weights(20, 16, 40)
    wide = torch.cat((x, x), 1)[:, :16]
    spaced = torch.stack((b, b), 1)[:, 0]
    got = OPS.linear_activation_fwd.triton(wide, w.t().contiguous().t(), spaced, None, 0.0, 0, True)
    want = OPS.linear_activation_fwd.triton(x, w, b, None, 0.0, 0, True)
    assert all(map(torch.equal, got, want))
    dy = x[:1].expand(20, 16)
    got = OPS.linear_activation_bwd.triton(dy, w.t(), want[0], None, 0.0, 0, True, True)
    want = OPS.linear_activation_bwd.triton(dy.contiguous(), w.t().contiguous(), want[0], None, 0.0, 0, True, True)
    assert all(map(torch.equal, got, want))
    preact, hidden = OPS.linear_activation_fwd.triton(x[:0], w, b, None, 0.0, 0, True)
    assert preact.shape == hidden.shape == (0, 40)
    dpreact, hidden, dbias = OPS.linear_activation_bwd.triton(x[:0], w.t(), preact, None, 0.0, 0, True, True)
    assert (dpreact.shape, hidden.shape, dbias.tolist()) == ((0, 40), (0, 40), [0.0] * 40)


@here
def test_opcheck():
    x, w, b = weights(6, 8, 16, torch.float32)
    rng = torch.tensor([1, 2], device=DEVICE)
    every = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for flag, checks in ((False, every[1]), (True, every)):
        torch.library.opcheck(OPS.linear_activation_fwd.triton, (x, w, b, rng, 0.1, 0, flag), test_utils=checks)
        arguments = (x, w.t().contiguous(), randn(6, 16, dtype=torch.float32), rng, 0.1, 0, flag, flag)
        torch.library.opcheck(OPS.linear_activation_bwd.triton, arguments, test_utils=checks)


def test_nothing_is_fused_while_nothing_was_measured():
    from fastattn.kernels.feed_forward_table import TABLE

    if FORCED or TABLE:
        pytest.skip("forced, or measured since")
    x, w, b = weights(4, 8, 16, torch.float32)
    assert "the vendor library's" in fastattn.explain("feed_forward", x, w, b, w.t(), None)


def test_the_choice(monkeypatch):
    """A block of the table is fused if its backend may serve, a gated or another one is not."""
    if CUDA:
        pytest.skip("the choice alone is tested, on CPU tensors")
    x, w, b = weights(4, 8, 16, torch.float32)
    arguments = (x, w, b, w.t(), None)
    asked = []

    def fuses(*key):
        asked.append(key)
        return key[0] == "fwd" and key[3:] == (8, 16)

    monkeypatch.setattr(_gemm, "_fused", fuses)
    runs = next(name for name, state in fastattn.backends()["cpu"].items() if state == "available")
    with fastattn.use_backend("auto"):
        text = fastattn.explain("feed_forward", *arguments)
        assert "forward in one kernel" in text if runs != "reference" else "the vendor library's" in text
        assert set(asked) <= {(way, x.device, torch.float32, 8, 16) for way in ("fwd", "bwd")}
        assert "the vendor library's" in fastattn.explain("feed_forward", *arguments, w_gate=w)
        assert "the vendor library's" in fastattn.explain("feed_forward", *arguments, backend=runs) or runs == "triton"


def test_in_the_interpreter():
    """The kernels here, and the tests of the op with every ungated block fused."""
    if CUDA or FORCED:
        pytest.skip("they run in this process")
    chosen = "test_feed_forward_gemm and not compile or apart or one_graph and False or random_cases and [5]"
    environment = {"TRITON_INTERPRET": "1", "FASTATTN_FUSED_GEMM": "1", "FASTATTN_BACKEND": "triton"}
    run_tests(chosen, __file__, "test_feed_forward.py", **environment)


PRODUCTS = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


def config(way, arch, row, dropped=True, activation="gelu"):
    sizes = ("rows", "cols", "depth", "x_stride", "dy_stride", "w_stride", "preact_stride", "threshold")
    halves = ("x_ptr", "w_ptr", "bias_ptr", "preact_ptr", "hidden_ptr", "dy_ptr", "dpreact_ptr")
    types = dict.fromkeys(sizes, "i32") | dict.fromkeys(halves, "*bf16")
    types |= {"rng_ptr": "*i64", "dbias_ptr": "*fp32", "scale": "fp32"}
    block_m, block_n, block_k, warps, stages = row
    constants = {"ACTIVATION": activation, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP_M": 8,
                 "TMA": arch >= 90} | ({} if dropped else {"rng_ptr": None})  # fmt: skip
    return {"module": "fastattn.kernels.feed_forward_gemm", "kernel": f"linear_activation{way}_kernel", "arch": arch,
            "num_warps": warps, "num_stages": stages, "types": types, "constants": constants}  # fmt: skip


def test_kernels_compile_without_spills_and_with_the_matrix_products_of_each_gpu():
    from fastattn.kernels.feed_forward_gemm import DEFAULT
    from fastattn.kernels.feed_forward_table import TABLE

    rows = [(arch, way, DEFAULT[way]) for arch, way in itertools.product(PRODUCTS, DEFAULT)]
    rows += [(key[0], key[1], row) for key, row in TABLE.items() if key[0] in PRODUCTS]
    wanted = [config("_bwd" if way == "bwd" else "", arch, row) for arch, way, row in rows]
    for c in aot.compile_all(wanted):
        title = f"{c['kernel']} sm_{c['arch']} {c['constants']['BLOCK_M']}x{c['constants']['BLOCK_N']}"
        print(title, {k: c.get(k, 0) for k in ("registers", "stack", "shared", PRODUCTS[c["arch"]], "UTMALDG")})
        assert (c["stack"], c.get("STL", 0), c.get("LDL", 0)) == (0, 0, 0), title
        assert c["registers"] < 255, title  # beyond it ptxas spills
        assert PRODUCTS[c["arch"]] in c, title
        assert c["arch"] < 90 or "UTMALDG" in c, title
        assert c.get("STG.128", 0) >= 2, title
