"""Arguments and modes with `__torch_function__`: torch's CausalBias, subclasses of Tensor, TorchFunctionMode."""

import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.overrides import TorchFunctionMode

import fastattn
from fastattn import nn

COS, SIN = torch.ones(5, 4), torch.zeros(5, 4)
Q = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(0))
W = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
TARGET = torch.arange(20).view(2, 2, 5) % 8
LENGTHS = torch.full((2,), 5, dtype=torch.int32)
# per op, a call with one tensor x (2, 2, 5, 8)
CALLS = {
    "attention": lambda f, x: f(x, Q, Q, causal=True),
    "attention_decode": lambda f, x: f(x, Q.clone(), Q.clone(), cache_seqlens=LENGTHS),
    "dropout": lambda f, x: f(x, 0.5),
    "feed_forward": lambda f, x: f(x, W, None, W, None),
    "layer_norm": lambda f, x: f(x, W[0]),
    "linear_cross_entropy": lambda f, x: f(x, W, TARGET),
    "rms_norm": lambda f, x: f(x, weight=W[0]),
    "rotary_embedding": lambda f, x: f(x, COS, SIN),
    "scaled_dot_product_attention": lambda f, x: f(x, Q, Q, is_causal=True),
}
OPS = {name: getattr(fastattn, name) for name in CALLS}


@pytest.fixture(params=CALLS)
def op(request):
    return request.param


class TestCausalBias:
    """A CausalBias has no values: its memory is never written. It stands for a causal flag of its kind."""

    @pytest.fixture(params=[(5, 5), (3, 7), (7, 3)], ids=str)
    def sizes(self, request):
        return request.param

    @pytest.fixture(params=[causal_upper_left, causal_lower_right])
    def bias(self, request, sizes):
        if request.param is causal_lower_right and sizes[0] > sizes[1]:
            with pytest.warns(UserWarning, match="will produce NaNs"):  # in ours such rows give 0
                return request.param(*sizes)
        return request.param(*sizes)

    @pytest.fixture
    def qkv(self, sizes):
        shapes = (2, 2, sizes[0], 8), (2, 2, sizes[1], 8), (2, 2, sizes[1], 8)
        return [torch.randn(shape, requires_grad=True) for shape in shapes]

    @pytest.mark.parametrize(
        "call",
        [
            lambda q, k, v, b: fastattn.scaled_dot_product_attention(q, k, v, b),
            lambda q, k, v, b: fastattn.scaled_dot_product_attention(q, k, v, attn_mask=b),
            lambda q, k, v, b: fastattn.scaled_dot_product_attention(q[0], k[0], v[0], attn_mask=b)[None],
            lambda q, k, v, b: fastattn.attention(q, k, v, bias=b),
            lambda q, k, v, b: fastattn.attention(q, k, v, mask=b),
        ],
    )
    def test_stands_for_the_causal_flag(self, call, bias, qkv):
        batch = slice(0, 1) if call(*qkv, bias).shape[0] == 1 else slice(None)
        right = fastattn.attention(*(t[batch] for t in qkv), mask=bias._materialize())
        out = call(*qkv, bias)
        assert type(out) is torch.Tensor
        torch.testing.assert_close(out, right)
        do = torch.randn_like(out)
        for got, want in zip(torch.autograd.grad(out, qkv, do), torch.autograd.grad(right, qkv, do), strict=True):
            torch.testing.assert_close(got, want)

    def test_is_what_torch_computes(self):
        for bias in (causal_upper_left(5, 5), causal_lower_right(5, 5), causal_upper_left(5, 3)):
            k = Q[:, :, : bias.seq_len_kv]
            torch.testing.assert_close(
                fastattn.scaled_dot_product_attention(Q, k, k, bias),
                F.scaled_dot_product_attention(Q, k, k, bias),
            )

    def test_joins_a_mask_and_a_bias(self):
        mask, bias = torch.rand(5, 5) > 0.3, torch.randn(5, 5)
        causal = causal_upper_left(5, 5)
        for given, wanted in (({"mask": mask, "bias": causal}, {"mask": mask}), ({"mask": causal, "bias": bias},) * 2):
            got = fastattn.attention(Q, Q, Q, **given)
            wanted = wanted | {"causal": "top_left"}
            wanted.pop("mask") if wanted.get("mask") is causal else None
            assert torch.equal(got, fastattn.attention(Q, Q, Q, **wanted))

    @pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right])
    def test_compiled(self, make):
        torch.compiler.reset()
        compiled = torch.compile(fastattn.scaled_dot_product_attention, fullgraph=True, backend="aot_eager")
        k = Q[:, :, :4]
        bias = make(5, 4) if make is causal_upper_left else make(5, 5)
        k = Q[:, :, : bias.seq_len_kv]
        assert torch.equal(compiled(Q, k, k, bias), fastattn.scaled_dot_product_attention(Q, k, k, bias))

    def test_explain_knows_it(self):
        text = fastattn.explain("scaled_dot_product_attention", Q, Q, Q, causal_lower_right(5, 5))
        assert text == fastattn.explain("attention", Q, Q, Q, causal=True)

    def test_mistakes_are_named(self):
        bias = causal_upper_left(5, 5)
        with pytest.raises(ValueError, match="CausalBias should not be used with causal=True"):
            fastattn.scaled_dot_product_attention(Q, Q, Q, bias, is_causal=True)
        with pytest.raises(ValueError, match="CausalBias should not be used with causal='bottom_right'"):
            fastattn.attention(Q, Q, Q, mask=bias, causal="bottom_right")
        with pytest.raises(ValueError, match=r"attn_mask must .* for 5 queries and 4 keys, got .* 5 and 5"):
            fastattn.scaled_dot_product_attention(Q, Q[:, :, :4], Q[:, :, :4], bias)
        cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
        packed = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), cu_seqlens)
        with pytest.raises(ValueError, match="packed sequences take neither mask"):
            fastattn.attention(*[Q[0].transpose(0, 1)] * 3, bias=bias, **packed)

    def test_is_no_operand(self):
        """It has the shape (1, 5, 5), but its memory is never written: torch computes with that."""
        x, weight = torch.randn(1, 5, 5), torch.randn(5, 5)
        cos, sin = torch.randn(5, 2).unbind(-1)
        calls = {
            "layer_norm: x": lambda t: fastattn.layer_norm(t),
            "layer_norm: residual": lambda t: fastattn.layer_norm(x, residual=t),
            "rms_norm: x": lambda t: fastattn.rms_norm(x=t),
            "dropout: x": lambda t: fastattn.dropout(t, 0.5),
            "feed_forward: x": lambda t: fastattn.feed_forward(t, weight, None, weight, None),
            "linear_cross_entropy: x": lambda t: fastattn.linear_cross_entropy(t, weight, torch.zeros(1, 5).long()),
            "rotary_embedding: x": lambda t: fastattn.rotary_embedding((x, t), cos[:, None], sin[:, None]),
            "scaled_dot_product_attention: value": lambda t: fastattn.scaled_dot_product_attention(x, x, t),
            "attention: q": lambda t: fastattn.attention(t, x, x),
        }
        attention = nn.MultiheadAttention(5, 1)
        layers = (
            nn.LayerNorm(5), nn.RMSNorm(5), nn.FeedForward(5, 8), nn.RotaryEmbedding(2),
            nn.TransformerEncoderLayer(5, 1, 8), lambda t: attention(t, t, t),
        )  # fmt: skip
        for bias in (causal_upper_left(5, 5), causal_lower_right(5, 5)):
            for name, call in calls.items():
                with pytest.raises(TypeError, match=f"^{name} must be a tensor that holds values, got a CausalBias"):
                    call(bias)
            for layer in layers:
                with pytest.raises(TypeError, match=r"must be .* got a CausalBias"):
                    layer(bias)

    def test_layers_refuse_it_as_torch_does(self):
        """Even if its shape fits by chance, which torch does not notice."""
        x = torch.randn(1, 5, 8)
        layers = (
            nn.MultiheadAttention(8, 2, batch_first=True),
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
            nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1),
            nn.TransformerDecoderLayer(8, 2, 16, batch_first=True),
        )
        for bias in (causal_upper_left(5, 5), causal_lower_right(5, 5)):
            for layer in layers:
                inputs = {1: (x, bias), 3: (x, x, x, None, True, bias), 2: (x, x, bias)}
                count = 3 if isinstance(layer, torch.nn.MultiheadAttention) else 1
                count = 2 if isinstance(layer, torch.nn.TransformerDecoderLayer) else count
                with pytest.raises(RuntimeError, match=r"attn_mask must be .* got a CausalBias"):
                    layer(*inputs[count])


class Counted(torch.Tensor):
    """A subclass as in PyTorch's manual: it sees the function, and results become its own kind."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


class Mode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        seen.append(func)
        return func(*args, **(kwargs or {}))


seen = []


class TestOverriding:
    @pytest.fixture(autouse=True)
    def _forget(self):
        seen.clear()

    def test_a_subclass_sees_the_public_function(self, op):
        torch.manual_seed(0)
        right = CALLS[op](OPS[op], Q)
        torch.manual_seed(0)
        out = CALLS[op](OPS[op], Q.as_subclass(Counted))
        assert seen == [OPS[op]]
        assert type(out) is Counted
        assert torch.equal(out.as_subclass(torch.Tensor), right)

    def test_a_subclass_in_the_pair_of_a_rotation_sees_it_too(self):
        q, k = fastattn.rotary_embedding((Q, Q.as_subclass(Counted)), COS, SIN)
        assert seen == [fastattn.rotary_embedding]
        assert type(q) is type(k) is Counted

    def test_a_subclass_may_answer_itself(self, op):
        class Answers(torch.Tensor):
            @classmethod
            def __torch_function__(cls, func, types, args=(), kwargs=None):
                return "answered", func.__name__

        assert CALLS[op](OPS[op], Q.as_subclass(Answers)) == ("answered", op)

    def test_no_tensor_at_all_may_answer(self, op):
        class Proxy:
            @classmethod
            def __torch_function__(cls, func, types, args=(), kwargs=None):
                return func

        assert CALLS[op](OPS[op], Proxy()) is OPS[op]

    def test_a_mode_sees_the_public_function(self, op):
        torch.manual_seed(0)
        right = CALLS[op](OPS[op], Q)
        torch.manual_seed(0)
        with Mode():
            out = CALLS[op](OPS[op], Q)
        assert OPS[op] in seen
        assert torch.equal(out, right)

    def test_a_layer_shows_a_mode_its_ops(self):
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        with Mode():
            layer(torch.randn(2, 5, 8))
        assert {fastattn.layer_norm, fastattn.attention, fastattn.feed_forward} <= set(seen)

    def test_a_causal_bias_beside_a_subclass(self):
        out = fastattn.scaled_dot_product_attention(Q.as_subclass(Counted), Q, Q, causal_upper_left(5, 5))
        assert seen == [fastattn.scaled_dot_product_attention]
        assert torch.equal(
            out.as_subclass(torch.Tensor), fastattn.scaled_dot_product_attention(Q, Q, Q, is_causal=True)
        )

    @pytest.mark.parametrize("full", [True, False])
    @pytest.mark.parametrize("op", ["layer_norm", "rotary_embedding", "scaled_dot_product_attention"])
    def test_compiled(self, op, full):
        torch.compiler.reset()
        compiled = torch.compile(lambda x: CALLS[op](OPS[op], x) * 2, fullgraph=full, backend="eager")
        right = CALLS[op](OPS[op], Q) * 2
        assert torch.equal(compiled(Q), right)
        torch.compiler.reset()
        out = compiled(Q.as_subclass(Counted) if not full else Q.as_subclass(type("Plain", (torch.Tensor,), {})))
        assert torch.equal(out.as_subclass(torch.Tensor), right)
        torch.compiler.reset()
        with Times5():
            assert torch.equal(compiled(Q), Q * 10)
        with torch.device("cpu"):
            torch.compiler.reset()
            assert torch.equal(compiled(Q), right)


class Times5(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return args[0] * 5 if func in OPS.values() else func(*args, **(kwargs or {}))


def test_signatures_and_pickles_are_those_of_plain_functions(op):
    function = OPS[op]
    assert function.__name__ == op
    assert function.__doc__
    parameters = inspect.signature(function).parameters.values()
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters)
    assert pickle.loads(pickle.dumps(function)) is function
