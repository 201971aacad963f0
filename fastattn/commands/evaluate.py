"""fastattn evaluate: the scores of a trained model on a whole split."""

from fastattn.training.evaluation.evaluate import draw_attention, evaluate_run
from fastattn.training.evaluation.report import report_json, report_text, write_report
from fastattn.training.files import run_path
from fastattn.training.messages import UsageError

from ._options import open_run, run_parser

SPECIAL = {"data": ("lm", None, "text"), "beams": ("translate", 1, "beams")}  # option: task, default, name in reports


def parser():
    parser = run_parser("evaluate", "Score a trained model on a whole split.")
    parser.add_argument("--split", type=str | None, help="train, validation or test; default: test if there is one")
    parser.add_argument("--data", type=str | None, help="task lm: score this whole text instead; a source as for train")
    parser.add_argument("--beams", type=int, default=1, help="task translate: number of beams; 1 is greedy search")
    parser.add_argument(
        "--attention", metavar="TEXT", type=str | None, help="draw the attention of the last block on TEXT"
    )
    parser.add_argument("--output", type=str | None, help="folder for the report; default: RUN, or RUN/reports/STEP")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def run(options, _argv):
    run, config, how = open_run(options)
    report = evaluate_run(run, config, split=options.split, **how, **special_options(options, config.task))
    if options.output is not None:
        folder = run_path(options.output)
    else:
        folder = run if options.checkpoint == "best" else run / "reports" / str(report["step"])
    if options.attention is not None:
        draw_attention(run, config, options.attention, folder / "attention.png", **how)
    write_report(folder, report)
    print(report_json(report) if options.json else report_text(report), end="")


def special_options(options, run_task):
    """The options of the run's task; UsageError if an option of another task is set."""
    given = {}
    for name, (task, default, argument) in SPECIAL.items():
        if run_task == task:
            given[argument] = options[name]
        elif options[name] != default:
            raise UsageError(f"{name} is for task {task} only, but the task of this run is {run_task}")
    return given
