"""A training step of models of transformers: their own attention implementations, and after `fastattn.replace`.

Random weights, two layers of width 256 unless the name says another, two rows of 256 tokens, a vocabulary of 8000,
fp32, no dropout except in T5. Of a batch with padding, the second row has one real token.

`test_shape` has the sizes of real models, and torch.compile as a candidate: a few minutes on two idle threads.
"""

import copy

import pytest
import torch
from conftest import DEVICE

import fastattn

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

VOCAB, D, BATCH, SEQLEN = 8000, 256, 2, 256
SIZES = {"vocab_size": VOCAB, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 8, "pad_token_id": 0}
DECODER = {**SIZES, "intermediate_size": 688, "num_key_value_heads": 4, "head_dim": 32, "eos_token_id": None}
ENCODER = {**SIZES, "intermediate_size": 1024, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# family: class, config, implementations of attention that transformers has for it
FAMILIES = {
    "Llama": ("LlamaForCausalLM", DECODER, ("sdpa", "eager")),
    "Gemma 2": ("Gemma2ForCausalLM", {**DECODER, "sliding_window": 64}, ("eager",)),
    "gpt-oss, one expert": ("GptOssForCausalLM", {**DECODER, "num_local_experts": 1, "num_experts_per_tok": 1,
                                                  "sliding_window": 64}, ("eager",)),
    "GPT-2": ("GPT2LMHeadModel", {"vocab_size": VOCAB, "n_embd": D, "n_layer": 2, "n_head": 8, "resid_pdrop": 0.0,
                                  "embd_pdrop": 0.0, "attn_pdrop": 0.0}, ("sdpa", "eager")),
    "BERT, half padding": ("BertForMaskedLM", ENCODER, ("sdpa", "eager")),
    "BERT of width 768, half padding": ("BertForMaskedLM", {**ENCODER, "hidden_size": 768, "num_attention_heads": 12,
                                                            "intermediate_size": 3072}, ("sdpa",)),
    "T5, dropout 0.1": ("T5ForConditionalGeneration", {"vocab_size": VOCAB, "d_model": D, "d_kv": 32, "d_ff": 1024,
                        "num_layers": 2, "num_heads": 8, "decoder_start_token_id": 0, "pad_token_id": 0}, ("eager",)),
}  # fmt: skip


def model_of(family, implementation):
    name, changes, _ = FAMILIES[family]
    config = getattr(transformers, name).config_class(**copy.deepcopy(changes))
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).to(DEVICE).train()
    model.set_attn_implementation(implementation)
    return model


def batch_of(family):
    ids = torch.randint(3, VOCAB, (BATCH, SEQLEN), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    real = torch.ones_like(ids)
    if "padding" in family:
        real[1:] = 0
        real[1:, :1] = 1
    return {"input_ids": ids, "attention_mask": real, "labels": ids.masked_fill(real == 0, -100)}


def step(model, batch):
    def call():
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return loss.detach()

    return call


def without_dropout(model):
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_training_step(compare, family):
    batch = batch_of(family)
    models = {implementation: model_of(family, implementation) for implementation in FAMILIES[family][2]}
    models["fastattn.replace"] = model_of(family, "eager")
    fastattn.replace(models["fastattn.replace"])
    if "padding" in family:
        models["padding_free=True"] = model_of(family, "eager")
        fastattn.replace(models["padding_free=True"], padding_free=True)
    compare(
        {name: step(model, batch) for name, model in models.items()},
        verify={name: step(without_dropout(model), batch) for name, model in models.items()},
    )


LARGE = {**DECODER, "vocab_size": 32000, "hidden_size": 512, "num_hidden_layers": 4, "head_dim": 64,
         "num_key_value_heads": 4, "intermediate_size": 1376}  # fmt: skip
WINDOWED = {**LARGE, "sliding_window": 128}
# name: class, config, attention that transformers has for it, (rows, tokens)
SHAPES = {
    "Llama": ("LlamaForCausalLM", {**LARGE, "num_key_value_heads": 8}, "sdpa", (4, 512)),
    "BERT base, half padding": ("BertForMaskedLM", {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
                                "sdpa", (8, 128)),
    "ViT-S": ("ViTForImageClassification", {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
              "sdpa", (4, 196)),
    "gpt-oss": ("GptOssForCausalLM", {**WINDOWED, "num_local_experts": 4, "num_experts_per_tok": 2,
                                      "intermediate_size": 512}, "eager", (4, 512)),
    "Gemma 2": ("Gemma2ForCausalLM", WINDOWED, "eager", (4, 512)),
}  # fmt: skip
WITHOUT_LINEAR = ("norms", "attention", "loss", "feed_forward")


def shape_model(name, kinds=None):
    """The model of a shape; replaced unless `kinds` is None: the kinds, or "all" for all of them."""
    label, changes, attention, _ = SHAPES[name]
    torch.manual_seed(0)
    model = getattr(transformers, label)(getattr(transformers, label).config_class(**copy.deepcopy(changes))).to(DEVICE)
    model.train().set_attn_implementation(attention)
    if kinds is not None:
        fastattn.replace(model, only=None if kinds == "all" else kinds, padding_free="padding" in name)
    return model


def shape_batch(name):
    """The arguments of the model; of the tokens of a batch with padding, half are real."""
    rows, tokens = SHAPES[name][3]
    generator = torch.Generator().manual_seed(0)
    if name == "ViT-S":
        images = torch.randn(rows, 3, 224, 224, generator=generator).to(DEVICE)
        return {"pixel_values": images, "labels": (torch.arange(rows) % 2).to(DEVICE)}
    ids = torch.randint(3, 30000, (rows, tokens), generator=generator).to(DEVICE)
    if "padding" not in name:
        return {"input_ids": ids, "labels": ids, "use_cache": False}
    lengths = torch.linspace(1, tokens - 1, rows, device=DEVICE)[:, None]
    real = torch.arange(tokens, device=DEVICE) < lengths
    return {"input_ids": ids, "attention_mask": real.long(), "labels": ids.masked_fill(~real, -100)}


@pytest.mark.parametrize("name", SHAPES)
def test_shape(compare, name):
    """A training step at the sizes of real models: the model, torch.compile of it, and the model after `replace`."""
    batch, attention = shape_batch(name), SHAPES[name][2]
    plain = shape_model(name)
    candidates = {
        attention: step(plain, batch),
        f"torch.compile, {attention}": step(torch.compile(shape_model(name)), batch),
        "fastattn.replace without linear": step(shape_model(name, WITHOUT_LINEAR), batch),
        "fastattn.replace": step(shape_model(name, "all"), batch),
    }
    compare(candidates, tolerance=1e-3)


@pytest.mark.parametrize("kind", [*WITHOUT_LINEAR, "linear"])
def test_kinds_alone(compare, kind):
    """What each kind of replacement gives on the Llama, compared with SDPA."""
    batch = batch_of("Llama")
    models = {"sdpa": model_of("Llama", "sdpa"), kind: model_of("Llama", "sdpa")}
    fastattn.replace(models[kind], only=kind)
    compare({name: step(model, batch) for name, model in models.items()})
