"""fastattn predict: the classes of texts, or the numbers that a model estimates for them."""

from fastattn.training.data.tokenizer import count_unknown
from fastattn.training.messages import UsageError, warn
from fastattn.training.runs.load import load_task

from ._options import add_input, open_run, print_json, read_input, run_parser

ESCAPED = str.maketrans({"\\": r"\\", "\n": r"\n", "\r": r"\r", "\t": r"\t"})  # one line per text, three columns


def parser():
    parser = run_parser("predict", "Classify texts, or estimate a number for each, with a trained model.")
    what = "text to classify, or with a [MASK] to fill in; for a run on pairs, the two texts of each pair in a row"
    texts = parser.add_argument("texts", metavar="TEXT", type=str, nargs="+", help=what)
    texts.required = False  # with "*", options could not stand before the texts
    add_input(parser, "also classify")
    parser.add_argument(
        "--pair_column", type=str | None, help="with --input: the column of the second texts; default: as in the run"
    )
    parser.add_argument("--json", action="store_true", help="print JSON lines, with the probabilities of all classes")
    return parser


def run(options, _argv):
    run, config, how = open_run(options)
    if config.task not in ("classify", "masked_lm"):
        raise UsageError(f"run {str(run)!r}: predict needs a run of task classify or masked_lm, got {config.task}")
    pair = options.pair_column or config.data.columns.pair
    if options.pair_column and (config.data.columns.pair is None or options.input is None):
        raise UsageError(f"pair_column is for --input and a run on pairs of texts, got {options.pair_column!r}")
    texts, pairs = options.texts or [], None
    if pair is not None:
        if len(texts) % 2:
            raise UsageError(f"this run reads pairs of texts: TEXT must be given twice for each, got {len(texts)}")
        texts, pairs = texts[::2], texts[1::2]
    if options.input is not None:
        more = read_input(options, pair)
        texts = texts + more.texts
        pairs = pairs if pair is None else pairs + more.pairs
    if not texts:
        raise UsageError("predict needs a TEXT or --input FILE with at least one line")
    model, task = load_task(run, config, **how)
    encoded = [number for text in texts for number in task.tokenizer.encode(text)]
    if unknown := count_unknown(task.tokenizer, encoded):
        warn(f"the vocabulary does not know {unknown} of the {len(encoded)} tokens of the texts")
    if config.task == "masked_lm":
        for text, (filled, masks) in [(text, task.fill(model, text)) for text in texts]:
            print_json({"text": text, "filled": filled, "masks": masks}) if options.json else print(filled)
        return
    sides = [texts] if pairs is None else [texts, pairs]
    for row, *given in zip(task.predict(model, *sides), *sides, strict=True):
        values, cells = task.describe(row)
        if options.json:
            print_json({**dict(zip(("text", "pair"), given, strict=False)), **values})
        else:
            print(*(cell.translate(ESCAPED) for cell in (*cells, *given)), sep="\t")
