"""Parsing the arguments of a command."""

import re
import typing
from argparse import ArgumentError

from fastattn.training.messages import UsageError

_KEY, _NULLABLE = r'Parser key "(\S+)": ', r"\[<class '(\w+)'>, <class 'NoneType'>\]"
_CHOICE = r"\[typing\.Literal\[(.*?)\], <class 'NoneType'>\]"
_ALIAS = re.compile(r"^--(run|start)_folder(?==|$)")  # torchrun takes --run and --start for options of its own
_PLAINER = (  # messages of jsonargparse → the form of ours
    (_KEY + r"File does not exist: (.*)", r"\1: the file \2 does not exist"),
    (_KEY + r"Expected an? <class '(\w+)'>\. Got value: (.*)", r"\1 must be \2, got \3"),
    (_KEY + r"Expected an? typing\.Literal\[(.*)\]\. Got value: (.*)", r"\1 must be one of \2, got \3"),
    (_KEY + rf".* Subtypes: {_NULLABLE} .* Given value: (.*)", r"\1 must be \2 or null, got \3"),
    (_KEY + rf".* Subtypes: {_CHOICE} .* Given value: (.*)", r"\1 must be one of \2 or null, got \3"),
    (r'expected "subcommand" to be one of {(.*)}, but it was not provided\.', r"a subcommand is missing: one of \1"),
    (r"the following arguments are required: (?:\w+\.)?(\w+)", r"--\1 is missing"),
    (r"Problems parsing config: (.*)", r"config: \1"),
)


def parse(parser, argv):
    """The parsed arguments; UsageError if the parser rejects them, or a config file is not UTF-8 or no YAML."""
    argv = [_ALIAS.sub(r"--\1", argument) for argument in argv]
    if any(argument.startswith("--config") or "{" in argument for argument in argv):
        from ._yaml import check_yaml  # its package comes with an extra

        check_yaml(argv)
    try:
        options = parser.parse_args(argv)
    except ArgumentError as error:
        text = " ".join(str(error).split())
        for pattern, plainer in _PLAINER:
            text = re.sub(f"^{pattern}$", plainer, text)
        unknown = any(words in text for words in ("not accept", "unrecognized", "Unexpected config"))
        text = text if len(text) <= 300 else text[:300] + " ..."  # it may quote a whole file
        raise UsageError(f"{text}{'; --help lists the options' if unknown else ''}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"config: the file is not UTF-8 text: {error}") from None
    _check_null(parser, options)
    return options


def _check_null(parser, options):
    """Raise UsageError if an option is null whose type does not allow it, which the parser lets pass."""
    for action in parser._actions:
        value = options
        for name in action.dest.split("."):
            value = value.get(name, "") if hasattr(value, "get") else ""
        if value is None and action.default is not None and hasattr(action, "_typehint"):
            if type(None) not in typing.get_args(action._typehint):
                raise UsageError(f"{action.dest} must have a value, got null")
        elif action.dest == "subcommand":
            _check_null(action.choices[value], options[value])
