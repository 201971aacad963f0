"""The tasks by their names in a config."""

from .classification import Classification
from .conversation import Conversation
from .language_modelling import LanguageModelling
from .masked_language_modelling import MaskedLanguageModelling
from .preference import Preference
from .translation import Translation

TASKS = {
    "lm": LanguageModelling,
    "masked_lm": MaskedLanguageModelling,
    "classify": Classification,
    "translate": Translation,
    "chat": Conversation,
    "preference": Preference,
}


def make_task(config, tokenizer=None, expected=None):
    """The task of a TrainConfig, with its data read and checked.

    Args:
        config: TrainConfig.
        tokenizer: None trains one on the training part.
        expected: None or the summary (data.json) of the data that a run was trained on.

    Raises:
        UsageError: the data cannot be used, or are not the expected ones.
    """
    return TASKS[config.task](config, tokenizer, expected)
