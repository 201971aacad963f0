"""The output layer of a language model: in training, its cross-entropy runs without the logits of all tokens."""

import sys

import torch

from fastattn._autocast import autocast_dtype
from fastattn.drop_in.change import Change, change_class, is_plain_input, make_class, why_not_take_over
from fastattn.drop_in.linear import Linear, is_linear
from fastattn.drop_in.logits import DeferredLogits, Product
from fastattn.nn.plain import is_plain, is_traced, must_call_children


class OutputLayer(Linear):
    """A linear layer on our product whose outputs are logits, which are deferred in training."""

    def forward(self, input):
        """(..., d_model) → (..., vocabulary); a DeferredLogits in training, when a gradient is recorded."""
        # A weight that has been parametrized since is not read here, because each reading computes it and may change
        # its state.
        as_made = "_fastattn" in type(self).__dict__ and is_plain(self, type(self))  # no hooks either
        deferred = as_made and self.training and torch.is_grad_enabled() and is_plain_input(input)
        if not deferred or is_traced() or must_call_children():
            return super().forward(input)
        weight, bias = self.weight, self.bias
        wanted = any(t is not None and t.requires_grad for t in (input, weight, bias))
        fits = input.dim() >= 2 and input.shape[-1] == weight.shape[-1] and input.device == weight.device
        if not wanted or not fits:
            return super().forward(input)
        dtype = autocast_dtype(input)
        product = Product(*(t if t is None or dtype is None else t.to(dtype) for t in (input, weight, bias)))
        if any(t is not None and t.dtype != product.x.dtype for t in product[:3]):
            return super().forward(input)
        return DeferredLogits.make(product)


def _output_embeddings(model):
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):  # it has none
        return None


def find(modules: dict[str, torch.nn.Module]) -> dict[str, Change | str]:
    """A Change for each output layer: a module that a model of transformers names as such, or that shares the weight of
    an embedding."""
    library = sys.modules.get("transformers.modeling_utils")
    models = () if library is None else library.PreTrainedModel
    embeddings = {id(m.weight) for m in modules.values() if isinstance(m, torch.nn.Embedding)}
    named = {id(_output_embeddings(m)) for m in modules.values() if isinstance(m, models)}
    found: dict[str, Change | str] = {}
    for name, module in modules.items():
        if not is_linear(module) or not (id(module) in named or id(module.weight) in embeddings):
            continue
        reason = why_not_take_over(module)
        new_class = make_class(OutputLayer, torch.nn.Linear, "logits")
        found[name] = reason or change_class(module, new_class, "output layer whose loss needs no logits")
    return found
