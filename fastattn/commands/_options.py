"""Options that several commands share, and the functions that read them."""

import json
import sys

from jsonargparse import ArgumentParser

from fastattn.training.config import Columns, DataConfig, TrainConfig, config_from_dict
from fastattn.training.data.documents import Documents
from fastattn.training.data.parts import read_whole
from fastattn.training.data.reading import TABLES, decode_text, lines_of, read_file, suffix_of
from fastattn.training.files import run_path, user_path
from fastattn.training.messages import UsageError
from fastattn.training.runs.checkpoint import check_run

from ._parse import parse


def new_parser(command, description):
    return ArgumentParser(prog=f"fastattn {command}", exit_on_error=False, allow_abbrev=False, description=description)


def train_parser(command="train", model_options=()):
    """The parser of a TrainConfig; model_options: {name: value}, the defaults of the model section."""
    parser = new_parser(command, "Train a model on text.")
    parser.add_argument("--config", action="config", help="YAML file; later options override it")
    parser.add_argument("--resume", metavar="RUN", type=str | None, help="continue this run from its newest checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in the run folder")
    parser.add_class_arguments(TrainConfig, as_group=False)
    parser.set_defaults({f"model.{name}": value for name, value in dict(model_options).items()})
    return parser


def read_config(options):
    """The TrainConfig from the parsed options of a train_parser."""
    values = options.as_dict()
    for name in ("config", "resume", "overwrite"):
        values.pop(name)
    return config_from_dict(values)


def stored_config(run):
    """The TrainConfig of a run folder."""
    check_run(run)
    try:
        return read_config(parse(train_parser(), ["--config", str(run / "config.yaml")]))
    except UsageError as error:
        path = str(run / "config.yaml")
        raise UsageError(error if path in str(error) else f"{path}: {error}") from None


def run_parser(command, description):
    """The parser of a command that reads a trained run."""
    parser = new_parser(command, description)
    parser.add_argument("run", metavar="RUN", type=str, help="folder of a run")
    parser.add_argument("--checkpoint", type=str, default="best", help="best, last or a step")
    parser.add_argument("--accelerator", type=str, default="auto", help="auto, cpu or cuda")
    parser.add_argument("--layers", type=str | None, help="the layers: fastattn or torch; default: as in training")
    return parser


def add_input(parser, what):
    parser.add_argument(
        "--input", type=str | None, help=f"{what} each line of a text file or row of a table; - is standard input"
    )
    parser.add_argument("--column", type=str, default="text", help="with --input: the column of a table")


def read_input(options, pair=None):
    """The Documents of the options of add_input; UsageError if they cannot be read.

    pair: None, or the column of second texts. In a line of text they follow a tab.
    """
    path = user_path(options.input)
    if options.input == "-":
        if sys.stdin is None:
            raise UsageError("--input - reads standard input, which this process does not have")
        lines = lines_of(decode_text(sys.stdin.buffer.read(), "standard input"))
    elif path.exists() and not path.is_dir() and suffix_of(path) not in TABLES:  # also a pipe
        lines = lines_of(read_file(path))  # blank lines too: one result a line
    else:
        return read_whole(DataConfig(source=options.input, columns=Columns(text=options.column, pair=pair)))
    if not lines:
        raise UsageError("--input must have at least one line, got none from standard input")
    if pair is None:
        return Documents(lines)
    halves = [line.split("\t") for line in lines]
    if wrong := next((number for number, half in enumerate(halves, 1) if len(half) != 2), None):
        raise UsageError(f"{options.input}, line {wrong} must have two texts with a tab between them")
    return Documents([half[0] for half in halves], pairs=[half[1] for half in halves])


def print_json(values):
    """Print a dict as one line of JSON."""
    print(json.dumps(values, ensure_ascii=False), flush=True)


def open_run(options):
    """(folder, TrainConfig, options of load_run) from the parsed options of a run_parser.

    Raises:
        UsageError: the folder is not a run, or an option has an unknown value.
    """
    run = run_path(options.run)
    config = stored_config(run)
    for name, allowed in (("accelerator", ("auto", "cpu", "cuda")), ("layers", (None, "fastattn", "torch"))):
        if options[name] not in allowed:
            raise UsageError(f"{name} must be one of {', '.join(filter(None, allowed))}, got {options[name]!r}")
    return run, config, {name: options[name] for name in ("checkpoint", "accelerator", "layers")}
