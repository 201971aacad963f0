"""fastattn train: trains a model on text, or resumes an interrupted run."""

import operator
from pathlib import Path

from fastattn.training.messages import UsageError
from fastattn.training.runs.start import start_model_options

from ._options import read_config, stored_config, train_parser
from ._parse import parse


def parser():
    return train_parser()


def run(options, argv, command="train"):
    from fastattn.training.runs.processes import follow_parent, needs_processes, run_processes
    from fastattn.training.runs.train import train  # imports Fabric, which --help does not need

    follow_parent()
    config = read_train_config(options, argv)
    if needs_processes(config):
        return run_processes(config, [command, *argv])
    return train(config, resume=options.resume is not None, overwrite=options.overwrite)


def read_train_config(options, argv):
    """The TrainConfig of the options; on resume, they override the settings of the run."""
    if options.resume is not None:
        if options.overwrite:
            raise UsageError("train takes either --resume or --overwrite, not both")
        run = Path(options.resume).expanduser().absolute()
        stored = stored_config(run)
        argv = ["--config", str(run / "config.yaml"), *argv, "--run", str(run)]
        config = read_config(parse(train_parser(), argv))
        check_same_run(stored, config)
        return config
    if options.start is not None:  # the start decides the shape, unless the user sets it
        options = parse(train_parser(model_options=start_model_options(options.start)), argv)
    return read_config(options)


def check_same_run(stored, config):
    """Raise UsageError if the options change the text, the model or the state of a resumed run."""
    for section, names in (
        ("", ("task", "trained", "lora_rank", "select")),
        ("optim.", ("name", "ema")),
        ("model.", vars(stored.model)),
        ("data.", [name for name in vars(stored.data) if name != "source"]),
    ):
        for name in names:
            value, got = map(operator.attrgetter(section + name), (stored, config))
            if got != value:
                raise UsageError(f"{section}{name} must be {value!r} as in the resumed run, got {got!r}")
