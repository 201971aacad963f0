"""Swap the torch.nn modules of any model for ours, in place."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.decoder import TransformerDecoder, TransformerDecoderLayer
from fastattn.nn.encoder import TransformerEncoder, TransformerEncoderLayer
from fastattn.nn.norm import LayerNorm, RMSNorm
from fastattn.nn.transformer import Transformer

_OURS = {
    getattr(torch.nn, ours.__name__): ours
    for ours in (
        LayerNorm, RMSNorm, MultiheadAttention, TransformerEncoderLayer, TransformerDecoderLayer, TransformerEncoder,
        TransformerDecoder, Transformer,
    )
}  # fmt: skip

_INSTEAD = "write replace(model) instead of model = replace(model)"


@dataclass
class Report:
    """What `replace` did: name of the module in the model ("" is the model) → its class, or why it was left alone."""

    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __call__(self, *args, **kwargs):
        raise TypeError(f"replace changes the model in place and returns a report, not the model: {_INSTEAD}")

    def __getattr__(self, name):
        hint = f": replace returns a report, not the model: {_INSTEAD}" if hasattr(torch.nn.Module, name) else ""
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{hint}")

    def __str__(self):
        lines = [f"{len(self.replaced)} modules replaced, {len(self.left)} left alone"]
        lines += [f"  {name or 'the model itself'}: now fastattn.nn.{kind}" for name, kind in self.replaced.items()]
        lines += [f"  {name or 'the model itself'}: left alone, {why}" for name, why in self.left.items()]
        return "\n".join(lines)


def replace(
    model: torch.nn.Module,
    *,
    only: str | type[torch.nn.Module] | Iterable[str | type[torch.nn.Module]] | None = None,
) -> Report:
    """Turn the torch.nn modules of a model that fastattn.nn has into ours, in place.

    The modules stay the same objects with the same parameters, buffers, hooks and modes, so optimizers and references
    to them stay valid; only their class changes. A subclass of a torch.nn class is not touched: it may rely on what
    the original does.

    Args:
        model: any torch.nn.Module.
        only: a class of torch.nn or its name, or several: the ones to replace; None = all that fastattn.nn has.
    Returns: a Report with `replaced` and `left`, dicts by module name; `print` it.
    Raises:
        TypeError: model is no module.
        ValueError: `only` is or holds something else than a class that has a counterpart, or its name.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"replace: model must be a torch.nn.Module, got {type(model).__name__}")
    wanted = tuple(_OURS) if only is None else tuple(only) if isinstance(only, (tuple, list, set)) else (only,)
    by_name = {kind.__name__: kind for kind in _OURS}
    wanted = tuple(by_name.get(kind, kind) if isinstance(kind, str) else kind for kind in wanted)
    for kind in wanted:
        if kind not in _OURS:
            known = ", ".join(f"torch.nn.{name}" for name in by_name)
            raise ValueError(f"replace: only must be classes out of {known}, or their names, got {kind!r}")
    report = Report()
    for name, module in model.named_modules():
        kind = type(module)
        if kind in wanted:
            if "forward" in module.__dict__:
                report.left[name] = f"its forward was replaced on the {kind.__name__} object"
            else:
                module.__class__ = _OURS[kind]
                report.replaced[name] = kind.__name__
        elif isinstance(module, wanted) and not isinstance(module, tuple(_OURS.values())):
            report.left[name] = f"{kind.__name__} is a subclass of a torch.nn class"
    return report
