"""Loads models from folders of Hugging Face into those of fastattn.models and writes them, without transformers.

Weights that our models lack are folded into others: BERT's first token type is added to every position, Gemma's norm
weights count from 1, and queries, keys and values become one matrix. Other token types are not supported.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoints import FAMILIES
from .checkpoints.files import read_json, read_tensors, tensor_names


def load_hugging_face(
    folder: str | os.PathLike[str], *, layers: str = "fastattn", block_size: int | None = None
) -> nn.Module:
    """Load the model in a folder with config.json and weights, whole or in shards.

    Args:
        folder: path of the folder, with model.safetensors, pytorch_model.bin, or either in shards with their index.
        layers: "fastattn" or "torch", as for the models.
        block_size: the most tokens that the model sees, which decides the size of caches; None: as in the folder. Only
            for rotary positions.
    Returns: the model in evaluation mode, fp32. BERT becomes a Classifier if the folder has the weights of a
        classifier, a MaskedLM if it has that head, else a Backbone. GPT-2, Llama, Mistral, Qwen 2 and 3, Gemma 1 to 3
        (text), OLMo 1 and 2 and nanochat become a CausalLM.
    Raises:
        ValueError: the folder or a file is missing, or the model has an architecture or option that ours lack.
    Example:
        >>> from fastattn.integrations.hugging_face import load_hugging_face
        >>> model = load_hugging_face("models/gpt2")
        >>> model(torch.tensor([[3, 1]])).shape  # (batch, tokens, vocabulary)
        torch.Size([1, 2, 100])
    """
    from fastattn.models import CausalLM, Classifier, MaskedLM
    from fastattn.models.backbone import Backbone

    task, labels, shape = read_config(folder)
    weights = read_weights(folder)
    if block_size is not None:
        if shape["positions"] != "rotary":
            raise ValueError(f"block_size must be None for {shape['positions']} positions, got {block_size}")
        shape["block_size"] = block_size
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

    Returns: (task, labels, shape). task: "lm" for a language model, "classify" for a BERT with a classifier,
        "masked_lm" for any other BERT. labels: a classifier's labels in the order of their numbers, else None. shape:
        the arguments of our model, with head_transform and pooling as in fastattn.training.
    Raises:
        ValueError: as `load_hugging_face`.
    """
    config, path = read_json(folder), Path(folder) / "config.json"
    family = _family_of(config, path)
    try:
        return family.read_shape(config, tensor_names(folder))
    except KeyError as error:
        raise ValueError(f"{path} has no {error.args[0]}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_weights(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """{name: fp32 tensor} of a folder, with the names and shapes of our models (for BERT: encoder, pooler, head).

    Raises:
        ValueError: as `load_hugging_face`, or a tensor has no counterpart in our models.
    """
    shape = read_config(folder)[2]
    family = _family_of(read_json(folder), folder)
    try:
        return family.read_weights(read_tensors(folder), shape)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def _family_of(config, path):
    kinds = {kind: family for family in FAMILIES for kind in family.kinds}
    if config["model_type"] not in kinds:
        raise ValueError(f"{path}: model_type must be one of {', '.join(kinds)}, got {config['model_type']!r}")
    return kinds[config["model_type"]]


@torch.no_grad()
def write_hugging_face(model: nn.Module, folder: str | os.PathLike[str], **settings: Any) -> str:
    """Write config.json and model.safetensors of the first family that fits; transformers loads them with equal logits.

    Args:
        model: a CausalLM, a MaskedLM, or a Classifier with the pooling "pooler", in fp32.
        folder: an existing folder.
        settings: further entries of config.json, such as id2label or eos_token_id.
    Returns: the model_type.
    Raises:
        ValueError: no family has the shape of the model; the message says where each differs.
    Example:
        >>> from fastattn.integrations.hugging_face import load_hugging_face, write_hugging_face
        >>> model = load_hugging_face("models/gpt2")
        >>> write_hugging_face(model, "exported")  # then AutoModelForCausalLM.from_pretrained("exported")
        'gpt2'
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    problems = []
    for family in FAMILIES:
        try:
            config = family.write_config(model)
        except ValueError as error:
            problems.append(str(error))
            continue
        tensors = {name: t.detach().cpu().contiguous() for name, t in family.write_weights(model).items()}
        try:
            save_file(tensors, str(Path(folder) / "model.safetensors"), metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk
            raise OSError(f"{folder}: model.safetensors could not be written: {error}") from error
        text = json.dumps({**config, **settings}, indent=2, ensure_ascii=False) + "\n"
        (Path(folder) / "config.json").write_text(text, encoding="utf-8")
        return config["model_type"]
    raise ValueError(f"no family of Hugging Face has this model: {'; '.join(problems)}")
