"""The starting point of a run: tokenizer, shape and weights of another run, or of a model of Hugging Face."""

from collections import namedtuple
from dataclasses import asdict
from pathlib import Path

from ..config import ModelConfig
from ..data.tokenizer import load_tokenizer
from ..files import user_path
from ..messages import UsageError, expect
from .checkpoint import read_summary
from .load import load_run, read_run_config

# task; labels of a classifier, else None; model: ModelConfig; read_weights: () → {name: tensor}
Start = namedtuple("Start", "task labels model read_weights")

# settings that decide the meaning of the weights, not only their shape
_KEPT = (
    "body", "n_layer", "n_head", "n_kv_head", "d_model", "d_ff", "head_dim", "bias", "qkv_bias", "positions", "rotary",
    "window", "window_pattern", "norm", "norm_weight", "norm_first", "norm_output", "norm_eps", "qk_norm",
    "attention_softcap", "attention_scale", "sinks", "logit_softcap", "embedding_scale", "embedding_norm", "parallel",
    "feed_forward",
)  # fmt: skip
_WITH_ENCODER, _DECODERS = {"masked_lm", "classify", "translate"}, {"lm", "chat", "preference"}
_BY_TOKEN_OR_POSITION = ("embedding.weight", "head.weight", "head.bias")


def open_start(start):
    """The Start in a folder: a run with config.yaml, or a Hugging Face model with config.json.

    Raises:
        UsageError: the folder is neither, or cannot be read.
    """
    folder = user_path(start)
    if (folder / "config.yaml").is_file():
        return _run_start(folder)
    if (folder / "config.json").is_file():
        return _hugging_face_start(folder)
    raise UsageError(
        f"start {start!r} must be the folder of a run (config.yaml) or of a Hugging Face model (config.json), but it "
        + ("has neither file" if folder.is_dir() else "does not exist")
    )


def start_tokenizer(config):
    """The tokenizer of config.start; UsageError if it is missing, or the task or shape differs."""
    _matching_start(config)
    path = Path(config.start) / "tokenizer.json"
    if not path.is_file():
        raise UsageError(f"start {config.start!r} has no tokenizer.json")
    return load_tokenizer(path)


def start_model_options(start):
    """{name: value} of the ModelConfig of a start: the defaults of a run that starts from it."""
    options = asdict(open_start(start).model)
    del options["embedding"], options["init"], options["checkpointing"]  # about initial weights and memory
    return options


def load_start(model, config, labels=None):
    """Load the weights of config.start into a model.

    The same task takes all weights, except the head of a classifier with other labels; another task takes the encoder.
    Rows for tokens and positions that the model does not have are dropped.

    Args:
        model: the task's model, before add_lora.
        config: its TrainConfig.
        labels: the names of its classes, if it is a classifier.
    Returns: names of the parameters that were not loaded.
    Raises:
        UsageError: the start is missing, has an unsuitable task or another shape, or is a bag of words with other
            labels, none of whose weights could be used.
    """
    start = _matching_start(config)
    same = start.task == config.task or {start.task, config.task} <= _DECODERS
    weights, state = start.read_weights(), model.state_dict()
    if not same:
        weights = {name: value for name, value in weights.items() if name.startswith(("encoder.", "pooler."))}
    elif start.labels != labels:
        body = config.model.body
        expect(body != "bag_of_words", "the labels of the data", f"{start.labels} as in the start", labels)
        weights = {name: value for name, value in weights.items() if not name.startswith("head.")}
    if same and "head.weight" in state and "head.weight" not in weights and labels is None:  # tied there, untied here
        weights["head.weight"] = next(weights[n] for n in weights if n.endswith("token_embedding.weight"))
    for name, value in weights.items():
        if name in state and name.endswith(_BY_TOKEN_OR_POSITION) and len(value) > len(state[name]):
            weights[name] = value[: len(state[name])]
    weights = {name: value for name, value in weights.items() if name in state or not name.startswith("pooler.")}
    _check_tensors(weights, state, ("head.", "pooler.") if same else ("head.", "pooler.", "decoder."), config.start)
    model.load_state_dict(weights, strict=False)
    return [name for name, _ in model.named_parameters() if name not in weights]


def _matching_start(config):
    """The Start of a TrainConfig; UsageError unless its weights keep their meaning in the model of the config."""
    start = open_start(config.start)
    tasks = {start.task, config.task}
    if start.task != config.task and not tasks <= _WITH_ENCODER and not tasks <= _DECODERS:
        raise UsageError(f"start {config.start!r} is of task {start.task}, which cannot start task {config.task}")
    theirs, ours = _shape(start.model), _shape(config.model)
    for name in _KEPT:
        expect(theirs[name] == ours[name], f"model.{name}", f"{theirs[name]!r} as in {config.start}", ours[name])
    return start


def _check_tensors(weights, state, may_be_new, start):
    """Raise UsageError if a weight has no counterpart or another shape; `may_be_new`: prefixes that may be missing."""
    for name in [*weights, *state]:
        if name not in state:
            problem = f"the checkpoint has {name}, which this model does not"
        elif name in weights and weights[name].shape != state[name].shape:
            shapes = tuple(state[name].shape), tuple(weights[name].shape)
            problem = f"{name} must have shape {shapes[0]} as in this model, got {shapes[1]}"
        elif name not in weights and not name.startswith(may_be_new):
            problem = f"the checkpoint lacks {name}, which this model has"
        else:
            continue
        raise UsageError(f"start {start!r}: {problem}")


def _shape(model):
    shape = dict(vars(model))
    shape["n_kv_head"], shape["d_ff"] = model.n_kv_head or model.n_head, model.d_ff or 4 * model.d_model
    shape["head_dim"] = model.head_dim or model.d_model // model.n_head
    shape["qkv_bias"] = model.bias if model.qkv_bias is None else model.qkv_bias
    return shape


def _run_start(folder):
    config = read_run_config(folder)

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
