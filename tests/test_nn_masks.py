"""What the modules tell the attention op: flags and views where they say it all, and no seqlen × seqlen tensor."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn.nn.attention
from fastattn import nn

E, H, N, S = 8, 2, 2, 64  # every activation is smaller than S × S

MODULES = {
    "MultiheadAttention": lambda: nn.MultiheadAttention(E, H, batch_first=True),
    "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(E, H, 2 * E, batch_first=True),
    "TransformerEncoder": lambda: nn.TransformerEncoder(MODULES["TransformerEncoderLayer"](), 2),
    "TransformerDecoderLayer": lambda: nn.TransformerDecoderLayer(E, H, 2 * E, batch_first=True),
    "TransformerDecoder": lambda: nn.TransformerDecoder(MODULES["TransformerDecoderLayer"](), 2),
    "Transformer": lambda: nn.Transformer(E, H, 1, 1, 2 * E, batch_first=True),
}


STACKS = ("TransformerEncoder", "TransformerDecoder", "Transformer")  # they look whether a mask is the causal one
CASES = [(kind, form) for form in ("full", "hint", "hint_and_mask") for kind in MODULES]
CASES += [(kind, "mask_detected") for kind in STACKS]


def run(kind, module, x, mask, padding, hint):
    """The module on x, with the arguments under the names it has for them."""
    if kind == "MultiheadAttention":
        return module(x, x, x, padding, need_weights=False, attn_mask=mask, is_causal=bool(hint))
    if kind.startswith("TransformerEncoder"):
        hint = {} if hint is None else {"is_causal": hint}
        return module(x, mask, src_key_padding_mask=padding, **hint)
    paddings = {"tgt_key_padding_mask": padding, "memory_key_padding_mask": padding}
    hint = {} if hint is None else {"tgt_is_causal": hint}
    if kind == "Transformer":
        hints = hint | ({"src_is_causal": hint["tgt_is_causal"]} if hint else {})
        return module(x, x, mask, mask, src_key_padding_mask=padding, **paddings, **hints)
    return module(x, x, mask, **paddings, **hint)


class Largest(TorchDispatchMode):
    """The number of elements of memory behind the largest tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, torch.Tensor) and not any(t is argument for argument in args):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return result


@pytest.fixture
def calls(monkeypatch):
    """The keyword arguments of every call of the op."""
    seen, op = [], fastattn.nn.attention.attention

    def spy(q, k, v, **kwargs):
        seen.append(kwargs)
        return op(q, k, v, **kwargs)

    monkeypatch.setattr(fastattn.nn.attention, "attention", spy)
    return seen


def causal_mask():
    return torch.nn.Transformer.generate_square_subsequent_mask(S)


def padding_mask(dtype):
    mask = torch.zeros(N, S, dtype=torch.bool)
    mask[1, S // 2 :] = True
    return mask if dtype == torch.bool else torch.zeros(N, S).masked_fill(mask, -torch.inf)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("padding", [None, torch.bool, torch.float32], ids=["unpadded", "bool", "float"])
@pytest.mark.parametrize(("kind", "form"), CASES)
def test_what_reaches_the_op(kind, form, padding, training, calls):
    torch.manual_seed(0)
    module, x = MODULES[kind]().train(training), torch.randn(N, S, E)
    mask = causal_mask() if form in ("hint_and_mask", "mask_detected") else None
    key_padding = None if padding is None else padding_mask(padding)
    hint = {"full": False, "mask_detected": None}.get(form, True)
    if form == "mask_detected":
        run(kind, module, x, mask, key_padding, hint)  # the comparison, once per mask
        calls.clear()
    largest = Largest()
    with largest:
        run(kind, module, x, mask, key_padding, hint)
    assert calls
    for n, call in enumerate(calls):
        cross = n == 2 if kind == "Transformer" else "Decoder" in kind and n % 2 == 1
        assert call["causal"] == ("top_left" if form != "full" and not cross else False)
        for name, dtype in (("mask", torch.bool), ("bias", torch.float32)):
            if padding == dtype:
                assert call[name].shape == (N, 1, 1, S)
            else:
                assert call[name] is None
    assert largest.elements < S * S


def test_the_measure_sees_a_square():
    with Largest() as largest:
        causal_mask()
    assert largest.elements >= S * S
