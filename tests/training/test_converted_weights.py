"""Generation with weights in bfloat16 or int8, and the one call per layer that it shares with fp32."""

import copy
import itertools

import pytest

pytest.importorskip("tokenizers", reason="needs the packages of fastattn[train]")
import torch
from model_cases import OPTIONS, SHAPE, build, random_tokens
from threads import same_bits

import fastattn
from fastattn.models import CausalLM, KeyValueCache
from fastattn.models.decoding import read_layers
from fastattn.ops import _gemm
from fastattn.ops import layer as layer_op
from fastattn.ops._backends import why_not_available
from fastattn.training.inspect.generate import beam_search, generate_tokens, stream_tokens
from fastattn.training.messages import UsageError

pytestmark = pytest.mark.skipif(
    why_not_available("native", "cpu") is not None, reason=f"no C++ kernels: {why_not_available('native', 'cpu')}"
)
KINDS = ("bf16", "int8")


@pytest.fixture(autouse=True)
def few_rows_are_ours(monkeypatch):
    """Acts as on a processor with AVX2, whatever the table says about this processor."""
    monkeypatch.setattr(_gemm, "_most_rows", 16)


PROMPT = [1, 2, 3]


def restored(weight, kind):
    """The fp32 matrix that a converted weight stands for."""
    linear = layer_op.convert_linear(weight, None, kind)
    return linear.weight.float() * (linear.scale[:, None] if kind == "int8" else 1)


def rounded(model, kind):
    """The same model in fp64, with its matrices rounded as `kind` rounds them; an untied head has rounded rows."""
    model = copy.deepcopy(model)
    embedding = model.token_embedding.weight.detach().clone()
    for block in model.blocks:
        for parameter in block.parameters():
            if parameter.dim() == 2:
                parameter.data = restored(parameter, kind)
    head = embedding if model.head.weight is None else model.head.weight
    model.head.weight = torch.nn.Parameter(restored(head, kind))
    return model.double().eval()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_a_call_per_layer_is_the_model(options):
    """Few tokens at once and many, rows of the batch reordered: logits of the whole sequence in fp64."""
    model, tokens = build(CausalLM, **options).eval(), random_tokens(3, 16)
    with torch.no_grad():
        assert read_layers(model.blocks) is not None
        for kind in (None, *KINDS):
            whole = (rounded(model, kind) if kind else copy.deepcopy(model).double())(tokens)
            for steps in ([16], [1] * 16, [5, 1, 1, 4, 5]):
                cache = KeyValueCache(model, 3, weights=kind)
                parts = torch.cat([model(part, cache=cache) for part in tokens.split(steps, 1)], 1)
                torch.testing.assert_close(parts.double(), whole, rtol=1e-4, atol=1e-5)
            cache = KeyValueCache(model, 3, weights=kind)
            model(tokens[:, :9], cache=cache)
            cache.reorder(torch.tensor([2, 0, 0, 1]))
            last = model(tokens[[2, 0, 0, 1], 9:], cache=cache, last=True)
            torch.testing.assert_close(last.double(), whole[[2, 0, 0, 1], -1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_bits_do_not_depend_on_threads(kind):
    model, tokens = build(CausalLM, d_model=128, positions="rotary", feed_forward="swiglu").eval(), random_tokens(2, 9)

    @torch.no_grad()
    def logits():
        cache = KeyValueCache(model, 2, weights=kind)
        return torch.cat([model(part, cache=cache) for part in tokens.split([6, 1, 2], 1)], 1)

    same_bits(logits, range(1, 9))


@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_converted_weights(kind):
    """The text of the rounded model, also after the window has moved, without a cache, and by beam search."""
    model = build(CausalLM).train()
    exact = rounded(model, kind).float()
    for options in ({"temperature": 0}, {"temperature": 1.0, "seed": 3, "top_p": 0.9}):
        expected = generate_tokens(exact, PROMPT, 30, **options)
        for use_cache in (True, False):
            assert generate_tokens(model, PROMPT, 30, weights=kind, use_cache=use_cache, **options) == expected
    assert beam_search(model, PROMPT, 20, beams=3, weights=kind) == beam_search(exact, PROMPT, 20, beams=3)
    assert model.training


def _set(parameter, values, method="copy_"):
    with torch.no_grad():
        getattr(parameter, method)(values.clone())


def _in_inference_mode(parameter, values):
    with torch.inference_mode():
        parameter.data.copy_(values)


def _step(parameter, values):
    optimizer = torch.optim.SGD([parameter], lr=1.0, fused=True)
    parameter.grad = parameter.detach() - values
    optimizer.step()
    parameter.grad = None


def _load(model, name, values):
    model.load_state_dict(model.state_dict() | {name: values})


def _assign(model, name, values):
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()} | {name: values.clone()}, assign=True)


def _replace(model, name, values):
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, torch.nn.Parameter(values.clone()))


CHANGES = {
    "copy_": lambda model, name, values: _set(model.get_parameter(name), values),
    "in inference mode": lambda model, name, values: _in_inference_mode(model.get_parameter(name), values),
    "data": lambda model, name, values: setattr(model.get_parameter(name), "data", values.clone()),
    "in place in data": lambda model, name, values: model.get_parameter(name).data.copy_(values),
    "numpy": lambda model, name, values: model.get_parameter(name).detach().numpy().__setitem__(..., values.numpy()),
    "storage": lambda model, name, values: model.get_parameter(name).data.untyped_storage().copy_(
        values.contiguous().untyped_storage()
    ),
    "set_": lambda model, name, values: _set(model.get_parameter(name), values, "set_"),
    "optimizer": lambda model, name, values: _step(model.get_parameter(name), values),
    "load_state_dict": _load,
    "load_state_dict, assign": _assign,
    "new parameter": _replace,
}  # fmt: skip
NAMES = (
    "token_embedding.weight", "position_embedding.weight", "blocks.0.self_attn.in_proj_weight",
    "blocks.1.self_attn.in_proj_bias", "blocks.1.self_attn.out_proj.weight", "blocks.0.linear1.weight",
    "blocks.1.linear2.weight", "blocks.1.linear2.bias", "blocks.0.norm1.weight", "blocks.1.norm2.bias", "norm.weight",
)  # fmt: skip


def logits(model, kind):
    with torch.no_grad():
        cache = KeyValueCache(model, 1, weights=kind)
        parts = [model(part, cache=cache) for part in random_tokens(1, 8).split([5, 1, 2], 1)]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_no_copy_outlives_a_change_of_the_model(change, kind):
    model = build(CausalLM, bias=True).eval()
    for name in NAMES:
        before = logits(model, kind)
        generate_tokens(model, PROMPT, 2, weights=kind)
        values = torch.randn_like(model.get_parameter(name))
        change(model, name, values)
        changed = build(CausalLM, bias=True, seed=5).eval()
        changed.load_state_dict(model.state_dict())
        torch.testing.assert_close(changed.get_parameter(name).detach(), values)
        assert torch.equal(logits(model, kind), logits(changed, kind)), name
        assert not torch.allclose(logits(model, kind), before), name
        texts = [generate_tokens(m, PROMPT, 8, temperature=0, weights=kind) for m in (model, changed)]
        assert texts[0] == texts[1], name


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_has_the_weights_of_its_beginning(kind):
    model = build(CausalLM).eval()
    expected = generate_tokens(model, PROMPT, 12, temperature=0, weights=kind)
    stream = stream_tokens(model, PROMPT, 12, temperature=0, weights=kind)
    first = list(itertools.islice(stream, 2))
    with torch.no_grad():
        for block in model.blocks:
            for parameter in block.parameters():
                parameter.normal_()
    assert [*first, *stream] == expected


def _hook(block):
    block.linear1.register_forward_hook(lambda *_: None)


def _subclass(block):
    class Mine(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    block.linear2.__class__ = Mine


def _own_activation(block):
    block.activation = torch.tanh


def _fp64(block):
    block.linear1.weight.data = block.linear1.weight.data.double()


@pytest.mark.parametrize("change", [_hook, _subclass, _own_activation])
def test_changed_children_are_called(change):
    model, tokens = build(CausalLM).eval(), random_tokens(1, 8)
    change(model.blocks[1])
    with torch.no_grad():
        cache = KeyValueCache(model, 1)
        parts = torch.cat([model(part, cache=cache) for part in tokens.split(1, 1)], 1)
        torch.testing.assert_close(parts, model(tokens), rtol=1e-4, atol=1e-5)


def test_a_rotary_embedding_with_a_hook_is_called():
    model, tokens = build(CausalLM, positions="rotary").eval(), random_tokens(1, 8)
    model.rotary.register_forward_hook(lambda module, args, out: tuple(2 * x for x in out))
    with torch.no_grad():
        cache = KeyValueCache(model, 1)
        parts = torch.cat([model(part, cache=cache) for part in tokens.split(1, 1)], 1)
        torch.testing.assert_close(parts, model(tokens), rtol=1e-4, atol=1e-5)
        with pytest.raises(RuntimeError, match="a plain rotary embedding"):
            model(tokens, cache=KeyValueCache(model, 1, weights="int8"))


@pytest.mark.parametrize("change", [_hook, _subclass, _own_activation, _fp64])
def test_changed_children_cannot_be_converted(change):
    model = build(CausalLM)
    change(model.blocks[1])
    with pytest.raises(UsageError, match="weights must be None for this model, got 'int8': block 1: "):
        generate_tokens(model, PROMPT, 3, weights="int8")
    assert model.training


def test_models_that_cannot_be_converted_are_named():
    with pytest.raises(UsageError, match="block 0: it is a TransformerEncoderLayer with MultiheadAttention"):
        generate_tokens(build(CausalLM, "torch"), PROMPT, 3, weights="bf16")
    with pytest.raises(UsageError, match=r"block 0: .* fp32"):
        generate_tokens(build(CausalLM).bfloat16(), PROMPT, 3, weights="bf16")
    with pytest.raises(UsageError, match="weights must be None or 'bf16' or 'int8', got 'fp4'"):
        generate_tokens(build(CausalLM), PROMPT, 3, weights="fp4")
    with pytest.raises(ValueError, match="weights must be None, 'bf16' or 'int8', got 'fp4'"):
        KeyValueCache(build(CausalLM), 1, weights="fp4")
    model = build(CausalLM)
    with pytest.raises(RuntimeError, match="converted weights need fp32 tokens, no gradients"):
        model(random_tokens(1, 2), cache=KeyValueCache(model, 1, weights="bf16"))
    with pytest.raises(ValueError, match="targets must be None with last"):
        model(random_tokens(1, 2), random_tokens(1, 2), last=True)


def test_other_backends_and_casts_call_the_children(monkeypatch):
    model, tokens = build(CausalLM).eval(), random_tokens(1, 6)
    calls = []
    whole_layer = layer_op.decode_layer
    monkeypatch.setattr(layer_op, "decode_layer", lambda *args: calls.append(args) or whole_layer(*args))
    with torch.no_grad():
        expected = model(tokens)
        for context, count in (
            (torch.autocast("cpu", torch.bfloat16), 0),
            (torch.inference_mode(), SHAPE["n_layer"]),
        ):
            calls.clear()
            with context:
                model(tokens, cache=KeyValueCache(model, 1))
            assert len(calls) == count
        with fastattn.use_backend("reference"):
            calls.clear()
            torch.testing.assert_close(model(tokens, cache=KeyValueCache(model, 1)), expected, rtol=1e-4, atol=1e-5)
            assert not calls


def test_the_op_checks_its_tensors():
    model = build(CausalLM).eval()
    (layer, *_), cache = read_layers(model.blocks), KeyValueCache(model, 1)
    x, k, v = torch.randn(1, 1, 32), cache.k[0], cache.v[0]
    lengths, positions = torch.zeros(1, dtype=torch.int32), layer_op.Positions(None, None, False, None)
    good = layer_op.Cache(k, v, lengths)
    short = torch.randn(3, 4)
    for message, arguments in (
        ("linears do not fit", (torch.randn(1, 1, 30), layer._replace(norms=[layer_op.ABSENT] * 4), good, positions)),
        ("cache_seqlens must be from 0 to 15, got 16", (x, layer, good._replace(lengths=lengths + 16), positions)),
        ("k_cache must have 4 dimensions", (torch.randn(2, 1, 32), layer, good, positions)),
        ("must fit 3 heads", (x, layer._replace(n_heads=3), good, positions)),
        ("activation must be between 0 and 4", (x, layer._replace(activation=9), good, positions)),
        ("cos must have at least 1", (x, layer, good, positions._replace(cos=short[:0], sin=short[:0]))),
        ("norms must be 4 tensors", (x, layer._replace(norms=[]), good, positions)),
    ):
        with torch.no_grad(), pytest.raises(RuntimeError, match=message):
            layer_op.decode_layer(*arguments)
    arguments = (x, layer.norms, layer.linears, k, v, lengths, *positions, 0, 0, *layer[2:-1])
    torch.library.opcheck(torch.ops.fastattn.layer_decode.native, arguments, test_utils="test_schema")
