"""A language model whose loss is that of direct preference optimisation (DPO)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backbone import Backbone
from .causal_lm import CausalLM


class PreferenceLM(CausalLM):
    """A `CausalLM` that learns to prefer one of two answers, relative to a reference model.

        loss = -log sigmoid(beta * ((chosen - reference_chosen) - (rejected - reference_rejected)))

    with the summed log-probabilities of the answers' tokens under the model and under the reference.

    Args:
        beta: how much a difference of log-probabilities counts; the smaller, the further the model may leave the
            reference.
        others: as for `CausalLM`.
    Source: Rafailov et al., "Direct preference optimization", 2023.
    """

    def __init__(self, vocab_size: int, *, beta: float = 0.1, **others) -> None:
        super().__init__(vocab_size, **others)
        self.beta = beta

    def forward(self, tokens, targets=None, cache=None, cu_seqlens=None, last=False, reference=None):
        """As `CausalLM`; with `reference` the DPO loss of pairs.

        Args:
            tokens, targets: with reference (pairs, 2, seqlen): the chosen text, then the rejected one; -100 as target
                of all that is not the answer, and of padding on the right.
            reference: None, or (pairs, 2), the summed log-probabilities under the reference.
        Returns: the mean loss over the pairs in nats, fp32.
        """
        if reference is None:
            return super().forward(tokens, targets, cache, cu_seqlens, last)
        margin = (self.log_probs(tokens, targets) - reference).diff(dim=1)[:, 0]  # rejected - chosen
        return -F.logsigmoid(-self.beta * margin).mean()

    def log_probs(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """(...,) fp32: the summed log-probabilities of the targets (..., seqlen) that are not -100."""
        x = Backbone.forward(self, tokens.flatten(0, -2), causal=True)
        losses = self.head.losses(x, self.token_embedding, targets.flatten(0, -2))
        return -losses.sum(-1).view(tokens.shape[:-1]).to(torch.float32)
