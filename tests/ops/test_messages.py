"""Mistakes and their messages: names of other libraries, values of the wrong kind, lengths out of range."""

import inspect
import re

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

import fastattn
from fastattn import nn
from fastattn.integrations import flash_attn
from fastattn.ops._advice import ADVICE

Q = torch.randn(2, 4, 6, 8)
X = torch.randn(3, 8)
W = torch.randn(8, 8)
B = torch.randn(8)
TARGET = torch.tensor([1, 2, 3])
COS, SIN = torch.ones(6, 4), torch.zeros(6, 4)
LENGTHS = torch.tensor([2, 3], dtype=torch.int32)
MASK = torch.ones(6, 6, dtype=torch.bool)
CU = torch.tensor([0, 2, 6], dtype=torch.int32)
PACKED = torch.randn(6, 4, 8)

# op: valid (positional arguments, keywords)
RIGHT = {
    "attention": ((Q, Q, Q), {}),
    "attention_decode": ((Q, Q, Q), {"cache_seqlens": LENGTHS}),
    "dropout": ((X,), {}),
    "feed_forward": ((X, W, B, W, B), {}),
    "layer_norm": ((X, B, B), {}),
    "linear_cross_entropy": ((X, W, TARGET), {}),
    "rms_norm": ((X, B), {}),
    "rotary_embedding": ((Q, COS, SIN), {}),
    "scaled_dot_product_attention": ((Q, Q, Q), {}),
}
# the kinds that are not a tensor, a number or None
NOTHING = {"array": np.ones((2, 4, 6, 8)), "list": [1.0], "callable": abs, "text": "a", "dict": {}}


def functions(op):
    """The op, and explain for it, which must respond in the same way."""
    return getattr(fastattn, op), lambda *args, **kwargs: fastattn.explain(op, *args, **kwargs)


@pytest.fixture(params=RIGHT)
def op(request):
    return request.param


# (op, arguments in addition to those of RIGHT, message)
FOREIGN = [
    (
        "attention",
        {"attn_mask": MASK},
        r"no argument attn_mask: use mask= .*True = attend.* or bias= .*, or call sc",
    ),
    ("attention", {"is_causal": True}, r'no argument is_causal: use causal="top_left"'),
    ("attention", {"softmax_scale": 0.1}, "no argument softmax_scale: use scale="),
    ("attention", {"window_size": (1, 1)}, "no argument window_size: use window="),
    ("attention", {"key_padding_mask": MASK}, "no argument key_padding_mask: use mask=~key_padding_mask"),
    ("attention", {"dropout": 0.1}, "no argument dropout: use dropout_p="),
    ("attention", {"need_weights": True}, "no argument need_weights: .*MultiheadAttention"),
    ("attention", {"casual": True}, "no argument casual: did you mean causal="),
    ("attention", {"colour": 1}, "no argument colour: it takes q, k, v, mask, bias, "),
    ("scaled_dot_product_attention", {"causal": True}, "no argument causal: use is_causal="),
    ("scaled_dot_product_attention", {"mask": MASK}, "no argument mask: use attn_mask="),
    ("scaled_dot_product_attention", {"window": (1, 1)}, "no argument window: call attention"),
    ("attention_decode", {"rotary_cos": COS}, "no argument rotary_cos: rotate q and k with rotary_embedding"),
    ("attention_decode", {"seqused_k": LENGTHS}, "no argument seqused_k: use cache_seqlens="),
    ("layer_norm", {"normalized_shape": (8,)}, "no argument normalized_shape: it normalises the last dimension"),
    ("rms_norm", {"bias": B}, "no argument bias: it has none; x_bias="),
    ("dropout", {"p": 0.1}, "no argument p: use dropout_p="),
    ("dropout", {"training": True}, "no argument training: .* pass dropout_p=0.0 in evaluation"),
    ("feed_forward", {"approximate": "tanh"}, 'no argument approximate: use activation="gelu_tanh"'),
    ("feed_forward", {"dropout": 0.1}, "no argument dropout: use dropout_p="),
    ("linear_cross_entropy", {"labels": TARGET}, "no argument labels: use target="),
    ("linear_cross_entropy", {"lse_square_scale": 0.1}, "no argument lse_square_scale: use z_loss="),
    ("rotary_embedding", {"position_ids": None}, "no argument position_ids: use positions="),
    ("rotary_embedding", {"cu_seqlens": CU}, "no argument cu_seqlens: use positions="),
]


@pytest.mark.parametrize(("op", "more", "message"), FOREIGN, ids=[f"{op}-{next(iter(m))}" for op, m, _ in FOREIGN])
def test_names_of_other_libraries_are_answered_with_ours(op, more, message):
    args, kwargs = RIGHT[op]
    for function in functions(op):
        with pytest.raises(TypeError, match=f"^{op}: there is {message}"):
            function(*args, **kwargs, **more)


@pytest.mark.parametrize(
    ("op", "args", "message"),
    [
        (
            "attention",
            (Q, Q, Q, MASK),
            r"takes q, k, v by position, got 4 arguments: use mask= .*, or call scaled_dot_",
        ),
        ("dropout", (X, 0.5, True), r"takes x, dropout_p by position, got 3 arguments: there is no training flag"),
        ("linear_cross_entropy", (X, W, TARGET, B), "got 4 arguments: pass the others by name: bias=, ignore_index="),
        ("rotary_embedding", (Q, Q, COS, SIN), r"got 4 arguments: q and k are passed as one pair, \(q, k\)"),
        ("layer_norm", (X, (8,), B, B), "weight must be a tensor or None, got tuple: there is no normalized_shape"),
        ("layer_norm", (X, 8), "weight must be a tensor or None, got int"),
        ("rms_norm", (X, 1e-6), "weight must be a tensor or None, got float: eps is the third argument"),
        ("attention", (Q, Q), "missing a required argument: 'v'"),
    ],
)
def test_arguments_in_the_place_of_others(op, args, message):
    for function in functions(op):
        with pytest.raises(TypeError, match=f"^{op}: .*{message}"):
            function(*args)


def test_every_advice_names_what_there_is():
    """A text that says use NAME= must be right, and no foreign name may be one of ours."""
    public = {name: getattr(fastattn, name) for name in RIGHT}
    public |= {name: getattr(flash_attn, name) for name in ADVICE if name.startswith("flash_attn")}
    public |= {name: getattr(nn, name[3:]) for name in ADVICE if name.startswith("nn.")}
    assert set(public) == set(ADVICE)
    for name, function in public.items():
        ours = inspect.signature(function).parameters
        for given, text in ADVICE[name].items():
            if given in ours:
                continue
            before_call = text.split("call ")[0]
            for used in re.findall(r"(?:use|and|,|or) (\w+)=", before_call):
                assert used in ours, f"{name}: {given}: {text}"


def test_none_for_a_bias_is_no_mistake():
    with pytest.raises(ValueError, match="w2 must have shape"):
        fastattn.feed_forward(X, W, None, W[:3, :3], None)


@pytest.mark.parametrize("kind", NOTHING)
def test_what_is_no_tensor_is_named(op, kind):
    """Every parameter that takes a tensor, one after the other."""
    value = NOTHING[kind]
    function, explain = functions(op)
    args, kwargs = RIGHT[op]
    names = list(inspect.signature(function).parameters)
    tensors = {
        "attention": "q k v mask bias seqlens_k cu_seqlens_q cu_seqlens_k alibi_slopes sink",
        "attention_decode": "q k_cache v_cache k v cache_seqlens block_table cache_batch_idx cache_leftpad"
        " alibi_slopes sink",
        "dropout": "x residual",
        "feed_forward": "x w1 b1 w2 b2 w_gate b_gate",
        "layer_norm": "x weight bias x_bias residual",
        "linear_cross_entropy": "x weight target bias",
        "rms_norm": "x weight x_bias residual",
        "rotary_embedding": "x cos sin positions",
        "scaled_dot_product_attention": "query key value attn_mask",
    }[op].split()
    for label in tensors:
        given = dict(zip(names, args, strict=False)) | kwargs | {label: value}
        if label in ("k", "v") and op == "attention_decode":
            given |= {"k": Q[:, :, :1], "v": Q[:, :, :1], label: value}
        if label.startswith("cu_seqlens"):
            given |= dict.fromkeys("qkv", PACKED) | {"cu_seqlens_q": CU, "cu_seqlens_k": CU, label: value}
        is_pair = op == "rotary_embedding" and label == "x" and kind == "list"
        if is_pair:
            given["x"] = [1.0, Q]
        named = "float" if is_pair else type(value).__name__
        for call in (function, explain):
            with pytest.raises(TypeError, match=rf"^{op}: {label} must be .*, got {named}"):
                call(**given)


def test_half_a_pair_is_named():
    for pair in ((Q, None), [Q, None], (None, Q)):
        with pytest.raises(TypeError, match=r"^rotary_embedding: x must be a tensor, got NoneType"):
            fastattn.rotary_embedding(pair, COS, SIN)


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


class TestFlashAttn:
    def test_names(self):
        q = Q.transpose(1, 2)
        with pytest.raises(TypeError, match=r"^flash_attn_func: there is no argument scale: use softmax_scale="):
            flash_attn.flash_attn_func(q, q, q, scale=1.0)
        with pytest.raises(TypeError, match=r"^flash_attn_func: there is no argument attn_mask: call fastattn"):
            flash_attn.flash_attn_func(q, q, q, attn_mask=MASK)
        with pytest.raises(TypeError, match=r"^flash_attn_with_kvcache: .* no argument return_lse: use return_soft"):
            flash_attn.flash_attn_with_kvcache(q, q, q, return_lse=True)
        with pytest.raises(TypeError, match=r"^flash_attn_qkvpacked_func: qkv must be a tensor, got ndarray"):
            flash_attn.flash_attn_qkvpacked_func(np.ones(3))

    def test_none_stands_for_off(self):
        q = Q.transpose(1, 2)
        none = {"softcap": None, "window_size": None, "dropout_p": None, "softmax_scale": None, "deterministic": None}
        assert torch.equal(flash_attn.flash_attn_func(q, q, q, **none), flash_attn.flash_attn_func(q, q, q))
        none = {"softcap": None, "window_size": None, "softmax_scale": None, "num_splits": None}
        assert torch.equal(
            flash_attn.flash_attn_with_kvcache(q, q, q, **none), flash_attn.flash_attn_with_kvcache(q, q, q)
        )


class TestModules:
    def test_names(self):
        with pytest.raises(TypeError, match=r"^nn\.FeedForward: there is no argument dim_feedforward: use d_ff="):
            nn.FeedForward(8, dim_feedforward=16)
        with pytest.raises(TypeError, match=r"^nn\.RotaryEmbedding: there is no argument dim: use rotary_dim="):
            nn.RotaryEmbedding(dim=8)
        with pytest.raises(TypeError, match=r"^nn\.RotaryEmbedding: rotary_dim must be an integer, got str"):
            nn.RotaryEmbedding("8")
        with pytest.raises(TypeError, match="no argument colour: it takes src, src_mask, src_key_padding_mask, is_"):
            nn.TransformerEncoderLayer(8, 2)(X, colour=None)
        for wrong in (torch.relu, ["relu"], "swish"):
            with pytest.raises(ValueError, match="FeedForward: activation must be one of gelu, "):
                nn.FeedForward(8, activation=wrong)
        with pytest.raises(ValueError, match="explain: op must be one of attention, "):
            fastattn.explain(["attention"])

    def test_inputs_that_are_no_tensors(self):
        x = torch.randn(5, 2, 8)
        model = nn.Transformer(8, 2, 1, 1, 16)
        for wrong in (x.numpy(), x.tolist(), None, torch.relu, 1.0):
            for args, label in (((wrong, x), "src"), ((x, wrong), "tgt")):
                with pytest.raises(TypeError, match=rf"^nn\.Transformer: {label} must be a tensor, got"):
                    model(*args)
        with pytest.raises(TypeError, match=r"^nn\.Transformer: src_mask must be a tensor or None, got list"):
            model(x, x, x.tolist())
        for layer, inputs in ((nn.TransformerEncoderLayer, 1), (nn.TransformerDecoderLayer, 2)):
            with pytest.raises(AssertionError, match="0-D query"):
                layer(8, 2, 16)(*[torch.tensor(1.0)] * inputs)

    def test_a_report_is_not_the_model(self):
        model = torch.nn.Sequential(torch.nn.LayerNorm(8))
        model = fastattn.replace(model)
        with pytest.raises(TypeError, match=r"returns a report, not the model: write replace\(model\) inst"):
            model(X)
        with pytest.raises(AttributeError, match=r"no attribute 'parameters': replace returns a report, not the model"):
            model.parameters()
        with pytest.raises(AttributeError, match=r"no attribute 'colour'$"):
            _ = model.colour

    def test_replace_takes_names(self):
        model = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.RMSNorm(8))
        assert fastattn.replace(model, only="LayerNorm").replaced == {"0": "LayerNorm"}
        assert fastattn.replace(model, only=["RMSNorm", torch.nn.LayerNorm]).replaced == {"1": "RMSNorm"}
        with pytest.raises(ValueError, match=r"only must name classes among .*, got 'LayerNrm'"):
            fastattn.replace(model, only="LayerNrm")


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


def test_errors_are_caught_as_those_of_pytorch_too(op):
    """PyTorch and flash-attn raise RuntimeError for wrong arguments, so code that catches theirs catches ours."""
    args, kwargs = RIGHT[op]
    for function in functions(op):
        with pytest.raises(RuntimeError, match="there is no argument colour") as caught:
            function(*args, **kwargs, colour=1)
        assert isinstance(caught.value, TypeError)
    if op != "scaled_dot_product_attention":  # it takes no backend
        with pytest.raises(RuntimeError, match="backend must be one of") as caught:
            getattr(fastattn, op)(*args, **kwargs, backend="mine")
        assert isinstance(caught.value, ValueError)


def test_errors_of_the_drop_in_functions_are_runtime_errors():
    calls = {
        "Explicit attn_mask should not be set when is_causal=True": lambda: fastattn.scaled_dot_product_attention(
            Q, Q, Q, MASK, is_causal=True
        ),
        "at least 2 dimensions": lambda: fastattn.scaled_dot_product_attention(B, B, B),
        "must have one dtype": lambda: fastattn.scaled_dot_product_attention(Q, Q.half(), Q),
        "flash_attn_func: ": lambda: flash_attn.flash_attn_func(Q, Q, Q[0]),
        "weight must": lambda: fastattn.layer_norm(X, B[:3]),
        "at least 1-dimensional": lambda: nn.LayerNorm(())(torch.ones(())),
    }
    for message, call in calls.items():
        with pytest.raises(RuntimeError, match=message):
            call()


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
