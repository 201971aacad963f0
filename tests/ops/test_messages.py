"""Mistakes and their messages: names of other libraries, arguments in the wrong place or of the wrong kind."""

import inspect
import re

import numpy as np
import pytest
import torch
from mistakes import COS, CU, LENGTHS, MASK, PACKED, RIGHT, SIN, TARGET, B, Q, W, X, functions

import fastattn
from fastattn import nn
from fastattn.integrations import flash_attn
from fastattn.ops._advice import ADVICE

# the kinds that are not a tensor, a number or None
NOTHING = {"array": np.ones((2, 4, 6, 8)), "list": [1.0], "callable": abs, "text": "a", "dict": {}}


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


@pytest.mark.parametrize("op", ["attention", "attention_decode", "scaled_dot_product_attention"])
def test_no_name_of_another_attention_is_guessed_at(op):
    """The nearest name of ours means something else: cache_seqlens is no answer to max_seqlen_q."""
    functions = [getattr(flash_attn, name) for name in dir(flash_attn) if name.startswith("flash_attn_")]
    functions += [fastattn.scaled_dot_product_attention, fastattn.attention, fastattn.attention_decode]
    names = {name for function in functions for name in inspect.signature(function).parameters}
    names -= {"kv", "qkv", *inspect.signature(getattr(fastattn, op)).parameters}
    assert len(names) > 15
    assert sorted(names - set(ADVICE[op])) == []


def test_every_advice_names_what_there_is():
    """A text that says use NAME= must be right, and no foreign name may be one of ours."""
    public = {name: getattr(fastattn, name) for name in RIGHT}
    public |= {name: getattr(flash_attn, name) for name in ADVICE if name.startswith("flash_attn")}
    public |= {name: getattr(nn, name[3:]) for name in ADVICE if name.startswith("nn.")}
    assert set(public) == set(ADVICE)
    for name, function in public.items():
        ours = dict(inspect.signature(function).parameters)
        if name.startswith("nn."):
            ours |= inspect.signature(function.forward).parameters
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
        with pytest.raises(TypeError, match=r"there is no argument d_ff: use dim_feedforward="):
            nn.TransformerDecoderLayer(8, 2, d_ff=16)
        with pytest.raises(TypeError, match=r"no argument attn_mask: use src_mask= \(bool: True = ignore\)"):
            nn.TransformerEncoderLayer(8, 2)(X, attn_mask=None)
        with pytest.raises(TypeError, match=r"no argument padding_mask: use key_padding_mask= "):
            nn.MultiheadAttention(8, 2)(X, X, X, padding_mask=None)
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
        "must have the same dtype": lambda: fastattn.scaled_dot_product_attention(Q, Q.half(), Q),
        "flash_attn_func: ": lambda: flash_attn.flash_attn_func(Q, Q, Q[0]),
        "weight must": lambda: fastattn.layer_norm(X, B[:3]),
        "at least 1-dimensional": lambda: nn.LayerNorm(())(torch.ones(())),
    }
    for message, call in calls.items():
        with pytest.raises(RuntimeError, match=message):
            call()
