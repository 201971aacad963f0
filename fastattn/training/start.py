"""Weights and tokenizer to start a run from: those of another run, or of a BERT or GPT-2 of Hugging Face."""

from pathlib import Path

from .checkpoint import check_run, choose_checkpoint, warn
from .config import UsageError
from .tokenizer import load_tokenizer


def start_tokenizer(start):
    """The tokenizer of a run, or of a Hugging Face folder with a tokenizer.json.

    Raises:
        UsageError: neither of them, or no tokenizer in it.
    """
    folder = Path(start).expanduser()
    if not (folder / "tokenizer.json").is_file():
        raise UsageError(f"start {start!r}: expected the folder of a run or of a Hugging Face model with its "
                         "tokenizer.json, got none")  # fmt: skip
    return load_tokenizer(folder / "tokenizer.json")


def load_start(model, config):
    """Fill a model with the weights of config.start that it has a place for; what stays as it was is told on stderr.

    Raises:
        UsageError: no weights there, none that fit, or some of another shape.
    """
    folder = Path(config.start).expanduser()
    weights = _run_weights(folder) if (folder / "config.yaml").is_file() else _hugging_face_weights(folder)
    own = model.state_dict()
    for name in list(weights):
        if name in own and name.startswith("position_embedding") and len(weights[name]) > len(own[name]):
            weights[name] = weights[name][: len(own[name])]  # a shorter block_size needs the first rows only
    common = weights.keys() & own.keys()
    other = [name for name in sorted(common) if weights[name].shape != own[name].shape]
    if not common or other:
        got = (
            f"{other[0]} {tuple(weights[other[0]].shape)} for {tuple(own[other[0]].shape)}" if other else "no such name"
        )
        raise UsageError(f"start {config.start!r}: expected weights of the model in this config, got {got}")
    model.load_state_dict({name: weights[name] for name in common}, strict=False)
    if new := sorted(own.keys() - common):
        warn(f"start {config.start}: {len(common)} tensors taken over, new are {', '.join(new)}")


def _run_weights(folder):
    from safetensors.torch import load_file

    check_run(folder)
    chosen = choose_checkpoint(folder, "best")
    if chosen is None:
        raise UsageError(f"start {str(folder)!r}: expected a checkpoint, got none yet")
    return load_file(chosen[0] / "model.safetensors")


def _hugging_face_weights(folder):
    from fastattn.integrations.hugging_face import read_weights

    return read_weights(folder)
