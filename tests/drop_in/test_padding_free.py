"""Padded batches without their padding: the same results at the real tokens, and nothing computed for the others."""

import copy
import pickle

import pytest
import torch
from oracle import BACKWARD, assert_accurate

import fastattn

D, SEQLEN = 16, 9
PADDING = torch.tensor([[False] * 9, [False] * 2 + [True] * 7, [True] * 4 + [False] * 5, [True] * 9])


def stack(batch_first=True, norm_first=False, **options):
    layer = fastattn.nn.TransformerEncoderLayer(
        D, 2, 24, 0.0, activation="gelu", batch_first=batch_first, norm_first=norm_first
    )
    return fastattn.nn.TransformerEncoder(layer, 2, torch.nn.LayerNorm(D) if norm_first else None, **options)


def run_stack(model, x, batch_first=True, **masks):
    x = x if batch_first else x.transpose(0, 1)
    leaf = x.detach().clone().requires_grad_()
    y = model(leaf, src_key_padding_mask=PADDING[: len(x) if batch_first else x.shape[1]], **masks)
    y = y if batch_first else y.transpose(0, 1)
    real = ~PADDING[: len(y)]
    weights = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
    grads = torch.autograd.grad((y * weights)[real].sum(), [leaf, *model.parameters()])
    return y, (grads[0] if batch_first else grads[0].transpose(0, 1))[real], grads[1:]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("batch_first", "norm_first"), [(True, False), (False, True)])
def test_stack_of_encoder_layers(batch_first, norm_first, causal):
    model = stack(batch_first, norm_first).train()
    masks = {"mask": torch.nn.Transformer.generate_square_subsequent_mask(SEQLEN), "is_causal": True} if causal else {}
    x = torch.randn(2 if causal else 3, SEQLEN, D)  # a causal row that begins with padding has tokens without a key
    padded, dx, grads = run_stack(model, x, batch_first, **masks)
    exact_masks = {name: m.double() if torch.is_tensor(m) else m for name, m in masks.items()}
    exact, exact_dx, exact_grads = run_stack(copy.deepcopy(model).double(), x.double(), batch_first, **exact_masks)
    model.padding_free = True
    packed, our_dx, our_grads = run_stack(model, x, batch_first, **masks)
    real = ~PADDING[: len(x)]
    assert (packed[~real] == 0).all()
    assert_accurate(packed[real], exact[real], padded[real])
    assert_accurate(our_dx, exact_dx, dx, BACKWARD)
    for ours, wanted, theirs in zip(our_grads, exact_grads, grads, strict=True):
        assert_accurate(ours, wanted, theirs, BACKWARD, slack=1e-6)


def test_stack_computes_real_tokens_only():
    """NaN at the padding does not reach any result. A row may consist of padding only."""
    model, x = stack(padding_free=True), torch.randn(4, SEQLEN, D)
    expected = model(x, src_key_padding_mask=PADDING)
    x[PADDING] = float("nan")
    assert torch.equal(model(x, src_key_padding_mask=PADDING), expected)
    assert (expected[3] == 0).all()
    assert (model(x, src_key_padding_mask=torch.ones_like(PADDING)) == 0).all()


def test_stack_keeps_the_padding_where_it_must():
    model, x = stack(padding_free=True), torch.randn(3, SEQLEN, D)
    padding = PADDING[:3]
    expected, calls = model(x, src_key_padding_mask=padding), []
    handle = model.layers[1].register_forward_hook(lambda layer, args, out: calls.append(out.shape))
    got = model(x, src_key_padding_mask=padding)
    assert calls == [x.shape]
    torch.testing.assert_close(got[~padding], expected[~padding])
    handle.remove()
    as_floats = torch.zeros(padding.shape).masked_fill(padding, -torch.inf)
    torch.testing.assert_close(model(x, src_key_padding_mask=as_floats)[~padding], expected[~padding])
    band = torch.ones(SEQLEN, SEQLEN, dtype=torch.bool).triu(3)
    assert not torch.equal(model(x, mask=band, src_key_padding_mask=padding)[padding], expected[padding])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(x, src_key_padding_mask=padding)
    torch.testing.assert_close(compiled[~padding], expected[~padding])


def test_replace_sets_and_unsets_it_on_stacks():
    layer = torch.nn.TransformerEncoderLayer(D, 2, 24, 0.0, batch_first=True)
    model = torch.nn.Sequential(torch.nn.TransformerEncoder(layer, 1, enable_nested_tensor=False))
    report = fastattn.replace(model, padding_free=True)
    assert "packing padded batches" in report.replaced["0"]
    assert model[0].padding_free
    report.undo()
    assert type(model[0]) is torch.nn.TransformerEncoder
    assert not hasattr(model[0], "padding_free")


transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from transformers_families import (  # noqa: E402
    FAMILIES,
    HAS_OWN_ATTENTION,
    has_own_attention,
    inputs_of,
    logits_and_gradients,
    model_of,
)

BERT = {"vocab_size": 40, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
PACKED = [
    pytest.param(family, marks=pytest.mark.skipif(has_own_attention(family), reason=HAS_OWN_ATTENTION))
    for family in ("llama", "mistral", "gemma2", "gpt_oss", "qwen3", "gpt2", "gpt_neox", "bert", "roberta",
                   "modernbert")
]  # fmt: skip


def replaced(family):
    model = copy.deepcopy(model_of(family))
    return model, fastattn.replace(model, padding_free=True)


@pytest.mark.parametrize("family", PACKED)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_logits_and_gradients(family, padding):
    given, real = inputs_of(FAMILIES[family][2], padding)
    theirs = copy.deepcopy(model_of(family))
    theirs.set_attn_implementation("eager")
    logits, grads = logits_and_gradients(theirs, given, real)
    model, report = replaced(family)
    assert sum("packing padded batches" in what for what in report.replaced.values()) == 1
    got, got_grads = logits_and_gradients(model, given, real)
    torch.testing.assert_close(got, logits, atol=2e-5 * logits.abs().max().item(), rtol=1e-4)
    largest = max(grad.abs().max().item() for grad in grads.values())
    assert got_grads.keys() == grads.keys()
    for name, grad in got_grads.items():
        torch.testing.assert_close(grad, grads[name], atol=2e-5 * largest, rtol=1e-3, msg=name)
    if padding == "right":
        hidden = model.base_model(**given)
        assert (hidden.last_hidden_state[given["attention_mask"] == 0] == 0).all()
    report.undo()
    assert type(model.base_model) is type(theirs.base_model)
    model.set_attn_implementation("eager")
    again, again_grads = logits_and_gradients(model, given, real)
    assert torch.equal(again, logits)
    assert all(torch.equal(again_grads[name], grad) for name, grad in grads.items())


@pytest.mark.parametrize("family", PACKED)
def test_every_layer_gets_the_real_tokens_alone(family):
    model, _ = replaced(family)
    ids = torch.randint(3, 40, (4, 24))
    real = torch.ones_like(ids)
    real[1:, 8:] = 0  # half of the tokens
    seen = []
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, args, kwargs: seen.append((*args, *kwargs.values())[0].shape[:2]),
                                        with_kwargs=True)  # fmt: skip
    model(input_ids=ids, attention_mask=real, labels=ids.masked_fill(real == 0, -100)).loss.backward()
    assert seen == [(1, 48)] * len(layers)


def test_pooler_and_classifier():
    config = transformers.BertConfig(**BERT, num_hidden_layers=2)
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).train()
    given, _ = inputs_of("encoder", "right")
    expected = model(**given, labels=torch.tensor([0, 1]))
    fastattn.replace(model, padding_free=True)
    got = model(**given, labels=torch.tensor([0, 1]))
    torch.testing.assert_close(got.logits, expected.logits)
    torch.testing.assert_close(got.loss, expected.loss)


MASKS = {
    "right": [[1] * 6, [1, 1, 1, 0, 0, 0]],
    "left": [[1] * 6, [0, 0, 0, 1, 1, 1]],
    "holes": [[1, 0, 1, 1, 1, 1], [1, 1, 0, 0, 1, 0]],
    "one token": [[1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]],
    "no token": [[1] * 6, [0] * 6],
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("family", ["gemma2", "gpt2", "gpt_neox", "bert"])
def test_what_a_head_makes_of_any_mask(family, mask):
    mask = torch.tensor(MASKS[mask])
    pad = model_of(family).config.pad_token_id or 0
    ids = torch.randint(3, 40, mask.shape).masked_fill(mask == 0, pad)
    model = copy.deepcopy(model_of(family)).train()
    given = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    if family == "bert":
        model = transformers.BertForSequenceClassification(model.config).train()
        given["labels"] = torch.tensor([0, 1])
    model.set_attn_implementation("eager" if mask[:, 0].all() else "fastattn")  # they differ in rows without a key
    expected = model(**given).loss
    fastattn.replace(model, padding_free=True)
    torch.testing.assert_close(model(**given).loss, expected, atol=1e-4, rtol=1e-4, equal_nan=True)


def test_more_tokens_than_positions():
    """The packed batch is longer than the longest row that the model allows."""
    config = transformers.BertConfig(**BERT, num_hidden_layers=1, max_position_embeddings=24)
    model = transformers.BertModel(config).eval()
    given, real = inputs_of("encoder", "right")
    given = {name: t.repeat(3, 1) for name, t in given.items()}
    expected = model(**given)
    fastattn.replace(model, padding_free=True)
    got = model(**given)
    real = given["attention_mask"].bool()
    torch.testing.assert_close(got.last_hidden_state[real], expected.last_hidden_state[real], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.pooler_output, expected.pooler_output, atol=1e-5, rtol=1e-4)


def test_generation_caches_holes_and_other_outputs_keep_the_padding():
    model, _ = replaced("llama")
    given, _ = inputs_of("decoder", "left")
    model.eval()
    theirs = copy.deepcopy(model_of("llama")).eval()
    expected = theirs.generate(**given, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(**given, max_new_tokens=4, do_sample=False), expected)
    assert model(**given).past_key_values is not None
    assert len(model.model(**given, use_cache=False, output_hidden_states=True).hidden_states) == 3
    model.config.output_hidden_states = True  # after the check
    given, _ = inputs_of("decoder", "right")
    assert all(t.shape[:2] == given["input_ids"].shape for t in model(**given, use_cache=False).hidden_states)
    assert model.model(**given, use_cache=False, output_hidden_states=False).hidden_states is None
    model.config.output_hidden_states = False
    given, _ = inputs_of("decoder", "left")
    holes = given["attention_mask"].clone()
    holes[0, 5] = 0
    wanted = theirs(input_ids=given["input_ids"], attention_mask=holes, use_cache=False).logits
    got = model(input_ids=given["input_ids"], attention_mask=holes, use_cache=False).logits
    torch.testing.assert_close(got[holes.bool()], wanted[holes.bool()], atol=1e-5, rtol=1e-4)


def test_gradient_checkpointing_and_copies():
    model, _ = replaced("llama")
    given, real = inputs_of("decoder", "right")
    expected, grads = logits_and_gradients(model, given, real)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    model.gradient_checkpointing_enable()
    for twin in (model, *twins):
        got, got_grads = logits_and_gradients(twin, given, real)
        assert torch.equal(got, expected)
        assert all(torch.equal(got_grads[name], grad) for name, grad in grads.items())


@pytest.mark.parametrize(("family", "reason"), [("t5", "cross attention"), ("vit", "position_ids")])
def test_models_that_keep_the_padding(family, reason):
    _, report = replaced(family)
    assert reason in str(report)
    assert not any("packing" in what for what in report.replaced.values())


def test_a_head_that_compares_all_positions():
    """Its loss is a softmax over the row, padding included, where packing would put 0."""
    model = transformers.BertForQuestionAnswering(transformers.BertConfig(**BERT, num_hidden_layers=1))
    report = fastattn.replace(model, padding_free=True)
    assert "the loss of BertForQuestionAnswering compares all positions of a row" in str(report)
    assert not any("packing" in what for what in report.replaced.values())


def test_the_check_leaves_the_model_as_it_was():
    model, state = copy.deepcopy(model_of("llama")), torch.get_rng_state()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    implementation = model.config._attn_implementation
    fastattn.replace(model, padding_free=True).undo()
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == implementation
    assert torch.equal(torch.get_rng_state(), state)
    twice = fastattn.replace(model, padding_free=True), fastattn.replace(model, padding_free=True)
    assert "packs padded batches already" in str(twice[1])
