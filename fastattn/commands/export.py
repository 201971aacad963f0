"""fastattn export: writes a trained model for transformers or as ONNX."""

from fastattn.training.files import run_path
from fastattn.training.messages import UsageError

from ._options import open_run, print_json, run_parser

FORMATS = ("hugging_face", "onnx")


def parser():
    parser = run_parser("export", "Write a trained model with its tokenizer into a new folder, for other programs.")
    parser.add_argument("folder", metavar="FOLDER", type=str, help="the new folder")
    parser.add_argument(
        "--format", type=str, default="hugging_face", help="hugging_face (transformers loads it) or onnx"
    )
    return parser


def run(options, _argv):
    from fastattn.training.runs.export import export_run
    from fastattn.training.runs.loaded import load_run

    run, _, how = open_run(options)
    if options.format not in FORMATS:
        raise UsageError(f"format must be one of {', '.join(FORMATS)}, got {options.format!r}")
    try:
        loaded = load_run(run, **how)
    except ValueError as error:
        raise UsageError(str(error)) from None
    print_json(export_run(loaded, run_path(options.folder), options.format))
