"""Folders of BERT and GPT-2 with random weights, made without transformers."""

import json

import torch
from safetensors.torch import save_file


def made_up_tensors(kind, vocab_size, d=16, n_layer=2, block_size=24, n_classes=None, head=True):
    """Random tensors with the names and shapes of a checkpoint, and its config.json."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}

    def add(name, rows, *columns, bias=True):
        tensors[f"{name}.weight"] = 0.1 * torch.randn(rows, *columns, generator=generator) + (not columns)
        if bias:
            tensors[f"{name}.bias"] = 0.1 * torch.randn(rows, generator=generator)

    if kind == "gpt2":
        add("transformer.wte", vocab_size, d, bias=False)
        add("transformer.wpe", block_size, d, bias=False)
        add("transformer.ln_f", d)
        for block in range(n_layer):
            for name, columns, rows in (
                ("attn.c_attn", d, 3 * d),
                ("attn.c_proj", d, d),
                ("mlp.c_fc", d, 4 * d),
                ("mlp.c_proj", 4 * d, d),
            ):
                tensors[f"transformer.h.{block}.{name}.weight"] = 0.1 * torch.randn(columns, rows, generator=generator)
                tensors[f"transformer.h.{block}.{name}.bias"] = 0.1 * torch.randn(rows, generator=generator)
            add(f"transformer.h.{block}.ln_1", d)
            add(f"transformer.h.{block}.ln_2", d)
        return tensors, {"model_type": "gpt2", "n_layer": n_layer, "n_head": 2, "n_embd": d, "n_positions": block_size,
                         "activation_function": "gelu_new", "resid_pdrop": 0.0}  # fmt: skip
    for name, rows in (("word", vocab_size), ("position", block_size), ("token_type", 2)):
        add(f"bert.embeddings.{name}_embeddings", rows, d, bias=False)
    add("bert.embeddings.LayerNorm", d)
    for block in range(n_layer):
        layer = f"bert.encoder.layer.{block}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            add(f"{layer}.attention.{name}", d, d)
        add(f"{layer}.intermediate.dense", 3 * d, d)
        add(f"{layer}.output.dense", d, 3 * d)
        add(f"{layer}.attention.output.LayerNorm", d)
        add(f"{layer}.output.LayerNorm", d)
    add("bert.pooler.dense", d, d)
    if n_classes:
        add("classifier", n_classes, d)
    elif head:
        add("cls.predictions.transform.dense", d, d)
        add("cls.predictions.transform.LayerNorm", d)
        tensors["cls.predictions.bias"] = torch.randn(vocab_size, generator=generator)
    config = {"model_type": "bert", "num_hidden_layers": n_layer, "num_attention_heads": 2, "hidden_size": d,
              "intermediate_size": 3 * d, "max_position_embeddings": block_size, "hidden_dropout_prob": 0}  # fmt: skip
    if n_classes:
        config["id2label"] = {str(number): f"class {number}" for number in range(n_classes)}
    return tensors, config


def make_up(folder, kind, vocab_size=40, **options):
    folder.mkdir(parents=True, exist_ok=True)
    tensors, config = made_up_tensors(kind, vocab_size, **options)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return tensors
