"""The metrics of a run: metrics.csv, TensorBoard, and the loss curve drawn from the CSV."""

import csv
import io
import math

from ..files import write_atomic
from ..inspect.figures import label, new_figure, save_png
from ..messages import UsageError

# seconds: training time since the last row with a value, without validation and checkpoints
COLUMNS = (
    "step", "train_loss", "validation_loss", "validation_accuracy", "validation_macro_f1", "learning_rate", "grad_norm",
    "tokens_per_second", "mfu", "seconds",
)  # fmt: skip


def read_metrics(run):
    """Rows of metrics.csv: list of {column: float}, without empty cells and an incomplete last line.

    Raises:
        UsageError: it is not a table of numbers.
    """
    path = run / "metrics.csv"
    if not path.exists():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            lines = [line for line in file if line.endswith("\n")]
        rows = [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(lines)]
    except (ValueError, TypeError, csv.Error) as error:
        raise UsageError(f"{path} is not a table of numbers: {error}") from None
    if not all("step" in row for row in rows):
        raise UsageError(f"{path} must have a step in each row")
    return rows


class MetricsLog:
    """Appends rows to metrics.csv and to TensorBoard; a resumed run first drops the rows past its checkpoint.

    Args:
        run: the folder of the run.
        step: number of finished steps; later rows are dropped.
        tensorboard: whether to write TensorBoard logs too.
        more: further columns, of the task.
    """

    # Fabric's CSVLogger starts a new file, or appends to rows that a resumed run will write again
    def __init__(self, run, step, tensorboard, more=()):
        columns = (*COLUMNS, *more)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        for row in read_metrics(run):
            if step and row["step"] <= step:  # a restarted run validates at step 0 again
                writer.writerow({**row, "step": int(row["step"])})
        write_atomic(run / "metrics.csv", text.getvalue())
        self.file = open(run / "metrics.csv", "a", newline="", buffering=1)  # noqa: SIM115, closed by close()
        self.writer = csv.DictWriter(self.file, columns, lineterminator="\n")
        self.tensorboard = None
        if tensorboard:
            from lightning_fabric.loggers import TensorBoardLogger

            purge = step + 1 if step else 0
            self.tensorboard = TensorBoardLogger(run, name="tensorboard", version="", purge_step=purge)

    def log(self, step, **values):
        """Append a row; None is an unknown value: an empty cell, and no point in TensorBoard."""
        known = {name: value for name, value in values.items() if value is not None}
        self.writer.writerow({"step": step, **known})
        if self.tensorboard:
            self.tensorboard.log_metrics(known, step)

    def close(self):
        self.file.close()
        if self.tensorboard:
            self.tensorboard.finalize("finished")


def plot_losses(run, *, unit="nats a token", smoothing=0.0, chosen=None):
    """Draw RUN/loss.png from RUN/metrics.csv and return its path.

    Args:
        run: the folder of the run.
        unit: of the losses.
        smoothing: label smoothing, which raises the training loss alone.
        chosen: step of the chosen checkpoint, which is marked; None = none.
    """
    rows = read_metrics(run)
    figure = new_figure(8, 5)
    axes = figure.add_subplot(xlabel="step", ylabel=f"loss ({unit})", title=label(run.name, 60))
    smoothed = f", with label smoothing {smoothing:g}" if smoothing else ""
    for name, style in (("train_loss", {"linewidth": 0.8, "alpha": 0.6}), ("validation_loss", {"marker": "o"})):
        if points := _points(rows, name):
            text = f"{name.replace('_', ' ')}{smoothed if name == 'train_loss' else ''}, last {points[-1][1]:.4f}"
            axes.plot(*zip(*points, strict=True), label=text, **style)
    if chosen is not None:
        axes.axvline(chosen, color="gray", linestyle=":", label=f"chosen checkpoint, step {chosen}")
    lines = list(axes.lines)
    if accuracies := _points(rows, "validation_accuracy"):
        right = axes.twinx()
        right.set(ylabel="validation accuracy", ylim=(0, 1))
        text = f"validation accuracy, last {accuracies[-1][1]:.4f}"
        lines += right.plot(*zip(*accuracies, strict=True), "--", color="tab:green", marker=".", label=text)
    if lines:  # below the axes: between two falling and a rising curve no corner is free
        figure.legend(handles=lines, loc="outside lower center", ncols=2)
    axes.xaxis.get_major_locator().set_params(integer=True)  # no half steps
    axes.grid(alpha=0.3)
    save_png(figure, run / "loss.png")
    return run / "loss.png"


def _points(rows, name):
    return [(row["step"], row[name]) for row in rows if name in row and math.isfinite(row[name])]
