"""A trained model from the folder of its run."""

from safetensors import SafetensorError
from safetensors.torch import load_model

from ..data.tokenizer import load_tokenizer
from ..messages import UsageError
from ..tasks.registry import TASKS
from .checkpoint import check_run, choose_checkpoint, read_summary
from .devices import pick_device
from .lora import add_lora, merge_lora


def load_run(run, config, *, checkpoint="best", accelerator="auto", layers=None):
    """A trained model and its tokenizer.

    Args:
        run: folder of the run.
        config: its TrainConfig.
        checkpoint: "best", "last" or a step.
        accelerator: "auto", "cpu" or "cuda".
        layers: None or other layers than the model was trained with.

    Returns:
        (model in evaluation mode, tokenizer, step).

    Raises:
        UsageError: no such run or device, no undamaged checkpoint.
    """
    check_run(run)
    device = pick_device(accelerator)
    tokenizer = load_tokenizer(run / "tokenizer.json")
    chosen = choose_checkpoint(run, checkpoint)
    if chosen is None:
        raise UsageError(f"run {str(run)!r}: expected a checkpoint, got none yet; continue it with --resume {run}")
    model = TASKS[config.task].build_model(config, tokenizer, read_summary(run), layers)
    if config.trained == "lora":
        add_lora(model, config.lora_rank)
    load_weights(model, chosen[0])
    merge_lora(model)
    return model.to(device).eval(), tokenizer, chosen[1]["step"]


def load_task(run, config, checkpoint="best", accelerator="auto", layers=None):
    """(model, task without data) of a run, for texts that come later; as load_run."""
    model, tokenizer, _ = load_run(run, config, checkpoint=checkpoint, accelerator=accelerator, layers=layers)
    return model, TASKS[config.task].without_data(config, tokenizer, read_summary(run))


def load_weights(model, folder):
    """Fill a model from a checkpoint folder; UsageError if the weights are those of another shape."""
    try:
        load_model(model, str(folder / "model.safetensors"), strict=True)
    except (SafetensorError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise UsageError(f"{folder}: expected weights of the model in config.yaml, got {text[:200]}") from None
