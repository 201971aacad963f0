"""Compares several runs, or several checkpoints of a run."""

import json
import math
import statistics

import yaml

from ..files import run_path, write_atomic
from ..inspect.figures import label, new_figure, save_png
from ..messages import UsageError
from ..runs.checkpoint import choose_checkpoint
from ..runs.metrics import read_metrics
from .report import table

# title → path in a report; a column is shown if any report has it
SCORES = {
    "loss": ("loss",),
    "perplexity": ("perplexity",),
    "bits/character": ("bits_per_character",),
    "accuracy": ("accuracy",),
    "macro precision": ("averages", "macro", "precision"),
    "macro recall": ("averages", "macro", "recall"),
    "macro F1": ("averages", "macro", "f1"),
    "log loss": ("log_loss",),
    "calibration error": ("expected_calibration_error",),
    "BLEU": ("bleu",),
    "chrF": ("chrf",),
    "exact match": ("exact_match",),
    "mean absolute error": ("mean_absolute_error",),
    "Spearman": ("spearman",),
    "preference accuracy": ("preference_accuracy",),
    "exact answers": ("exact_answers",),
}


def compare_runs(runs, output=None):
    """A table of runs, and their validation curves.

    Args:
        runs: list of "RUN", for its latest report, or "RUN@STEP", "RUN@best", "RUN@last", for that of a checkpoint,
            from RUN/report.json or RUN/reports/*/report.json. A folder with only a report.json, as of a baseline, also
            counts as a run.
        output: None, or a folder for comparison.md and comparison.png.

    Returns:
        The Markdown table, with "–" for unknown values. Parameters are those that `evaluate` counts.
        Without @, the validation loss is that of the checkpoint in the report, or of the best one without a report, and
        the steps are all steps. Seconds exclude validation.

    Raises:
        UsageError: runs is empty, a folder is not a run, a checkpoint is missing, or a file cannot be read.
    """
    if not runs:
        raise UsageError("compare needs at least one run")
    entries = [_read_entry(name) for name in runs]
    for title, path in SCORES.items():
        values = [_score(report, path) for report, _, _ in entries]
        if any(value is not None for value in values):
            for (_, row, _), value in zip(entries, values, strict=True):
                row[title] = value
    last = ("validation loss", "steps", "seconds", "tokens/s")
    header = [name for name in entries[0][1] if name not in last]
    text = table((*header, *last), [[row[name] for name in (*header, *last)] for _, row, _ in entries])
    if output is not None:
        folder = run_path(output)
        folder.mkdir(parents=True, exist_ok=True)
        _plot_validation(folder / "comparison.png", {row["run"]: curve for _, row, curve in entries})
        write_atomic(folder / "comparison.md", f"{text}\n\n![validation losses](comparison.png)\n")
    return text


def _read_entry(name):
    """(report, row, (curve, shown)) of a run: its report or {}, its cells except scores, [(step, validation loss)], and
    the step of the checkpoint that the row is about, or None.
    """
    base, which = name, None
    if not run_path(name).is_dir() and "@" in name:
        base, _, which = name.rpartition("@")
    run = run_path(base)
    if not any((run / file).is_file() for file in ("config.yaml", "report.json")):
        raise UsageError(f"run {base!r} has neither config.yaml nor report.json")
    metrics = [row for row in read_metrics(run) if "step" in row]
    checkpoint = choose_checkpoint(run, which or "best", needed=())
    if which and checkpoint is None:
        raise UsageError(f"run {base!r} has no checkpoint yet for '@{which}'")
    step = checkpoint[1]["step"] if which else None
    if which:
        metrics = [row for row in metrics if row["step"] <= step]
    report = _read_report(run, step)
    evaluated_on = ", ".join(str(report[key]) for key in ("source", "split") if key in report)
    curve = [(int(row["step"]), row["validation_loss"]) for row in metrics if "validation_loss" in row]
    curve = [point for point in curve if math.isfinite(point[1])]
    speeds = [row["tokens_per_second"] for row in metrics if row.get("tokens_per_second")]
    shown = step if which else report.get("step", checkpoint[1]["step"] if checkpoint else None)
    row = {
        "run": name,
        "architecture": report.get("architecture") or _architecture(run / "config.yaml"),
        "parameters": _count_parameters(checkpoint[0]) if checkpoint else report.get("parameters"),
        "evaluated on": evaluated_on or None if report else "no report",
        "validation loss": min((loss for at, loss in curve if shown in (None, at)), default=None),
        "steps": step if which else max((int(row["step"]) for row in metrics), default=None),
        "seconds": sum(row.get("seconds", 0.0) for row in metrics) or report.get("seconds"),
        "tokens/s": statistics.median(speeds) if speeds else None,
    }
    return report, row, (curve, shown)


def _score(report, path):
    for key in path:
        report = report.get(key) if isinstance(report, dict) else None
    return float(report) if isinstance(report, (int, float)) else None


def _read_report(run, step):
    """The report of a step, or the latest if step is None; {} if there is none."""
    paths = [run / "report.json", *([] if step is None else sorted(run.glob("reports/*/report.json")))]
    for path in filter(lambda path: path.is_file(), paths):
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UsageError(f"{path} is not a report: {error}") from None
        if not isinstance(report, dict):
            raise UsageError(f"{path} is not a report: it holds a {type(report).__name__}")
        if step is None or report.get("step") == step:
            return report
    return {}


def _architecture(path):
    """The architecture in a config.yaml, such as "transformer, 4 × 128, 4 heads, fastattn"; None without a model."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    model = config.get("model") if isinstance(config, dict) else None
    if not isinstance(model, dict):
        return None
    body = model.get("body", "transformer")
    parts = [body]
    if {"n_layer", "d_model"} <= model.keys() and body != "bag_of_words":
        parts.append(f"{model['n_layer']} × {model['d_model']}")
    if body == "transformer" and "n_head" in model:
        parts.append(f"{model['n_head']} heads")
    return ", ".join([*parts, *filter(None, [config.get("layers")])])


def _count_parameters(folder):
    """The parameters in model.safetensors, counted like num_parameters does; None if its header is damaged."""
    try:
        with open(folder / "model.safetensors", "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size) if size < 2**30 else b"")
        uncounted = ("__metadata__", "position_embedding.weight", ".lora_a", ".lora_b")  # LoRA is merged
        return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if not name.endswith(uncounted))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _plot_validation(path, curves):
    figure = new_figure(8, 5)
    axes = figure.add_subplot(xlabel="step", ylabel="validation loss (nats a prediction)")
    for name, (curve, shown) in curves.items():
        if curve:
            lowest = min(loss for _, loss in curve)
            name = name if len(name) <= 40 else f"…{name[-39:]}"  # paths differ at their ends
            (line,) = axes.plot(*zip(*curve, strict=True), marker=".", label=f"{lowest:.4f}  {label(name, 40)}")
            chosen = [point for point in curve if point[0] == shown]
            axes.plot(*zip(*chosen, strict=True), "*", ms=12, color=line.get_color()) if chosen else None
    if axes.lines:
        axes.legend(title="lowest, run (star: the checkpoint in the table)")
    axes.grid(alpha=0.3)
    save_png(figure, path)
