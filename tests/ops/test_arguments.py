"""Every flag, integer, number, window, choice and table of lengths of every public function is given wrong values.

Each value raises a TypeError or ValueError that names the function and the argument, or is treated as what it means.
"""

import functools
import inspect

import numpy as np
import pytest
import torch

import fastattn
from fastattn import nn
from fastattn.integrations import flash_attn

Q = torch.randn(2, 4, 6, 8)
HEADS_BEHIND = Q.transpose(1, 2)
PACKED = torch.randn(6, 4, 8)
PAGES = torch.randn(4, 4, 16, 8)
X = torch.randn(3, 8)
W, B = torch.randn(8, 8), torch.randn(8)
COS, SIN = torch.ones(16, 4), torch.zeros(16, 4)
TARGET = torch.tensor([1, 2, 3])
LENGTHS = torch.tensor([2, 3], dtype=torch.int32)
CU = torch.tensor([0, 2, 6], dtype=torch.int32)
QKV = dict.fromkeys("qkv", PACKED)
CACHE = {"k_cache": HEADS_BEHIND, "v_cache": HEADS_BEHIND, "cache_seqlens": LENGTHS}
NEW = {"k": HEADS_BEHIND[:, :1], "v": HEADS_BEHIND[:, :1], "rotary_cos": COS, "rotary_sin": SIN}

# name in messages, and a suffix: (function, valid positional arguments and keywords)
CALLS = {
    "attention": (fastattn.attention, (Q, Q, Q), {}),
    "attention packed": (fastattn.attention, (), QKV | {"cu_seqlens_q": CU, "cu_seqlens_k": CU}),
    "attention_decode": (fastattn.attention_decode, (Q, Q, Q), {"cache_seqlens": LENGTHS}),
    "attention_decode paged": (
        fastattn.attention_decode, (Q, PAGES, PAGES),
        {"cache_seqlens": LENGTHS, "block_table": torch.arange(4).int().view(2, 2)},
    ),
    "dropout": (fastattn.dropout, (X,), {}),
    "feed_forward": (fastattn.feed_forward, (X, W, B, W, B), {}),
    "layer_norm": (fastattn.layer_norm, (X, B, B), {}),
    "linear_cross_entropy": (fastattn.linear_cross_entropy, (X, W, TARGET), {}),
    "rms_norm": (fastattn.rms_norm, (X, B), {}),
    "rotary_embedding": (fastattn.rotary_embedding, (Q, COS, SIN), {}),
    "scaled_dot_product_attention": (fastattn.scaled_dot_product_attention, (Q, Q, Q), {}),
    "flash_attn_func": (flash_attn.flash_attn_func, [HEADS_BEHIND] * 3, {}),
    "flash_attn_kvpacked_func": (
        flash_attn.flash_attn_kvpacked_func, (HEADS_BEHIND, torch.stack([HEADS_BEHIND] * 2, 2)), {},
    ),
    "flash_attn_qkvpacked_func": (flash_attn.flash_attn_qkvpacked_func, (torch.stack([HEADS_BEHIND] * 3, 2),), {}),
    "flash_attn_varlen_func": (flash_attn.flash_attn_varlen_func, [PACKED] * 3 + [CU, CU, 4, 4], {}),
    "flash_attn_varlen_kvpacked_func": (
        flash_attn.flash_attn_varlen_kvpacked_func, (PACKED, torch.stack([PACKED] * 2, 1), CU, CU, 4, 4), {},
    ),
    "flash_attn_varlen_qkvpacked_func": (
        flash_attn.flash_attn_varlen_qkvpacked_func, (torch.stack([PACKED] * 3, 1), CU, 4), {},
    ),
    "flash_attn_with_kvcache": (flash_attn.flash_attn_with_kvcache, (HEADS_BEHIND,), CACHE | NEW),
    "nn.FeedForward": (nn.FeedForward, (8, 8), {}),
    "nn.RotaryEmbedding": (nn.RotaryEmbedding, (8,), {"max_seqlen": 8}),
    "nn.RotaryEmbedding forward": (nn.RotaryEmbedding(8, max_seqlen=8).forward, (Q, Q), {}),
}  # fmt: skip
SIGNATURES = {name: inspect.signature(function) for name, (function, *_) in CALLS.items()}
for op in [name for name, (function, *_) in CALLS.items() if function is getattr(fastattn, name, None)]:
    CALLS[f"{op} explain"] = functools.partial(fastattn.explain, op), *CALLS[op][1:]
    SIGNATURES[f"{op} explain"] = SIGNATURES[op]

FLAGS = {
    "is_causal", "return_lse", "deterministic", "enable_gqa", "recompute", "return_residual", "interleaved", "inplace",
    "return_attn_probs", "return_softmax_lse", "rotary_interleaved", "gated",
}  # fmt: skip
INTEGERS = {
    "max_seqlen_q", "max_seqlen_k", "max_seqlen", "num_splits", "ignore_index", "chunk_size", "d_model", "d_ff",
    "rotary_dim",
}  # fmt: skip
LAYER_FLAGS = {
    "need_weights", "average_attn_weights", "is_causal", "tgt_is_causal", "memory_is_causal", "src_is_causal",
    "strict_torch",
}  # fmt: skip
PROBABILITIES = {"dropout_p", "dropout", "label_smoothing"}
NUMBERS = {"scale", "softcap", "eps", "z_loss", "softmax_scale", "base"} | PROBABILITIES
WINDOWS = {"window", "window_size"}
CHOICES = {"causal", "backend", "activation", "reduction"}
TABLES = {
    "seqlens_k", "cu_seqlens", "cu_seqlens_q", "cu_seqlens_k", "cache_seqlens", "block_table", "cache_batch_idx",
    "cache_leftpad", "positions", "target",
}  # fmt: skip
# tested by test_what_is_no_tensor_is_named in test_messages.py; the last two are passed to PyTorch unchanged
OTHERS = set(
    "q k v query key value mask bias attn_mask alibi_slopes sink k_cache v_cache kv qkv rotary_cos rotary_sin x w1 b1"  # noqa: SIM905
    " w2 b2 w_gate b_gate weight x_bias residual cos sin device dtype".split()
)

ARRAYS = [torch.ones(2), np.ones(2), [1], (1, 1), {1: 1}]


@pytest.fixture(params=CALLS)
def name(request):
    return request.param


def labels(name, kind):
    """The parameters of a call that are of a kind. `bias` of FeedForward is a flag; in other calls it is a tensor."""
    kind = kind | {"bias"} if kind == FLAGS and name == "nn.FeedForward" else kind
    return [label for label in SIGNATURES[name].parameters if label in kind]


def call(name, label, value):
    function, args, kwargs = CALLS[name]
    given = SIGNATURES[name].bind_partial(*args, **kwargs).arguments | {label: value}
    # clones, because some functions write into their arguments
    return function(**{k: t.clone() if isinstance(t, torch.Tensor) else t for k, t in given.items()})


def check_refused(name, kind, values, error, message):
    for label in labels(name, kind):
        for value in values:
            with pytest.raises(error) as caught:
                call(name, label, value)
            text = str(caught.value)
            assert text.startswith(f"{name.split()[0]}: {label} {message}".rstrip()), f"{label}={value!r}: {text}"


def test_every_parameter_is_in_a_table_here(name):
    known = FLAGS | INTEGERS | NUMBERS | WINDOWS | CHOICES | TABLES | OTHERS
    assert set(SIGNATURES[name].parameters) <= known


def test_flags(name):
    wrong = ["no", "False", 2, 0.5, abs, torch.tensor(1.0), 1j, *ARRAYS]
    check_refused(name, FLAGS, wrong, TypeError, "must be True or False")
    for label in labels(name, FLAGS):
        for value in (True, False, 1, 0, np.True_, None, torch.tensor(True)):
            call(name, label, value)


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (lambda **more: nn.MultiheadAttention(8, 2, **more), 3),
        (lambda **more: nn.TransformerEncoderLayer(8, 2, 8, **more), 1),
        (lambda **more: nn.TransformerDecoderLayer(8, 2, 8, **more), 2),
        (lambda **more: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8), 1, **more), 1),
        (lambda **more: nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 8), 1, **more), 2),
        (lambda **more: nn.Transformer(8, 2, 1, 1, 8, **more), 2),
    ],
    ids=["attention", "encoder layer", "decoder layer", "encoder", "decoder", "transformer"],
)
def test_flags_of_layers(make, inputs):
    """torch.nn takes the truth value of anything; a text as is_causal must not silently make a layer causal."""
    layer, x = make(), torch.randn(5, 3, 8)
    for label in set(inspect.signature(layer.forward).parameters) & LAYER_FLAGS:
        for value in ("no", 2, 0.5, abs, torch.ones(2), [True]):
            with pytest.raises(TypeError, match=r"^nn\.\w+: \w*is_causal|\w*weights must be True or False"):
                layer(*[x] * inputs, **{label: value})
        for value in (True, 1, 0, np.False_, torch.tensor(True)):
            layer(*[x] * inputs, **{label: value})
    for value in ("no", 2, abs):
        with pytest.raises(TypeError, match=r"^nn\.\w+: strict_torch must be True or False, got"):
            make(strict_torch=value)


def test_flags_by_position():
    with pytest.raises(TypeError, match=r"^scaled_dot_product_attention: is_causal must be True or False, got str"):
        fastattn.scaled_dot_product_attention(Q, Q, Q, None, 0.0, "no")
    with pytest.raises(TypeError, match=r"^flash_attn_func: deterministic must be True or False, got float"):
        flash_attn.flash_attn_func(*[HEADS_BEHIND] * 3, 0.0, None, False, (-1, -1), 0.0, None, 0.5)


def test_integers(name):
    wrong = [4.0, 4.5, "4", True, abs, 4j, float("nan"), torch.tensor(4.0), torch.tensor([4, 4]), *ARRAYS]
    check_refused(name, INTEGERS, wrong, TypeError, "must be an integer")
    for label in labels(name, INTEGERS):
        belongs = not label.startswith("max_seqlen") or "packed" in name or "varlen" in name or name.startswith("nn.")
        for value in (4, np.int64(4), np.int32(4), np.uint8(4), torch.tensor(4)) if belongs else ():
            call(name, label, value)
        if belongs and label != "ignore_index":
            check_refused(name, {label}, [-3], ValueError, "must be")


def test_numbers(name):
    wrong = ["0.5", abs, 1j, torch.tensor(1j), *ARRAYS]
    explained = {"eps"} if "explain" in name else set()  # the choice does not depend on it
    check_refused(name, NUMBERS - explained, wrong, TypeError, "must be a number")
    # eps behaves as in PyTorch, where NaN and negative numbers give NaN
    check_refused(name, NUMBERS - {"eps"}, [float("nan"), float("inf")], ValueError, "must be")
    check_refused(name, PROBABILITIES, [-0.5, 2.0], ValueError, "must be")
    check_refused(name, {"softcap", "z_loss", "base"}, [-0.5], ValueError, "must be")
    for label in labels(name, NUMBERS):
        for value in (0.5, np.float64(0.5), np.float32(0.5), torch.tensor(0.5)):
            call(name, label, value)


def test_windows(name):
    sides = [1.0, "1", True, 1j, abs, torch.tensor([1, 2]), torch.tensor(1.5), -2, np.float32(1), [1], (1, 2)]
    check_refused(name, WINDOWS, [(1, side) for side in sides], ValueError, "sides must be integers")
    check_refused(name, WINDOWS, [(side, 1) for side in sides], ValueError, "sides must be integers")
    pairs = [(1,), (1, 2, 3), "12", 5, {1: 2}, torch.tensor(3), np.ones((2, 2)), torch.tensor([1.0, 2.0]), abs]
    check_refused(name, WINDOWS, pairs, ValueError, "")
    for label in labels(name, WINDOWS):
        for value in ((1, 1), [1, 1], (np.int64(1), 1), torch.tensor([1, 1]), np.array([1, 1]), (None, -1), None):
            call(name, label, value)


def test_choices(name):
    check_refused(name, CHOICES, ["nope", 5, abs, b"native", 1j, ["native"], {1: 1}], ValueError, "must be")
    wrong = [torch.ones(6, 6, dtype=torch.bool), 2, 0.5, "false", *ARRAYS]
    check_refused(name, {"causal"}, wrong, ValueError, "must be")


def test_tables(name):
    """A table of a wrong kind, dtype, shape or device."""
    kind = TABLES
    if name.startswith("attention") and "packed" not in name:
        kind = kind - {"cu_seqlens_q", "cu_seqlens_k"}
    if "paged" in name:
        kind = kind - {"cache_batch_idx"}  # cannot be combined with block_table
    errors = TypeError, ValueError  # RuntimeError if the dtype must match that of other arguments
    wrong = ["a", 0.5, [0, 2, 6], {}, np.array([0, 2, 6], dtype=np.int32), torch.ones(3), torch.ones(3) > 0]
    check_refused(name, kind, wrong, errors, "must be")
    check_refused(name, kind, [torch.zeros(1, 2, 3, dtype=torch.int32)], errors, "must")
    meta = torch.zeros(3, dtype=torch.int32, device="meta")
    check_refused(name, kind - {"cu_seqlens_q", "cu_seqlens_k"}, [meta], errors, "must")


def test_lengths_that_leave_the_cache_are_named():
    for lengths in (-3, 99, torch.tensor([-3, 2], dtype=torch.int32), torch.tensor([3, 99], dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"^flash_attn_with_kvcache: cache_seqlens must be "):
            flash_attn.flash_attn_with_kvcache(HEADS_BEHIND, HEADS_BEHIND, HEADS_BEHIND, cache_seqlens=lengths)
    for lengths in (4.5, "4", [4], True, torch.tensor(4.0), abs):
        with pytest.raises((TypeError, ValueError), match=r"^flash_attn_with_kvcache: cache_seqlens must "):
            flash_attn.flash_attn_with_kvcache(HEADS_BEHIND, HEADS_BEHIND, HEADS_BEHIND, cache_seqlens=lengths)
