"""What a run starts from: tokenizer, shape and weights of another run, or of a BERT or GPT-2 of Hugging Face."""

from collections import namedtuple
from pathlib import Path

import yaml

from ..config import ModelConfig, config_from_dict
from ..data.tokenizer import load_tokenizer
from ..messages import UsageError, expect
from .checkpoint import check_run, read_summary
from .load import load_run

# task; labels: of a classifier, else None; model: its ModelConfig; read_weights: () → {name: tensor}
Start = namedtuple("Start", "task labels model read_weights")

# what decides the meaning of weights, whatever their shape
_KEPT = ("body", "n_layer", "n_head", "n_kv_head", "d_model", "d_ff", "bias", "positions", "norm_first",
         "feed_forward", "norm_eps")  # fmt: skip
_WITH_ENCODER = {"masked_lm", "classify", "translate"}
_BY_TOKEN_OR_POSITION = ("embedding.weight", "head.weight", "head.bias")


def open_start(start):
    """The Start in a folder: a run with config.yaml, or a Hugging Face model with config.json.

    Raises:
        UsageError: neither of them, or one that cannot be read.
    """
    folder = Path(start).expanduser()
    if (folder / "config.yaml").is_file():
        return _run_start(folder)
    if (folder / "config.json").is_file():
        return _hugging_face_start(folder)
    raise UsageError(
        f"start {start!r}: expected the folder of a run (config.yaml) or of a Hugging Face model (config.json), got "
        + ("neither file in it" if folder.is_dir() else "no such folder")
    )


def start_tokenizer(config):
    """The tokenizer of config.start; UsageError if there is none, or a model of another task or shape."""
    _matching_start(config)
    path = Path(config.start) / "tokenizer.json"
    if not path.is_file():
        raise UsageError(f"start {config.start!r}: expected a tokenizer.json beside the weights, got none")
    return load_tokenizer(path)


def start_model_options(start):
    """{name: value} of the ModelConfig of a start, for a run that does not say otherwise."""
    options = dict(vars(open_start(start).model))
    del options["embedding"], options["init"], options["checkpointing"]  # they say how weights began, and how to save
    return options


def load_start(model, config, labels=None):
    """Fill a model with the weights of config.start.

    The same task takes all of them over, except the head of a classifier of other labels; another task takes the
    encoder. Rows of tokens and positions that the model does not have are left out.

    Args:
        model: of the task, before add_lora.
        config: its TrainConfig.
        labels: the names of its classes, if it is a classifier.
    Returns: names of the parameters that stay as they were.
    Raises:
        UsageError: a start that is not there, of a task that does not fit, of another shape, or with other labels where
            nothing would be left of it.
    """
    start = _matching_start(config)
    same = start.task == config.task
    weights, own = start.read_weights(), model.state_dict()
    if not same:
        weights = {name: value for name, value in weights.items() if name.startswith(("encoder.", "pooler."))}
    elif start.labels != labels:
        expect(config.model.body != "bag_of_words", "data", f"the labels {start.labels} of the start", labels)
        weights = {name: value for name, value in weights.items() if not name.startswith("head.")}
    if same and "head.weight" in own and "head.weight" not in weights and labels is None:  # tied there, untied here
        weights["head.weight"] = next(weights[n] for n in weights if n.endswith("token_embedding.weight"))
    for name, value in weights.items():
        if name in own and name.endswith(_BY_TOKEN_OR_POSITION) and len(value) > len(own[name]):
            weights[name] = value[: len(own[name])]
    weights = {name: value for name, value in weights.items() if name in own or not name.startswith("pooler.")}
    _check_tensors(weights, own, ("head.", "pooler.") if same else ("head.", "pooler.", "decoder."), config.start)
    model.load_state_dict(weights, strict=False)
    return [name for name, _ in model.named_parameters() if name not in weights]


def _matching_start(config):
    """The Start of a TrainConfig; UsageError unless its weights mean the same in the model of the config."""
    start = open_start(config.start)
    if start.task != config.task and not {start.task, config.task} <= _WITH_ENCODER:
        raise UsageError(f"start {config.start!r}: expected a model for task {config.task}, got one of {start.task}")
    theirs, ours = _shape(start.model), _shape(config.model)
    for name in _KEPT:
        expect(theirs[name] == ours[name], f"model.{name}", f"{theirs[name]!r} as in {config.start}", ours[name])
    return start


def _check_tensors(weights, own, may_be_new, start):
    """Raises UsageError if weights would be lost, have another shape, or what may not be new would stay as it is."""
    for name in [*weights, *own]:
        if name not in own:
            got = f"{name}, for which it has no place"
        elif name in weights and weights[name].shape != own[name].shape:
            got = f"{name} {tuple(weights[name].shape)} for {tuple(own[name].shape)}"
        elif name not in weights and not name.startswith(may_be_new):
            got = f"no {name}"
        else:
            continue
        raise UsageError(f"start {start!r}: expected weights of the model in this config, got {got}")


def _shape(model):
    shape = dict(vars(model))
    return {**shape, "n_kv_head": model.n_kv_head or model.n_head, "d_ff": model.d_ff or 4 * model.d_model}


def _run_start(folder):
    check_run(folder)
    try:
        config = config_from_dict(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, UsageError) as error:
        raise UsageError(f"{folder / 'config.yaml'}: expected the config of a run, got {error}") from None

    def read_weights():

        return load_run(folder, config, accelerator="cpu")[0].state_dict()

    return Start(config.task, read_summary(folder).get("labels"), config.model, read_weights)


def _hugging_face_start(folder):
    from fastattn.integrations import hugging_face

    try:
        task, labels, shape = hugging_face.read_config(folder)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return Start(task, labels, ModelConfig(**shape), lambda: hugging_face.read_weights(folder))
