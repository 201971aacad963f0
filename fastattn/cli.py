"""The command line: fastattn COMMAND, with one module of fastattn.commands per command.

Exit code: 0 on success; 2 on a user's mistake (one line on stderr); 1 on a bug (a traceback); 128 + the signal's number
if a signal stopped the command, also where a shell would send SIGPIPE because nothing reads the output any more.
"""

import importlib
import importlib.metadata
import os
import re
import shlex
import signal
import sys

from fastattn import __version__
from fastattn.commands._memory import keep_freed_memory
from fastattn.commands._parse import parse
from fastattn.training.messages import UsageError, did_you_mean

EXTRAS = {  # the packages of each extra, by import name
    "train": "jsonargparse lightning_fabric matplotlib numpy safetensors tensorboard tokenizers tqdm yaml",
    "eval": "sacrebleu sklearn",
    "words": "gensim",
}
COMMANDS = {
    "train": "train a model on text",
    "finetune": "train from the weights of another model (--start)",
    "evaluate": "score a model on a whole split: report.html, report.md, report.json and pictures",
    "compare": "show the scores of several runs side by side",
    "baseline": "score a linear classifier on word counts",
    "predict": "classify texts",
    "generate": "generate text with a trained model",
    "export": "write a trained model for transformers or as ONNX",
    "data": "count, clean, split, tokenize or vectorize documents",
    "info": "show versions, devices and backends, and why one is missing",
}
_NO_MEMORY = re.compile("out of memory|allocate memory|storage size calculation overflow", re.IGNORECASE)
_NO_COMPILER = re.compile(r"No working C\+\+ compiler|Failed to find C compiler")  # of Inductor and of Triton
MODEL_COMMANDS = ("train", "finetune", "evaluate", "predict", "generate")


def main(argv=None):
    """Run one command.

    Args:
        argv: list of str; None: the arguments of the process.

    Returns:
        The exit code.
    """
    if argv is None:  # the process is ours
        os.environ.pop("MPLBACKEND", None)  # figures need none, and matplotlib fails with a wrong one
        if sys.argv[1:2] and sys.argv[1] in MODEL_COMMANDS:
            keep_freed_memory()
    argv = sys.argv[1:] if argv is None else list(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a text may have characters that the terminal cannot show
    try:
        try:
            return run_command(argv) or 0
        finally:
            _flush()
    except BrokenPipeError:  # the program that reads our output has closed the pipe
        _discard(sys.stdout, sys.stderr)
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except ImportError as error:
        package = (error.name or "?").partition(".")[0]
        extra = next((extra for extra, packages in EXTRAS.items() if package in packages.split()), None)
        if extra is None:
            raise
        return report_error(f"missing package {error.name}: run {command_for(extra)}")
    except (UsageError, OSError) as error:
        return report_error(error)
    except (MemoryError, RuntimeError) as error:  # torch has no type of its own for a lack of memory on a CPU
        if _NO_COMPILER.search(str(error)):
            return report_error("no C++ compiler was found, but compile: true and Triton need one; set CXX to its name")
        if not isinstance(error, MemoryError) and not _NO_MEMORY.search(str(error)):
            raise
        return report_error(f"not enough memory; a smaller model, batch_size or block_size needs less{_asked(error)}")


def _flush():
    """Write what is left of the output while an error can still be reported; Python would do it when it ends."""
    try:
        if sys.stdout is not None:  # it is None if the process was started without one
            sys.stdout.flush()
    except OSError:
        _discard(sys.stdout)
        raise


def _discard(*streams):
    """Discard what these streams still hold, because Python flushes them at its end and would fail again."""
    for stream in filter(None, streams):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _asked(error):
    size = re.search(r"allocate (\d+) bytes", str(error))
    return f" ({int(size[1]):,} bytes were requested at once)" if size else ""


def report_error(message):
    line = " ".join(str(message).split())
    print(f"fastattn: error: {line}", file=sys.stderr)
    return 2


def command_for(extra):
    """The pip command that installs the packages of an extra.

    It names each of them, as the installed fastattn asks for it, because fastattn itself is on no package index.
    """
    try:
        requirements = importlib.metadata.requires("fastattn") or []
    except importlib.metadata.PackageNotFoundError:  # it runs from a checkout
        return f"""pip install ".[{extra}]" in the checkout of fastattn"""
    wanted = (line.partition(";") for line in requirements)
    packages = [name.strip() for name, _, marker in wanted if re.search(rf"extra == ['\"]{extra}['\"]", marker)]
    return f"pip install {shlex.join(packages)}"


def run_command(argv):
    name, arguments = argv[:1], argv[1:]
    if name == ["--version"]:
        return print(f"fastattn {__version__}")
    if name in (["-h"], ["--help"]):
        return print(help_text())
    if not name or name[0] not in COMMANDS:
        problem = f"there is no command {name[0]!r}" if name else "a command is missing"
        close = did_you_mean(name[0], [*COMMANDS, "--version"]) if name else ""
        raise UsageError(f"{problem}{close or '; the commands are ' + ', '.join(COMMANDS)} (see fastattn --help)")
    for number, argument in enumerate(arguments, 2):
        if not _is_text(argument):
            raise UsageError(f"argument {number} is not UTF-8 text: {argument!r}")
    command = importlib.import_module(f"fastattn.commands.{name[0]}")
    return command.run(parse(command.parser(), arguments), arguments)


def _is_text(argument):
    try:
        return argument.encode() is not None
    except UnicodeEncodeError:  # bytes that are not UTF-8 arrive as half surrogate pairs
        return False


def help_text():
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fastattn COMMAND ...", "", "Fused attention for PyTorch.", "", *lines, "",
            "fastattn COMMAND --help", "fastattn --version",
        ]
    )  # fmt: skip
