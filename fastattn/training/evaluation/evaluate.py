"""Evaluates a run: its scores on a part of the data, and a drawing of its attention."""

from dataclasses import replace

from ..data.parts import read_whole
from ..inspect.figures import plot_attention
from ..messages import UsageError
from ..runs.checkpoint import best_checkpoint, read_summary
from ..runs.load import load_run, load_task
from ..tasks.registry import make_task, task_class


def draw_attention(run, config, text, path, **options):
    """Draw the attention of the last block's heads on a text.

    Args:
        run, config, options: as for load_run.
        text: a document; for task translate the source, to which the decoder's attention is drawn.
        path: path of the PNG.

    Raises:
        UsageError: as load_run; the model has no attention.
    """
    model, task = load_task(run, config, **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    plot_attention(path, *task.attention(model, text))


def evaluate_run(
    run, config, *, split=None, checkpoint="best", accelerator="auto", layers=None, documents=None, **options
):
    """The scores of a run on a whole part of its data.

    Args:
        run, config, checkpoint, accelerator, layers: as for load_run.
        split: "train", "validation" or "test"; None: "test" if the run has it, else "validation".
        documents: None, or a DataConfig: its documents are scored as a whole, for all tasks but lm.
        options: of the task's report: `text` for lm, another text to score as a whole; `beams` for translate.

    Returns:
        dict: the scores of the task, and the data that they were measured on.

    Raises:
        UsageError: as load_run; the run has no such split, or the data have changed since the run.
    """
    model, tokenizer, step = load_run(run, config, checkpoint=checkpoint, accelerator=accelerator, layers=layers)
    summary, text = read_summary(run), options.get("text")
    if (text is not None or documents is not None) and split is not None:
        raise UsageError(f"--split cannot be used with --data, which is read as a whole, got {split!r}")
    source = config.data.source
    if text is not None:
        task, source, split = task_class(config).without_data(config, tokenizer, summary), text, "all"
    elif documents is not None:
        source, split = documents.source, "all"
        config = replace(config, data=replace(config.data, source=source))  # which messages name
        task = task_class(config).on_documents(config, tokenizer, summary, read_whole(documents))
    else:
        task = make_task(config, tokenizer, summary)
        split = split or ("test" if "test" in task.sizes else "validation")
        if split not in task.sizes:
            raise UsageError(f"split must be one of {', '.join(task.sizes)}, which this run has, got {split!r}")
    scores = task.report(model, split, **options)
    facts = {"run": str(run), "task": config.task, "step": step, "checkpoint": _rank(run, config, step)}
    facts |= {"source": source, "split": split, "parameters": model.num_parameters()}
    return {**facts, **scores, **task.counts[split].facts()}


def _rank(run, config, step):
    """Whether the checkpoint of a step is the one that was chosen, and by what."""
    best = best_checkpoint(run)
    if best is None:
        return "not validated"
    chosen = best[1]["step"]
    by = {"loss": "lowest validation loss", "accuracy": "highest validation accuracy"}.get(
        config.select, "highest macro F1 in validation"
    )
    return f"the best, with the {by}" if step == chosen else f"not the best, which is step {chosen}"
