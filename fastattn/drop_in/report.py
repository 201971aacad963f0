"""What `replace` did to a model, why it left the rest alone, and the way back."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

_INSTEAD = "write replace(model) instead of model = replace(model)"
_NUMBER = re.compile(r"\d+")


@dataclass
class Report:
    """The result of `replace`: a printable report, and the way back.

    Attributes:
        replaced: the name of each module that was replaced ("" is the model) → what it is now.
        left: the name of each module that looks like one that could be replaced → why it was left alone.
        advice: what prevents further replacements, and what to do about it.
    Example:
        >>> model = torch.nn.LayerNorm(64)
        >>> report = fastattn.replace(model)
        >>> report.replaced
        {'': 'LayerNorm'}
        >>> report.undo()
        >>> type(model)
        <class 'torch.nn.modules.normalization.LayerNorm'>
    """

    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    advice: list[str] = field(default_factory=list)
    _undo: list[Callable[[], None]] = field(default_factory=list, init=False, repr=False)
    _classes: dict[torch.nn.Module, type] = field(default_factory=dict, init=False, repr=False)

    def undo(self) -> None:
        """Make the model what it was before `replace`; nothing happens the second time.

        Raises:
            RuntimeError: the class of a module was changed since. Nothing is undone then.
        """
        for module, kind in self._classes.items():
            if type(module) is not kind:
                raise RuntimeError(
                    f"undo: the class of a module was changed after replace, from {kind.__name__} to"
                    f" {type(module).__name__}: undo that change first"
                )
        self._classes.clear()
        while self._undo:
            self._undo.pop()()

    def __call__(self, *args, **kwargs):
        raise TypeError(f"replace changes the model in place and returns a report, not the model: {_INSTEAD}")

    def __getattr__(self, name):
        hint = f": replace returns a report, not the model: {_INSTEAD}" if hasattr(torch.nn.Module, name) else ""
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{hint}")

    def __str__(self):
        count = len(self.replaced)
        lines = [f"{count} module{'s' * (count != 1)} replaced, {len(self.left)} left alone"]
        lines += [f"  {where}: {what}" for where, what in _grouped(self.replaced, "now ")]
        lines += [f"  {where}: {why}" for where, why in _grouped(self.left, "left alone, ")]
        return "\n".join(lines + [f"  {line}" for line in self.advice])


def _grouped(texts, prefix):
    """(names, text): layers that differ only in the numbers in their names share a line."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, text in texts.items():
        groups.setdefault((_NUMBER.sub("*", name), text), []).append(name or "the model itself")
    for (pattern, text), names in groups.items():
        yield names[0] if len(names) == 1 else f"{pattern} ({len(names)} modules)", prefix + text
