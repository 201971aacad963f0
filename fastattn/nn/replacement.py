"""Replaces the torch.nn modules of any model with those of fastattn.nn, in place."""

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
    """The result of `replace`: two dicts from a module's name ("" is the model) to its class, or to why it was left."""

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
    """Replace the torch.nn modules of a model with their counterparts in fastattn.nn, in place.

    The modules stay the same objects with the same parameters, buffers, hooks and modes, so optimizers and references
    to them stay valid; only their class changes. A subclass of a torch.nn class is left alone, because it may rely on
    the original code.

    Args:
        model: any torch.nn.Module.
        only: the class or classes of torch.nn to replace, or their names; None = all that fastattn.nn has.
    Returns: a printable Report with the dicts `replaced` and `left`, by module name.
    Raises:
        TypeError: model is not a module.
        ValueError: `only` has an entry that is not a class of torch.nn with a counterpart, or the name of one.
    Example:
        model = torch.nn.TransformerEncoderLayer(512, 8)
        print(fastattn.replace(model))  # 4 modules replaced, 0 left alone ...
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"replace: model must be a torch.nn.Module, got {type(model).__name__}")
    wanted = tuple(_OURS) if only is None else tuple(only) if isinstance(only, (tuple, list, set)) else (only,)
    by_name = {kind.__name__: kind for kind in _OURS}
    wanted = tuple(by_name.get(kind, kind) if isinstance(kind, str) else kind for kind in wanted)
    for kind in wanted:
        if kind not in _OURS:
            known = ", ".join(f"torch.nn.{name}" for name in by_name)
            raise ValueError(f"replace: only must name classes among {known}, got {kind!r}")
    report = Report()
    for name, module in model.named_modules():
        kind = type(module)
        if kind in wanted:
            if "forward" in module.__dict__:
                report.left[name] = f"forward was replaced on this {kind.__name__} object"
            else:
                module.__class__ = _OURS[kind]
                report.replaced[name] = kind.__name__
        elif isinstance(module, wanted) and not isinstance(module, tuple(_OURS.values())):
            report.left[name] = f"{kind.__name__} is a subclass of a torch.nn class"
    return report
