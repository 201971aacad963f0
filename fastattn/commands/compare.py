"""fastattn compare: shows runs or their checkpoints side by side."""

from fastattn.training.evaluation.compare import compare_runs

from ._options import new_parser


def parser():
    parser = new_parser("compare", "Show runs or their checkpoints side by side.")
    parser.add_argument(
        "runs", metavar="RUN", type=str, nargs="+", help="folder of a run, or RUN@STEP, RUN@best, RUN@last"
    )
    parser.add_argument("--output", type=str | None, help="folder for comparison.md and comparison.png")
    return parser


def run(options, _argv):
    print(compare_runs(options.runs, options.output))
