"""Text classifiers: a transformer, a recurrent or convolutional network, or a bag of words."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .backbone import Backbone, check_lengths, check_tokens, num_parameters
from .initialize import initialize
from .shape import check_choice

BODIES = ("transformer", "lstm", "gru", "cnn", "bag_of_words")
LABEL_KINDS = ("class", "classes", "number")
_WIDTHS = (3, 4, 5)


class Classifier(nn.Module):
    """Predicts a class, several classes or a number for each text; texts are padded on the right.

    Args:
        vocab_size, n_classes: number of distinct tokens and of classes.
        body: "transformer": a `Backbone` named encoder as in MaskedLM; "lstm" or "gru": n_layer bidirectional layers,
            d_model wide in each direction; "cnn": d_model filters each of 3, 4 and 5 tokens, max-pooled over the text;
            "bag_of_words": a weight for each token and class, summed over the distinct tokens of the text.
        pooling: how the transformer's states become one: "mean", "first", or "pooler", tanh(linear(first)) as in BERT.
        init: as for `CausalLM`; with "gpt2" recurrent and convolutional layers keep torch.nn's initial weights.
        label_smoothing: share of a target's probability that is spread over the classes, in training mode only.
        class_weights: None, or n_classes weights of the classes in the loss.
        label_kind: "class": a text has one class; "classes": any number of them; "number": the output is a number, and
            n_classes is 1.
        number_range: mean and standard deviation of the numbers, which scale the output.
        shape: the fields of `Shape`; dropout also comes before the output layer.
    Raises:
        ValueError: as `Backbone`; body, pooling or label_kind is unknown, or label_smoothing is out of range.
    Example:
        model = Classifier(8000, 2, n_layer=2, n_head=4, d_model=128, block_size=64)
        logits = model(tokens, lengths)  # (batch, 2) for tokens (batch, seqlen) and lengths (batch,), int64
    Sources: Devlin et al., "BERT", 2019; Graves and Schmidhuber, "Framewise phoneme classification with bidirectional
        LSTM", 2005; Cho et al., "Learning phrase representations using RNN encoder-decoder", 2014 (GRU); Kim,
        "Convolutional neural networks for sentence classification", 2014.
    """

    num_parameters = num_parameters

    def __init__(
        self,
        vocab_size: int,
        n_classes: int,
        *,
        body: str = "transformer",
        pooling: str = "mean",
        init: str = "gpt2",
        label_smoothing: float = 0.0,
        class_weights: list[float] | None = None,
        label_kind: str = "class",
        number_range: tuple[float, float] = (0.0, 1.0),
        **shape: Any,
    ) -> None:
        super().__init__()
        check_choice("body", body, BODIES)
        check_choice("pooling", pooling, ("mean", "first", "pooler"))
        check_choice("label_kind", label_kind, LABEL_KINDS)
        if pooling != "mean" and body != "transformer":
            raise ValueError(f"pooling must be 'mean' with the body {body!r}, got {pooling!r}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing}")
        self.body, self.pooling, self.label_smoothing = body, pooling, label_smoothing
        self.label_kind, self.number_range = label_kind, number_range
        weights = None if class_weights is None else torch.tensor(class_weights)
        self.register_buffer("class_weights", weights, persistent=False)
        self.block_size, d_model, dropout = shape["block_size"], shape["d_model"], shape.get("dropout", 0.0)
        features = d_model
        if body == "transformer":
            self.encoder = Backbone(vocab_size, **shape)
            self.pooler = nn.Linear(d_model, d_model) if pooling == "pooler" else None
        elif body == "bag_of_words":
            self.token_embedding, features = nn.Embedding(vocab_size, n_classes), 0
        else:
            self.token_embedding = nn.Embedding(vocab_size, d_model)
        if body in ("lstm", "gru"):
            rnn, features = {"lstm": nn.LSTM, "gru": nn.GRU}[body], 2 * d_model
            n_layer = shape["n_layer"]
            between = dropout if n_layer > 1 else 0.0  # torch.nn warns if it cannot use dropout
            self.rnn = rnn(d_model, d_model, n_layer, batch_first=True, dropout=between, bidirectional=True)
        elif body == "cnn":
            self.convolutions = nn.ModuleList(nn.Conv1d(d_model, d_model, width) for width in _WIDTHS)
            features = len(_WIDTHS) * d_model
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(features, n_classes) if features else None
        self.bias = None if features else nn.Parameter(torch.zeros(n_classes))
        as_torch = init == "gpt2" and body in ("lstm", "gru", "cnn")
        for module in self.children() if not as_torch else (self.token_embedding, self.head):
            initialize(module, init, shape["n_layer"])

    def forward(self, tokens: Tensor, lengths: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits of the classes or numbers, or the mean loss if targets are given.

        Args:
            tokens: (batch, seqlen) int64, padded on the right, seqlen at most block_size.
            lengths: (batch,) int64, the number of tokens in each row, at least 1.
            targets: None, or (batch,) int64, the true classes; for several classes (batch, n_classes) of 0 and 1, for
                numbers (batch,), both floating point.
        Returns: logits (batch, n_classes), or numbers (batch,). With targets, fp32: their mean cross-entropy in nats,
            weighted by class_weights; for several classes the mean over texts and classes; for numbers the mean squared
            error in standard deviations.
        Raises:
            ValueError: as `Backbone`.
        """
        check_tokens(tokens, self.block_size)
        check_lengths(lengths, tokens)
        features = getattr(self, f"_{self.body}", self._recurrent)(tokens, lengths)
        logits = features + self.bias if self.head is None else self.head(self.dropout(features))
        mean, deviation = self.number_range
        if self.label_kind == "number":
            logits = logits[:, 0] * deviation + mean
        if targets is None:
            return logits
        if self.label_kind == "number":
            return ((logits.float() - targets) / deviation).square().mean()
        if self.label_kind == "classes":
            return F.binary_cross_entropy_with_logits(logits.float(), targets)
        weights: Any = self.class_weights
        return F.cross_entropy(
            logits.float(), targets, None if weights is None else weights.float(),
            label_smoothing=self.label_smoothing * self.training,
        )  # fmt: skip

    def _transformer(self, tokens, lengths):
        x = self.encoder(tokens, lengths=lengths)
        if self.pooling == "mean":
            return _mean(x, lengths)
        return x[:, 0] if self.pooler is None else self.pooler(x[:, 0]).tanh()

    def _recurrent(self, tokens, lengths):
        x = self.dropout(self.token_embedding(tokens))
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        x, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=tokens.shape[1])
        return _mean(x, lengths)

    def _cnn(self, tokens, lengths):
        valid = _valid(tokens, lengths)[..., None]
        x = (self.token_embedding(tokens) * valid).mT  # zeros follow the text, whatever the padding
        maxima = []
        for width, conv in zip(_WIDTHS, self.convolutions, strict=True):
            windows = conv(F.pad(x, ((width - 1) // 2, width // 2)))  # one window per token
            maxima.append((windows.relu() * valid.mT).amax(-1))
        return torch.cat(maxima, 1)

    def _bag_of_words(self, tokens, lengths):
        # sorted, padding last: a token is new where it differs from the one before it
        ordered = tokens.masked_fill(~_valid(tokens, lengths), self.token_embedding.num_embeddings).sort(1).values
        new = ordered < self.token_embedding.num_embeddings
        new[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
        return (self.token_embedding(ordered * new) * new[..., None]).sum(1)


def _valid(tokens, lengths):
    return torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]


def _mean(x, lengths):
    """(batch, features): the mean of x (batch, seqlen, features) over the first `lengths` of seqlen."""
    return (x * _valid(x, lengths)[..., None]).sum(1) / lengths[:, None]
