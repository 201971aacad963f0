"""The tasks by their names in a config."""

from .classification import Classification
from .conversation import Conversation
from .language_modelling import LanguageModelling
from .masked_language_modelling import MaskedLanguageModelling
from .preference import Preference
from .regression import Regression
from .several_classes import SeveralClasses
from .translation import Translation

TASKS = {
    "lm": LanguageModelling,
    "masked_lm": MaskedLanguageModelling,
    "classify": Classification,
    "translate": Translation,
    "chat": Conversation,
    "preference": Preference,
}

LABEL_KINDS = {"class": Classification, "classes": SeveralClasses, "number": Regression}


def task_class(config):
    """The class of the task of a TrainConfig."""
    return LABEL_KINDS[config.data.columns.label_kind] if config.task == "classify" else TASKS[config.task]


def make_task(config, tokenizer=None, expected=None):
    """The task of a TrainConfig, with its data read and checked.

    Args:
        config: TrainConfig.
        tokenizer: None trains one on the training part.
        expected: None or the summary (data.json) of the data that a run was trained on.

    Raises:
        UsageError: the data cannot be used, or are not the expected ones.
    """
    return task_class(config)(config, tokenizer, expected)
