"""fastattn baseline: the scores of a linear classifier on word counts."""

from fastattn.training.config import Columns, DataConfig
from fastattn.training.data.parts import read_parts
from fastattn.training.evaluation.baseline import bag_of_words_baseline
from fastattn.training.evaluation.report import report_json, report_text, write_report
from fastattn.training.files import check_place, run_path
from fastattn.training.messages import UsageError

from ._options import new_parser


def parser():
    parser = new_parser("baseline", "Score logistic regression on the words of a text.")
    parser.add_class_arguments(DataConfig, "data", skip={"tokenizer", "vocab_size", "packed", "chat_template"})
    parser.add_argument("--tfidf", action="store_true", help="weight words by inverse document frequency")
    parser.add_argument("--max_ngram", type=int, default=1, help="also count sequences of up to this many words")
    parser.add_argument("--split", type=str | None, help="validation or test; default: test if there is one")
    parser.add_argument("--output", type=str | None, help="folder for the report; fastattn compare reads it like a run")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def run(options, _argv):
    if options.output is not None:
        check_place(run_path(options.output), "output")
    data = options.data.as_dict()
    data = DataConfig(**{**data, "columns": Columns(**data["columns"])})
    parts = read_parts(data)
    split = options.split or ("test" if "test" in parts else "validation")
    if split not in parts:
        raise UsageError(f"split must be one of {', '.join(parts)}, which this source has, got {split!r}")
    scores = bag_of_words_baseline(parts["train"], parts[split], tfidf=options.tfidf, max_ngram=options.max_ngram)
    report = {"source": data.source, "split": split, **scores}
    if options.output is not None:
        write_report(run_path(options.output), report)
    print(report_json(report) if options.json else report_text(report), end="")
