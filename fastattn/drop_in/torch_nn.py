"""The modules of torch.nn itself: fastattn.nn has a subclass of each, so only the class changes."""

import torch

from fastattn.drop_in.change import ON_META, Change, change_class
from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.decoder import TransformerDecoder, TransformerDecoderLayer
from fastattn.nn.encoder import TransformerEncoder, TransformerEncoderLayer
from fastattn.nn.norm import LayerNorm, RMSNorm
from fastattn.nn.transformer import Transformer

CLASSES = {
    getattr(torch.nn, ours.__name__): ours
    for ours in (
        LayerNorm, RMSNorm, MultiheadAttention, TransformerEncoderLayer, TransformerDecoderLayer, TransformerEncoder,
        TransformerDecoder, Transformer,
    )
}  # fmt: skip


def find(modules: dict[str, torch.nn.Module], classes: tuple[type, ...]) -> dict[str, Change | str]:
    """A Change for each module of one of these classes, and a reason for each of a subclass."""
    found = {name: recognise(module) for name, module in modules.items() if isinstance(module, classes)}
    return {name: result for name, result in found.items() if result is not None}


def recognise(module: torch.nn.Module) -> Change | str | None:
    """A Change for a module of exactly such a class, the reason why it is left alone, or None for other modules."""
    kind = type(module)
    if kind in CLASSES:
        if "forward" in module.__dict__:
            return f"forward was replaced on this {kind.__name__} object"
        if any(parameter.is_meta for parameter in module.parameters()):
            return ON_META
        return change_class(module, CLASSES[kind], kind.__name__)
    if isinstance(module, tuple(CLASSES)) and not isinstance(module, tuple(CLASSES.values())):
        return f"{kind.__name__} is a subclass of a torch.nn class"
    return None
