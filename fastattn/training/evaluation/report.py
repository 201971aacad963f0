"""The report of an evaluation: report.json for programs, report.md and pictures for readers."""

import html
import json
import math

from ..files import write_atomic
from ..inspect.figures import plot_calibration, plot_confusion

PICTURES = {
    "loss.png": "loss curve",
    "confusion.png": "confusion matrix",
    "calibration.png": "reliability diagram",
    "attention.png": "attention map",
}
N_CONFUSIONS = 20


def write_report(folder, report):
    """Write report.json and report.md, and for classifiers confusion.png and calibration.png.

    Args:
        folder: output folder, created if missing; report.md also shows the other pictures of a run in it.
        report: dict of what was evaluated, and of scores of `inspect.scores`; lists and dicts stay out of the first
            table.

    Returns:
        list of the paths written.
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
    return [*written, folder / "report.md"]


def report_json(report):
    """The report as JSON, one line per key; numbers that are not finite become null, as JSON has none."""
    lines = (f" {json.dumps(key)}: {json.dumps(_finite(value), allow_nan=False)}" for key, value in report.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def report_text(report):
    """The scores of a report as lines for a terminal, each with a name and a number."""
    scores = {name: value for name, value in report.items() if not isinstance(value, (list, dict))}
    if "averages" in report:
        scores["macro_f1"] = report["averages"]["macro"]["f1"]
    width = max(map(len, scores)) + 2
    # text is not escaped as in a Markdown cell, because users copy it
    return "".join(f"{name:{width}}{v if isinstance(v, str) else cell(v)}\n" for name, v in scores.items())


def report_markdown(report, pictures=()):
    """The report as Markdown text, with links to pictures (names in PICTURES) in the same folder."""
    scalars = [(key, value) for key, value in report.items() if not isinstance(value, (dict, list))]
    parts = [f"# Evaluation of {cell(report.get('run', 'a model'))}", table(("", ""), scalars)]
    if "averages" in report:
        rows = [(name, *values.values()) for name, values in report["averages"].items()]
        parts += ["## Averages over the classes", table(("average", "precision", "recall", "f1"), rows)]
    if "classes" in report:
        parts += ["## Classes", table(tuple(report["classes"][0]), [row.values() for row in report["classes"]])]
    if "confusion" in report:
        names = [row["name"] for row in report["classes"]]
        rows = confusions(report["confusion"], names)[:N_CONFUSIONS]
        header = ("true", "predicted", "examples", "share of the true class")
        parts += ["## Most frequent confusions", table(header, rows) if rows else "None."]
    parts += [f"![{PICTURES[name]}]({name})" for name in pictures]
    return "\n\n".join(parts) + "\n"


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
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:,.4f}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = " ".join(str(value).split()).replace("\\", "\\\\").replace("|", "\\|")
    return html.escape(text, quote=False).encode("utf-8", "backslashreplace").decode()


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
