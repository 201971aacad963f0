"""The command line: fastattn train | finetune | evaluate | compare | baseline | generate | predict |
data | info.

Exit code 0 on success, 2 on a user's mistake (one line on stderr), 1 on a fault of ours (a traceback), and 128 + the
signal's number for a training run that was asked to stop. torch is imported by the commands, never for --help.
"""

import itertools
import json
import operator
import os
import sys
from pathlib import Path

EXTRA = (  # what pip install 'fastattn[train]' brings, by import name
    "jsonargparse lightning_fabric matplotlib numpy safetensors tensorboard tokenizers tqdm yaml"
)


DRAWING = {  # options of generate with their defaults that only task lm has
    "max_new_tokens": 300, "temperature": 0.8, "top_k": None, "top_p": None, "repetition_penalty": 1.0, "stop": None,
    "seed": 0,
}  # fmt: skip


def main(argv=None):
    """Run one command.

    Args:
        argv: list of str, None for the process's own.

    Returns:
        The exit code.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a text may hold what the terminal cannot show
    try:
        return run_command(argv)
    except BrokenPipeError:  # the reader of our output has left: nothing to tell, and nobody to tell it to
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except KeyboardInterrupt:
        return 130
    except ImportError as error:
        if (error.name or "?").partition(".")[0] not in EXTRA:
            raise
        return complain(f"expected the packages of pip install 'fastattn[train]', got no {error.name}")
    except OSError as error:
        return complain(error)


def complain(message):
    line = " ".join(str(message).split())
    print(f"fastattn: error: {line}", file=sys.stderr)
    return 2


def run_command(argv):
    from fastattn.training.messages import UsageError

    if argv == ["info"]:  # needs none of the packages that the other commands need
        return info(None, argv) or 0
    try:
        if argv[:1] == ["data"]:  # its parser knows all options of all steps: only those who prepare data wait for it
            return data(argv[1:]) or 0
        options = parse(build_parser(), argv)
        command = options.subcommand
        return COMMANDS[command](options[command], argv[argv.index(command) + 1 :]) or 0
    except UsageError as error:
        return complain(error)


def parse(parser, argv):
    """The parsed arguments; UsageError for what jsonargparse or the decoding of a config file refuses."""
    from jsonargparse import ArgumentError

    from fastattn.training.messages import UsageError

    try:
        return parser.parse_args(argv)
    except ArgumentError as error:
        text = str(error)
        text = text if len(text) <= 300 else text[:300] + " ..."  # it may quote a whole file
        unknown = any(words in text for words in ("not accept", "unrecognized", "Unexpected config"))
        raise UsageError(f"{text}{'; expected the options that --help lists' if unknown else ''}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"config: expected UTF-8 text, got {error}") from None


def build_parser():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="fastattn", exit_on_error=False, description="Fused attention for PyTorch.")
    commands = parser.add_subcommands(required=True, metavar="COMMAND")
    commands.add_subcommand("train", train_parser(), help="train a model on text")
    commands.add_subcommand("finetune", train_parser(), help="train with --start: from the weights of another model")
    run = ArgumentParser(exit_on_error=False, description="Scores of a trained model on a whole split.")
    add_run_arguments(run)
    run.add_argument("--split", type=str | None, help="train, validation or test; default: test where there is one")
    run.add_argument("--data", type=str | None, help="task lm: another text to read whole, a source as for train")
    run.add_argument("--beams", type=int, default=1, help="task translate: more than 1 searches with so many beams")
    run.add_argument("--attention", metavar="TEXT", type=str | None, help="draw what the last block looks at in TEXT")
    run.add_argument("--output", type=str | None, help="folder for the report; default: RUN, or RUN/reports/STEP")
    run.add_argument("--json", action="store_true", help="print the report as JSON")
    commands.add_subcommand("evaluate", run, help="scores on a whole split: report.json, report.md and pictures")
    run = ArgumentParser(exit_on_error=False, description="Runs, or checkpoints of them, side by side.")
    run.add_argument(
        "runs", metavar="RUN", type=str, nargs="+", help="folder of a run, or RUN@STEP, RUN@best, RUN@last"
    )
    run.add_argument("--output", type=str | None, help="folder for comparison.md and comparison.png")
    commands.add_subcommand("compare", run, help="scores of several runs side by side")
    commands.add_subcommand("baseline", baseline_parser(), help="what counted words and a linear classifier reach")
    run = ArgumentParser(exit_on_error=False, description="Classes that a trained classifier gives to texts.")
    add_run_arguments(run)
    run.add_argument("texts", metavar="TEXT", type=str, nargs="+", help="text to classify")
    commands.add_subcommand("predict", run, help="the class of a text")
    run = ArgumentParser(exit_on_error=False, description="Continue a prompt, or translate it, with a trained model.")
    add_run_arguments(run)
    run.add_argument("--prompt", type=str, required=True, help="text to continue")
    run.add_argument("--max_new_tokens", type=int, help="tokens to add")
    run.add_argument("--temperature", type=float, help="0 takes the most likely token")
    run.add_argument("--top_k", type=int | None, help="draw among the k most likely tokens only")
    run.add_argument("--top_p", type=float | None, help="draw among the likeliest tokens that reach this probability")
    run.add_argument("--repetition_penalty", type=float, help="more than 1 avoids tokens already there")
    run.add_argument("--beams", type=int, default=1, help="more than 1: the likeliest text of a beam search, not drawn")
    run.add_argument("--stop", type=str | None, help="end before this text")
    run.add_argument("--seed", type=int, help="the same seed gives the same text")
    run.set_defaults(DRAWING)
    commands.add_subcommand("generate", run, help="text from a trained model")
    commands.add_subcommand("data", ArgumentParser(), help="stats, clean, split, tokenize or vectorize documents")
    info = ArgumentParser(exit_on_error=False, description="Versions, devices, backends, and why one is missing.")
    commands.add_subcommand("info", info, help="versions, devices, backends and reasons")
    return parser


def train_parser(model_options=()):
    """The parser of a TrainConfig; `model_options`: {name: value}, defaults of its model."""
    from jsonargparse import ArgumentParser

    from fastattn.training.config import TrainConfig

    parser = ArgumentParser(exit_on_error=False, description="Train a model on text.")
    parser.add_argument("--config", action="config", help="YAML file; options after it win")
    parser.add_argument("--resume", metavar="RUN", type=str | None, help="continue this run from its newest checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in the run folder")
    parser.add_class_arguments(TrainConfig, as_group=False)
    parser.set_defaults({f"model.{name}": value for name, value in dict(model_options).items()})
    return parser


def baseline_parser():
    from jsonargparse import ArgumentParser

    from fastattn.training.config import DataConfig

    parser = ArgumentParser(exit_on_error=False, description="Scores of logistic regression on the words of a text.")
    parser.add_class_arguments(DataConfig, "data", skip={"tokenizer", "vocab_size", "packed"})
    parser.add_argument("--tfidf", action="store_true", help="weigh words by how few documents have them")
    parser.add_argument("--max_ngram", type=int, default=1, help="count up to so many words in a row too")
    parser.add_argument("--split", type=str | None, help="validation or test; default: test where there is one")
    parser.add_argument("--output", type=str | None, help="folder for the report, which compare reads like a run")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def data_parser():
    from jsonargparse import ArgumentParser

    from fastattn.training.data import prepare

    parser = ArgumentParser(
        prog="fastattn data", exit_on_error=False, description="Prepare documents; prints its report as JSON."
    )
    commands = parser.add_subcommands(required=True, metavar="WHAT")
    for name in ("stats", "clean", "split", "tokenize", "vectorize"):
        function = getattr(prepare, f"data_{name}")
        summary = function.__doc__.partition("\n")[0]
        command = ArgumentParser(exit_on_error=False, description=summary)
        command.add_argument(
            "source", metavar="SOURCE", type=str, help="table, text file, folder, hf:NAME or known set"
        )
        command.add_class_arguments(prepare.SourceConfig, as_group=False, skip={"source"})
        command.add_function_arguments(function, as_group=False, skip={"documents"})
        commands.add_subcommand(name, command, help=summary)
    return parser


def add_run_arguments(parser):
    parser.add_argument("run", metavar="RUN", type=str, help="folder of a run")
    parser.add_argument("--checkpoint", type=str, default="best", help="best, last or a step")
    parser.add_argument("--accelerator", type=str, default="auto", help="auto, cpu or cuda")
    parser.add_argument("--layers", type=str | None, help="fastattn or torch, other layers than in training")


def read_config(options):
    from fastattn.training.config import config_from_dict

    values = options.as_dict()
    for name in ("config", "resume", "overwrite"):
        values.pop(name)
    return config_from_dict(values)


def stored_config(run):
    """The TrainConfig of a run folder."""
    from fastattn.training.messages import UsageError
    from fastattn.training.runs.checkpoint import check_run

    check_run(run)
    try:
        return read_config(parse(train_parser(), ["--config", str(run / "config.yaml")]))
    except UsageError as error:
        raise UsageError(f"{run / 'config.yaml'}: {error}") from None


def train(options, argv):
    from fastattn.training.messages import UsageError

    if options.resume is not None:
        if options.overwrite:
            raise UsageError("train: expected one of --resume and --overwrite, got both")
        run = Path(options.resume).expanduser().absolute()
        stored = stored_config(run)
        argv = ["--config", str(run / "config.yaml"), *argv, "--run", str(run)]
        config = read_config(parse(train_parser(), argv))
        check_same_run(stored, config)
    else:
        if options.start is not None:  # the shape is that of the start unless the user says otherwise
            from fastattn.training.runs.start import start_model_options

            options = parse(train_parser(start_model_options(options.start)), argv)
        config = read_config(options)
    from fastattn.training.runs.loop import train as run_training

    return run_training(config, resume=options.resume is not None, overwrite=options.overwrite)


def finetune(options, argv):
    from fastattn.training.messages import UsageError

    if options.start is None and options.resume is None:
        raise UsageError("finetune: expected --start FOLDER, a run or a Hugging Face model to begin from, got none")
    return train(options, argv)


def check_same_run(stored, config):
    """Raises UsageError if a resumed run would read another text, build another model or need another state."""
    from fastattn.training.messages import UsageError

    for section, names in (
        ("", ("task", "trained", "lora_rank", "select")),
        ("optim.", ("name", "ema")),
        ("model.", vars(stored.model)),
        ("data.", [name for name in vars(stored.data) if name != "source"]),
    ):
        for name in names:
            value, got = map(operator.attrgetter(section + name), (stored, config))
            if got != value:
                raise UsageError(f"{section}{name}: expected {value!r} as in the run that is resumed, got {got!r}")


def evaluate(options, _argv):
    run = Path(options.run).expanduser().absolute()
    config = stored_config(run)
    check_run_options(options)
    from fastattn.training.evaluation.evaluate import draw_attention, evaluate_run
    from fastattn.training.evaluation.report import write_report
    from fastattn.training.files import run_path
    from fastattn.training.messages import UsageError

    special = {"data": ("lm", None, "text"), "beams": ("translate", 1, "beams")}
    given = {}
    for name, (task, default, argument) in special.items():
        if config.task == task:
            given[argument] = options[name]
        elif options[name] != default:
            raise UsageError(f"{name}: expected for task {task} only, got a run of task {config.task}")
    where = {name: options[name] for name in ("checkpoint", "accelerator", "layers")}
    report = evaluate_run(run, config, split=options.split, **where, **given)
    if options.output is not None:
        folder = run_path(options.output)
    else:
        folder = run if options.checkpoint == "best" else run / "reports" / str(report["step"])
    if options.attention is not None:
        draw_attention(run, config, options.attention, folder / "attention.png", **where)
    write_report(folder, report)
    print_report(report, options.json)


def print_report(report, as_json):
    from fastattn.training.evaluation.report import cell, report_json

    if as_json:
        print(report_json(report), end="")
        return
    scores = {name: value for name, value in report.items() if not isinstance(value, (list, dict))}
    width = max(map(len, scores)) + 2
    for name, value in scores.items():  # a text as it is: what a Markdown cell has to escape would be copied from here
        print(f"{name:{width}}{value if isinstance(value, str) else cell(value)}")


def baseline(options, _argv):
    from fastattn.training.config import Columns, DataConfig
    from fastattn.training.data.parts import read_parts
    from fastattn.training.evaluation.baseline import bag_of_words_baseline
    from fastattn.training.evaluation.report import write_report
    from fastattn.training.files import run_path
    from fastattn.training.messages import UsageError

    data = options.data.as_dict()
    data = DataConfig(**{**data, "columns": Columns(**data["columns"])})
    parts = read_parts(data)
    split = options.split or ("test" if "test" in parts else "validation")
    if split not in parts:
        raise UsageError(f"split: expected one of {', '.join(parts)} of this source, got {split!r}")
    scores = bag_of_words_baseline(parts["train"], parts[split], tfidf=options.tfidf, max_ngram=options.max_ngram)
    report = {"source": data.source, "split": split, **scores}
    if options.output is not None:
        write_report(run_path(options.output), report)
    print_report(report, options.json)


def compare(options, _argv):
    from fastattn.training.evaluation.compare import compare_runs

    print(compare_runs(options.runs, options.output))


def predict(options, _argv):
    from fastattn.training.messages import UsageError

    run = Path(options.run).expanduser().absolute()
    config = stored_config(run)
    check_run_options(options)
    if config.task != "classify":
        raise UsageError(f"run {str(run)!r}: expected one of task classify, got {config.task}")
    from fastattn.training.runs.load import load_task

    model, task = load_task(run, config, options.checkpoint, options.accelerator, options.layers)
    for text, row in zip(options.texts, task.predict(model, options.texts).tolist(), strict=True):
        chance, name = max(zip(row, task.names, strict=True))
        print(f"{name}\t{chance:.3f}\t{text}")


def generate(options, _argv):
    run = Path(options.run).expanduser().absolute()
    config = stored_config(run)
    check_run_options(options)
    from fastattn.training.inspect.generate import beam_search, check_sampling, stream_text, stream_tokens
    from fastattn.training.messages import UsageError
    from fastattn.training.runs.load import load_run, load_task

    if config.task not in ("lm", "translate"):
        raise UsageError(f"run {str(run)!r}: expected one of task lm or translate, got {config.task}")

    names = ("temperature", "top_k", "top_p", "repetition_penalty")
    sampling = {name: options[name] for name in names}
    check_sampling(options.max_new_tokens, beams=options.beams, **sampling)
    if config.task == "translate":
        for name, default in DRAWING.items():
            if options[name] != default:
                raise UsageError(f"{name}: expected for task lm only, got a run of task translate")
        model, task = load_task(run, config, options.checkpoint, options.accelerator, options.layers)
        print(*task.translate(model, [options.prompt], beams=options.beams))
        return
    model, tokenizer, _ = load_run(
        run, config, checkpoint=options.checkpoint, accelerator=options.accelerator, layers=options.layers
    )
    prompt = tokenizer.encode(options.prompt)
    if options.beams > 1:
        numbers = beam_search(model, prompt, options.max_new_tokens, beams=options.beams)
    else:
        numbers = stream_tokens(model, prompt, options.max_new_tokens, seed=options.seed, **sampling)
        numbers = itertools.chain([next(numbers)], numbers)  # a mistake shows before anything is printed
    print(options.prompt, end="", flush=True)
    for piece in stream_text(tokenizer, numbers, options.stop):
        print(piece, end="", flush=True)
    print()


def check_run_options(options):
    from fastattn.training.messages import UsageError

    for name, allowed in (("accelerator", ("auto", "cpu", "cuda")), ("layers", (None, "fastattn", "torch"))):
        if options[name] not in allowed:
            expected = ", ".join(filter(None, allowed))
            raise UsageError(f"{name}: expected one of {expected}, got {options[name]!r}")


def data(argv):
    from dataclasses import fields

    from fastattn.training.data import prepare

    options = parse(data_parser(), argv)
    name = options.subcommand
    sections = {"columns": prepare.Columns, "cleaning": prepare.CleanConfig}
    values = {k: sections[k](**v) if k in sections else v for k, v in options[name].as_dict().items()}
    documents = prepare.SourceConfig(**{f.name: values.pop(f.name) for f in fields(prepare.SourceConfig)})
    print(json.dumps(getattr(prepare, f"data_{name}")(documents, **values), indent=1, ensure_ascii=False))


def info(_options, _argv):
    from fastattn._info import report

    print(report())


COMMANDS = {
    "train": train,
    "finetune": finetune,
    "evaluate": evaluate,
    "compare": compare,
    "baseline": baseline,
    "generate": generate,
    "predict": predict,
    "info": info,
}
