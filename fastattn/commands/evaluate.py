"""fastattn evaluate: the scores of a trained model on a whole split."""

from dataclasses import replace

from fastattn.training.config import Columns
from fastattn.training.evaluation.evaluate import draw_attention, evaluate_run
from fastattn.training.evaluation.report import report_json, report_text, write_report
from fastattn.training.files import check_place, run_path
from fastattn.training.inspect.generate import check_sampling
from fastattn.training.messages import UsageError

from ._options import open_run, run_parser


def parser():
    parser = run_parser("evaluate", "Score a trained model on a whole split.")
    parser.add_argument("--split", type=str | None, help="train, validation or test; default: test if there is one")
    parser.add_argument("--data", type=str | None, help="score this whole source instead of a split of the run's own")
    parser.add_argument("--target_source", type=str | None, help="with --data: a second file with the targets")
    for name in ("text", "pair", "label", "target", "rejected", "messages"):
        parser.add_argument(f"--columns.{name}", type=str | None, help="with --data: a column; default: as in the run")
    parser.add_argument("--beams", type=int, default=1, help="task translate: number of beams; 1 is greedy search")
    parser.add_argument(
        "--attention", metavar="TEXT", type=str | None, help="draw the attention of the last block on TEXT"
    )
    parser.add_argument("--output", type=str | None, help="folder for the report; default: RUN, or RUN/reports/STEP")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def run(options, _argv):
    run, config, how = open_run(options)
    folder = run if options.output is None else run_path(options.output)
    check_place(folder, "output")
    report = evaluate_run(run, config, split=options.split, **how, **task_options(options, config))
    if options.output is None and options.checkpoint != "best":
        folder = run / "reports" / str(report["step"])
    if options.attention is not None:
        draw_attention(run, config, options.attention, folder / "attention.png", **how)
    write_report(folder, report, run)
    print(report_json(report) if options.json else report_text(report), end="")
    if not options.json:
        print(f"\nThe report with its pictures: {folder / 'report.html'}")


def task_options(options, config):
    """What is scored and how, by the run's task; UsageError if an option of another task is set."""
    columns = {name: value for name, value in options.columns.as_dict().items() if value is not None}
    if options.data is None:
        for name, value in {"target_source": options.target_source, **columns}.items():
            if value is not None:
                raise UsageError(f"{name} is for --data only, got {value!r}")
    check_sampling(1, beams=options.beams)
    given = {}
    if config.task == "translate":
        given["beams"] = options.beams
    elif options.beams != 1:
        raise UsageError(f"beams is for task translate only, but the task of this run is {config.task}")
    if config.task == "lm":
        given["text"] = options.data
        if columns or options.target_source:
            raise UsageError("columns and target_source are not for the task lm, which reads --data as a text")
    elif options.data is not None:
        data, own = config.data, config.data.columns
        if columns:
            columns = replace(own, **columns)
        elif options.target_source:  # the lines of two files have no columns
            columns = Columns()
        else:
            columns = own
        unit = "line" if options.target_source else data.unit
        given["documents"] = replace(
            data, source=options.data, target_source=options.target_source, columns=columns, unit=unit
        )
    return given
