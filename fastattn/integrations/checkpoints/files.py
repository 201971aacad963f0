"""Reads and writes the files of a Hugging Face folder: config.json and weights, in one file or in shards."""

import json
from contextlib import contextmanager
from pathlib import Path

import torch

_SINGLE = ("model.safetensors", "pytorch_model.bin")
_SHARDED = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def read_json(folder):
    """The dict in config.json, with a model_type; ValueError if there is none."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a readable config of a Hugging Face model: {error!r}") from None
    return config


def tensor_names(folder):
    """The names of all tensors of a folder."""
    names = set()
    for path in _weight_files(folder):
        with _readable(path):
            if path.suffix == ".bin":
                names |= set(torch.load(path, map_location="cpu", weights_only=True))
            else:
                from safetensors import safe_open

                with safe_open(path, "pt") as file:
                    names |= set(file.keys())
    return names


def read_tensors(folder):
    """{name: tensor} of a folder, on the CPU."""
    tensors = {}
    for path in _weight_files(folder):
        with _readable(path):
            if path.suffix == ".bin":
                tensors |= torch.load(path, map_location="cpu", weights_only=True)
            else:
                from safetensors.torch import load_file

                tensors |= load_file(path)
    return tensors


def _weight_files(folder):
    """The files with weights: one, or all shards that an index names, which must be there."""
    folder = Path(folder)
    for name in _SINGLE:
        if (folder / name).is_file():
            return [folder / name]
    for name in _SHARDED:
        if (folder / name).is_file():
            with _readable(folder / name):
                shards = sorted(set(json.loads((folder / name).read_text(encoding="utf-8"))["weight_map"].values()))
            for shard in shards:
                if Path(shard).name != shard or not (folder / shard).is_file():
                    raise ValueError(f"{folder} has no {shard}, which {name} names")
            return [folder / shard for shard in shards]
    raise ValueError(f"{folder} has neither {_SINGLE[0]} nor {_SINGLE[1]}, nor an index of shards")


@contextmanager
def _readable(path):
    """Turn any exception of safetensors and pickle into a ValueError."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(f"{path} has no readable weights: {type(error).__name__}: {error}") from None
