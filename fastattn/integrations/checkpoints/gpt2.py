"""GPT-2: its matrices are stored as (columns, rows), queries, keys and values as one."""

import re

from fastattn.models import CausalLM
from fastattn.models.shape import Shape

from .values import ACTIVATIONS, check_needed, differences, look_up, reverse

# name in a checkpoint, without the model's prefix → ours; {} is the number of a block
_NAMES = {
    "wte": "token_embedding",
    "wpe": "position_embedding",
    "ln_f": "norm",
    "h.{}.ln_1": "blocks.{}.norm1",
    "h.{}.ln_2": "blocks.{}.norm2",
    "h.{}.attn.c_attn": "blocks.{}.self_attn.in_proj_",
    "h.{}.attn.c_proj": "blocks.{}.self_attn.out_proj",
    "h.{}.mlp.c_fc": "blocks.{}.linear1",
    "h.{}.mlp.c_proj": "blocks.{}.linear2",
}
_IGNORED = re.compile(r".*\.(attn\.bias|attn\.masked_bias)")  # computed
_NEEDED = {"add_cross_attention": False, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}


class Gpt2:
    kinds = ("gpt2",)

    def read_shape(self, config, names):
        """(task, labels, shape) of a config; names: of all tensors."""
        check_needed(config, _NEEDED)
        shape = {
            "n_layer": config["n_layer"], "n_head": config["n_head"], "d_model": config["n_embd"],
            "d_ff": config.get("n_inner") or 4 * config["n_embd"], "block_size": config["n_positions"],
            "dropout": config.get("resid_pdrop", 0.1), "norm_first": True, "positions": "learned", "bias": True,
            "feed_forward": look_up(ACTIVATIONS, config.get("activation_function", "gelu_new"), "the activation"),
            "norm_eps": config.get("layer_norm_epsilon", 1e-5), "head_transform": False, "pooling": "mean",
            "tied": "lm_head.weight" not in names or config.get("tie_word_embeddings", True),
        }  # fmt: skip
        return "lm", None, shape

    def read_weights(self, tensors, shape):
        """{our name: fp32 tensor}; shape as from `read_shape`."""
        weights = {}
        for name, value in tensors.items():
            plain = name.removeprefix("transformer.")
            block = re.match(r"h\.(\d+)\.", plain)
            general = plain if block is None else plain.replace(f".{block[1]}.", ".{}.", 1)
            stem, _, leaf = general.rpartition(".")
            if stem in _NAMES:
                is_matrix = block is not None and value.dim() == 2  # Conv1D: (columns, rows)
                ours = f"{_NAMES[stem]}.{leaf}".replace("proj_.", "proj_").format(block[1] if block else "")
                weights[ours] = (value.T if is_matrix else value).float().contiguous()
            elif plain == "lm_head.weight":
                if not shape["tied"]:
                    weights["head.weight"] = value.float()
            elif not _IGNORED.fullmatch(plain):
                raise ValueError(f"the tensor {name} is not part of a BERT or GPT-2")
        return weights

    def write_config(self, model):
        """The config.json of a CausalLM; ValueError if GPT-2 lacks a feature of it."""
        if not isinstance(model, CausalLM):
            raise ValueError(f"gpt2 is a language model, got a {type(model).__name__}")
        shape, untied = model.shape, model.head.weight is not None
        activation = "gelu_new" if shape.feed_forward == "gelu_tanh" else shape.feed_forward
        config = {
            "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "dtype": "float32",
            "vocab_size": model.token_embedding.num_embeddings, "n_embd": shape.d_model, "n_inner": shape.hidden,
            "n_layer": shape.n_layer, "n_head": shape.n_head, "n_positions": shape.block_size,
            "activation_function": activation, "layer_norm_epsilon": shape.norm_eps, "tie_word_embeddings": not untied,
            "resid_pdrop": shape.dropout, "embd_pdrop": shape.dropout, "attn_pdrop": shape.dropout,
        }  # fmt: skip
        try:
            read = self.read_shape(config, {"lm_head.weight"} if untied else set())[2]
        except ValueError as error:
            raise ValueError(f"gpt2: {error}") from None
        del read["tied"], read["head_transform"], read["pooling"]
        if different := differences(shape, Shape(**read)):
            raise ValueError(f"gpt2 differs in {', '.join(different)}")
        return config

    def write_weights(self, model):
        """{their name: tensor}."""
        theirs, tensors = reverse(_NAMES), {}
        for name, value in model.state_dict().items():
            block = re.match(r"blocks\.(\d+)\.", name)
            general = name if block is None else name.replace(f".{block[1]}.", ".{}.", 1)
            stem, _, leaf = general.replace("in_proj_", "in_proj_.").rpartition(".")
            if name == "head.weight":
                tensors["lm_head.weight"] = value
                continue
            is_matrix = block is not None and value.dim() == 2
            full = f"transformer.{theirs[stem]}.{leaf}".format(block[1] if block else "")
            tensors[full] = (value.T if is_matrix else value).contiguous()
        return tensors


GPT2 = Gpt2()
