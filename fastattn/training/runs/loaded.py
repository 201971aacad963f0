"""A trained run for use from Python: `fastattn.load_run`."""

import os
from typing import Any, NamedTuple

from ..files import run_path
from ..messages import UsageError
from ..tasks.registry import task_class
from .checkpoint import read_summary
from .load import load_run as load_model
from .load import read_run_config


class LoadedRun(NamedTuple):
    """What `fastattn.load_run` returns.

    model: nn.Module in evaluation mode. tokenizer: encode(text) → list of int, decode(numbers) → text, vocab_size.
    task: applies the model to new texts, such as task.predict(model, texts) of a classifier. config: TrainConfig.
    step: of the checkpoint.
    """

    model: Any
    tokenizer: Any
    task: Any
    config: Any
    step: int


def load_run(
    path: str | os.PathLike[str], *, checkpoint: str = "best", accelerator: str = "auto", layers: str | None = None
) -> LoadedRun:
    """The trained model in the folder of a run, with its tokenizer.

    Args:
        path: the folder.
        checkpoint: "best", "last" or a step.
        accelerator: "auto", "cpu" or "cuda".
        layers: "fastattn" or "torch"; None: as the model was trained.
    Returns: LoadedRun(model, tokenizer, task, config, step).
    Raises:
        ValueError: the run or the checkpoint does not exist or is damaged, or there is no such device.
    Example:
        >>> run = fastattn.load_run("runs/char_lm")
        >>> logits = run.model(torch.tensor([run.tokenizer.encode("bottles")]))
        >>> logits.shape == (1, 7, run.tokenizer.vocab_size)
        True
    """
    try:
        run = run_path(path)
        config = read_run_config(run)
        model, tokenizer, step = load_model(run, config, checkpoint=checkpoint, accelerator=accelerator, layers=layers)
        task = task_class(config).without_data(config, tokenizer, read_summary(run))
    except UsageError as error:
        raise ValueError(str(error)) from None
    return LoadedRun(model, tokenizer, task, config, step)
