"""The attention weights of a model, head by head."""

import torch

from fastattn.models.block import Attention

from ..messages import UsageError


@torch.no_grad()
def attention_maps(model, *inputs, blocks=None, name="self_attn", **options):
    """What the blocks of a model look at while it reads one text, dropout off.

    Args:
        model: calls its blocks; left in the mode it was in.
        inputs, options: what model(...) takes, with a batch of one, for example tokens (1, seqlen).
        blocks: encoder or decoder layers, of torch.nn, fastattn.nn or fastattn.models; None: model.blocks.
        name: of their attention, "multihead_attn" for that of decoder layers to the encoder's output.

    Returns:
        list of (n_head, seqlen_q, seqlen_k), the softmax of the scores, one a block.

    Raises:
        UsageError: blocks without such an attention, or that compute it in a way that leaves no weights; another batch.
    """
    blocks = getattr(model, "blocks", ()) if blocks is None else blocks
    attentions = [getattr(block, name, None) for block in blocks]
    known = (torch.nn.MultiheadAttention, Attention)
    if not attentions or not all(isinstance(attention, known) for attention in attentions):
        kinds = ", ".join(sorted({type(attention).__name__ for attention in attentions})) or "no blocks"
        raise UsageError(f"attention map: expected blocks whose {name} is a MultiheadAttention, got {kinds}")
    maps = [None] * len(attentions)

    def want_weights(module, arguments, keywords):
        if isinstance(module, Attention):
            return None
        return arguments, {**keywords, "need_weights": True, "average_attn_weights": False}

    def keep(number):
        def hook(module, arguments, output):
            maps[number] = module.weights(*arguments) if isinstance(module, Attention) else output[1]

        return hook

    was_training = model.training
    model.eval()
    handles = []
    try:
        for number, attention in enumerate(attentions):
            handles.append(attention.register_forward_pre_hook(want_weights, with_kwargs=True))
            handles.append(attention.register_forward_hook(keep(number)))
        model(*inputs, **options)
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    if any(weights is None for weights in maps):
        raise UsageError(f"attention map: expected blocks that call their {name}, got one that computes it otherwise")
    if any(weights.dim() != 4 or len(weights) != 1 for weights in maps):
        raise UsageError(f"attention map: expected a batch of one text, got weights {tuple(maps[0].shape)}")
    return [weights[0] for weights in maps]
