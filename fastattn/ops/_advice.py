"""Advice for arguments that a function does not have, such as the names that PyTorch and flash-attn use.

A key holds the unknown names, separated by spaces; the text says what to use instead. The key "*" is for too many
positional arguments. The name of an argument that exists is for a value of the wrong type.
"""


def _table(*parts):
    """One dict with a key per name."""
    return {name: text for part in parts for names, text in part.items() for name in names.split()}


_DROPOUT = {
    "dropout p dropout_prob dropout_rate attn_dropout attention_dropout": "use dropout_p=",
    "training is_training": "dropout is always applied: pass dropout_p=0.0 in evaluation",
}
_NO_DROPOUT = dict.fromkeys((*_DROPOUT, "dropout_p"), "it has no dropout")
_SCORES = {
    "softmax_scale sm_scale scaling": "use scale=",
    "need_weights average_attn_weights output_attentions": "the weights are never stored; nn.MultiheadAttention"
    " computes them in a second pass",
    "layout qkv_format tensor_layout": "tensors are (batch, heads, seqlen, head_dim); transpose(1, 2) of a (batch,"
    " seqlen, heads, head_dim) tensor costs no copy",
}
_FLASH_3 = {
    "q_descale k_descale v_descale": "there is no float8 attention",
    "attention_chunk": "use mask= (bool, True = attend)",
    "qv q_v pack_gqa sm_margin scheduler_metadata": "it has no counterpart here",
}
_ATTENTION = (
    _SCORES
    | _FLASH_3
    | {
        "window_size local_window_size": "use window=(left, right)",
        "sliding_window": "use window=(sliding_window - 1, 0)",
        "soft_cap logit_cap logits_soft_cap logit_softcap": "use softcap=",
        "sinks s_aux learnable_sink": "use sink=",
        "return_attn_probs return_softmax return_softmax_lse": "use return_lse=True; the weights are never stored",
        "enable_gqa": "k and v may have fewer heads than q without it",
        "query key value": "use q=, k= and v=",
    }
)
_FLASH = _DROPOUT | {
    "scale sm_scale scaling": "use softmax_scale=",
    "window sliding_window": "use window_size=(left, right)",
    "is_causal": "use causal=True, which aligns the last query and key",
    "mask attn_mask attention_mask bias attn_bias": "call fastattn.attention with mask= or bias=",
    "key_padding_mask": "pack the sequences for flash_attn_varlen_func, or call fastattn.attention with mask=",
    "return_lse return_softmax_lse": "use return_attn_probs=True",
    "sink sinks s_aux learnable_sink": "call fastattn.attention with sink=",
    "seqused_k seqlens_k": "call fastattn.attention with seqlens_k=",
}
_NORM = _DROPOUT | {
    "normalized_shape dim": "it normalises the last dimension",
    "input hidden_states": "use x=",
    "gamma": "use weight=",
    "beta": "use bias=",
    "epsilon layer_norm_eps variance_epsilon": "use eps=",
    "prenorm": "use return_residual=True",
    "zero_centered_weight zero_centered_gamma offset": "use weight=1 + weight",
    "residual_in_fp32": "pass the residual in float32: it keeps its dtype",
}

_LAYER = {
    "d_ff dim_ff ff_dim hidden_dim intermediate_size": "use dim_feedforward=",
    "num_heads n_heads n_head": "use nhead=",
    "eps norm_eps layer_norm_epsilon": "use layer_norm_eps=",
    "pre_norm prenorm": "use norm_first=",
    "act act_fn activation_fn hidden_act": "use activation=",
    "dropout_p dropout_rate": "use dropout=",
}

ADVICE = {
    "attention": _table(
        _DROPOUT,
        _ATTENTION,
        {
            "is_causal": 'use causal="top_left" (query i sees keys 0 to i), or causal=True to align the last query and'
            " key",
            "attn_bias position_bias": "use bias= (added to the scores)",
            "score_mod block_mask mask_mod": "use mask= (bool, True = attend) and bias= (added to the scores)",
            "*": "use mask= (bool, True = attend), bias= and causal=, or call scaled_dot_product_attention, which takes"
            " attn_mask, dropout_p and is_causal by position",
            "attn_mask attention_mask": "use mask= (bool, True = attend) or bias= (added to the scores), or call"
            " scaled_dot_product_attention",
            "key_padding_mask": "use mask=~key_padding_mask[:, None, None, :] (True = attend), or seqlens_k=",
            "cu_seqlens": "use cu_seqlens_q= and cu_seqlens_k=",
            "max_seqlen": "use max_seqlen_q= and max_seqlen_k=",
            "seqused_k seqlens kv_seqlens": "use seqlens_k=",
            "seqused_q": "use cu_seqlens_q=, or ignore the rows of out that are padding",
            "k_cache v_cache cache_seqlens cache_batch_idx cache_leftpad block_table page_table num_splits": "call"
            " attention_decode",
            "rotary_cos rotary_sin rotary_interleaved": "rotate q and k with rotary_embedding first",
            "add_zero_attn add_bias_kv bias_k bias_v": "append the key and the value to k and v, or use"
            " nn.MultiheadAttention",
            "mask": "bool, True = attend",
            "bias": "float, added to the scores",
        },
    ),
    "scaled_dot_product_attention": _table(
        _DROPOUT,
        _SCORES,
        _FLASH_3 | {"attention_chunk": "use attn_mask= (bool, True = attend)"},
        {
            "q k v": "use query=, key= and value=",
            "mask bias attn_bias position_bias attention_mask": "use attn_mask= (bool, True = attend, or float, added"
            " to the scores)",
            "causal": "use is_causal=True (query i sees keys 0 to i), or call attention",
            "key_padding_mask": "use attn_mask=~key_padding_mask[:, None, None, :] (True = attend)",
            "window window_size sliding_window softcap alibi_slopes sink sinks s_aux learnable_sink seqlens_k seqused_k"
            " cu_seqlens max_seqlen cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k return_lse return_attn_probs"
            " return_softmax_lse deterministic backend": "call attention, which has it",
            "k_cache v_cache cache_seqlens cache_batch_idx cache_leftpad block_table page_table num_splits": "call"
            " attention_decode",
            "rotary_cos rotary_sin rotary_interleaved": "rotate query and key with rotary_embedding first",
            "attn_mask": "bool (True = attend) or float (added to the scores)",
        },
    ),
    "attention_decode": _table(
        _NO_DROPOUT,
        _ATTENTION,
        {
            "is_causal": 'use causal=True or "bottom_right"',
            "mask attn_mask attention_mask bias attn_bias key_padding_mask": "use cache_seqlens=, cache_leftpad= and"
            " window= to say which keys are visible",
            "rotary_cos rotary_sin rotary_interleaved": "rotate q and k with rotary_embedding first",
            "seqused_k seqlens_k": "use cache_seqlens= (valid keys before the call)",
            "cu_seqlens cu_seqlens_q cu_seqlens_k max_seqlen max_seqlen_q max_seqlen_k seqused_q": "every sequence has"
            " as many new queries as q; use cache_seqlens= and cache_batch_idx=",
            "attention_chunk": "use cache_leftpad= and window= to say which keys are visible",
            "deterministic": "it has no gradients, and its results are always the same",
            "page_table block_tables": "use block_table=",
            "cache_seqlens": "int32 (batch,), the valid keys of each sequence before the call",
        },
    ),
    "layer_norm": _table(_NORM, {"weight": "there is no normalized_shape: it normalises the last dimension"}),
    "rms_norm": _table(
        _NORM,
        {
            "bias beta": "it has none; x_bias= is added to x before the norm",
            "weight": "eps is the third argument, and there is no normalized_shape: it normalises the last dimension",
        },
    ),
    "dropout": _table(
        _DROPOUT,
        {
            "*": "there is no training flag: pass dropout_p=0.0 in evaluation",
            "input": "use x=",
            "inplace": "the result is a new tensor",
        },
    ),
    "feed_forward": _table(
        _DROPOUT,
        {
            "input hidden_states": "use x=",
            "act act_fn activation_fn hidden_act": "use activation=",
            "approximate": 'use activation="gelu_tanh"',
            "gate gated w3 gate_proj": "use w_gate=",
            "weight1 linear1 fc1 up_proj": "use w1= and b1=",
            "weight2 linear2 fc2 down_proj": "use w2= and b2=",
        },
    ),
    "linear_cross_entropy": _table(
        {
            "input hidden_states logits": "use x=, the input of the last linear layer",
            "labels targets": "use target=",
            "linear_bias lin_bias": "use bias=",
            "return_z_loss": "the loss includes it; its value alone is not returned",
            "lin_weight linear_weight lm_head classifier": "use weight=, (vocab, d_model)",
            "class_weight class_weights ce_weight": "the classes have no weights",
            "lse_square_scale": "use z_loss=",
            "logit_softcap soft_cap": "use softcap=",
            "size_average reduce": 'use reduction="mean", "sum" or "none"',
            "shift": "shift x and target first",
            "weight": "(vocab, d_model)",
        },
    ),
    "rotary_embedding": _table(
        {
            "*": "q and k are passed as one pair, (q, k)",
            "q k query key": "use x=(q, k)",
            "position_ids seqlen_offsets offset": "use positions=",
            "rotary_cos rotary_sin freqs_cis": "use cos= and sin=",
            "rotary_dim": "it follows from the width of cos",
            "cu_seqlens max_seqlen": "use positions= (total,), the position of each token in its sequence",
            "conjugate": "use -sin",
            "x": "or a pair of tensors",
        },
    ),
    "nn.MultiheadAttention": _table(
        {
            "d_model embedding_dim hidden_size": "use embed_dim=",
            "nhead n_heads n_head": "use num_heads=",
            "dropout_p attention_dropout": "use dropout=",
            "mask src_mask attention_mask": "use attn_mask= (bool: True = ignore)",
            "padding_mask src_key_padding_mask": "use key_padding_mask= (bool: True = ignore)",
            "causal": "use is_causal=",
        }
    ),
    "nn.TransformerEncoderLayer": _table(
        _LAYER,
        {
            "mask attn_mask attention_mask": "use src_mask= (bool: True = ignore)",
            "key_padding_mask padding_mask": "use src_key_padding_mask= (bool: True = ignore)",
            "causal": "use is_causal=",
        },
    ),
    "nn.TransformerDecoderLayer": _table(
        _LAYER,
        {
            "mask attn_mask attention_mask": "use tgt_mask= and memory_mask= (bool: True = ignore)",
            "key_padding_mask padding_mask": "use tgt_key_padding_mask= and memory_key_padding_mask= (bool: True ="
            " ignore)",
            "causal is_causal": "use tgt_is_causal=",
        },
    ),
    "nn.FeedForward": _table(
        {
            "dim_feedforward hidden_dim intermediate_size": "use d_ff=",
            "dropout_p p": "use dropout=",
            "act hidden_act": "use activation=",
        },
    ),
    "nn.RotaryEmbedding": _table(
        {
            "dim head_dim": "use rotary_dim=",
            "max_position_embeddings max_seq_len": "use max_seqlen=",
            "theta rope_theta": "use base=",
        },
    ),
    "flash_attn_with_kvcache": _table(
        _FLASH, _NO_DROPOUT, {"return_lse return_attn_probs": "use return_softmax_lse=True"}
    ),
}
for _kind in ("func", "kvpacked_func", "qkvpacked_func"):
    ADVICE[f"flash_attn_{_kind}"] = _table(
        _FLASH, {"cu_seqlens cu_seqlens_q cu_seqlens_k max_seqlen": f"call flash_attn_varlen_{_kind}"}
    )
    ADVICE[f"flash_attn_varlen_{_kind}"] = _table(_FLASH)
