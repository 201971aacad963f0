"""What a model can learn, one file a task: its data, its batches, its model and its scores."""

from ..config import UsageError
from .classification import Classification
from .language_modelling import LanguageModelling
from .masked_language_modelling import MaskedLanguageModelling
from .translation import Translation

TASKS = {
    "lm": LanguageModelling,
    "masked_lm": MaskedLanguageModelling,
    "classify": Classification,
    "translate": Translation,
}


def make_task(config, tokenizer=None, expected=None):
    """The task of a TrainConfig, with its data read and checked.

    Args:
        config: TrainConfig.
        tokenizer: None learns one from the training part.
        expected: None or the summary (data.json) of the data that a run was trained on.

    Raises:
        UsageError: data that cannot be used, or other data than expected.
    """
    task = TASKS[config.task](config, tokenizer)
    if expected and expected["sha256"] != task.summary["sha256"]:
        raise UsageError(
            f"text {config.data.source!r}: expected the {expected['characters']} characters this run was trained on "
            f"(sha256 {expected['sha256']}), got {task.summary['characters']} (sha256 {task.summary['sha256']})"
        )
    return task
