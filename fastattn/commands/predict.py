"""fastattn predict: classifies texts."""

from fastattn.training.messages import UsageError
from fastattn.training.runs.load import load_task

from ._options import add_input, open_run, print_json, read_input, run_parser

ESCAPED = str.maketrans({"\\": r"\\", "\n": r"\n", "\r": r"\r", "\t": r"\t"})  # one line per text, three columns


def parser():
    parser = run_parser("predict", "Classify texts with a trained classifier.")
    texts = parser.add_argument("texts", metavar="TEXT", type=str, nargs="+", help="text to classify")
    texts.required = False  # with "*", options could not stand before the texts
    add_input(parser, "also classify")
    parser.add_argument("--json", action="store_true", help="print JSON lines, with the probabilities of all classes")
    return parser


def run(options, _argv):
    run, config, how = open_run(options)
    if config.task != "classify":
        raise UsageError(f"run {str(run)!r}: predict needs a run of task classify, got {config.task}")
    texts = (options.texts or []) + (read_input(options) if options.input is not None else [])
    if not texts:
        raise UsageError("predict needs a TEXT or --input FILE with at least one line")
    model, task = load_task(run, config, **how)
    for text, row in zip(texts, task.predict(model, texts).tolist(), strict=True):
        chance, name = max(zip(row, task.names, strict=True))
        if options.json:
            all_classes = dict(zip(task.names, row, strict=True))
            print_json({"text": text, "class": name, "probability": chance, "probabilities": all_classes})
        else:
            print(f"{name.translate(ESCAPED)}\t{chance:.3f}\t{text.translate(ESCAPED)}")
