"""Llama and its relatives: Mistral, Qwen 2 and 3, Gemma 1 to 3, OLMo 1 and 2, nanochat. One row of a table each."""

import re
from dataclasses import dataclass, field
from typing import Any

import torch

from fastattn.models import CausalLM
from fastattn.models.shape import Shape

from .values import check_needed, differences, look_up, read_rotary, read_windows, reverse, write_rotary, write_windows

_PREFIX, _BLOCK = "model.", "layers.{}."
_LLAMA_NORMS = {"input_layernorm": "norm1", "post_attention_layernorm": "norm2"}
_GEMMA_NORMS = {
    "input_layernorm": "norm1", "post_attention_layernorm": "norm1_out", "pre_feedforward_layernorm": "norm2",
    "post_feedforward_layernorm": "norm2_out",
}  # fmt: skip
_QK_NORMS = {"self_attn.q_norm": "self_attn.q_norm", "self_attn.k_norm": "self_attn.k_norm"}
_GATED = {"mlp.gate_proj": "gate", "mlp.up_proj": "linear1", "mlp.down_proj": "linear2"}
_IGNORED = re.compile(r".*rotary_emb\.inv_freq")  # computed


@dataclass(frozen=True)
class Decoder:
    """One family.

    kind, architecture: model_type and class in transformers. block: names inside a block, theirs → ours. fixed: fields
    of a Shape that the config does not decide. defaults: values for a config that leaves them out. needed: values that
    a config must have. feed_forwards: their activation → ours. norm_offset: added to norm weights, which are stored
    around 0. backwards: their rotary embedding rotates in the other direction. pattern: the layers with a window if the
    config does not say which.
    """

    kind: str
    architecture: str
    block: dict[str, str]
    fixed: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    needed: dict[str, Any] = field(default_factory=dict)
    feed_forwards: dict[str, str] = field(default_factory=lambda: {"silu": "swiglu", "swish": "swiglu"})
    activation: str = "hidden_act"
    norm_offset: float = 0.0
    backwards: bool = False
    pattern: str | None = None

    @property
    def kinds(self):
        return (self.kind,)

    @property
    def window_settings(self):
        """The settings about windows that the family has."""
        if "sliding_window" in self.defaults:
            return ("sliding_window", "layer_types", "use_sliding_window")
        return () if self.pattern is None else ("sliding_window",)

    @property
    def is_gemma(self):
        return "attn_logit_softcapping" in self.defaults

    def read_shape(self, config, names):
        """(task, labels, shape) of a config, as `read_config` returns them; names: of all tensors."""
        config, head = {**self.defaults, **config}, "lm_head.weight" in names
        check_needed(config, {"attention_bias": False, "use_bidirectional_attention": False, **self.needed})
        window, pattern = read_windows(config, self.pattern)
        shape = {
            "n_layer": config["num_hidden_layers"], "n_head": config["num_attention_heads"],
            "d_model": config["hidden_size"],
            "n_kv_head": config.get("num_key_value_heads") or config["num_attention_heads"],
            "d_ff": config["intermediate_size"], "head_dim": config.get("head_dim"),
            "block_size": config["max_position_embeddings"], "dropout": config.get("attention_dropout") or 0.0,
            "bias": False, "positions": "rotary", "rotary": read_rotary(config, config.get("default_base", 10000.0)),
            "window": window, "window_pattern": pattern, "norm": "rms", "norm_eps": config.get("rms_norm_eps", 1e-6),
            "feed_forward": look_up(self.feed_forwards, config[self.activation], "the activation"),
            "logit_softcap": float(config.get("final_logit_softcapping") or 0.0),
            "tied": not head or config.get("tie_word_embeddings", False), "head_transform": False, "pooling": "mean",
            **self.fixed,
        }  # fmt: skip
        if self.is_gemma:
            shape["attention_scale"] = config["query_pre_attn_scalar"] ** -0.5
            shape["attention_softcap"] = float(config.get("attn_logit_softcapping") or 0.0)
        return "lm", None, shape

    def read_weights(self, tensors, shape):
        """{our name: fp32 tensor}; shape as from `read_shape`."""
        weights, rows = {}, {}
        names = {"embed_tokens": "token_embedding", "norm": "norm"}
        for name, value in tensors.items():
            plain = name.removeprefix(_PREFIX)
            found = re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", plain)
            value = value.float()
            if found and (part := re.fullmatch(r"self_attn\.([qkv])_proj", found[2])):
                rows[int(found[1]), found[3], "qkv".index(part[1])] = value
            elif found and found[2] in self.block:
                ours = self.block[found[2]]
                weights[f"blocks.{found[1]}.{ours}.{found[3]}"] = value + self.norm_offset * ("norm" in ours)
            elif plain.rpartition(".")[0] in names:
                stem = names[plain.rpartition(".")[0]]
                weights[f"{stem}.weight"] = value + self.norm_offset * (stem == "norm")
            elif plain == "lm_head.weight":
                if not shape["tied"]:
                    weights["head.weight"] = value
            elif not _IGNORED.fullmatch(plain):
                raise ValueError(f"the tensor {name} is not part of a model of type {self.kind}")
        for layer, leaf in {key[:2] for key in rows}:
            parts = [rows[layer, leaf, number] for number in range(3)]
            parts[:2] = [self._turn(part, shape) for part in parts[:2]]
            weights[f"blocks.{layer}.self_attn.in_proj_{leaf}"] = torch.cat(parts)
        return weights

    def _turn(self, rows, shape):
        """Rows of queries or keys for our direction of rotation: the halves of each head swap places."""
        if not self.backwards:
            return rows
        width = shape["head_dim"] or shape["d_model"] // shape["n_head"]
        return rows.unflatten(0, (-1, 2, width // 2)).flip(1).flatten(0, 2)

    def write_config(self, model):
        """The config.json of a CausalLM; ValueError if this family lacks a feature of it."""
        if not isinstance(model, CausalLM):
            raise ValueError(f"{self.kind} is a language model, got a {type(model).__name__}")
        shape, untied = model.shape, model.head.weight is not None
        config = {
            "model_type": self.kind, "architectures": [self.architecture], "dtype": "float32",
            "vocab_size": model.token_embedding.num_embeddings, "hidden_size": shape.d_model,
            "intermediate_size": shape.hidden, "num_hidden_layers": shape.n_layer, "num_attention_heads": shape.n_head,
            "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_width,
            "max_position_embeddings": shape.block_size, "rms_norm_eps": shape.norm_eps,
            self.activation: reverse(self.feed_forwards).get(shape.feed_forward), "attention_dropout": 0.0,
            "attention_bias": False, "tie_word_embeddings": not untied, **write_windows(shape),
            **write_rotary(shape.rotary, self.kind == "gemma3_text"),
        }  # fmt: skip
        for name in ("sliding_window", "layer_types", "use_sliding_window"):
            if name not in self.window_settings:
                del config[name]
        if "final_logit_softcapping" in self.defaults:
            config["final_logit_softcapping"] = shape.logit_softcap or None
        if self.is_gemma:
            scale = shape.attention_scale or shape.head_width**-0.5
            config["query_pre_attn_scalar"] = round(scale**-2)
            config["attn_logit_softcapping"] = shape.attention_softcap or None
        self._check_written(shape, config, untied)
        return config

    def _check_written(self, shape, config, untied):
        """Raise ValueError unless the config means the Shape."""
        try:
            read = self.read_shape(config, {"lm_head.weight"} if untied else set())[2]
        except ValueError as error:
            raise ValueError(f"{self.kind}: {error}") from None
        for name in ("tied", "head_transform", "pooling"):
            del read[name]
        if different := differences(shape, Shape(**read)):
            raise ValueError(f"{self.kind} differs in {', '.join(different)}")

    def write_weights(self, model):
        """{their name: tensor}."""
        theirs, names = reverse(self.block), {"token_embedding": "embed_tokens", "norm": "norm"}
        shape, tensors = model.shape, {}
        sizes = [n * shape.head_width for n in (shape.n_head, shape.kv_heads, shape.kv_heads)]
        for name, value in model.state_dict().items():
            stem, _, leaf = name.rpartition(".")
            block, _, inner = stem.removeprefix("blocks.").partition(".")
            if name == "head.weight":
                tensors["lm_head.weight"] = value
            elif stem in names:
                tensors[f"{_PREFIX}{names[stem]}.{leaf}"] = value - self.norm_offset * (stem == "norm")
            elif leaf.startswith("in_proj_"):
                for letter, part in zip("qkv", value.split(sizes), strict=True):
                    part = part if letter == "v" else self._turn(part, vars(shape))
                    own = f"self_attn.{letter}_proj.{leaf.removeprefix('in_proj_')}"
                    tensors[_PREFIX + _BLOCK.format(block) + own] = part.contiguous()
            else:
                offset = self.norm_offset * ("norm" in inner)
                tensors[_PREFIX + _BLOCK.format(block) + f"{theirs[inner]}.{leaf}"] = value - offset
        return tensors


_OUT = {"self_attn.o_proj": "self_attn.out_proj"}
_LLAMA = {**_OUT, **_GATED, **_LLAMA_NORMS}
_GEMMA_ACT = {"gelu_pytorch_tanh": "geglu_tanh"}
_GEMMA_OLD_ACT = {**_GEMMA_ACT, "gelu": "geglu_tanh"}  # Gemma 1 was published with "gelu", but computes "gelu_tanh"
_WINDOWS = {"sliding_window": 4096, "use_sliding_window": False}
_GEMMA = {
    "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096, "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": True,
}  # fmt: skip
DECODERS = (
    Decoder("llama", "LlamaForCausalLM", _LLAMA, needed={"mlp_bias": False, "pretraining_tp": 1}),
    Decoder("qwen2", "Qwen2ForCausalLM", _LLAMA, {"qkv_bias": True}, _WINDOWS,),
    Decoder(
        "qwen3", "Qwen3ForCausalLM", {**_LLAMA, **_QK_NORMS}, {"qk_norm": "head"}, {"head_dim": 128, **_WINDOWS},
    ),
    Decoder("mistral", "MistralForCausalLM", _LLAMA, pattern="S"),
    Decoder(
        "gemma", "GemmaForCausalLM", _LLAMA, {"embedding_scale": True},
        {"head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True},
        feed_forwards=_GEMMA_OLD_ACT, norm_offset=1.0,
    ),
    Decoder(
        "gemma2", "Gemma2ForCausalLM", {**_OUT, **_GATED, **_GEMMA_NORMS},
        {"embedding_scale": True, "norm_output": True},
        {**_GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        feed_forwards=_GEMMA_ACT, activation="hidden_activation", norm_offset=1.0, pattern="SL",
    ),
    Decoder(
        "gemma3_text", "Gemma3ForCausalLM", {**_OUT, **_GATED, **_GEMMA_NORMS, **_QK_NORMS},
        {"embedding_scale": True, "norm_output": True, "qk_norm": "head"},
        {**_GEMMA, "default_base": 1e6, "rope_local_base_freq": 1e4},
        feed_forwards=_GEMMA_ACT, activation="hidden_activation", norm_offset=1.0, pattern="SSSSSL",
    ),
    Decoder(
        "olmo", "OlmoForCausalLM", {**_OUT, **_GATED}, {"norm": "layer", "norm_weight": False, "norm_eps": 1e-5},
        needed={"clip_qkv": None},
    ),
    Decoder(
        "olmo2", "Olmo2ForCausalLM",
        {**_OUT, **_GATED, "post_attention_layernorm": "norm1_out", "post_feedforward_layernorm": "norm2_out",
         **_QK_NORMS},
        {"norm_first": False, "norm_output": True, "qk_norm": "all"},
    ),
    Decoder(
        "nanochat", "NanoChatForCausalLM", {**_OUT, "mlp.fc1": "linear1", "mlp.fc2": "linear2"},
        {"norm_weight": False, "qk_norm": "head", "embedding_norm": True}, {"final_logit_softcapping": 15.0},
        feed_forwards={"relu2": "relu2"}, backwards=True,
    ),
)  # fmt: skip
