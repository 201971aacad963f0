"""Runs padded batches without their padding: the real tokens of all rows pass through all layers as one row.

A model of transformers runs on one row with the real tokens of the batch. Attention gets the boundaries of the rows,
positions stay those of the padded batch, and the hidden states go back to their places at the end. Stacks of
`fastattn.nn.TransformerEncoder` do the same themselves.
"""

import functools
import inspect
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.drop_in.attention import set_implementation
from fastattn.drop_in.change import ON_META, Change, Replaced, change_class, make_class, why_not_take_over
from fastattn.drop_in.recognise import quiet
from fastattn.nn.plain import is_traced

_OF_TOKENS = ("input_ids", "inputs_embeds", "token_type_ids", "position_ids")  # (batch, seqlen, ...)
_CACHES = ("past_key_values", "cache")
_KNOWN_OUTPUTS = {"last_hidden_state", "pooler_output", *_CACHES}
_MORE_OUTPUTS = ("output_attentions", "output_hidden_states", "output_router_logits")
_NO_TENSORS = (bool, int, float, str, type(None))


class Facts(NamedTuple):
    """What the packed forward of a model needs to know.

    caches: whether the model fills a cache in evaluation, unless use_cache says otherwise.
    counted: whether it counts positions from its padding index, as RoBERTa does; otherwise they are the columns.
    """

    caches: bool
    counted: bool = False


class Rows(NamedTuple):
    """Where the real tokens of a padded batch are. index: in all batch * seqlen tokens; cu_seqlens: int32."""

    shape: torch.Size
    index: Tensor
    cu_seqlens: Tensor

    def pack(self, t):
        """(batch, seqlen, ...) → (1, tokens, ...)."""
        return t.reshape(-1, *t.shape[2:])[self.index][None]

    def restore(self, t):
        """(1, tokens, ...) → (batch, seqlen, ...) with 0 at the padding."""
        rows = t.new_zeros(self.shape.numel(), *t.shape[2:]).index_copy(0, self.index, t[0])
        return rows.unflatten(0, self.shape)


def rows_of(real: Tensor) -> Rows | None:
    """The Rows of a bool mask (batch, seqlen), True at real tokens. None if there is no padding, or if it is not all at
    the end.

    A head may read the hidden state of padding that comes before the real tokens: a classifier that of column 0, and
    the loss of a causal model that of the column before each label.
    """
    if real.shape[1] == 0 or real.all() or not real[:, 0].all() or (real[:, 1:] & ~real[:, :-1]).any():
        return None
    ends = real.sum(1).cumsum(0).int()
    return Rows(real.shape, real.flatten().nonzero().flatten(), torch.cat([ends.new_zeros(1), ends]))


class PaddingFree(Replaced):
    """A model of transformers without output layer, which packs padded batches."""

    def forward(self, *args, **kwargs):
        """The original forward, of the real tokens alone where the call allows it."""
        packed = None if is_traced() else self._packed(args, kwargs)
        if packed is None:
            return super().forward(*args, **kwargs)
        rows, arguments = packed
        out = super().forward(**arguments)
        out["last_hidden_state"] = rows.restore(out["last_hidden_state"])
        if out.get("pooler_output") is not None:  # the model has computed it from the first token of the packed row
            out["pooler_output"] = self.pooler(out["last_hidden_state"])
        return out

    def _packed(self, args, kwargs):
        """(Rows, arguments of the packed call), or None."""
        facts = self._fastattn
        given = _arguments(self._original, self, args, kwargs)
        if given is None or self.config._attn_implementation != "fastattn":
            return None
        mask, tokens = given.pop("attention_mask", None), given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        if not isinstance(mask, Tensor) or tokens is None or mask.dim() != 2 or mask.shape != tokens.shape[:2]:
            return None
        caches = facts.caches and given.get("use_cache") is not False
        if caches and (given.get("use_cache") or not (self.training and torch.is_grad_enabled())):
            return None
        others = [value for name, value in given.items() if name not in (*_OF_TOKENS, "use_cache")]
        if any((isinstance(t, Tensor) and t.dim() > 0) or not isinstance(t, (*_NO_TENSORS, Tensor)) for t in others):
            return None
        if any(self._asked_for(name, given, False) for name in _MORE_OUTPUTS) or not self._asked_for(
            "return_dict", given, True
        ):
            return None
        rows = rows_of(mask != 0)
        return None if rows is None else (rows, self._of_real_tokens(given, rows, mask.device))

    def _asked_for(self, name, given, default):
        """An option of a call, or else of the config."""
        return given[name] if name in given else getattr(self.config, name, default)

    def _of_real_tokens(self, given, rows, device):
        batch, seqlen = rows.shape
        if given.get("position_ids") is None:
            if self._fastattn.counted and given.get("input_ids") is not None:
                pad = self.config.pad_token_id
                real = (given["input_ids"] != pad).int()
                given["position_ids"] = (real.cumsum(1) * real).long() + pad
            else:
                start = self.config.pad_token_id + 1 if self._fastattn.counted else 0
                given["position_ids"] = torch.arange(start, start + seqlen, device=device)[None]
        if given.get("token_type_ids") is None and _has_token_types(self):
            given["token_type_ids"] = given["position_ids"].new_zeros(1, seqlen)
        for name in _OF_TOKENS:
            if given.get(name) is not None:
                t = given[name]
                given[name] = rows.pack(t.expand(batch, *t.shape[1:]))
        if self._fastattn.caches:
            given["use_cache"] = False
        return given | {"cu_seq_lens_q": rows.cu_seqlens, "cu_seq_lens_k": rows.cu_seqlens}


def _has_token_types(model):
    return any(name.endswith("token_type_embeddings") for name, _ in model.named_modules())


@functools.cache
def _signature(original):
    return inspect.signature(original.forward)


def _arguments(original, model, args, kwargs):
    """The arguments of a call by name, without those that are None; None if they do not fit."""
    try:
        bound = _signature(original).bind(model, *args, **kwargs).arguments
    except TypeError:
        return None
    bound.pop("self", None)
    bound |= bound.pop("kwargs", {})
    return {name: value for name, value in bound.items() if value is not None}


def find(modules: dict[str, torch.nn.Module]) -> dict[str, Change | str]:
    """A Change or a reason for each model of transformers, and a Change for each stack of encoder layers."""
    library = sys.modules.get("transformers.modeling_utils")
    models = () if library is None else library.PreTrainedModel
    found: dict[str, Change | str] = {}
    names, inside = {module: name for name, module in modules.items()}, set()
    for name, module in modules.items():
        if isinstance(module, models) and module not in inside:
            inside.update(module.modules())
            base = module.base_model
            found[names.get(base, name)] = _recognise(module, base)
        elif isinstance(module, torch.nn.TransformerEncoder):
            found[name] = Change("packing padded batches", functools.partial(_let_stack_pack, module))
    return found


def _let_stack_pack(stack):
    before = stack.__dict__.get("padding_free")
    stack.padding_free = True

    def undo():
        del stack.padding_free
        if before is not None:
            stack.padding_free = before

    return undo


def _recognise(model, base):
    """A Change of the base of a model, or the reason why it cannot be packed."""
    if isinstance(base, Replaced):
        return "it packs padded batches already"
    kind = type(base).__name__
    if getattr(base.config, "is_encoder_decoder", False):
        return f"{kind} has cross attention, whose queries and keys are packed differently"
    if "start_positions" in _signature(type(model)).parameters:
        return f"the loss of {type(model).__name__} compares all positions of a row, also those of the padding"
    missing = {"attention_mask", "position_ids"} - _signature(type(base)).parameters.keys()
    if missing:
        return f"the forward of {kind} takes no {' and no '.join(sorted(missing))}"
    if any(parameter.is_meta for parameter in base.parameters()):
        return ON_META
    reason = why_not_take_over(base)
    if reason is not None:
        return reason
    try:
        facts = _check(model, base)
    except Exception as error:  # the model's own code, or an argument that our attention refuses
        return f"the check of a packed batch failed: {type(error).__name__}: {error}"
    if isinstance(facts, str):
        return facts
    return _change(model, base, facts)


def _change(model, base, facts):
    """The class of the base, and our attention, without which it does not pack."""
    inner = change_class(base, make_class(PaddingFree, type(base), facts), "packing padded batches")

    def apply():
        undo_attention = set_implementation(model)
        undo_class = inner.apply()

        def undo():
            undo_class()
            undo_attention()

        return undo

    return inner._replace(apply=apply)


def _check(model, base):
    """The Facts with which a packed batch gives the hidden states of the padded one, or the reason why none do."""
    vocab = base.get_input_embeddings().weight.shape[0]
    device = next(base.parameters()).device
    training = [module for module in base.modules() if module.training]
    undo = set_implementation(model)
    try:
        base.eval()
        with quiet(device), torch.no_grad():
            real = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0], [1] * 6], device=device)
            pad = getattr(base.config, "pad_token_id", None) or 0
            ids = torch.randint(min(3, vocab - 1), vocab, real.shape, device=device).masked_fill(real == 0, pad)
            expected = base(input_ids=ids, attention_mask=real)
            fields = {name for name, value in expected.items() if value is not None}
            if "last_hidden_state" not in fields or fields - _KNOWN_OUTPUTS:
                return f"{type(base).__name__} returns {', '.join(sorted(fields))}"
            caches = bool(fields & set(_CACHES))
            for counted in (False, True):
                facts = Facts(caches, counted)
                if _same(base, facts, expected, {"input_ids": ids, "attention_mask": real}):
                    return facts
    finally:
        undo()
        for module in training:
            module.training = True
    return "packing changes its hidden states"


def _same(base, facts, expected, given):
    original, kind = type(base), make_class(PaddingFree, type(base), facts)
    options: dict[str, Any] = {"use_cache": False} if facts.caches else {}
    base.__class__ = kind
    try:
        packed = base._packed((), given | options)
        got = None if packed is None else base(**given, **options)
    finally:
        base.__class__ = original
    if got is None:
        return False
    real = given["attention_mask"].bool()
    pairs = [(got["last_hidden_state"][real], expected["last_hidden_state"][real])]
    if expected.get("pooler_output") is not None:
        pairs.append((got["pooler_output"], expected["pooler_output"]))
    slack = 256 if pairs[0][0].dtype == torch.float32 else 16
    return all(
        (a.double() - b.double()).abs().max() <= slack * torch.finfo(a.dtype).eps * b.double().abs().max()
        for a, b in pairs
    )
