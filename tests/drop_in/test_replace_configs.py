"""`replace` on configurations that change what a family computes: logits, gradients, and the old bits after `undo`.

Partial rotary embeddings, soft caps, sinks, patterns of windows, heads of another width than hidden / heads, tied and
biased layers, mixtures of experts, scaled residuals, cross attention, post-norm, images with rotary embeddings.
"""

import copy
import re

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
import transformers
from transformers_families import (
    DECODER,
    DROPOUTS,
    ENCODER,
    FAMILIES,
    GROUPED,
    SEQ2SEQ,
    VERSION,
    VISION,
    WINDOW,
    assert_same,
    inputs_of,
    logits_and_gradients,
)

import fastattn

pytestmark = pytest.mark.skipif(VERSION < (5, 24), reason="configurations as transformers 5.24 has them")

WIDE = {**GROUPED, "head_dim": 16}
PATTERN = {"sliding_window": WINDOW, "layer_types": ["full_attention", "sliding_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FALCON = [r".*(dense|query_key_value)(_\w+)?", ""]  # linear layers of a class of its own; no attn_implementation
GPT = {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
# class: (config, kind of inputs, patterns of the names that are left alone)
CONFIGS = {
    "Llama, biases, tied, wide heads": (
        "LlamaForCausalLM", {**WIDE, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, "decoder"),
    "Qwen 2, window from a layer on": (
        "Qwen2ForCausalLM", {**GROUPED, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        "decoder"),
    "Gemma 2, both soft caps": (
        "Gemma2ForCausalLM", {**WIDE, "sliding_window": WINDOW, "attn_logit_softcapping": 2.0,
                              "final_logit_softcapping": 1.5, "query_pre_attn_scalar": 16}, "decoder"),
    "Gemma 3, biases": ("Gemma3ForCausalLM", {**GROUPED, **PATTERN, "attention_bias": True}, "decoder"),
    "GPT-NeoX, partial, sequential": (
        "GPTNeoXForCausalLM", {**DECODER, "rotary_pct": 0.5, "use_parallel_residual": False}, "decoder"),
    "Phi, partial, norms of q and k": (
        "PhiForCausalLM", {**GROUPED, "partial_rotary_factor": 0.5, "qk_layernorm": True}, "decoder"),
    "Phi-3, partial, tied": (
        "Phi3ForCausalLM", {**GROUPED, "partial_rotary_factor": 0.5, "tie_word_embeddings": True}, "decoder"),
    "StableLM, parallel": (
        "StableLmForCausalLM", {**GROUPED, "partial_rotary_factor": 0.5, "qk_layernorm": True, "use_qkv_bias": True,
                                "use_parallel_residual": True}, "decoder"),
    "Nemotron, 1 + weight": ("NemotronForCausalLM", {**GROUPED, "partial_rotary_factor": 0.5}, "decoder"),
    "GLM 4, interleaved, partial": ("Glm4ForCausalLM", WIDE, "decoder"),
    "Cohere 2, interleaved, pattern": ("Cohere2ForCausalLM", {**GROUPED, **PATTERN}, "decoder"),
    "OLMo, clipped": ("OlmoForCausalLM", {**GROUPED, "clip_qkv": 0.5}, "decoder"),
    "OLMo 3, pattern": ("Olmo3ForCausalLM", {**GROUPED, **PATTERN}, "decoder"),
    "gpt-oss, wide heads, pattern": (
        "GptOssForCausalLM", {**WIDE, **PATTERN, "num_local_experts": 4, "num_experts_per_tok": 2}, "decoder"),
    "Granite, multipliers": (
        "GraniteForCausalLM", {**GROUPED, "embedding_multiplier": 2.0, "residual_multiplier": 0.5,
                               "attention_multiplier": 0.3, "logits_scaling": 4.0}, "decoder"),
    "Qwen 3 MoE, one dense layer": (
        "Qwen3MoeForCausalLM", {**GROUPED, **EXPERTS, "norm_topk_prob": True, "mlp_only_layers": [0]}, "decoder"),
    "Qwen 2 MoE, shared expert": (
        "Qwen2MoeForCausalLM", {**GROUPED, **EXPERTS, "shared_expert_intermediate_size": 24}, "decoder"),
    "DeepSeek V3, experts, half-split": (
        "DeepseekV3ForCausalLM", {**FAMILIES["deepseek_v3"][1], "rope_interleave": False, "first_k_dense_replace": 1,
                                  "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
                                  "moe_intermediate_size": 24}, "decoder"),
    "SmolLM3, a layer without positions": (
        "SmolLM3ForCausalLM", {**GROUPED, "no_rope_layers": [1, 0]}, "decoder"),
    "Qwen 3 Next, linear attention": (
        "Qwen3NextForCausalLM", {**GROUPED, **EXPERTS, "shared_expert_intermediate_size": 24,
                                 "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4,
                                 "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
        "decoder", [r".*linear_attn\.norm"]),
    "OPT, post-norm, projected": (
        "OPTForCausalLM", {**DECODER, "ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
        "decoder"),
    "Falcon, ALiBi": ("FalconForCausalLM", {**DECODER, "alibi": True, "multi_query": False, "bias": True,
                                            "parallel_attn": False}, "decoder", FALCON),
    "GPT-J, rotary of q and of k by itself": ("GPTJForCausalLM", {**GPT, "rotary_dim": 4}, "decoder"),
    "CodeGen, the same": ("CodeGenForCausalLM", {**GPT, "rotary_dim": 4}, "decoder"),
    "Gemma 3n, shared keys": (
        "Gemma3nForCausalLM", {**GROUPED, **PATTERN, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 40,
                               "laurel_rank": 4, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0]},
        "decoder"),
    "DeepSeek V2, rotary by complex numbers": (
        "DeepseekV2ForCausalLM", {**FAMILIES["deepseek_v3"][1], "head_dim": 8, "first_k_dense_replace": 2}, "decoder"),
    "GPT-2, scaled by layer": ("GPT2LMHeadModel", {**GPT, "scale_attn_by_inverse_layer_idx": True}, "decoder"),
    "ModernBERT, decoder": ("ModernBertDecoderForCausalLM", FAMILIES["modernbert"][1], "decoder"),
    "ModernBERT, biases, no window": (
        "ModernBertForMaskedLM", {**FAMILIES["modernbert"][1], "global_attn_every_n_layers": 1, "attention_bias": True,
                                  "norm_bias": True, "mlp_bias": True}, "encoder"),
    "ESM, rotary": ("EsmForMaskedLM", {**ENCODER, "position_embedding_type": "rotary", "mask_token_id": 4,
                                       "token_dropout": False}, "encoder"),
    "EuroBERT": ("EuroBertForMaskedLM", {**ENCODER, "num_key_value_heads": 2}, "encoder"),
    "T5, untied, gated": (
        "T5ForConditionalGeneration", {**FAMILIES["t5"][1], "tie_word_embeddings": False,
                                       "feed_forward_proj": "gated-gelu"}, "seq2seq"),
    "UMT5, a bias for each layer": (
        "UMT5ForConditionalGeneration", {**FAMILIES["t5"][1], "feed_forward_proj": "gated-gelu"}, "seq2seq"),
    "mBART, pre-norm": ("MBartForConditionalGeneration", SEQ2SEQ, "seq2seq"),
    "BERT to BERT": ("EncoderDecoderModel", {}, "seq2seq"),
    "DINOv2, gated": ("Dinov2ForImageClassification", {**VISION, "mlp_ratio": 2, "use_swiglu_ffn": True}, "vision"),
    "Pixtral, rotary in two dimensions": ("PixtralVisionModel", {**VISION, "head_dim": 8}, "vision"),
}  # fmt: skip


def model_of(name):
    kind, changes = getattr(transformers, CONFIGS[name][0]), CONFIGS[name][1]
    if kind is transformers.EncoderDecoderModel:
        decoder = transformers.BertConfig(**ENCODER, is_decoder=True, add_cross_attention=True)
        config = kind.config_class.from_encoder_decoder_configs(transformers.BertConfig(**ENCODER), decoder)
        config.decoder_start_token_id, config.pad_token_id = 1, 0
        parts = [config.encoder, config.decoder]
    else:
        config = kind.config_class(**copy.deepcopy(changes))
        parts = [config]
    for part in parts:
        for label in DROPOUTS:
            if hasattr(part, label):
                setattr(part, label, 0.0)
        part._experts_implementation = "eager"
    torch.manual_seed(0)
    model = kind(config).train()
    for parameter in model.parameters():
        parameter.data += 0.15 * torch.randn_like(parameter)
    model.set_attn_implementation("eager")
    return model


@pytest.fixture(scope="module", autouse=True)
def small_layers_too():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastattn.ops.linear, "_LEAST", 0)  # our product serves layers of these sizes too
        yield


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients(name):
    _, _, kind, *left = CONFIGS[name]
    model = model_of(name)
    case = inputs_of(kind, "whole" if kind == "vision" else "right")
    logits, grads = logits_and_gradients(model, *case)
    report = fastattn.replace(model)
    patterns = left[0] if left else []
    assert all(any(re.fullmatch(pattern, where) for pattern in patterns) for where in report.left), report.left
    assert all(any(re.fullmatch(pattern, where) for where in report.left) for pattern in patterns), report.left
    assert_same(logits_and_gradients(model, *case), (logits, grads))
    report.undo()
    again, again_grads = logits_and_gradients(model, *case)
    assert torch.equal(again, logits)
    assert all(torch.equal(again_grads[key], grad) for key, grad in grads.items())
