"""Loads a trained model from the folder of its run."""

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_model

from ..config import config_from_dict
from ..data.tokenizer import load_tokenizer
from ..messages import UsageError
from ..tasks.registry import task_class
from .checkpoint import check_run, choose_checkpoint, read_summary
from .devices import pick_device
from .lora import add_lora, merge_lora


def read_run_config(run):
    """The TrainConfig of a run folder; UsageError if it is not one."""
    check_run(run)
    try:
        return config_from_dict(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, UsageError) as error:
        raise UsageError(f"{run / 'config.yaml'} is not the config of a run: {error}") from None


def load_run(run, config, *, checkpoint="best", accelerator="auto", layers=None):
    """A trained model and its tokenizer.

    Args:
        run: folder of the run.
        config: its TrainConfig.
        checkpoint: "best", "last" or a step.
        accelerator: "auto", "cpu" or "cuda".
        layers: "fastattn" or "torch"; None: as the model was trained.

    Returns:
        (model in evaluation mode, tokenizer, step).

    Raises:
        UsageError: the run or device does not exist, or there is no undamaged checkpoint.
    """
    check_run(run)
    device = pick_device(accelerator)
    tokenizer = load_tokenizer(run / "tokenizer.json")
    chosen = choose_checkpoint(run, checkpoint)
    if chosen is None:
        raise UsageError(f"run {str(run)!r} has no checkpoint yet; continue it with --resume {run}")
    model = task_class(config).build_model(config, tokenizer, read_summary(run), layers)
    if config.trained == "lora":
        add_lora(model, config.lora_rank)
    load_weights(model, chosen[0])
    merge_lora(model)
    return model.to(device).eval(), tokenizer, chosen[1]["step"]


def load_task(run, config, checkpoint="best", accelerator="auto", layers=None):
    """(model, task without data) of a run, to apply to new texts; otherwise as load_run."""
    model, tokenizer, _ = load_run(run, config, checkpoint=checkpoint, accelerator=accelerator, layers=layers)
    return model, task_class(config).without_data(config, tokenizer, read_summary(run))


def load_weights(model, folder):
    """Load a checkpoint folder into a model; UsageError if the weights do not fit."""
    try:
        load_model(model, str(folder / "model.safetensors"), strict=True)
    except (SafetensorError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise UsageError(f"{folder}: the weights do not fit the model in config.yaml: {text[:200]}") from None
