"""CausalLM with every option: both kinds of layers agree, the future is hidden, caches and packing change nothing."""

import pytest
import torch
import torch.nn.functional as F
from model_cases import LAYERS, OPTIONS, assert_both_layers_agree, build, gradients, random_tokens

from fastattn.models import CausalLM, KeyValueCache
from fastattn.models.backbone import alibi_slopes, sinusoids
from fastattn.models.sequences import Sequences
from fastattn.nn import RotaryEmbedding

options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
layers = pytest.mark.parametrize("layers", LAYERS)


@options
def test_both_layers_agree(options):
    tokens, targets = random_tokens(3, 16), random_tokens(3, 16, seed=2)
    targets[1, 5:] = -100
    assert_both_layers_agree(
        lambda layers: build(CausalLM, layers, **options),
        lambda model, with_targets: model(tokens, targets if with_targets else None),
    )


@options
@layers
def test_no_token_sees_a_later_one_and_the_cache_changes_nothing(layers, options):
    model = build(CausalLM, layers, **options).eval()
    tokens = random_tokens(3, 16)
    with torch.no_grad():
        whole = model(tokens)
        torch.testing.assert_close(model(tokens[:, :9]), whole[:, :9], rtol=1e-4, atol=1e-5)
        cache = KeyValueCache(model, 3)
        assert cache.k.shape[2] == options.get("n_kv_head", options.get("n_head", 4))
        parts = [model(part, cache=cache) for part in tokens[:, :13].split([5, 1, 7], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole[:, :13], rtol=1e-4, atol=1e-5)
        cache.reorder(torch.tensor([2, 0]))
        torch.testing.assert_close(model(tokens[[2, 0], 13:], cache=cache), whole[[2, 0], 13:], rtol=1e-4, atol=1e-5)


def documents(*rows):
    """The cu_seqlens of rows with documents of these lengths."""
    return torch.tensor([0, *(length for row in rows for length in row)]).cumsum(0).to(torch.int32)


@options
@layers
def test_packed_documents_are_separate_documents(layers, options):
    model = build(CausalLM, layers, **options)
    tokens, targets = random_tokens(2, 16), random_tokens(2, 16, seed=2)
    targets[0, 15] = targets[1, 3] = -100
    cu_seqlens = documents((5, 1, 10), (16,))
    logits, loss = model(tokens, cu_seqlens=cu_seqlens), model(tokens, targets, cu_seqlens=cu_seqlens)
    packed = gradients(model, loss)
    total = 0.0
    for start, end in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False):
        document, follow = (t.flatten()[None, start:end] for t in (tokens, targets))
        torch.testing.assert_close(logits.flatten(0, 1)[start:end], model(document)[0], rtol=1e-4, atol=1e-5)
        total = total + model(document, follow) * (follow != -100).sum()
    separate = gradients(model, total / 30)
    torch.testing.assert_close(loss, total / 30, rtol=1e-5, atol=1e-5)
    for name, value in separate.items():
        torch.testing.assert_close(packed[name], value, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@layers
@pytest.mark.parametrize("options", [{}, OPTIONS["Llama"], OPTIONS["alibi"]], ids=["default", "Llama", "alibi"])
def test_checkpointing_is_bit_for_bit_the_same_with_dropout(layers, options):
    tokens, targets = random_tokens(2, 16), random_tokens(2, 16, seed=2)
    results = []
    for checkpointing in (False, True):
        model = build(CausalLM, layers, dropout=0.3, checkpointing=checkpointing, **options)
        calls = []
        model.blocks[1].linear2.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(5)
        loss = model(tokens, targets, cu_seqlens=documents((7, 9), (16,)))
        results.append((loss.detach(), gradients(model, loss), torch.rand(1)))
        assert len(calls) == 1 + checkpointing
    (plain, plain_gradients, plain_next), (again, again_gradients, again_next) = results
    assert torch.equal(plain, again)
    assert torch.equal(plain_next, again_next)
    assert all(torch.equal(value, again_gradients[name]) for name, value in plain_gradients.items())


@layers
def test_dropout_and_label_smoothing_act_in_training_only(layers):
    tokens, targets = random_tokens(2, 16), random_tokens(2, 16, seed=2)
    model = build(CausalLM, layers, dropout=0.3, label_smoothing=0.2, **OPTIONS["Llama"])
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    logits = model(tokens).flatten(0, 1)
    torch.testing.assert_close(model(tokens, targets), F.cross_entropy(logits, targets.flatten()))
    model = build(CausalLM, layers, label_smoothing=0.2, **OPTIONS["Llama"])
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), label_smoothing=0.2)
    torch.testing.assert_close(model(tokens, targets), expected)


@layers
def test_targets_that_do_not_count(layers):
    model = build(CausalLM, layers)
    tokens, targets = random_tokens(2, 16), random_tokens(2, 16, seed=2)
    targets[:, ::2] = -100
    expected = F.cross_entropy(model(tokens)[:, 1::2].flatten(0, 1), targets[:, 1::2].flatten())
    torch.testing.assert_close(model(tokens, targets), expected)
    loss = model(tokens, torch.full_like(targets, -100))
    assert loss.item() == 0
    assert all(not value.any() for value in gradients(model, loss).values())


@pytest.mark.parametrize("options", [OPTIONS["Llama"], OPTIONS["silu, post-norm"]])
def test_a_replaced_child_of_our_block_is_called(options):
    """Adapters and pruning replace children; the children are then called instead of the fused kernels."""

    class Twice(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    tokens = random_tokens(2, 16)
    for packed in (None, documents((7, 9), (16,))):
        models = [build(CausalLM, layers, **options) for layers in LAYERS]
        before = models[1](tokens, cu_seqlens=packed)
        for model in models:
            model.blocks[0].linear1.__class__ = Twice
        theirs, ours = (model(tokens, cu_seqlens=packed) for model in models)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(ours, before, atol=1e-5)


def test_positions_are_those_of_the_papers():
    table = sinusoids(50, 8)
    for position, pair in ((0, 0), (7, 1), (49, 3)):
        angle = torch.tensor(position / 10000 ** (2 * pair / 8), dtype=torch.float64)
        assert table[position, pair].item() == pytest.approx(angle.sin().item(), abs=1e-6)
        assert table[position, 4 + pair].item() == pytest.approx(angle.cos().item(), abs=1e-6)
    assert alibi_slopes(8).tolist() == [2.0**-h for h in range(1, 9)]
    assert alibi_slopes(6).tolist() == pytest.approx([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])
    assert alibi_slopes(1).tolist() == [2.0**-8]


@layers
def test_what_is_added_to_the_embeddings(layers):
    tokens, inputs = random_tokens(2, 16), []
    for positions in ("learned", "sinusoidal", "rotary", "alibi"):
        model = build(CausalLM, layers, positions=positions)
        model.blocks[0].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        model(tokens)
        expected = model.token_embedding(tokens)
        if positions == "learned":
            expected = expected + model.position_embedding.weight
        elif positions == "sinusoidal":
            expected = expected * 32**0.5 + sinusoids(16, 32)
        assert torch.equal(inputs.pop(), expected)


@layers
def test_the_norm_stands_at_the_end_or_on_the_embeddings(layers):
    tokens = random_tokens(2, 16)
    for norm_first in (True, False):
        model, seen = build(CausalLM, layers, norm_first=norm_first), {}
        for name in ("norm", "blocks.0", "blocks.1", "head"):
            model.get_submodule(name).register_forward_hook(
                lambda module, args, out, name=name, seen=seen: seen.__setitem__(name, (args[0], out))
            )
        model(tokens)
        before, after = ("blocks.1", "head") if norm_first else (None, "blocks.0")
        assert torch.equal(seen["norm"][1], seen[after][0])
        assert before is None or torch.equal(seen[before][1], seen["norm"][0])
        assert norm_first or torch.equal(seen["blocks.1"][1], seen["head"][0])


@layers
def test_rotary_scores_depend_on_distances_alone(layers):
    q, k = torch.randn(2, 1, 2, 6, 8).unbind()
    tokens, rotary = random_tokens(1, 6), RotaryEmbedding(8, max_seqlen=16)
    early, late = (Sequences(layers, tokens, start=start, rotary=rotary).rotate(q, k) for start in (0, 10))
    assert not torch.allclose(early[0], late[0], atol=0.1)
    torch.testing.assert_close(early[0] @ early[1].mT, late[0] @ late[1].mT, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(early[0] @ early[1].mT, q @ k.mT, atol=0.1)


@layers
@pytest.mark.parametrize("causal", [True, False])
def test_alibi_lowers_scores_by_the_distance(layers, causal):
    slopes = alibi_slopes(2)
    sequences = Sequences(layers, random_tokens(1, 5), causal=causal, alibi_slopes=slopes)
    zero, v = torch.zeros(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    position = torch.arange(5)
    distance = position[:, None] - position
    scores = -slopes[:, None, None] * distance.abs()
    weights = torch.where(distance >= 0, scores, -torch.inf if causal else scores).softmax(-1)
    torch.testing.assert_close(sequences.attend(zero, zero, v, 0.0), weights @ v)


@layers
def test_bfloat16_keeps_the_tables_of_positions(layers):
    for positions in ("rotary", "alibi", "sinusoidal"):
        model = build(CausalLM, layers, positions=positions).bfloat16()
        exact = build(CausalLM, layers, positions=positions)
        tokens = random_tokens(2, 16)
        logits = model(tokens)
        assert logits.dtype == torch.bfloat16
        torch.testing.assert_close(logits.float(), exact(tokens), rtol=0.05, atol=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_kv_head": 3}, "n_kv_head must be a divisor of n_head = 4, got 3"),
        ({"n_kv_head": 0}, "n_kv_head must be a divisor of n_head = 4, got 0"),
        ({"positions": "absolute"}, "positions must be 'learned' or 'sinusoidal' or 'rotary' or 'alibi', got 'absol"),
        ({"feed_forward": "mish"}, "feed_forward must be 'gelu' or .* or 'reglu', got 'mish'"),
        ({"positions": "rotary", "d_model": 12}, "d_model / n_head must be even for rotary .*, got 3"),
        (
            {"positions": "sinusoidal", "d_model": 15, "n_head": 3},
            "d_model must be even for sin.*, got 15",
        ),
        ({"label_smoothing": 1.0}, "label_smoothing must be at least 0 and below 1, got 1.0"),
        ({"init": "zeros"}, "init must be one of gpt2, .*, got 'zeros'"),
        ({"layers": "jax"}, "layers must be 'fastattn' or 'torch', got 'jax'"),
    ],
)
def test_wrong_options_are_told(changes, message):
    with pytest.raises(ValueError, match=message):
        build(CausalLM, changes.pop("layers", "fastattn"), **changes)


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (torch.tensor([0, 16, 32]), r"cu_seqlens must be int32 of shape \(documents \+ 1,\), got torch.int64 \(3,\)"),
        (torch.tensor([[0, 16, 32]], dtype=torch.int32), r"got torch.int32 \(1, 3\)"),
        (torch.tensor([0, 20, 32], dtype=torch.int32), r"end of every row of 16 tokens, got \[0, 20, 32\]"),
        (torch.tensor([0, 16], dtype=torch.int32), r"rise from 0 to 32 .* got \[0, 16\]"),
        (torch.tensor([0, 16, 9, 32], dtype=torch.int32), "must rise from 0 to 32"),
    ],
)
def test_wrong_documents_are_told(cu_seqlens, message):
    with pytest.raises(ValueError, match=message):
        build(CausalLM)(random_tokens(2, 16), cu_seqlens=cu_seqlens)


def test_cache_and_documents_exclude_each_other():
    model = build(CausalLM)
    with pytest.raises(ValueError, match="cu_seqlens must be None with a cache"):
        model(random_tokens(1, 4), cache=KeyValueCache(model, 1), cu_seqlens=documents((4,)))
