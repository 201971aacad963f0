"""Numbers, lengths, dtypes and shapes: which values an op takes, which it refuses, and what it then says."""

import inspect

import numpy as np
import pytest
import torch
from mistakes import COS, CU, LENGTHS, PACKED, RIGHT, SIN, B, Q, X, functions
from torch._subclasses import FakeTensorMode

import fastattn
from fastattn import nn
from fastattn.integrations import flash_attn


@pytest.fixture(params=RIGHT)
def op(request):
    return request.param


@pytest.mark.parametrize(
    ("op", "label"),
    [
        ("attention", "scale"), ("attention", "softcap"), ("attention", "dropout_p"),
        ("scaled_dot_product_attention", "scale"), ("scaled_dot_product_attention", "dropout_p"),
        ("attention_decode", "scale"), ("attention_decode", "softcap"), ("layer_norm", "eps"), ("rms_norm", "eps"),
        ("layer_norm", "dropout_p"), ("dropout", "dropout_p"), ("feed_forward", "dropout_p"),
        ("linear_cross_entropy", "label_smoothing"), ("linear_cross_entropy", "z_loss"),
        ("linear_cross_entropy", "softcap"),
    ],
)  # fmt: skip
def test_numbers(op, label):
    """A number that requires a gradient is refused: it would get none. None is the default; a tensor is its value."""
    function, _ = functions(op)
    args, kwargs = RIGHT[op]
    learnable = torch.tensor(0.25, requires_grad=True)
    with pytest.raises(TypeError, match=rf"{op}: {label} must be a number, .* got a tensor that requires grad"):
        function(*args, **kwargs, **{label: learnable})
    with torch.no_grad():
        torch.manual_seed(0)
        right = function(*args, **kwargs, **{label: 0.25})
        for value in (learnable, np.float32(0.25), torch.tensor(0.25)):
            torch.manual_seed(0)
            assert torch.equal(function(*args, **kwargs, **{label: value}), right)
    if label != "eps" or op == "rms_norm":
        default = function(*args, **kwargs, **({"dropout_p": 0.0} if label == "dropout_p" else {}))
        assert torch.equal(function(*args, **kwargs, **{label: None}), default)
    for wrong in ("a", abs, [1.0]):
        with pytest.raises(TypeError, match=rf"^{op}: {label} must be a number.*, got {type(wrong).__name__}"):
            function(*args, **kwargs, **{label: wrong})


def test_a_stream_in_fp32_begins_with_zeros():
    x = X.bfloat16()
    for op in ("layer_norm", "rms_norm"):
        function, _ = functions(op)
        with pytest.raises(TypeError, match=rf"^{op}: there is no argument residual_in_fp32: pass the residual in fl"):
            function(x, residual_in_fp32=True)
        y, stream = function(x, residual=torch.zeros_like(x, dtype=torch.float32), return_residual=True)
        assert (y.dtype, stream.dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(stream, x.float())
        assert torch.equal(y, function(x))


def test_float64_runs_on_the_reference():
    q = Q.double()
    text = fastattn.explain("scaled_dot_product_attention", q, q, q)
    assert "reference: runs" in text
    assert "it supports float32, bfloat16 and float16, got torch.float64" in text


def test_a_learnable_scale_says_the_way_out_and_the_way_out_is_right():
    scale = torch.tensor(0.3, requires_grad=True)
    with pytest.raises(TypeError, match=r"multiply q by it and pass scale=1.0"):
        fastattn.attention(Q, Q, Q, scale=scale)
    out = fastattn.attention(Q * scale, Q, Q, scale=1.0)
    torch.testing.assert_close(out, fastattn.attention(Q, Q, Q, scale=0.3))
    (grad,) = torch.autograd.grad(out.sum(), scale)
    twin = scale.detach().double().requires_grad_()
    q = Q.double()
    (right,) = torch.autograd.grad((torch.softmax(q @ q.mT * twin, -1) @ q).sum(), twin)
    torch.testing.assert_close(grad.double(), right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [torch.tensor([2, 1]), np.array([2, 1]), [2, 1], (torch.tensor(2), 1)])
def test_window_may_be_any_pair(window):
    right = fastattn.attention(Q, Q, Q, window=(2, 1))
    assert torch.equal(fastattn.attention(Q, Q, Q, window=window), right)
    out = flash_attn.flash_attn_func(*[Q.transpose(1, 2)] * 3, window_size=window)
    assert torch.equal(out.transpose(1, 2), right)
    cache = {"cache_seqlens": LENGTHS, "window": window}
    assert torch.equal(
        fastattn.attention_decode(Q, Q, Q, **cache), fastattn.attention_decode(Q, Q, Q, **cache | {"window": (2, 1)})
    )


@pytest.mark.parametrize("window", [torch.tensor(3), torch.tensor([1, 2, 3]), np.array([[1, 2]]), 3, "ab"])
def test_what_is_no_pair_is_named(window):
    with pytest.raises((ValueError, TypeError), match=r"attention: window"):
        fastattn.attention(Q, Q, Q, window=window)


class TestLengths:
    @pytest.mark.parametrize("bad", [[3, 99], [-3, 6], [7, 0]])
    def test_seqlens_k(self, bad):
        for function in functions("attention"):
            with pytest.raises(ValueError, match=rf"seqlens_k must be from 0 to 6, got \[{bad[0]}, {bad[1]}\]"):
                function(Q, Q, Q, seqlens_k=torch.tensor(bad, dtype=torch.int32))

    def test_seqlens_k_of_packed_sequences(self):
        cu = {"cu_seqlens_q": CU, "cu_seqlens_k": CU}
        fastattn.attention(PACKED, PACKED, PACKED, **cu, seqlens_k=torch.tensor([2, 4], dtype=torch.int32))
        with pytest.raises(ValueError, match=r"lengths of the packed sequences, \[2, 4\], got \[3, 4\]"):
            fastattn.attention(PACKED, PACKED, PACKED, **cu, seqlens_k=torch.tensor([3, 4], dtype=torch.int32))

    def test_any_cache_leftpad_is_right(self):
        """It is the first visible key: 0 and below hide no key, the length and above hide all."""
        for backend in ("native", "reference"):
            for pads, alike in (([0, -5], [0, 0]), ([2, 99], [2, 3])):
                out, right = (
                    fastattn.attention_decode(
                        Q, Q, Q, cache_seqlens=LENGTHS, cache_leftpad=torch.tensor(pad, dtype=torch.int32),
                        backend=backend,
                    )
                    for pad in (pads, alike)
                )  # fmt: skip
                assert torch.equal(out, right)
        assert torch.equal(out, torch.zeros_like(out))

    @pytest.mark.parametrize("side", ["q", "k"])
    def test_max_seqlen(self, side):
        cu = {"cu_seqlens_q": CU, "cu_seqlens_k": CU}
        right = fastattn.attention(PACKED, PACKED, PACKED, **cu)
        for enough in (4, 6, torch.tensor(4)):
            out = fastattn.attention(PACKED, PACKED, PACKED, **cu, **{f"max_seqlen_{side}": enough})
            assert torch.equal(out, right)
        with pytest.raises(ValueError, match=f"max_seqlen_{side} must be at least the longest length, 4, got 3"):
            fastattn.attention(PACKED, PACKED, PACKED, **cu, **{f"max_seqlen_{side}": 3})

    def test_nothing_is_looked_at_while_a_graph_is_made(self):
        lengths = torch.tensor([3, 6], dtype=torch.int32)
        torch.compiler.reset()
        compiled = torch.compile(
            lambda q, n, cu, x: (
                fastattn.attention(q, q, q, seqlens_k=n),
                fastattn.attention(x, x, x, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=4, max_seqlen_k=4),
                fastattn.rotary_embedding(q, COS, SIN, positions=torch.arange(6)),
                fastattn.attention_decode(q, q, q, cache_seqlens=n),
            ),
            fullgraph=True,
            backend="aot_eager",
        )
        compiled(Q, lengths, CU, PACKED)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            q, n, cu, x = (mode.from_tensor(t) for t in (Q, lengths, CU, PACKED))
            assert fastattn.attention(q, q, q, seqlens_k=n).shape == Q.shape
            assert fastattn.attention(x, x, x, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=1).shape == x.shape
            assert fastattn.attention_decode(q, q, q, cache_seqlens=n).shape == Q.shape


@pytest.mark.parametrize("value", [np.ones(3), torch.ones(3)], ids=["array", "tensor"])
def test_texts(op, value):
    args, kwargs = RIGHT[op]
    for label in ("activation", "backend", "reduction"):
        if label in inspect.signature(getattr(fastattn, op)).parameters:
            with pytest.raises(TypeError, match=rf"^{op}: {label} must be a string, got "):
                getattr(fastattn, op)(*args, **kwargs, **{label: value})


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.int32])
def test_dtypes_one_cannot_compute_with(op, dtype):
    """All float tensors of the call get it, so that nothing else is wrong; then one after the other."""
    function, explain = functions(op)
    args, kwargs = RIGHT[op]
    sets = [tuple(t.to(dtype) if t.is_floating_point() else t for t in args)]
    sets += [(*args[:i], t.to(dtype), *args[i + 1 :]) for i, t in enumerate(args) if t.is_floating_point()]
    for wrong in sets:
        for call in (function, explain):
            with pytest.raises((TypeError, ValueError), match=rf"^{op}: .*{dtype}"):
                call(*wrong, **kwargs)


def wrong_operands():
    """Calls whose operands a C++ kernel refuses by itself: (op, arguments, keywords)."""
    meta = torch.empty(8, device="meta")
    grad = X.clone().requires_grad_()
    for x in (X, grad):
        yield from [
            ("layer_norm", (x, B[:7]), {}),
            ("layer_norm", (x, B, B[:1]), {}),
            ("layer_norm", (x, meta, B), {}),
            ("layer_norm", (x, B, B), {"residual": X[:2]}),
            ("layer_norm", (x, B, B), {"x_bias": torch.randn(3, 8)}),
            ("layer_norm", (x, B, B), {"residual": X.to("meta")}),
            ("layer_norm", (x, B.long(), B), {}),
            ("rms_norm", (x, B[None]), {}),
            ("rms_norm", (x, B, torch.ones(2)), {}),
        ]
    yield from [
        ("layer_norm", (torch.tensor(1.0),), {}),
        ("rms_norm", (X.long(),), {}),
        ("attention", (Q, Q[:1], Q[:1]), {}),
        ("attention", (Q, Q, Q[:, :, :3]), {}),
        ("attention", (Q, Q[:, :3], Q[:, :3]), {"causal": True}),
        ("attention", (Q, Q[..., :4], Q), {}),
        ("attention", (Q, Q.double(), Q), {}),
        ("attention", (Q[0], Q[0], Q[0]), {}),
        ("attention", (Q, Q.to("meta"), Q), {}),
        ("attention", (Q, Q, Q), {"scale": float("nan")}),
        ("attention", (Q.long(), Q.long(), Q.long()), {}),
        ("rotary_embedding", (Q[0, 0], COS, SIN), {}),
        ("rotary_embedding", (Q.long(), COS, SIN), {}),
        ("rotary_embedding", (Q, COS[:3], SIN[:3]), {}),
        ("rotary_embedding", (Q, COS, SIN[:5]), {}),
        ("rotary_embedding", (Q, COS, SIN.double()), {}),
        ("rotary_embedding", (Q, COS.long(), SIN.long()), {}),
        ("rotary_embedding", (Q, COS.repeat(1, 3), SIN.repeat(1, 3)), {}),
        ("rotary_embedding", (Q, COS[:, :0], SIN[:, :0]), {}),
        ("rotary_embedding", (Q, COS, SIN.to("meta")), {}),
        ("rotary_embedding", ((Q, Q[:1]), COS, SIN), {}),
        ("rotary_embedding", ((Q, Q.double()), COS, SIN), {}),
        ("rotary_embedding", ((Q, Q, Q), COS, SIN), {}),
        ("rotary_embedding", (Q, COS, SIN), {"positions": len(COS)}),
        ("rotary_embedding", (Q, COS, SIN), {"positions": -1}),
        ("rotary_embedding", (Q, COS, SIN), {"positions": torch.arange(3)}),
        ("rotary_embedding", (Q, COS, SIN), {"positions": torch.arange(6) + len(COS)}),
        ("rotary_embedding", (Q, COS, SIN), {"positions": torch.arange(6.0)}),
        ("rotary_embedding", (Q, torch.ones(2, 6, 8), torch.ones(2, 6, 8)), {"interleaved": True}),
        ("dropout", (X.long(), 0.5), {}),
        ("dropout", (X, 0.5), {"residual": X[:1]}),
        ("dropout", (X, 0.5), {"residual": X.long()}),
        ("dropout", (X, 1.5), {}),
    ]


@pytest.mark.parametrize(("op", "args", "kwargs"), list(wrong_operands()))
def test_a_refusal_by_a_kernel_is_explained_as_the_op_would(op, args, kwargs):
    def error(**more):
        with pytest.raises((TypeError, ValueError)) as raised:
            getattr(fastattn, op)(*args, **kwargs, **more)
        return raised.value

    ours, checked_first = error(), error(backend="reference")
    assert str(ours).startswith(f"{op}: ")
    assert (type(ours), str(ours)) == (type(checked_first), str(checked_first))


@pytest.mark.parametrize(
    ("dtype", "floats"), [(torch.float32, "torch.float32"), (torch.float16, "torch.float32 or torch.float16")]
)
def test_a_mask_of_a_wrong_dtype_names_each_dtype_once(dtype, floats):
    q = torch.zeros(1, 1, 2, 4, dtype=dtype)
    wanted = rf"attn_mask must be torch.bool \(True = attend\) or {floats} \(added to the scores\), got torch.int64"
    with pytest.raises(TypeError, match=wanted):
        fastattn.scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(2, 2, dtype=torch.int64))


def test_the_refusal_of_a_mask_says_what_true_means():
    """True = attend in functions, True = ignore in modules, as in torch."""
    q, padding, x = torch.randn(2, 4, 6, 8), torch.ones(2, 6, dtype=torch.bool), torch.randn(2, 5, 8)
    for op, name in (("attention", "mask"), ("scaled_dot_product_attention", "attn_mask")):
        wanted = (
            rf"^{op}: {name} \(bool, True = attend\) must .* got \(2, 6\); for one value per key pass {name}\[:, None"
        )
        with pytest.raises(ValueError, match=wanted):
            getattr(fastattn, op)(q, q, q, **{name: padding})
        fastattn.explain(op, q, q, q, **{name: padding[:, None, None, :]})
    with pytest.raises(ValueError, match=r"attn_mask \(added to the scores\) must have 2 to 4 dimensions"):
        fastattn.scaled_dot_product_attention(q, q, q, attn_mask=torch.zeros(3, 3))
    attention, layer = nn.MultiheadAttention(8, 2, batch_first=True), nn.TransformerEncoderLayer(8, 2, batch_first=True)
    for masks in ({"key_padding_mask": padding}, {"attn_mask": padding}, {"attn_mask": torch.ones(5, 5).int()}):
        with pytest.raises((AssertionError, RuntimeError), match="True = ignore"):
            attention(x, x, x, **masks)
    for masks in ({"src_key_padding_mask": padding}, {"src_mask": padding}, {"src_mask": torch.ones(5, 5).int()}):
        with pytest.raises((AssertionError, RuntimeError), match="True = ignore"):
            layer(x, **masks)


@pytest.mark.parametrize(
    ("op", "shapes", "more"),
    [
        ("attention", [(2, 16, 4, 8), (2, 12, 4, 8), (2, 12, 4, 8)], {}),
        ("attention", [(2, 16, 4, 8), (2, 12, 2, 8), (2, 12, 2, 8)], {}),
        ("attention", [(2, 16, 4, 8)] * 3, {"mask": torch.ones(16, 16, dtype=torch.bool)}),
        ("scaled_dot_product_attention", [(2, 16, 4, 8)] * 3, {"attn_mask": torch.ones(1, 1, 16, 16)}),
        ("attention_decode", [(2, 1, 4, 8), (2, 32, 2, 8), (2, 32, 2, 8)], {"cache_seqlens": LENGTHS}),
    ],
)
def test_shapes_of_flash_attn_are_answered_with_the_transpose(op, shapes, more):
    given = [torch.zeros(shape) for shape in shapes]
    with pytest.raises(ValueError, match=r"\(batch, seqlen, heads, head_dim\), pass .*transpose\(1, 2\)"):
        getattr(fastattn, op)(*given, **more)
    getattr(fastattn, op)(*(t.transpose(1, 2) for t in given), **more)  # the advice helps
    with pytest.raises(ValueError) as raised:
        fastattn.attention(torch.zeros(2, 4, 6, 8), torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 5, 8))
    assert "transpose" not in str(raised.value)
