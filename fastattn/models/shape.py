"""The shape of a transformer: all numbers and switches that decide its parameters and its forward pass."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from .rotary import RotaryConfig

POSITIONS = ("learned", "sinusoidal", "rotary", "alibi")
# name → (activation, whether a second input layer gates the hidden layer)
FEED_FORWARDS = {
    "gelu": ("gelu", False), "gelu_tanh": ("gelu_tanh", False), "relu": ("relu", False), "relu2": ("relu2", False),
    "silu": ("silu", False), "swiglu": ("silu", True), "geglu": ("gelu", True), "geglu_tanh": ("gelu_tanh", True),
    "reglu": ("relu", True),
}  # fmt: skip
NORMS, QK_NORMS = ("layer", "rms"), ("none", "head", "all")


class Scores(NamedTuple):
    """How a layer turns products of queries and keys into scores; the defaults are those of plain attention.

    window: tokens that a token sees, itself included, or None; softcap: 0 = off; scale: None = 1/sqrt(head_dim);
    local: whether the rotary embedding of layers with a window applies.
    """

    window: int | None = None
    softcap: float = 0.0
    scale: float | None = None
    local: bool = False


def check_choice(name, value, choices):
    """Raise ValueError unless value is among the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")


@dataclass(frozen=True)
class Shape:
    """The arguments that all transformers of fastattn.models share.

    For both values of `layers`, the parameters have the same names, and a seed gives bitwise the same initial weights.

    Args:
        n_layer, n_head, d_model: number of blocks, heads per block, width.
        block_size: longest sequence, in tokens.
        n_kv_head: heads of keys and values, each shared by n_head / n_kv_head heads of queries; None: n_head.
        head_dim: width of a head; None: d_model / n_head.
        d_ff: width of the hidden layer, gated or not; None: 4 * d_model.
        dropout: probability on embeddings, attention weights, the feed-forward activation and the residual branches.
        bias: whether linear layers and norms have biases.
        qkv_bias: whether the projections to queries, keys and values have one; None: as `bias`.
        positions: "learned" are added to the embeddings; "sinusoidal" too, with the embeddings times sqrt(d_model);
            "rotary" rotates queries and keys; "alibi" lowers scores in proportion to the distance.
        rotary: RotaryConfig, the angles of rotary positions.
        window: a token sees this many tokens, itself included, in layers that `window_pattern` calls S; None: all.
        window_pattern: letters S (sliding window) and L (the whole text), repeated over the layers.
        norm: "layer" or "rms".
        norm_weight: whether norms have weights (and biases).
        norm_first: pre-norm with a norm at the end; False: post-norm with a norm on the embeddings, as in BERT.
        norm_output: a norm also follows each sub-layer, before its output is added. With norm_first there are both, as
            in Gemma 3; without, there are only these and the norm at the end, as in OLMo 2.
        norm_eps: added to the variance in norms.
        qk_norm: norm of queries and keys: "none", "head" over each head, "all" over all heads together.
        attention_softcap: scores become softcap * tanh(score / softcap); 0 = off.
        attention_scale: factor of the products of queries and keys; None: 1/sqrt(head_dim).
        sinks: a learnt logit per head takes part in the softmax of the scores but has no value.
        logit_softcap: as attention_softcap, for the logits of the output layer.
        embedding_scale: multiply token embeddings by sqrt(d_model); always so for sinusoidal positions.
        embedding_norm: a norm on the embeddings, before the first block.
        parallel: attention and the feed-forward block read the same norm, and both are added: one norm per block.
        feed_forward: activation "gelu" (erf), "gelu_tanh", "relu", "relu2" (squared) or "silu", or gated "swiglu",
            "geglu", "geglu_tanh" or "reglu".
        checkpointing: in training, save only the input of each block, and compute the block again in the backward.
        layers: "fastattn" or "torch": where the layers come from.
    Raises:
        ValueError: the sizes do not fit together, or a name is unknown.
    Sources: Vaswani et al. 2017; Devlin et al., "BERT", 2019 (post-norm); Radford et al., "Language models are
        unsupervised multitask learners", 2019 (pre-norm); Su et al., "RoFormer", 2021; Press et al., "Train short, test
        long", 2022; Shazeer, "GLU variants improve transformer", 2020; Ainslie et al., "GQA", 2023; Zhang and Sennrich,
        "Root mean square layer normalization", 2019; Henry et al., "Query-key normalization", 2020; Beltagy et al.,
        "Longformer", 2020 (windows); Gemma team, "Gemma 2", 2024 (softcap, norm_output); So et al., "Primer", 2021
        (relu2); Xiao et al., "Attention sinks", 2024; Wang and Komatsuzaki, "GPT-J", 2021 (parallel).
    """

    n_layer: int
    n_head: int
    d_model: int
    block_size: int
    n_kv_head: int | None = None
    head_dim: int | None = None
    d_ff: int | None = None
    dropout: float = 0.0
    bias: bool = True
    qkv_bias: bool | None = None
    positions: str = "learned"
    rotary: RotaryConfig = field(default_factory=RotaryConfig)
    window: int | None = None
    window_pattern: str = "S"
    norm: str = "layer"
    norm_weight: bool = True
    norm_first: bool = True
    norm_output: bool = False
    norm_eps: float = 1e-5
    qk_norm: str = "none"
    attention_softcap: float = 0.0
    attention_scale: float | None = None
    sinks: bool = False
    logit_softcap: float = 0.0
    embedding_scale: bool = False
    embedding_norm: bool = False
    parallel: bool = False
    feed_forward: str = "gelu"
    checkpointing: bool = False
    layers: str = "fastattn"

    def __post_init__(self) -> None:
        if self.head_dim is None and self.d_model % self.n_head:
            raise ValueError(f"d_model must be a multiple of n_head = {self.n_head}, got {self.d_model}")
        if self.head_dim is not None and self.head_dim < 1:
            raise ValueError(f"head_dim must be None or at least 1, got {self.head_dim}")
        if self.kv_heads < 1 or self.n_head % self.kv_heads:
            raise ValueError(f"n_kv_head must be a divisor of n_head = {self.n_head}, got {self.kv_heads}")
        for name, choices in (
            ("layers", ("fastattn", "torch")), ("positions", POSITIONS), ("feed_forward", tuple(FEED_FORWARDS)),
            ("norm", NORMS), ("qk_norm", QK_NORMS),
        ):  # fmt: skip
            check_choice(name, getattr(self, name), choices)
        width = {"rotary": self.head_width, "sinusoidal": self.d_model}.get(self.positions, 0)
        if width % 2:
            name = "d_model" if self.positions == "sinusoidal" else "d_model / n_head"
            raise ValueError(f"{name} must be even for {self.positions} positions, got {width}")
        self._check_switches()

    def _check_switches(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be None or at least 1, got {self.window}")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise ValueError(f"window_pattern must consist of the letters S and L, got {self.window_pattern!r}")
        for name in ("attention_softcap", "logit_softcap"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or a finite number above it, got {getattr(self, name)}")
        if self.attention_scale is not None and not 0 < self.attention_scale < math.inf:
            raise ValueError(f"attention_scale must be None or a finite number above 0, got {self.attention_scale}")
        if self.parallel and (not self.norm_first or self.norm_output):
            raise ValueError("parallel must be False unless norm_first is True and norm_output is False, got True")

    @property
    def kv_heads(self) -> int:
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def head_width(self) -> int:
        return self.d_model // self.n_head if self.head_dim is None else self.head_dim

    @property
    def hidden(self) -> int:
        return self.d_ff or 4 * self.d_model

    @property
    def post_norm(self) -> bool:
        """Whether norms come after the residual sums, as in BERT."""
        return not self.norm_first and not self.norm_output

    def window_of(self, layer: int) -> int | None:
        """The window of a layer, or None if it sees the whole text."""
        return self.window if self.window_pattern[layer % len(self.window_pattern)] == "S" else None

    def scores_of(self, layer: int) -> Scores:
        """How a layer turns products of queries and keys into scores."""
        window = self.window_of(layer)
        return Scores(window, self.attention_softcap, self.attention_scale, window is not None)

    @property
    def is_classic(self) -> bool:
        """Whether the layers of torch.nn can compute the blocks."""
        activation, gated = FEED_FORWARDS[self.feed_forward]
        plain = (
            self.norm == "layer" and self.norm_weight and not self.norm_output and not self.parallel
            and self.qk_norm == "none" and not self.sinks and self.attention_softcap == 0
            and self.attention_scale is None and self.window is None
        )  # fmt: skip
        same_width = self.head_width * self.n_head == self.d_model
        return (
            plain and same_width and self.positions in ("learned", "sinusoidal") and self.kv_heads == self.n_head
            and not gated and activation in ("gelu", "relu") and self.qkv_bias in (None, self.bias)
        )  # fmt: skip
