"""Checks of YAML before it is parsed, with the file and the line in the message."""

import yaml

from fastattn.training.files import user_path
from fastattn.training.messages import UsageError


def check_yaml(argv):
    """Raise UsageError for a config file without settings, and for a repeated key in it or in an option's {...}."""
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        option, given, value = argument.partition("=")
        value = value if given else following
        if option.startswith("--") and value.lstrip().startswith("{"):
            _check_keys(_compose(value, option.lstrip("-")), option.lstrip("-"))
        elif option == "--config" and user_path(value).is_file():
            try:
                root = _compose(user_path(value).read_text(encoding="utf-8"), value)
            except UnicodeDecodeError as error:
                raise UsageError(f"{value} is not UTF-8 text: {error}") from None
            if not isinstance(root, yaml.MappingNode):
                raise UsageError(f"{value} must have options with values, such as steps: 100")
            _check_keys(root, value)


def _compose(text, where):
    """The root node of a YAML text, or None."""
    try:
        return yaml.compose(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.reader.ReaderError as error:  # it has no line
        raise UsageError(f"{where} is not valid YAML: {error.reason} at character {error.position}") from None
    except (yaml.MarkedYAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UsageError(
            f"{where}{place} is not valid YAML: {getattr(error, 'problem', 'it is nested too deeply')}"
        ) from None


def _check_keys(root, where):
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))  # an alias may lead back
        pairs = node.value if isinstance(node, yaml.MappingNode) else [(None, item) for item in node.value]
        waiting += [value for _, value in pairs]
        keys = [key for key, _ in pairs if isinstance(key, yaml.ScalarNode)]
        for number, key in enumerate(keys):
            if key.value in [other.value for other in keys[:number]]:
                raise UsageError(f"{where}, line {key.start_mark.line + 1}: the key {key.value!r} is repeated")
