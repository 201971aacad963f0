"""An encoder that predicts masked tokens, and the transfer of its weights to other models."""

from collections import namedtuple
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .backbone import Backbone, Head, num_parameters
from .initialize import initialize


class MaskedLM(nn.Module):
    """Predicts the tokens at masked positions from all other tokens of the text.

    Args:
        vocab_size, tied, init, label_smoothing: as for `CausalLM`.
        head_transform: whether a layer with GELU and norm comes before the output layer, which then has a bias.
        shape: the fields of `Shape`.
    Raises:
        ValueError: as `CausalLM`.
    Source: Devlin et al., "BERT: pre-training of deep bidirectional transformers for language understanding", 2019.
    """

    num_parameters = num_parameters

    def __init__(
        self,
        vocab_size: int,
        *,
        tied: bool = True,
        init: str = "gpt2",
        label_smoothing: float = 0.0,
        head_transform: bool = False,
        **shape: Any,
    ) -> None:
        super().__init__()
        self.encoder = Backbone(vocab_size, **shape)
        self.block_size, self.layers = self.encoder.block_size, self.encoder.layers
        self.head = Head(vocab_size, self.encoder.shape, tied, label_smoothing, head_transform)
        initialize(self, init, len(self.encoder.blocks))

    def forward(self, tokens: Tensor, lengths: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits at every position, or the mean loss of the targets if given.

        Args:
            tokens: (batch, seqlen) int64 with the masked tokens replaced; padded on the right.
            lengths: (batch,) int64, the number of tokens in each row, at least 1.
            targets: None or (batch, seqlen) int64, -100 where nothing is predicted; the head skips these positions.
        Returns: logits (batch, seqlen, vocab_size); with targets their mean cross-entropy in nats, fp32; 0 if all are
            -100.
        Raises:
            ValueError: as `Backbone`.
        """
        x = self.encoder(tokens, lengths=lengths)
        if targets is not None:
            predicted = targets != -100
            x, targets = x[predicted], targets[predicted]
        return self.head(x, self.encoder.token_embedding, targets)


# names of parameters: loaded; in the model's encoder but not in the state; in the state but not used
LoadedEncoder = namedtuple("LoadedEncoder", "loaded missing unused")


@torch.no_grad()
def load_encoder(model: nn.Module, state_dict: Mapping[str, Tensor]) -> LoadedEncoder:
    """Copy pretrained weights into the encoder of a model, by name.

    Args:
        model: a Classifier with the body "transformer", a MaskedLM or a Seq2Seq.
        state_dict: {name: tensor} of such a model; only its encoder is used.
    Returns: LoadedEncoder(loaded, missing, unused), lists of names.
    Raises:
        ValueError: the model or the state has no encoder, or a shape differs; then nothing is copied.
    Example:
        load_encoder(classifier, masked_lm.state_dict())
    """
    own = {name: value for name, value in model.state_dict().items() if name.startswith("encoder.")}
    loaded = [name for name in own if name in state_dict]
    if not loaded:
        if not own:
            raise ValueError(f"load_encoder: the model must have an encoder, got a {type(model).__name__} without one")
        raise ValueError(f"load_encoder: the state has no encoder, only {', '.join(list(state_dict)[:3])}, ...")
    for name in loaded:
        if own[name].shape != state_dict[name].shape:
            raise ValueError(
                f"load_encoder: {name} must have shape {tuple(own[name].shape)}, got {tuple(state_dict[name].shape)}"
            )
    for name in loaded:
        own[name].copy_(state_dict[name])
    missing, unused = [name for name in own if name not in state_dict], [name for name in state_dict if name not in own]
    return LoadedEncoder(loaded, missing, unused)
