"""A training step of models of transformers: their own attention implementations, and after `fastattn.replace`.

Random weights, two layers of width 256 unless the name says another, two rows of 256 tokens, a vocabulary of 8000,
fp32, no dropout except in T5. In a batch with padding, the second row has one real token.

`test_shape` has the sizes of real models, and torch.compile as a candidate: a few minutes on two idle threads. Under
--benchmark-disable it has one layer and few tokens.
`test_family` has every family of docs/models.md: two layers of width 128, two rows of 128 tokens or images of 64 × 64
in patches of 8, a vocabulary of 2000, two experts, no dropout.
"""

import copy

import pytest
import torch
from conftest import DEVICE

import fastattn
from fastattn.drop_in import rotary

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

# (rows, tokens, heads, channels of a head): of the Llama of test_shape, and one token of it
PARTS = {"1024 tokens": (2, 512, 8, 64), "one token": (1, 1, 8, 64)}
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


SMALL = {"num_hidden_layers": 1, "vocab_size": 2000}


def shape_model(name, small, kinds=None):
    """The model of a shape; replaced unless `kinds` is None: the kinds, or "all" for all of them."""
    label, changes, attention, _ = SHAPES[name]
    changes = {**changes, **(SMALL if small else {})}
    torch.manual_seed(0)
    model = getattr(transformers, label)(getattr(transformers, label).config_class(**copy.deepcopy(changes))).to(DEVICE)
    model.train().set_attn_implementation(attention)
    if kinds is not None:
        fastattn.replace(model, only=None if kinds == "all" else kinds, padding_free="padding" in name)
    return model


def shape_batch(name, small):
    """The arguments of the model; of the tokens of a batch with padding, half are real."""
    rows, tokens = (2, 64) if small else SHAPES[name][3]
    generator = torch.Generator().manual_seed(0)
    if name == "ViT-S":
        images = torch.randn(rows, 3, 224, 224, generator=generator).to(DEVICE)
        return {"pixel_values": images, "labels": (torch.arange(rows) % 2).to(DEVICE)}
    ids = torch.randint(3, 1900 if small else 30000, (rows, tokens), generator=generator).to(DEVICE)
    if "padding" not in name:
        return {"input_ids": ids, "labels": ids, "use_cache": False}
    lengths = torch.linspace(1, tokens - 1, rows, device=DEVICE)[:, None]
    real = torch.arange(tokens, device=DEVICE) < lengths
    return {"input_ids": ids, "attention_mask": real.long(), "labels": ids.masked_fill(~real, -100)}


@pytest.mark.parametrize("name", SHAPES)
def test_shape(compare, name, request):
    """A training step at the sizes of real models: the model, torch.compile of it, and the model after `replace`."""
    small = request.config._benchmarksession.disabled
    batch, attention = shape_batch(name, small), SHAPES[name][2]
    plain = shape_model(name, small)
    candidates = {
        attention: step(plain, batch),
        f"torch.compile, {attention}": step(torch.compile(shape_model(name, small)), batch),
        "fastattn.replace without linear": step(shape_model(name, small, WITHOUT_LINEAR), batch),
        "fastattn.replace": step(shape_model(name, small, "all"), batch),
    }
    compare(candidates, tolerance=1e-3)


@pytest.mark.parametrize("kind", [*WITHOUT_LINEAR, "linear"])
def test_kinds_alone(compare, kind):
    """What each kind of replacement gives on the Llama, compared with SDPA."""
    batch = batch_of("Llama")
    models = {"sdpa": model_of("Llama", "sdpa"), kind: model_of("Llama", "sdpa")}
    fastattn.replace(models[kind], only=kind)
    compare({name: step(model, batch) for name, model in models.items()})


def with_gradients(call, inputs, directions):
    def run():
        out = call()
        return *out, *torch.autograd.grad(out, inputs, directions)

    return run


@pytest.mark.parametrize("size", PARTS)
def test_rotary_application(compare, size):
    """Forward and backward of Llama's function, and of what `replace` puts in its place."""
    rows, tokens, heads, channels = PARTS[size]
    theirs = transformers.models.llama.modeling_llama.apply_rotary_pos_emb
    ours = rotary.Rotate({"theirs": theirs}, "theirs")
    q, k, dq, dk = torch.randn(4, rows, tokens, heads, channels, device=DEVICE).transpose(2, 3).unbind()
    inputs = [t.requires_grad_() for t in (q, k)]
    angles = torch.randn(1, tokens, channels // 2, device=DEVICE).repeat(1, 1, 2)
    tables = angles.cos(), angles.sin()
    calls = {"transformers": lambda: theirs(q, k, *tables), "fastattn": lambda: ours(q, k, *tables)}
    compare({name: with_gradients(call, inputs, (dq, dk)) for name, call in calls.items()})


@pytest.mark.parametrize("size", PARTS)
def test_residual_and_norm(compare, size):
    """Forward and backward of what stands between attention and feed-forward block of a decoder layer."""
    rows, tokens, heads, channels = PARTS[size]
    x, residual, dy, dsum = torch.randn(4, rows, tokens, heads * channels, device=DEVICE).unbind()
    inputs = [x.requires_grad_(), residual.requires_grad_(), torch.ones(x.shape[-1], device=DEVICE).requires_grad_()]

    def apart():
        total = residual + x
        return fastattn.rms_norm(total, inputs[2], 1e-6), total

    def in_one_pass():
        return fastattn.rms_norm(x, inputs[2], 1e-6, residual=residual, return_residual=True)

    calls = {"sum, then our norm": apart, "in one pass": in_one_pass}
    compare({name: with_gradients(call, inputs, (dy, dsum)) for name, call in calls.items()})


TINY = {"vocab_size": 2000, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0,
        "intermediate_size": 344, "max_position_embeddings": 512}  # fmt: skip
TINY_DECODER = {**TINY, "num_key_value_heads": 2, "head_dim": 32, "eos_token_id": None}
TINY_WINDOW = {**TINY_DECODER, "sliding_window": 32}
TINY_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
TINY_GPT = {"vocab_size": 2000, "n_embd": 128, "n_layer": 2, "n_head": 4}
TINY_PAIR = {"vocab_size": 2000, "d_model": 128, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
             "decoder_attention_heads": 4, "encoder_ffn_dim": 512, "decoder_ffn_dim": 512, "pad_token_id": 0,
             "decoder_start_token_id": 1, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
TINY_T5 = {"vocab_size": 2000, "d_model": 128, "d_kv": 32, "d_ff": 512, "num_layers": 2, "num_heads": 4,
           "decoder_start_token_id": 0, "pad_token_id": 0}  # fmt: skip
TINY_IMAGES = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
               "image_size": 64, "patch_size": 8}  # fmt: skip
TINY_LATENT = {**TINY, "num_key_value_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32,
               "qk_rope_head_dim": 16, "v_head_dim": 32, "first_k_dense_replace": 2}  # fmt: skip
# family: class, config
TINY_MODELS = {
    "Llama": ("LlamaForCausalLM", TINY_DECODER),
    "Mistral": ("MistralForCausalLM", TINY_WINDOW),
    "Qwen 2": ("Qwen2ForCausalLM", TINY_DECODER),
    "Qwen 3": ("Qwen3ForCausalLM", TINY_DECODER),
    "Phi-3": ("Phi3ForCausalLM", TINY_WINDOW),
    "OLMo 2": ("Olmo2ForCausalLM", TINY_DECODER),
    "Llama 4": ("Llama4ForCausalLM", {**TINY_DECODER, "attention_chunk_size": 32, "num_local_experts": 2,
                                      "intermediate_size_mlp": 344}),
    "DeepSeek V3": ("DeepseekV3ForCausalLM", TINY_LATENT),
    "Gemma 2": ("Gemma2ForCausalLM", TINY_WINDOW),
    "Gemma 3": ("Gemma3ForCausalLM", TINY_WINDOW),
    "Mixtral": ("MixtralForCausalLM", {**TINY_DECODER, **TINY_EXPERTS}),
    "gpt-oss": ("GptOssForCausalLM", {**TINY_WINDOW, **TINY_EXPERTS}),
    "T5": ("T5ForConditionalGeneration", TINY_T5),
    "ModernBERT": ("ModernBertForMaskedLM", {**TINY, "cls_token_id": 1, "sep_token_id": 2}),
    "GPT-2": ("GPT2LMHeadModel", TINY_GPT),
    "GPT-NeoX": ("GPTNeoXForCausalLM", TINY),
    "BERT": ("BertForMaskedLM", TINY),
    "RoBERTa": ("RobertaForMaskedLM", TINY),
    "DistilBERT": ("DistilBertForMaskedLM", {"vocab_size": 2000, "dim": 128, "hidden_dim": 512, "n_layers": 2,
                                             "n_heads": 4}),
    "BART": ("BartForConditionalGeneration", TINY_PAIR),
    "Whisper": ("WhisperForConditionalGeneration", {**TINY_PAIR, "max_source_positions": 128, "num_mel_bins": 16}),
    "ViT": ("ViTForImageClassification", TINY_IMAGES),
    "SigLIP": ("SiglipForImageClassification", {"vision_config": TINY_IMAGES}),
    "CLIP": ("CLIPModel", {"text_config": {**TINY, "bos_token_id": 1, "eos_token_id": 2}, "vision_config": TINY_IMAGES,
                           "projection_dim": 64}),
    "DeBERTa": ("DebertaV2ForMaskedLM", {**TINY, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "Falcon": ("FalconForCausalLM", {**TINY, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "ConvNeXt": ("ConvNextForImageClassification", {"hidden_sizes": [32, 64, 128, 128], "depths": [1, 1, 2, 1],
                                                    "image_size": 64}),
}  # fmt: skip
TINY_TIMM = {
    "ViT of timm": ("vit_tiny_patch16_224", {"img_size": 64, "patch_size": 8, "embed_dim": 128, "depth": 2,
                                             "num_heads": 4}),
    "Swin of timm": ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 4, "embed_dim": 64,
                                                      "depths": (1, 1), "num_heads": (2, 4), "drop_path_rate": 0.0}),
    "ConvNeXt of timm": ("convnext_atto", {"depths": (1, 1, 2, 1), "dims": (32, 64, 128, 128)}),
}  # fmt: skip


def tiny_model(family):
    """Without dropout, with the best attention that transformers has for it."""
    torch.manual_seed(0)
    if family in TINY_TIMM:
        timm = pytest.importorskip("timm", reason="timm is not installed")
        name, changes = TINY_TIMM[family]
        return timm.create_model(name, pretrained=False, num_classes=10, **changes).to(DEVICE).train()
    name, changes = TINY_MODELS[family]
    config = getattr(transformers, name).config_class(**copy.deepcopy(changes))
    for part in (config, getattr(config, "text_config", None), getattr(config, "vision_config", None)):
        for label in vars(part) if part is not None else ():
            if "drop" in label and isinstance(getattr(part, label), float):
                setattr(part, label, 0.0)
    config._experts_implementation = "eager"
    return getattr(transformers, name)(config).to(DEVICE).train()


def tiny_batch(family):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 2000, (2, 128), generator=generator).to(DEVICE)
    images = torch.randn(2, 3, 64, 64, generator=generator).to(DEVICE)
    if family in TINY_TIMM:
        return {"x": images}
    if family == "CLIP":
        return {"input_ids": ids, "pixel_values": images, "return_loss": True}
    if family == "Whisper":
        return {"input_features": torch.randn(2, 16, 256, generator=generator).to(DEVICE), "labels": ids}
    if family in ("ViT", "SigLIP", "ConvNeXt"):
        return {"pixel_values": images, "labels": torch.tensor([0, 1], device=DEVICE)}
    return {"input_ids": ids, "labels": ids}


def tiny_step(model, batch):
    def call():
        model.zero_grad()
        loss = model(**batch).square().mean() if "x" in batch else model(**batch).loss
        loss.backward()
        return loss.detach()

    return call


@pytest.mark.parametrize("family", [*TINY_MODELS, *TINY_TIMM])
def test_family(compare, family):
    """A training step of every family of docs/models.md, tiny: the model as it is, and after `replace`."""
    models = {"model": tiny_model(family), "fastattn.replace": tiny_model(family)}
    fastattn.replace(models["fastattn.replace"])
    compare({name: tiny_step(model, tiny_batch(family)) for name, model in models.items()}, tolerance=1e-3)
