"""fastattn train: trains a model on text, or resumes an interrupted run."""

import operator

from fastattn.training.files import run_path
from fastattn.training.messages import UsageError
from fastattn.training.runs.start import start_model_options

from ._options import read_config, stored_config, train_parser
from ._parse import parse


def parser():
    return train_parser()


def run(options, argv, command="train"):
    from fastattn.training.runs.devices import check_devices
    from fastattn.training.runs.processes import follow_parent, needs_processes, run_processes
    from fastattn.training.runs.train import train  # imports Fabric, which --help does not need

    follow_parent()
    config = read_train_config(options, argv)
    if needs_processes(config):
        check_devices(config)
        return run_processes(config, [command, *argv])
    return train(config, resume=options.resume is not None, overwrite=options.overwrite)


def read_train_config(options, argv):
    """The TrainConfig of the options; on resume, they override the settings of the run."""
    if options.resume is not None:
        if options.overwrite:
            raise UsageError("train takes either --resume or --overwrite, not both")
        run = run_path(options.resume)
        stored = stored_config(run)
        config = read_config(parse(train_parser(), ["--config", str(run / "config.yaml"), *argv]))
        check_same_run(stored, config, run)
        config.run = str(run)
    elif options.start is not None:  # the start decides the shape, unless the user sets it
        config = read_config(parse(train_parser(model_options=start_model_options(options.start)), argv))
    else:
        config = read_config(options)
    if has_option(argv, "--steps") and not has_option(argv, "--epochs"):  # an option wins over a file
        config.epochs = None
    return config


def has_option(argv, option):
    """Whether the command line itself, not a file that it names, has this option."""
    return any(argument == option or argument.startswith(f"{option}=") for argument in argv)


def check_same_run(stored, config, run):
    """Raise UsageError if the options change the text, the model, the state or the folder of a resumed run."""
    if config.run != stored.run and run_path(config.run).resolve() != run.resolve():
        raise UsageError(f"with --resume, run must be left out or {str(run)!r}, got {config.run!r}")
    for section, settings in (
        ("", ("task", "trained", "lora_rank", "select", "start")),
        ("optim.", ("name", "ema", "decay_embeddings", "cautious_decay", "rates")),
        ("model.", vars(stored.model)),
        ("data.", [name for name in vars(stored.data) if name != "source"]),
    ):
        for name in settings:
            value, got = map(operator.attrgetter(section + name), (stored, config))
            if name in ("start", "target_source") and got is not None:  # stored as absolute paths
                got = str(run_path(got))
            if got != value:
                raise UsageError(f"{section}{name} must be {value!r} as in the resumed run, got {got!r}")
