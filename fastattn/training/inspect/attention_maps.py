"""The attention weights of a model, head by head."""

import torch

from fastattn.models.block import Attention

from ..messages import UsageError


@torch.no_grad()
def attention_maps(model, *inputs, blocks=None, name="self_attn", **options):
    """The attention weights of the blocks of a model on one text, without dropout.

    Args:
        model: a model that calls its blocks; its mode does not change.
        inputs, options: the arguments of model(...), with a batch of one, for example tokens (1, seqlen).
        blocks: encoder or decoder layers, of torch.nn, fastattn.nn or fastattn.models; None: model.blocks.
        name: attribute of the attention; "multihead_attn" is the attention of decoder layers to the encoder's output.

    Returns:
        list of (n_head, seqlen_q, seqlen_k), the softmax of the scores, one per block.

    Raises:
        UsageError: a block has no such attention or does not call it as a module, or the batch is not one text.
    Example:
        >>> from fastattn.models import CausalLM
        >>> from fastattn.training.inspect.attention_maps import attention_maps
        >>> model = CausalLM(100, n_layer=2, n_head=4, d_model=16, block_size=8)
        >>> [weights.shape for weights in attention_maps(model, torch.tensor([[1, 2, 3]]))]
        [torch.Size([4, 3, 3]), torch.Size([4, 3, 3])]
    """
    blocks = getattr(model, "blocks", ()) if blocks is None else blocks
    attentions = [getattr(block, name, None) for block in blocks]
    known = (torch.nn.MultiheadAttention, Attention)
    if not attentions or not all(isinstance(attention, known) for attention in attentions):
        kinds = ", ".join(sorted({type(attention).__name__ for attention in attentions})) or "no blocks"
        raise UsageError(f"attention map: {name} of every block must be a MultiheadAttention, got {kinds}")
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
        raise UsageError(f"attention map: a block does not call its {name} as a module, so it has no weights")
    if any(weights.dim() != 4 or len(weights) != 1 for weights in maps):
        raise UsageError(f"attention map: the batch must be one text, got weights of shape {tuple(maps[0].shape)}")
    return [weights[0] for weights in maps]
