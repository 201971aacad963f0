"""The report of an evaluation: report.json for programs, report.md, report.html and pictures for readers."""

import html
import json
import math
from pathlib import Path

from ..files import write_atomic
from ..inspect.figures import plot_calibration, plot_confusion
from .page import page, shown

PICTURES = {
    "loss.png": "loss curve",
    "confusion.png": "confusion matrix",
    "calibration.png": "reliability diagram",
    "attention.png": "attention map",
}
CAPTIONS = {
    "loss.png": "The losses by step. A validation loss that rises while the training loss falls means overfitting.",
    "confusion.png": "Each row is a true class, each column a prediction; the diagonal is correct.",
    "calibration.png": "Above: how often a prediction of this probability was right; bars below the dashed line mean"
    " that the model is too confident. Below: how many predictions there are.",
    "attention.png": "The tokens that each token (row) attends to in the last block, head by head; each row sums to 1.",
}
N_CONFUSIONS = 20


def write_report(folder, report, run=None):
    """Write report.json, report.md and report.html, and for classifiers confusion.png and calibration.png.

    Args:
        folder: output folder, created if missing; report.md also shows the other pictures of a run in it.
        run: folder of the run, whose loss curve, settings and sample report.html has too; None: `folder`.
        report: dict of what was evaluated, and of scores of `inspect.scores`; lists and dicts stay out of the first
            table.

    Returns:
        list of the paths written.
    Example:
        >>> from pathlib import Path
        >>> from fastattn.training.evaluation.report import write_report
        >>> [path.name for path in write_report(Path("report"), {"run": "mine", "bleu": 31.5})]
        ['report.json', 'report.md', 'report.html']
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "report.json"]
    write_atomic(folder / "report.json", report_json(report))
    if "confusion" in report:
        written.append(folder / "confusion.png")
        plot_confusion(written[-1], report["confusion"], [row["name"] for row in report["classes"]])
    if "calibration" in report:
        written.append(folder / "calibration.png")
        plot_calibration(written[-1], report["calibration"])
    pictures = [name for name in PICTURES if (folder / name).exists()]
    write_atomic(folder / "report.md", report_markdown(report, pictures))
    write_atomic(folder / "report.html", report_html(report, folder, run))
    return [*written, folder / "report.md", folder / "report.html"]


def report_json(report):
    """The report as JSON, one line per key; numbers that are not finite become null, as JSON has none."""
    lines = (f" {json.dumps(key)}: {json.dumps(_finite(value), allow_nan=False)}" for key, value in report.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def report_text(report):
    """The scores of a report as lines for a terminal, each with a name and a number."""
    scores = {name: value for name, value in report.items() if not isinstance(value, (list, dict))}
    if "averages" in report:
        scores["macro_f1"] = report["averages"]["macro"]["f1"]
    for name, of_source in report.get("sources", {}).items():
        scores[f"loss_{name}"] = of_source["loss"]
    width = max(map(len, scores)) + 2
    # text is not escaped as in a Markdown cell, because users copy it
    return "".join(f"{name:{width}}{v if isinstance(v, str) else cell(v)}\n" for name, v in scores.items())


def report_tables(report):
    """The tables of a report for readers: [(title or None, header, rows)]."""
    scalars = [(key, value) for key, value in report.items() if not isinstance(value, (dict, list))]
    tables = [(None, ("", ""), scalars)]
    if "averages" in report:
        rows = [(name, *values.values()) for name, values in report["averages"].items()]
        tables.append(("Averages over the classes", ("average", "precision", "recall", "f1"), rows))
    if "sources" in report:
        names = list(dict.fromkeys(name for scores in report["sources"].values() for name in scores))
        rows = [(name, *map(scores.get, names)) for name, scores in report["sources"].items()]
        tables.append(("Sources of the mixture", ("source", *names), rows))
    if "classes" in report:
        rows = [tuple(row.values()) for row in report["classes"]]
        tables.append(("Classes", tuple(report["classes"][0]), rows))
    if "confusion" in report:
        rows = confusions(report["confusion"], [row["name"] for row in report["classes"]])[:N_CONFUSIONS]
        header = ("true", "predicted", "examples", "share of the true class")
        tables.append(("Most frequent confusions", header, rows))
    return tables


def report_markdown(report, pictures=()):
    """The report as Markdown text, with links to pictures (names in PICTURES) in the same folder."""
    parts = [f"# Evaluation of {cell(report.get('run', 'a model'))}"]
    for title, header, rows in report_tables(report):
        parts += [f"## {title}"] if title else []
        parts.append(table(header, rows) if rows or not title else "None.")
    parts += [f"![{PICTURES[name]}]({name})" for name in pictures]
    return "\n\n".join(parts) + "\n"


def report_html(report, folder, run=None):
    """The report as one HTML file, with the pictures, settings and sample that are in the folder or in the run's."""
    of_the_run = ("loss.png", "sample.txt", "config.yaml")  # the other pictures belong to one evaluation

    def find(name):
        places = [Path(folder), *([Path(run)] if run and name in of_the_run else [])]
        return next((place / name for place in places if (place / name).is_file()), None)

    title = f"Evaluation of {Path(run).name if run else shown(report.get('run', 'a model'))}"
    (_, _, facts), *others = report_tables(report)
    tables = [(None, None, [(name.replace("_", " "), value) for name, value in facts]), *others]
    found = [(name, path) for name in PICTURES if (path := find(name))]
    pictures = [(PICTURES[name].capitalize(), CAPTIONS[name], path.read_bytes()) for name, path in found]
    texts = [("Sample", "sample.txt", False), ("Settings of the run", "config.yaml", True)]
    texts = [(name, path.read_text(encoding="utf-8"), fold) for name, file, fold in texts if (path := find(file))]
    return page(title, tables, pictures, texts)


def confusions(confusion, names):
    """The wrong predictions: [(true, predicted, examples, share of the true class)], most examples first."""
    found = [
        (names[i], names[j], count, count / sum(row))
        for i, row in enumerate(confusion)
        for j, count in enumerate(row)
        if i != j and count
    ]
    return sorted(found, key=lambda pair: (-pair[2], -pair[3]))  # stable: ties stay in the order of the classes


def table(header, rows):
    """A Markdown table; columns of numbers are aligned to the right."""
    rows = [tuple(row) for row in rows]
    columns = zip(header, *rows, strict=True)
    rule = ("---" if any(isinstance(value, str) for value in column[1:]) else "---:" for column in columns)
    lines = [map(cell, header), rule, *(map(cell, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value):
    """A value as the text of one cell of a Markdown table."""
    text = shown(value).replace("\\", "\\\\").replace("|", "\\|")
    return html.escape(text, quote=False).encode("utf-8", "backslashreplace").decode()


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
