"""Parsing the arguments of a command, and the messages for arguments that it does not take."""

import math
import re
import typing
from argparse import ArgumentError

from fastattn.training.messages import UsageError, did_you_mean

_ALIAS = re.compile(r"^--(run|start)_folder(?==|$)")  # torchrun takes --run and --start for options of its own
LARGEST = 2**53  # the largest whole number; sizes and counts are also used as floats
_TYPES = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "a text", "list": "a list"}
_TYPES["dict[str, float]"] = "names with a number each"
_ELSEWHERE = {"lr": "learning_rate", "optimizer": "optim.name", "device": "accelerator", "dataset": "data.source"}

# messages of jsonargparse
_KEY = r'Parser key "(?P<key>\S+)": '
_NO_FILE = re.compile(_KEY + r"File does not exist: (?P<path>.*)")
_WRONG_TYPE = re.compile(_KEY + r"Expected an? <class '(?P<type>\w+)'>\. Got value: (?P<got>.*)")
_NULLABLE = re.compile(
    _KEY + r".* Subtypes: \[(?:<class ')?(?P<type>dict\[.*?\]|\w+)(?:'>)?, <class 'NoneType'>\]"
    r" .* Given value: (?P<got>.*)"
)
_WRONG_CHOICE = re.compile(
    _KEY + r"Expected an? typing\.Literal\[(?P<choices>.*)\]\. Got value: (?P<got>.*)"
    r'|Parser key "(?P<name>\S+)": '
    r".* Subtypes: \[typing\.Literal\[(?P<some>.*?)\], <class 'NoneType'>\]"
    r" .* Given value: (?P<given>.*)"
    r"|argument (?P<argument>\S+): invalid choice: '(?P<word>.*)' \(choose from (?P<words>.*)\)"
)
_UNKNOWN = re.compile(
    r"unrecognized arguments: (?P<argument>[^\s=]+).*"
    r"|Group '(?P<group>\S+)' does not accept option '(?P<option>\S+)'.*"
    r"|Option '(?P<key>\S+)' is not accepted.*"
)
_MISSING = re.compile(r"the following arguments are required: (?P<names>.*)")
_NO_SECTION = re.compile(_KEY + r"Unable to load config .*")
_NOT_A_FILE = re.compile(_KEY + r"Path is not a file: '(?P<path>.*)'")
_NO_SUBCOMMAND = re.compile(r'expected "subcommand" to be one of .*, but it was not provided\.')
_NO_VALUE = re.compile(r"argument (?P<option>\S+): expected one argument")


def parse(parser, argv):
    """The parsed arguments; UsageError if the parser rejects them, or a config file is not UTF-8 or not YAML."""
    argv = [_ALIAS.sub(r"--\1", argument) for argument in argv]
    if any(argument.startswith("--config") or "{" in argument for argument in argv):
        from ._yaml import check_yaml  # its package comes with an extra

        check_yaml(argv)
    try:
        options = parser.parse_args(argv)
    except ArgumentError as error:
        text = _plain(" ".join(str(error).split()), parser, argv)
        raise UsageError(text if len(text) <= 300 else text[:300] + " ...") from None  # it may quote a whole file
    except UnicodeDecodeError as error:
        raise UsageError(f"config: the file is not UTF-8 text: {error}") from None
    _check_values(parser, options)
    return options


def _check_values(parser, options):
    """Raise UsageError for values that the parser accepts but no option can use.

    These are null where the type does not allow it, and a number that is not finite or that no counter holds.
    """
    for action in parser._actions:
        value = options
        for name in action.dest.split("."):
            value = value.get(name, "") if hasattr(value, "get") else ""
        if value is None and action.default is not None and hasattr(action, "_typehint"):
            if type(None) not in typing.get_args(action._typehint):
                raise UsageError(f"{action.dest} must have a value, got null")
        elif isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{action.dest} must be a finite number, got {value}")
        elif isinstance(value, int) and abs(value) >= LARGEST and not action.dest.endswith("seed"):
            raise UsageError(f"{action.dest} must be below 2**53, got {value}")
        elif action.dest == "subcommand":
            _check_values(action.choices[value], options[value])


def _arguments(parser, argv):
    """{name: its spelling} of what the parser takes, with the subcommand that argv names: options and positionals."""
    found = {}
    for action in parser._actions:
        spelled = f"--{action.dest}" if action.option_strings else action.metavar or action.dest.upper()
        found[action.dest] = spelled
        if not action.option_strings and isinstance(action.choices, dict):  # subcommands
            for name in set(action.choices) & set(argv):
                found |= _arguments(action.choices[name], argv)
    return found


def _plain(text, parser, argv):
    """A message of jsonargparse in our words."""
    if match := _UNKNOWN.fullmatch(text):
        return _about_unknown(**match.groupdict(), arguments=_arguments(parser, argv))
    if match := _WRONG_CHOICE.fullmatch(text):
        key = match["key"] or match["name"] or match["argument"]
        got = match["got"] or match["given"] or match["word"] or ""
        choices = (match["choices"] or match["some"] or match["words"]).replace("'", "")
        return f"{key} must be one of {choices}, got {got!r}{did_you_mean(got, choices.split(', '))}"
    if match := _WRONG_TYPE.fullmatch(text):
        return f"{match['key']} must be {_TYPES.get(match['type'], match['type'])}, got {match['got']!r}"
    if match := _NULLABLE.fullmatch(text):
        return f"{match['key']} must be {_TYPES.get(match['type'], match['type'])} or null, got {match['got']!r}"
    if match := _NO_FILE.fullmatch(text):
        return f"{match['key']}: the file {match['path']} does not exist"
    if match := _NOT_A_FILE.fullmatch(text):
        return f"{match['key']}: {match['path']} is not a file"
    if match := _NO_SECTION.fullmatch(text):
        return f"{match['key']} must be a section of settings, such as {{name: value}}, or the path of such a file"
    if match := _MISSING.fullmatch(text):
        names = [name.rpartition(".")[2] for name in match["names"].split(", ")]
        arguments = _arguments(parser, argv)
        spelled = [arguments.get(name, name) for name in names]
        return f"{' and '.join(spelled)} {'is' if len(spelled) == 1 else 'are'} missing; --help explains the arguments"
    if _NO_SUBCOMMAND.fullmatch(text):
        action = next(action for action in parser._actions if isinstance(action.choices, dict))
        return f"{action.metavar} is missing: one of {', '.join(action.choices)}"
    if match := _NO_VALUE.fullmatch(text):
        return f"{match['option']} must have a value, got none"
    wanted = "config: the file must have options with values, such as steps: 100, got "
    text = re.sub("^Unexpected config: ?", wanted, text)
    text = re.sub("^Key must be a string, got: (.*?).?$", r"config: a key must be a text, got \1", text)
    return re.sub("^Problems parsing config: ", "config: ", text)


def _about_unknown(argument, group, option, key, arguments):
    """The message for an unknown option, an unknown key of a config file, or an extra positional argument."""
    if argument and not argument.startswith("-"):
        return f"unexpected argument {argument!r}; --help shows the usage"
    name = argument.lstrip("-") if argument else f"{group}.{option}" if group else key
    dashes = "--" if argument else ""
    options = [ours for ours, spelled in arguments.items() if spelled.startswith("--")]
    last = name.rpartition(".")[2]
    wanted = _ELSEWHERE.get(last, last)
    elsewhere = [ours for ours in options if f".{ours}".endswith(f".{wanted}")]  # in another section
    if elsewhere:
        close = f"; did you mean {dashes}{min(elsewhere, key=len)}?"
    else:
        close = did_you_mean(name, options, dashes) or "; --help lists the options"
    return (f"there is no option {argument}" if argument else f"config: there is no key {name}") + close
