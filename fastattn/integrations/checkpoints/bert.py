"""BERT: the first token type is added to every position, and queries, keys and values become one matrix."""

import re

import torch

from fastattn.models import Classifier, MaskedLM
from fastattn.models.shape import Shape

from .values import ACTIVATIONS, check_needed, differences, look_up, reverse

# name in a checkpoint, without the model's prefix → ours; {} is the number of a block
_NAMES = {
    "embeddings.word_embeddings": "encoder.token_embedding",
    "embeddings.position_embeddings": "encoder.position_embedding",
    "embeddings.LayerNorm": "encoder.norm",
    "encoder.layer.{}.attention.output.dense": "encoder.blocks.{}.self_attn.out_proj",
    "encoder.layer.{}.attention.output.LayerNorm": "encoder.blocks.{}.norm1",
    "encoder.layer.{}.intermediate.dense": "encoder.blocks.{}.linear1",
    "encoder.layer.{}.output.dense": "encoder.blocks.{}.linear2",
    "encoder.layer.{}.output.LayerNorm": "encoder.blocks.{}.norm2",
    "pooler.dense": "pooler",
    "cls.predictions.transform.dense": "head.dense",
    "cls.predictions.transform.LayerNorm": "head.norm",
    "classifier": "head",
}
# names of one tensor; the last is usually equal to the one before it, and if not, BERT uses it
_TENSORS = {"cls.predictions.bias": "head.bias", "cls.predictions.decoder.bias": "head.bias"}
_IGNORED = re.compile(r".*\.position_ids|cls\.seq_rel.*")  # computed, and a head that our models lack
_SELF = "encoder.layer.{}.attention.self.{}.{}"


class Bert:
    kinds = ("bert",)

    def read_shape(self, config, names):
        """(task, labels, shape) of a config; names: of all tensors."""
        check_needed(config, {"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"})
        activation = config.get("hidden_act", "gelu")
        has_head = "cls.predictions.bias" in names
        feed_forward = look_up(ACTIVATIONS, activation, "the activation")
        if has_head and activation != "gelu":
            raise ValueError(f"hidden_act must be 'gelu' with a masked language model's head, got {activation!r}")
        shape = {
            "n_layer": config["num_hidden_layers"], "n_head": config["num_attention_heads"],
            "d_model": config["hidden_size"], "d_ff": config["intermediate_size"],
            "block_size": config["max_position_embeddings"], "dropout": config.get("hidden_dropout_prob", 0.1),
            "feed_forward": feed_forward, "positions": "learned", "bias": True, "norm_first": False,
            "norm_eps": config.get("layer_norm_eps", 1e-12), "head_transform": has_head,
            "pooling": "pooler" if any("pooler.dense" in name for name in names) else "first",
            "tied": config.get("tie_word_embeddings", True),
        }  # fmt: skip
        if "classifier.weight" not in names:
            return "masked_lm", None, shape
        labels = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
        return "classify", [labels[number] for number in sorted(labels, key=int)], shape

    def read_weights(self, tensors, shape):
        """{our name: fp32 tensor} with the prefixes encoder, pooler and head; shape as from `read_shape`."""
        weights, parts, types = {}, {}, None
        for name, value in sorted(tensors.items()):
            value = value.float()
            plain = name.removeprefix("bert.").replace(".gamma", ".weight").replace(".beta", ".bias")
            block = re.search(r"layer\.(\d+)\.", plain)
            general = plain if block is None else plain.replace(f".{block[1]}.", ".{}.", 1)
            stem, _, leaf = general.rpartition(".")
            if part := re.fullmatch(r"encoder\.layer\.\{\}\.attention\.self\.(query|key|value)", stem):
                parts[block[1], leaf, part[1]] = value
            elif stem in _NAMES:
                weights[f"{_NAMES[stem]}.{leaf}".format(block[1] if block else "")] = value.contiguous()
            elif plain in _TENSORS:
                weights[_TENSORS[plain]] = value
            elif plain == "cls.predictions.decoder.weight":
                if not shape["tied"]:
                    weights["head.weight"] = value
            elif plain == "embeddings.token_type_embeddings.weight":
                types = value
            elif not _IGNORED.fullmatch(plain):
                raise ValueError(f"the tensor {name} is not part of a BERT or GPT-2")
        if types is not None:
            weights["encoder.position_embedding.weight"] = weights["encoder.position_embedding.weight"] + types[0]
        for number, leaf in {key[:2] for key in parts}:
            heads = [parts[number, leaf, part] for part in ("query", "key", "value")]
            weights[f"encoder.blocks.{number}.self_attn.in_proj_{leaf}"] = torch.cat(heads)
        return weights

    def write_config(self, model):
        """The config.json of a MaskedLM or Classifier, without its labels; ValueError if BERT lacks a feature of it."""
        is_classifier = type(model) is Classifier and model.body == "transformer"
        if not is_classifier and type(model) is not MaskedLM:
            raise ValueError(f"bert is an encoder, got a {type(model).__name__}")
        if is_classifier and model.pooling != "pooler":
            raise ValueError(f"bert needs model.pooling 'pooler', got {model.pooling!r}")
        if not is_classifier and model.head.dense is None:
            raise ValueError("bert needs model.head_transform, got a masked language model without it")
        shape = model.encoder.shape
        config = {
            "model_type": "bert", "dtype": "float32",
            "architectures": ["BertForSequenceClassification" if is_classifier else "BertForMaskedLM"],
            "vocab_size": model.encoder.token_embedding.num_embeddings, "hidden_size": shape.d_model,
            "num_hidden_layers": shape.n_layer, "num_attention_heads": shape.n_head,
            "intermediate_size": shape.hidden, "max_position_embeddings": shape.block_size, "type_vocab_size": 2,
            "hidden_act": reverse(ACTIVATIONS).get(shape.feed_forward), "layer_norm_eps": shape.norm_eps,
            "hidden_dropout_prob": shape.dropout, "attention_probs_dropout_prob": shape.dropout,
            "tie_word_embeddings": is_classifier or model.head.weight is None,
        }  # fmt: skip
        names = {"classifier.weight"} if is_classifier else {"cls.predictions.bias"}
        try:
            read = self.read_shape(config, names)[2]
        except ValueError as error:
            raise ValueError(f"bert: {error}") from None
        del read["tied"], read["head_transform"], read["pooling"]
        if different := differences(shape, Shape(**read)):
            raise ValueError(f"bert differs in {', '.join(different)}")
        return config

    def write_weights(self, model):
        """{their name: tensor}; both rows of token types are 0, since ours are part of the positions."""
        theirs, tensors = reverse(_NAMES), {}
        theirs["head"] = "classifier" if type(model) is Classifier else "cls.predictions.decoder"
        for name, value in model.state_dict().items():
            block = re.search(r"blocks\.(\d+)\.", name)
            general = name if block is None else name.replace(f".{block[1]}.", ".{}.", 1)
            stem, _, leaf = general.rpartition(".")
            if leaf.startswith("in_proj_"):
                for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    tensors["bert." + _SELF.format(block[1], part, leaf.removeprefix("in_proj_"))] = rows.contiguous()
            elif name == "head.bias" and type(model) is MaskedLM:
                tensors |= {"cls.predictions.bias": value, "cls.predictions.decoder.bias": value.clone()}
            else:
                full = f"{theirs[stem]}.{leaf}".format(block[1] if block else "")
                tensors[full if full.startswith(("cls.", "classifier.")) else f"bert.{full}"] = value
        types = value.new_zeros(2, model.encoder.d_model)
        return {**tensors, "bert.embeddings.token_type_embeddings.weight": types}


BERT = Bert()
