"""fastattn predict: classifies texts."""

from fastattn.training.messages import UsageError
from fastattn.training.runs.load import load_task

from ._options import open_run, run_parser

ESCAPED = str.maketrans({"\\": r"\\", "\n": r"\n", "\r": r"\r", "\t": r"\t"})  # one line per text, three columns


def parser():
    parser = run_parser("predict", "Classify texts with a trained classifier.")
    parser.add_argument("texts", metavar="TEXT", type=str, nargs="+", help="text to classify")
    return parser


def run(options, _argv):
    run, config, how = open_run(options)
    if config.task != "classify":
        raise UsageError(f"run {str(run)!r}: predict needs a run of task classify, got {config.task}")
    model, task = load_task(run, config, **how)
    for text, row in zip(options.texts, task.predict(model, options.texts).tolist(), strict=True):
        chance, name = max(zip(row, task.names, strict=True))
        print(f"{name.translate(ESCAPED)}\t{chance:.3f}\t{text.translate(ESCAPED)}")
