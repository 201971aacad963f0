"""fastattn finetune: trains from the weights of another model."""

from fastattn.training.messages import UsageError

from . import train
from ._options import train_parser


def parser():
    return train_parser("finetune")


def run(options, argv):
    if options.start is None and options.resume is None:
        raise UsageError("finetune needs --start FOLDER, a run or a Hugging Face model to start from")
    return train.run(options, argv, "finetune")
