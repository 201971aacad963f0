"""The command line: fastattn COMMAND, each in its module of fastattn.commands.

Exit code 0 on success, 2 on a user's mistake (one line on stderr), 1 on a fault of ours (a traceback), and 128 + the
signal's number for a training run that was asked to stop.
"""

import importlib
import os
import sys

from fastattn.commands._parse import parse
from fastattn.training.messages import UsageError

EXTRA = (  # what pip install 'fastattn[train]' brings, by import name
    "jsonargparse lightning_fabric matplotlib numpy safetensors tensorboard tokenizers tqdm yaml"
)
COMMANDS = {
    "train": "train a model on text",
    "finetune": "train with --start: from the weights of another model",
    "evaluate": "scores on a whole split: report.json, report.md and pictures",
    "compare": "scores of several runs side by side",
    "baseline": "what counted words and a linear classifier reach",
    "predict": "the class of a text",
    "generate": "text from a trained model",
    "data": "stats, clean, split, tokenize or vectorize documents",
    "info": "versions, devices, backends and reasons",
}


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
        return run_command(argv) or 0
    except BrokenPipeError:  # the reader of our output has left: nothing to tell, and nobody to tell it to
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except KeyboardInterrupt:
        return 130
    except ImportError as error:
        if (error.name or "?").partition(".")[0] not in EXTRA:
            raise
        return complain(f"expected the packages of pip install 'fastattn[train]', got no {error.name}")
    except (UsageError, OSError) as error:
        return complain(error)


def complain(message):
    line = " ".join(str(message).split())
    print(f"fastattn: error: {line}", file=sys.stderr)
    return 2


def run_command(argv):
    name, arguments = argv[:1], argv[1:]
    if name in (["-h"], ["--help"]):
        return print(help_text())
    if not name or name[0] not in COMMANDS:
        got = repr(name[0]) if name else "nothing"
        raise UsageError(f"command: expected one of {', '.join(COMMANDS)}, got {got}; fastattn --help explains them")
    command = importlib.import_module(f"fastattn.commands.{name[0]}")
    return command.run(parse(command.parser(), arguments), arguments)


def help_text():
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        ["usage: fastattn COMMAND ...", "", "Fused attention for PyTorch.", "", *lines, "", "fastattn COMMAND --help"]
    )
