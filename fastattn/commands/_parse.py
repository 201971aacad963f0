"""Reading the arguments of a command."""

from argparse import ArgumentError

from fastattn.training.messages import UsageError


def parse(parser, argv):
    """The parsed arguments; UsageError for what the parser or the decoding of a config file refuses."""
    try:
        return parser.parse_args(argv)
    except ArgumentError as error:
        text = str(error)
        text = text if len(text) <= 300 else text[:300] + " ..."  # it may quote a whole file
        unknown = any(words in text for words in ("not accept", "unrecognized", "Unexpected config"))
        raise UsageError(f"{text}{'; expected the options that --help lists' if unknown else ''}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"config: expected UTF-8 text, got {error}") from None
