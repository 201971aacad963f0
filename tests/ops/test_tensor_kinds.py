"""Every op and layer is given every kind of non-plain tensor: the result is right, or an error names the argument.

A case fails if the result differs, or if an error speaks of internals: of attributes, or of operators that the test
did not call.
"""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_map

import fastattn
from fastattn import nn

INSIDE = ("Could not run", "Internal error", "no attribute", "Multiple dispatch failed", "no implementation found")

torch.manual_seed(0)
Q = torch.randn(2, 2, 5, 8)
X = torch.randn(3, 8)
W, B = torch.randn(8, 8), torch.randn(8)
TARGET = torch.tensor([1, 2, 3])
LENGTHS = torch.tensor([5, 3], dtype=torch.int32)
COS, SIN = torch.rand(5, 4), torch.rand(5, 4)

# op: its tensors by name; those in DATA hold the data and are all converted to another kind together
CALLS = {
    "attention": {"q": Q, "k": Q + 1, "v": Q - 1, "bias": torch.randn(5, 5), "sink": B[:2], "alibi_slopes": B[:2]},
    "attention_decode": {"q": Q, "k_cache": Q + 1, "v_cache": Q - 1, "cache_seqlens": LENGTHS},
    "dropout": {"x": X, "residual": X + 1},
    "feed_forward": {"x": X, "w1": W, "b1": B, "w2": W.T, "b2": B, "w_gate": W + 1, "b_gate": B},
    "layer_norm": {"x": X, "weight": B, "bias": B, "x_bias": B, "residual": X + 1},
    "linear_cross_entropy": {"x": X, "weight": W, "target": TARGET, "bias": B},
    "rms_norm": {"x": X, "weight": B, "x_bias": B, "residual": X + 1},
    "rotary_embedding": {"x": Q, "cos": COS, "sin": SIN, "positions": torch.arange(5)},
    "scaled_dot_product_attention": {"query": Q, "key": Q + 1, "value": Q - 1, "attn_mask": torch.randn(5, 5)},
}
DATA = {
    "attention": ("q", "k", "v"),
    "attention_decode": ("q", "k_cache", "v_cache"),
    "dropout": ("x", "residual"),
    "layer_norm": ("x", "residual"),
    "rms_norm": ("x", "residual"),
    "scaled_dot_product_attention": ("query", "key", "value"),
}
WEIGHTS = ("w1", "w2", "w_gate", "weight")  # F.linear accepts some kinds that nothing else does


@pytest.fixture(params=CALLS)
def op(request):
    return request.param


def run(op, **given):
    torch.manual_seed(0)
    return getattr(fastattn, op)(**given)


def all_data(op, change):
    """The arguments of the call with all its data converted."""
    return CALLS[op] | {label: change(CALLS[op][label]) for label in DATA.get(op, ("x",))}


class _Wrapper(torch.Tensor):
    """A subclass without memory of its own, whose wrapper operators see first."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if not cls.knows(func):
            raise NotImplementedError(f"{cls.__name__} knows no {func}")
        args, kwargs = tree_map(lambda t: t.inner if isinstance(t, cls) else t, (args, kwargs or {}))
        return tree_map(lambda t: cls(t) if isinstance(t, torch.Tensor) else t, func(*args, **kwargs))


class KnowsAll(_Wrapper):
    @staticmethod
    def knows(func):
        return True


class KnowsTorch(_Wrapper):
    """It handles PyTorch's operators and no others."""

    @staticmethod
    def knows(func):
        return func.namespace == "aten"


class KnowsNothing(_Wrapper):
    @staticmethod
    def knows(func):
        return func in (torch.ops.aten.detach.default, torch.ops.aten.transpose.int, torch.ops.aten.view.default)


class Plain(torch.Tensor):
    pass


def assert_result(op, out, right, **more):
    """The result must be the same. If dropout drew new numbers, elements are compared with their possible values."""
    if op == "dropout":
        x, residual = CALLS[op].values()
        kept = ((out - residual) / x / 2).round()
        assert set(kept.unique().tolist()) == {0.0, 1.0}
        right = residual + kept * 2 * x
    torch.testing.assert_close(out, right, rtol=1e-4, atol=1e-4, **more)


def plain(t):
    """The values of a result of any kind."""
    if isinstance(t, TwoTensor):
        return t.a
    if isinstance(t, _Wrapper):
        return t.inner
    if isinstance(t, torch.Tensor) and t.is_nested:
        return t.to_padded_tensor(0.0)
    return t.as_subclass(torch.Tensor) if isinstance(t, torch.Tensor) else t


SERVED = {
    "parameter": torch.nn.Parameter,
    "subclass": lambda t: t.as_subclass(Plain),
    "two tensors": lambda t: TwoTensor(t.clone(), t.clone()),
    "wrapper": KnowsAll,
    "wrapper of torch": KnowsTorch,
    "negative view": lambda t: torch._neg_view(-t),
    "imaginary part": lambda t: torch.complex(torch.zeros_like(t), -t).conj().imag,
    "inference": lambda t: _in_inference_mode(t),
}


def _in_inference_mode(t):
    with torch.inference_mode():
        return t.clone()


@pytest.mark.parametrize("kind", SERVED)
def test_served(op, kind):
    right = run(op, **CALLS[op])
    with torch.no_grad():
        given = all_data(op, SERVED[kind])
        if op == "attention_decode" and kind == "imaginary part":  # a cache must have last stride 1
            given = CALLS[op] | {"q": given["q"]}
        out = run(op, **given)
    assert_result(op, plain(out), right)


@pytest.mark.parametrize("kind", ["subclass", "two tensors", "wrapper", "wrapper of torch", "negative view"])
def test_served_with_gradients(op, kind):
    if op == "attention_decode":
        pytest.skip("it has no backward")
    labels = DATA.get(op, ("x",))
    leaves = {label: CALLS[op][label].clone().requires_grad_() for label in labels}
    right = torch.autograd.grad(run(op, **CALLS[op] | leaves).sum(), leaves.values())
    odd = {label: SERVED[kind](CALLS[op][label]).detach().requires_grad_() for label in labels}
    grads = torch.autograd.grad(run(op, **CALLS[op] | odd).sum(), odd.values())
    for got, want in zip(grads, right, strict=True):
        if op == "dropout":  # the values of the mask, in any order
            got, want = (t.abs().clamp_min(1).sign() for t in (plain(got), want))
        torch.testing.assert_close(plain(got), want, rtol=1e-4, atol=1e-5)


def test_zeros_without_memory(op):
    """The tensor that autograd uses for a missing gradient."""
    label = DATA.get(op, ("x",))[0]
    zeros = torch._efficientzerotensor(CALLS[op][label].shape, dtype=torch.float32)
    right = run(op, **CALLS[op] | {label: torch.zeros_like(CALLS[op][label])})
    torch.testing.assert_close(run(op, **CALLS[op] | {label: zeros}), right)


def test_vmap(op):
    label = DATA.get(op, ("x",))[0]
    stack = torch.stack([CALLS[op][label], CALLS[op][label] + 1])
    given = dict(CALLS[op])
    del given[label]
    mapped = torch.vmap(lambda t: run(op, **given, **{label: t}), randomness="same")(stack)
    for got, one in zip(mapped, stack, strict=True):
        if op != "dropout":
            torch.testing.assert_close(got, run(op, **given, **{label: one}), rtol=1e-4, atol=1e-5)


def test_functional_tensors(op):
    out = torch.func.functionalize(lambda x: run(op, **CALLS[op] | {DATA.get(op, ("x",))[0]: x}))(
        CALLS[op][DATA.get(op, ("x",))[0]]
    )
    torch.testing.assert_close(out, run(op, **CALLS[op]), rtol=1e-4, atol=1e-5)


def test_fake_and_meta_tensors(op):
    right = run(op, **CALLS[op])
    mode = FakeTensorMode()
    given = {label: mode.from_tensor(t) for label, t in CALLS[op].items()}
    for out in (run(op, **given), _within(mode, lambda: run(op, **given))):
        assert type(out) is FakeTensor
        assert (out.shape, out.dtype) == (right.shape, right.dtype)
    meta = run(op, **{label: t.to("meta") for label, t in CALLS[op].items()})
    assert (meta.shape, meta.dtype, meta.is_meta) == (right.shape, right.dtype, True)


def _within(mode, function):
    with mode:
        return function()


def test_packed_sequences_on_meta_and_fake_tensors():
    packed = {"q": Q[0].transpose(0, 1), "k": Q[0].transpose(0, 1), "v": Q[0].transpose(0, 1)}
    packed |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), torch.tensor([0, 2, 5], dtype=torch.int32))
    right = run("attention", **packed)
    mode = FakeTensorMode()
    for to in (mode.from_tensor, lambda t: t.to("meta")):
        out = run("attention", **{label: to(t) for label, t in packed.items()})
        assert (out.shape, out.dtype) == (right.shape, right.dtype)


def _quantized(t):
    return torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8)


REFUSED = {
    "sparse": torch.Tensor.to_sparse,
    "csr": lambda t: t.to_sparse_csr() if t.dim() == 2 else t.to_sparse(),
    "mkldnn": lambda t: t.float().to_mkldnn(),
    "quantized": _quantized,
    "jagged": lambda t: torch.nested.nested_tensor(list(t), layout=torch.jagged),
    "strided nested": lambda t: torch.nested.nested_tensor(list(t)),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "complex": lambda t: t.to(torch.complex64),
    "knows nothing": KnowsNothing,
    "masked": lambda t: torch.masked.masked_tensor(t, torch.ones_like(t, dtype=torch.bool)),
    "array": lambda t: t.numpy(),
    "list": lambda t: t.tolist(),
    "callable": lambda t: torch.relu,
    "number": lambda t: 1.5,
    "text": lambda t: "text",
}


def attempt(function):
    """(the result, None) or (None, the error)."""
    try:
        out = function()
    except Exception as error:
        return None, error
    return out, None


def changed(kind, t):
    """The tensor as another kind, or None if PyTorch has no such tensor."""
    return attempt(lambda: REFUSED[kind](t))[0]


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_refused_and_named(op, kind):
    """One argument after the other; if a kind happens to be accepted, the result must be right."""
    right = run(op, **CALLS[op])
    for label, t in CALLS[op].items():
        wrong = changed(kind, t)
        if wrong is None:
            continue
        out, error = attempt(lambda given=CALLS[op] | {label: wrong}: run(op, **given))
        if error is None:
            out = out.get_data() if hasattr(out, "get_data") else plain(out)
            assert_result(op, out, right, msg=f"{label}: served, and wrong")
            continue
        assert isinstance(error, (TypeError, ValueError)), f"{label}: {error!r}"
        name, text = str(error).split(": ")[:2]
        assert name == op
        together = {"cos": "cos and sin", "sin": "cos and sin", "k_cache": "caches", "v_cache": "caches"}
        about_all = getattr(wrong, "is_nested", False) and "nested tensor" in text
        assert label in text or together.get(label, label) in text or about_all, text
        assert not any(words in str(error) for words in INSIDE), error


@pytest.mark.parametrize("kind", ["array", "callable", "float8"])
def test_explain_names_what_the_op_names(op, kind):
    for label, t in CALLS[op].items():
        given = CALLS[op] | {label: REFUSED[kind](t)}
        _, error = attempt(lambda given=given: run(op, **given))
        _, same = attempt(lambda given=given: fastattn.explain(op, **given))
        assert repr(same) == repr(error)


# layers: (torch's, ours, inputs)
def _layers():
    torch.manual_seed(0)
    options = {"batch_first": True, "dropout": 0.0}
    x, memory = torch.randn(2, 5, 8), torch.randn(2, 4, 8)
    mask = torch.zeros(5, 5)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    encoder = torch.nn.TransformerEncoderLayer(8, 2, 16, **options)
    decoder = torch.nn.TransformerDecoderLayer(8, 2, 16, **options)
    theirs = {
        "LayerNorm": (torch.nn.LayerNorm(8), (x,)),
        "RMSNorm": (torch.nn.RMSNorm(8), (x,)),
        "MultiheadAttention": (torch.nn.MultiheadAttention(8, 2, **options), (x, x, x, padding, True, mask)),
        "TransformerEncoderLayer": (encoder, (x, mask, padding)),
        "TransformerDecoderLayer": (decoder, (x, memory, mask)),
        "TransformerEncoder": (torch.nn.TransformerEncoder(encoder, 1, enable_nested_tensor=False), (x, mask, padding)),
        "TransformerDecoder": (torch.nn.TransformerDecoder(decoder, 1), (x, memory, mask)),
    }
    found = {}
    for name, (layer, inputs) in theirs.items():
        ours = copy.deepcopy(layer)
        fastattn.replace(ours)
        found[name] = (layer, ours, inputs)
    feed_forward = nn.FeedForward(8, 16)
    found["FeedForward"] = (
        torch.nn.Sequential(feed_forward.linear1, torch.nn.GELU(), feed_forward.linear2), feed_forward, (x,)
    )  # fmt: skip
    found["RotaryEmbedding"] = (None, nn.RotaryEmbedding(8), (torch.randn(2, 2, 5, 8),))
    return found


LAYERS = _layers()


def _first(result):
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", {**SERVED, **REFUSED})
@pytest.mark.filterwarnings("ignore")
def test_layers(layer, kind):
    """The result of plain tensors, or an error that names the input; what torch's layer accepts, ours accepts."""
    torch_layer, ours, inputs = LAYERS[layer]
    change = {**SERVED, **REFUSED}[kind]
    with torch.no_grad():
        right = _first(ours(*inputs))
        if torch_layer is not None:
            torch.testing.assert_close(right, _first(torch_layer(*inputs)), rtol=1e-4, atol=1e-5)
        for i, t in enumerate(inputs):
            wrong = attempt(lambda t=t: change(t))[0] if isinstance(t, torch.Tensor) else None
            if wrong is None:
                continue
            given = tuple(wrong if other is t else other for other in inputs)
            out, error = attempt(lambda given=given: _first(ours(*given)))
            if error is None:
                out = out.get_data() if hasattr(out, "get_data") else plain(out)
                torch.testing.assert_close(out, right, rtol=1e-3, atol=1e-4, msg=f"{i}: served, and wrong")
                continue
            assert isinstance(error, (TypeError, ValueError, AssertionError, RuntimeError)), f"{i}: {error!r}"
            assert not any(words in str(error) for words in INSIDE), f"{i}: {error}"
            serves = torch_layer is None or attempt(lambda given=given: torch_layer(*given))[1] is None
            assert kind not in SERVED or not serves, f"{i}: {error}"
