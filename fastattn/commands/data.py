"""fastattn data: counts, cleans and splits documents, or turns them into tokens or vectors."""

import json
from dataclasses import fields

from fastattn.training.config import Columns
from fastattn.training.data import prepare
from fastattn.training.data.clean import CleanConfig

from ._options import new_parser

STEPS = ("stats", "clean", "split", "tokenize", "shard", "vectorize")
SECTIONS = {"columns": Columns, "cleaning": CleanConfig}


def parser():
    parser = new_parser("data", "Prepare documents and print a report as JSON.")
    steps = parser.add_subcommands(required=True, metavar="WHAT")
    for name in STEPS:
        function = getattr(prepare, f"data_{name}")
        summary = function.__doc__.partition("\n")[0]
        step = new_parser(f"data {name}", summary)
        step.add_argument("source", metavar="SOURCE", type=str, help="table, text file, folder, hf:NAME or known name")
        step.add_class_arguments(prepare.SourceConfig, as_group=False, skip={"source"})
        step.add_function_arguments(function, as_group=False, skip={"documents"})
        steps.add_subcommand(name, step, help=summary)
    return parser


def run(options, _argv):
    name = options.subcommand
    values = {k: SECTIONS[k](**v) if k in SECTIONS else v for k, v in options[name].as_dict().items()}
    documents = prepare.SourceConfig(**{f.name: values.pop(f.name) for f in fields(prepare.SourceConfig)})
    print(json.dumps(getattr(prepare, f"data_{name}")(documents, **values), indent=1, ensure_ascii=False))
