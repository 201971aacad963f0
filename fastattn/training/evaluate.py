"""A trained model from its run, its loss on a part of the data, and the report of a run."""

from contextlib import nullcontext

import torch

from .checkpoint import check_run, choose_checkpoint, read_summary
from .config import UsageError
from .lora import add_lora, merge_lora
from .tasks import TASKS, make_task
from .tokenizer import load_tokenizer


@torch.no_grad()
def evaluate_part(model, task, part, *, limit=None, rank=0, world_size=1, autocast=nullcontext, anywhere=None):
    """Losses and right predictions over a part, dropout off.

    Args:
        model: of the task; left in the mode it was in.
        task: Task.
        part: "train", "validation" or "test".
        limit: None or the number of windows of text to read.
        rank, world_size: which share of the part is this process's.
        autocast: gives the context to run the model in.
        anywhere: None, or tells whether something is true in any process: all run a sharded model equally often.

    Returns:
        (sum of the losses in nats, right predictions, predictions).
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total, right, count = 0.0, 0, 0
    own = task.rows(part, limit, rank, world_size)
    while True:
        rows = next(own, None)
        if not (anywhere or bool)(rows is not None):
            break
        with autocast():
            sums = task.sums(model, next(task.rows(part, limit)) if rows is None else rows, device)
        if rows is not None:
            total, right, count = total + sums[0], right + sums[1], count + sums[2]
    model.train(was_training)
    return total, right, count


def pick_device(accelerator):
    """The torch.device for "auto", "cpu" or "cuda"; UsageError if there is no such GPU."""
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise UsageError("accelerator: expected a CUDA GPU for 'cuda', got a machine without one that PyTorch can use")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


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


def draw_attention(run, config, text, path, **options):
    """Draw what the heads of the last block look at while a trained model reads a text.

    Args:
        run, config, options: as for load_run.
        text: a document; of a translation it is the source, and the decoder's attention to it is drawn.
        path: of the PNG.

    Raises:
        UsageError: as load_run; a model without attention.
    """
    from .figures import plot_attention

    model, task = load_task(run, config, **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    plot_attention(path, *task.attention(model, text))


def load_weights(model, folder):
    """Fill a model from a checkpoint folder; UsageError if the weights are those of another shape."""
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    try:
        load_model(model, str(folder / "model.safetensors"), strict=True)
    except (SafetensorError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise UsageError(f"{folder}: expected weights of the model in config.yaml, got {text[:200]}") from None


def evaluate_run(run, config, *, split=None, checkpoint="best", accelerator="auto", layers=None, **options):
    """The scores of a run on a whole part of its data.

    Args:
        run, config, checkpoint, accelerator, layers: as for load_run.
        split: "train", "validation", "test"; None is "test" where the run has one, else "validation".
        options: of the task's report: text for lm, another text that is read whole; beams for translate.

    Returns:
        dict: the scores of the task, and what they were measured on.

    Raises:
        UsageError: as load_run; a split the run does not have; data that are not those of the run.
    """
    model, tokenizer, step = load_run(run, config, checkpoint=checkpoint, accelerator=accelerator, layers=layers)
    if options.get("text") is not None and split is not None:
        raise UsageError(f"split: expected none beside --data, which is read whole, got {split!r}")
    task = make_task(config, tokenizer, read_summary(run))
    split = split or ("test" if "test" in task.sizes else "validation")
    if split not in task.sizes:
        raise UsageError(f"split: expected one of {', '.join(task.sizes)} of this run, got {split!r}")
    scores = task.report(model, split, **options)
    if options.get("text") is not None:
        source, split = options["text"], "all"
    else:
        source = config.data.source
    facts = {"run": str(run), "task": config.task, "step": step, "source": source, "split": split}
    return {**facts, "parameters": model.num_parameters(), **scores}
