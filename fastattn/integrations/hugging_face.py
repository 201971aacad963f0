"""Loads BERT and GPT-2 checkpoints of Hugging Face into the models of fastattn.models, without transformers.

Weights that our models lack are folded into others: BERT's first token type is added to every position, and queries,
keys and values become one matrix. Other token types are not supported.
"""

import json
import os
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "silu": "silu",
    "swish": "silu",
}  # fmt: skip

# name in a checkpoint, without the model's prefix → ours; {} is the number of a block
_BERT = {
    "embeddings.word_embeddings.weight": "encoder.token_embedding.weight",
    "embeddings.position_embeddings.weight": "encoder.position_embedding.weight",
    "embeddings.LayerNorm": "encoder.norm",
    "encoder.layer.{}.attention.output.dense": "encoder.blocks.{}.self_attn.out_proj",
    "encoder.layer.{}.attention.output.LayerNorm": "encoder.blocks.{}.norm1",
    "encoder.layer.{}.intermediate.dense": "encoder.blocks.{}.linear1",
    "encoder.layer.{}.output.dense": "encoder.blocks.{}.linear2",
    "encoder.layer.{}.output.LayerNorm": "encoder.blocks.{}.norm2",
    "pooler.dense": "pooler",
    "cls.predictions.transform.dense": "head.dense",
    "cls.predictions.transform.LayerNorm": "head.norm",
    "cls.predictions.bias": "head.bias",
    "cls.predictions.decoder.bias": "head.bias",  # usually equal to the one above; if not, BERT uses this one
    "classifier": "head",
}
_GPT2 = {
    "wte.weight": "token_embedding.weight",
    "wpe.weight": "position_embedding.weight",
    "ln_f": "norm",
    "h.{}.ln_1": "blocks.{}.norm1",
    "h.{}.ln_2": "blocks.{}.norm2",
    "h.{}.attn.c_attn.weight": "blocks.{}.self_attn.in_proj_weight",
    "h.{}.attn.c_attn.bias": "blocks.{}.self_attn.in_proj_bias",
    "h.{}.attn.c_proj": "blocks.{}.self_attn.out_proj",
    "h.{}.mlp.c_fc": "blocks.{}.linear1",
    "h.{}.mlp.c_proj": "blocks.{}.linear2",
}
# buffers that are computed, and a head that our models lack
_IGNORED = re.compile(r".*\.(position_ids|attn\.bias|attn\.masked_bias)|cls\.seq_rel.*")


def load_hugging_face(folder: str | os.PathLike[str], *, layers: str = "fastattn") -> nn.Module:
    """Load the model in a folder with config.json and model.safetensors or pytorch_model.bin.

    Args:
        folder: path of the folder.
        layers: "fastattn" or "torch", as for the models.
    Returns: the model in evaluation mode, fp32. GPT-2 becomes a CausalLM; BERT becomes a Classifier if the folder has
        the weights of a classifier, a MaskedLM if it has that head, else a Backbone.
    Raises:
        ValueError: the folder or a file is missing, or the model has an architecture or option that ours lack.
    Example:
        model = load_hugging_face("models/gpt2")
        logits = model(torch.tensor([[15496, 995]]))  # (1, 2, 50257)
    """
    from fastattn.models import CausalLM, Classifier, MaskedLM
    from fastattn.models.backbone import Backbone

    task, labels, shape = read_config(folder)
    weights = read_weights(folder)
    vocab_size = len(weights["token_embedding.weight" if task == "lm" else "encoder.token_embedding.weight"])
    head_transform, pooling = shape.pop("head_transform"), shape.pop("pooling")
    tied = {"tied": shape.pop("tied")}
    model: nn.Module
    if task == "lm":
        model = CausalLM(vocab_size, layers=layers, **tied, **shape)
    elif task == "classify":
        model = Classifier(vocab_size, len(labels), pooling=pooling, layers=layers, **shape)
    elif head_transform:
        model = MaskedLM(vocab_size, layers=layers, head_transform=True, **tied, **shape)
    else:
        model = Backbone(vocab_size, layers=layers, **shape)
        weights = {name.removeprefix("encoder."): value for name, value in weights.items()}
    unused = {name for name in weights if name.startswith("pooler.")} - model.state_dict().keys()
    model.load_state_dict({name: value for name, value in weights.items() if name not in unused})
    return model.eval()


def read_config(folder: str | os.PathLike[str]) -> tuple[str, Any, dict[str, Any]]:
    """Read the config of a folder.

    Returns: (task, labels, shape). task: "lm" for GPT-2, "classify" for a BERT with a classifier, "masked_lm" for any
        other BERT. labels: a classifier's labels in the order of their numbers, else None. shape: the arguments of our
        model, with head_transform and pooling as in fastattn.training.
    Raises:
        ValueError: as `load_hugging_face`.
    """
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a readable config of a Hugging Face model: {error!r}") from None
    if kind not in ("bert", "gpt2"):
        raise ValueError(f"{path}: model_type must be 'bert' or 'gpt2', got {kind!r}")
    needed = {"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"}
    if kind == "gpt2":
        needed = {"add_cross_attention": False, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
    for name, value in needed.items():
        if config.get(name, value) != value:
            raise ValueError(f"{path}: {name} must be {value!r}, got {config[name]!r}")
    activation = config.get("hidden_act" if kind == "bert" else "activation_function", "gelu")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"{path}: the activation must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
    shape = {"feed_forward": _ACTIVATIONS[activation], "positions": "learned", "bias": True}
    names = _tensor_names(folder)
    try:
        if kind == "gpt2":
            shape |= {
                "n_layer": config["n_layer"], "n_head": config["n_head"], "d_model": config["n_embd"],
                "d_ff": config.get("n_inner") or 4 * config["n_embd"], "block_size": config["n_positions"],
                "dropout": config.get("resid_pdrop", 0.1), "norm_first": True,
                "norm_eps": config.get("layer_norm_epsilon", 1e-5), "head_transform": False, "pooling": "mean",
            }  # fmt: skip
            return (
                "lm",
                None,
                {**shape, "tied": "lm_head.weight" not in names or config.get("tie_word_embeddings", True)},
            )
        has_head = "cls.predictions.bias" in names
        if has_head and activation != "gelu":
            raise ValueError(
                f"{path}: hidden_act must be 'gelu' with a masked language model's head, got {activation!r}"
            )
        shape |= {
            "n_layer": config["num_hidden_layers"], "n_head": config["num_attention_heads"],
            "d_model": config["hidden_size"], "d_ff": config["intermediate_size"],
            "block_size": config["max_position_embeddings"], "dropout": config.get("hidden_dropout_prob", 0.1),
            "norm_first": False, "norm_eps": config.get("layer_norm_eps", 1e-12), "head_transform": has_head,
            "pooling": "pooler" if any("pooler.dense" in name for name in names) else "first",
            "tied": config.get("tie_word_embeddings", True),
        }  # fmt: skip
    except KeyError as error:
        raise ValueError(f"{path} has no {error.args[0]}") from None
    if "classifier.weight" not in names:
        return "masked_lm", None, shape
    labels = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    return "classify", [labels[number] for number in sorted(labels, key=int)], shape


def read_weights(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """{name: fp32 tensor} of a folder, with the names and shapes of our models (for BERT: encoder, pooler, head).

    Raises:
        ValueError: as `load_hugging_face`, or a tensor has no counterpart in our models.
    """
    task, _, shape = read_config(folder)
    names, prefix = (_GPT2, "transformer.") if task == "lm" else (_BERT, "bert.")
    weights: dict[str, Tensor] = {}
    parts: dict[Any, Tensor] = {}
    for name, value in sorted(_read_tensors(folder).items()):
        value = value.float()
        plain = name.removeprefix(prefix).replace(".gamma", ".weight").replace(".beta", ".bias")
        block = re.search(r"(?:h|layer)\.(\d+)\.", plain)
        general = plain if block is None else plain.replace(f".{block[1]}.", ".{}.", 1)
        stem, _, leaf = general.rpartition(".")
        if part := re.fullmatch(r"encoder\.layer\.\{\}\.attention\.self\.(query|key|value)\.(weight|bias)", general):
            parts[int(block[1]), part[2], part[1]] = value  # type: ignore[index]
        elif general in names or stem in names:
            ours = names[general] if general in names else f"{names[stem]}.{leaf}"
            if task == "lm" and block is not None and value.dim() == 2:  # Conv1D: (columns, rows)
                value = value.T
            weights[ours.format(block[1] if block else "")] = value.contiguous()
        elif plain in ("lm_head.weight", "cls.predictions.decoder.weight"):
            if not shape["tied"]:
                weights["head.weight"] = value
        elif plain == "embeddings.token_type_embeddings.weight":
            parts["types"] = value
        elif not _IGNORED.fullmatch(plain):
            raise ValueError(f"{folder}: the tensor {name} is not part of a BERT or GPT-2")
    types = parts.pop("types", None)
    if types is not None:
        weights["encoder.position_embedding.weight"] = weights["encoder.position_embedding.weight"] + types[0]
    for number, leaf in {key[:2] for key in parts}:
        heads = [parts[number, leaf, part] for part in ("query", "key", "value")]
        weights[f"encoder.blocks.{number}.self_attn.in_proj_{leaf}"] = torch.cat(heads)
    return weights


def _weight_file(folder):
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise ValueError(f"{folder} has neither model.safetensors nor pytorch_model.bin")


def _tensor_names(folder):
    path = _weight_file(folder)
    with _readable(path):
        if path.suffix == ".bin":
            return set(torch.load(path, map_location="cpu", weights_only=True))
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            return set(file.keys())


def _read_tensors(folder):
    path = _weight_file(folder)
    with _readable(path):
        if path.suffix == ".bin":
            return torch.load(path, map_location="cpu", weights_only=True)
        from safetensors.torch import load_file

        return load_file(path)


@contextmanager
def _readable(path):
    """Turn any exception of safetensors and pickle into a ValueError."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(f"{path} has no readable weights: {type(error).__name__}: {error}") from None
