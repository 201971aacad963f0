"""A trained model from its run, its loss on a part of the data, and the report of a run."""

from ..inspect.figures import plot_attention
from ..messages import UsageError
from ..runs.checkpoint import read_summary
from ..runs.load import load_run, load_task
from ..tasks.registry import make_task


def draw_attention(run, config, text, path, **options):
    """Draw what the heads of the last block look at while a trained model reads a text.

    Args:
        run, config, options: as for load_run.
        text: a document; of a translation it is the source, and the decoder's attention to it is drawn.
        path: of the PNG.

    Raises:
        UsageError: as load_run; a model without attention.
    """

    model, task = load_task(run, config, **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    plot_attention(path, *task.attention(model, text))


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
