"""Tiny models of transformers with random weights, one a family, their inputs, and attention written out for fp64."""

import contextlib
import copy
import functools

import torch
import transformers
from transformers import masking_utils

BATCH, SEQLEN, VOCAB, WINDOW = 2, 24, 40, 5
DECODER = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
GROUPED = {**DECODER, "num_key_value_heads": 2, "head_dim": 8}
ENCODER = {name: value for name, value in DECODER.items() if name not in ("bos_token_id", "eos_token_id")}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
          "image_size": 16, "patch_size": 4}  # fmt: skip
SEQ2SEQ = {"vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
           "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0,
           "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": None}  # fmt: skip
# family: (class of the model, changes of its config, what it takes)
FAMILIES = {
    "llama": ("LlamaForCausalLM", GROUPED, "decoder"),
    "mistral": ("MistralForCausalLM", {**GROUPED, "sliding_window": WINDOW}, "decoder"),
    "mixtral": ("MixtralForCausalLM", {**GROUPED, "num_local_experts": 2}, "decoder"),
    "qwen2": ("Qwen2ForCausalLM", GROUPED, "decoder"),
    "qwen3": ("Qwen3ForCausalLM", GROUPED, "decoder"),
    "gemma2": ("Gemma2ForCausalLM", {**GROUPED, "sliding_window": WINDOW, "attn_logit_softcapping": 2.0}, "decoder"),
    "gemma3": ("Gemma3ForCausalLM", {**GROUPED, "sliding_window": WINDOW,
                                     "layer_types": ["sliding_attention", "full_attention"]}, "decoder"),
    "phi3": ("Phi3ForCausalLM", {**GROUPED, "sliding_window": WINDOW}, "decoder"),
    "olmo2": ("Olmo2ForCausalLM", GROUPED, "decoder"),
    "gpt_oss": ("GptOssForCausalLM", {**GROUPED, "sliding_window": WINDOW, "num_local_experts": 2,
                                      "num_experts_per_tok": 1}, "decoder"),
    "llama4": ("Llama4ForCausalLM", {**GROUPED, "attention_chunk_size": WINDOW, "num_local_experts": 2,
                                     "intermediate_size_mlp": 48, "no_rope_layers": [1, 0]}, "decoder"),
    "deepseek_v3": ("DeepseekV3ForCausalLM", {**DECODER, "num_key_value_heads": 4, "q_lora_rank": 16,
                                              "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
                                              "v_head_dim": 8, "first_k_dense_replace": 2}, "decoder"),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512,
                                 "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}, "decoder"),
    "gpt_neox": ("GPTNeoXForCausalLM", DECODER, "decoder"),
    "bert": ("BertForMaskedLM", ENCODER, "encoder"),
    "roberta": ("RobertaForMaskedLM", ENCODER, "encoder"),
    "distilbert": ("DistilBertForMaskedLM", {"vocab_size": VOCAB, "dim": 32, "hidden_dim": 48, "n_layers": 2,
                                             "n_heads": 4}, "encoder"),
    "modernbert": ("ModernBertForMaskedLM", {**ENCODER, "local_attention": 2 * WINDOW, "cls_token_id": 1,
                                             "sep_token_id": 2, "global_attn_every_n_layers": 2}, "encoder"),
    "t5": ("T5ForConditionalGeneration", {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2,
                                          "num_heads": 4, "decoder_start_token_id": 0, "pad_token_id": 0,
                                          "eos_token_id": None}, "seq2seq"),
    "bart": ("BartForConditionalGeneration", SEQ2SEQ, "seq2seq"),
    "whisper": ("WhisperForConditionalGeneration", {**SEQ2SEQ, "max_source_positions": SEQLEN, "num_mel_bins": 8,
                                                    "max_target_positions": 64}, "audio"),
    "vit": ("ViTForImageClassification", VISION, "vision"),
    "siglip": ("SiglipVisionModel", VISION, "vision"),
    "clip": ("CLIPModel", {"text_config": {**ENCODER, "bos_token_id": 1, "eos_token_id": 2}, "vision_config": VISION,
                           "projection_dim": 16}, "both"),
}  # fmt: skip
# families whose attention no attn_implementation reaches in some of the older versions of transformers
SOMETIMES_OWN = ("bert", "roberta", "distilbert", "modernbert", "t5")
VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
NO_FP64 = ["clip"] if VERSION < (5, 0) else []  # it makes a mask in fp32 with the smallest number of fp64
HAS_OWN_ATTENTION = "this version of transformers gives the family an attention that no attn_implementation reaches"
DROPOUTS = ("attention_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob", "attn_pdrop", "resid_pdrop",
            "embd_pdrop", "dropout_rate", "dropout", "activation_dropout", "hidden_dropout", "mlp_dropout",
            "embedding_dropout")  # fmt: skip
PADDINGS = {
    "decoder": ("whole", "left", "right", "packed"), "encoder": ("whole", "left", "right"), "vision": ("whole",),
    "seq2seq": ("whole", "left", "right"), "audio": ("whole",), "both": ("right",),
}  # fmt: skip


@functools.cache
def model_of(family):
    """A model whose weights are larger than its own initialisation, so that attention is far from uniform."""
    name, changes, _ = FAMILIES[family]
    config = getattr(transformers, name).config_class(**copy.deepcopy(changes))
    for part in (config, getattr(config, "text_config", None), getattr(config, "vision_config", None)):
        for label in DROPOUTS:
            if hasattr(part, label):
                setattr(part, label, 0.0)
    config._experts_implementation = "eager"  # the grouped product has no fp64
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).float()
    for parameter in model.parameters():
        parameter.data += 0.15 * torch.randn_like(parameter)
    return model.train()


def has_own_attention(family):
    """Whether no attn_implementation reaches the attention of a family, as the installed transformers says itself."""
    return family in SOMETIMES_OWN and not model_of(family)._can_set_attn_implementation()


def inputs_of(kind, padding, seqlen=SEQLEN):
    """(arguments of the model, the rows of its logits to compare)."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (BATCH, seqlen), generator=generator)
    real = torch.ones_like(ids)
    if padding in ("left", "right"):
        real[1, :7] = 0
        real = real if padding == "left" else real.flip(1)
    given = {"input_ids": ids}
    if padding == "packed":
        ends = (5, 6, seqlen), (11, seqlen)
        given["position_ids"] = torch.stack(
            [
                torch.cat([torch.arange(end - start) for start, end in zip((0, *row[:-1]), row, strict=True)])
                for row in ends
            ]
        )
        given["use_cache"] = False  # with a cache, transformers does not look for documents
    elif padding != "whole":
        given["attention_mask"] = real
    images = {"pixel_values": torch.randn(BATCH, 3, 16, 16, generator=generator)}
    if kind == "seq2seq":
        given["decoder_input_ids"], real = ids[:, :9].flip(1), real.new_ones(BATCH, 9)
    elif kind == "audio":
        given = {"input_features": torch.randn(BATCH, 8, 2 * seqlen, generator=generator), "decoder_input_ids": ids}
    elif kind == "vision":
        given, real = images, None
    elif kind == "both":
        given, real = given | images, None
    return given, real


def logits_and_gradients(model, given, real):
    """The logits of the rows to compare, and the gradients of all parameters."""
    model.zero_grad()
    dtype = next(model.parameters()).dtype
    given = {label: t.to(dtype) if torch.is_tensor(t) and t.is_floating_point() else t for label, t in given.items()}
    out = model(**given)
    logits = next(out[label] for label in ("logits", "logits_per_image", "last_hidden_state") if label in out)
    if real is not None:
        logits = logits[real.bool()]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    (logits * weights).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    """Check results of `logits_and_gradients` in fp32 against each other."""
    (logits, grads), (expected_logits, expected_grads) = found, expected
    torch.testing.assert_close(logits, expected_logits, atol=2e-5 * expected_logits.abs().max().item(), rtol=1e-4)
    largest = max(grad.abs().max().item() for grad in expected_grads.values())
    assert grads.keys() == expected_grads.keys()
    for key, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[key], atol=2e-5 * largest, rtol=1e-3, msg=key)


def plain_attention(module, q, k, v, mask, scaling=None, softcap=None, s_aux=None, position_bias=None, **_):
    """Attention written out in fp64; eager masks with a number that its softmax in fp32 does not have.

    mask: bool, or floats that are 0 at visible keys, as some models of transformers 4.57 make theirs.
    """
    mask = mask == 0 if mask is not None and mask.is_floating_point() else mask
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores if position_bias is None else scores + position_bias
    scores = scores if mask is None else scores.masked_fill(~mask, torch.finfo(scores.dtype).min / 2)
    sinks = scores.new_empty(0) if s_aux is None else s_aux[None, :, None, None].expand(*scores.shape[:3], 1)
    weights = torch.cat([scores, sinks], -1).softmax(-1) if s_aux is not None else scores.softmax(-1)
    return (weights[..., : k.shape[2]] @ v).transpose(1, 2), None


def plain_mask(*, allow_is_causal_skip, **given):
    return masking_utils.sdpa_mask(allow_is_causal_skip=False, **given)


@contextlib.contextmanager
def plain_implementation():
    """Registers attn_implementation="plain", which is attention written out, while it is entered."""
    transformers.AttentionInterface.register("plain", plain_attention)
    transformers.AttentionMaskInterface.register("plain", plain_mask)
    yield
    for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
        del interface._global_mapping["plain"]


class RoundedLayer(transformers.cache_utils.QuantizedLayer):
    """The quantised cache of transformers, with a quantisation that needs no package: it keeps bfloat16."""

    def _quantize(self, tensor, axis):
        return tensor.to(torch.bfloat16)

    def _dequantize(self, tensor):
        return tensor.float()


def quantised_cache(model):
    """A cache that gives plain tensors after it has rounded them, four tokens at a time."""
    layers = [RoundedLayer(residual_length=4) for _ in range(model.config.num_hidden_layers)]
    return {"past_key_values": transformers.Cache(layers=layers)}
