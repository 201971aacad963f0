"""How the weights of a model are initialized."""

from torch import nn

SCHEMES = ("gpt2", "normal", "uniform", "xavier", "he", "nanochat")
# Projections into the residual stream: the last one of attention and the last one of the feed-forward block.
_INTO_RESIDUAL = ("out_proj.weight", "linear2.weight")


def initialize(model, scheme, n_layer=1):
    """Initialize the matrices of a model by a scheme and its biases with 0; norm weights stay 1.

    Args:
        model: nn.Module.
        scheme: "gpt2": normal with standard deviation 0.02, divided by sqrt(2 n_layer) for projections into the
            residual stream; "normal": 0.02 everywhere; "uniform": -0.04 to 0.04; "xavier": uniform within
            sqrt(6 / (rows + columns)); "he": normal with sqrt(2 / columns). With these, embeddings are normal with
            0.02. "nanochat": uniform within sqrt(3 / columns), 0 for projections into the residual stream, embeddings
            normal with 1, an output layer of its own normal with 0.001.
        n_layer: residual layers of the model.

    Raises:
        ValueError: the scheme is unknown.
    Sources: Radford et al. 2019, "Language models are unsupervised multitask learners"; Glorot and Bengio 2010,
        "Understanding the difficulty of training deep feedforward neural networks"; He et al. 2015, "Delving deep into
        rectifiers"; Karpathy, nanochat, 2025, for its scheme.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"init must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            if "bias" in name.rpartition(".")[2]:
                nn.init.zeros_(parameter)
        elif scheme == "nanochat":
            _initialize_like_nanochat(name, parameter, id(parameter) in embeddings)
        elif id(parameter) in embeddings or scheme in ("gpt2", "normal"):
            smaller = scheme == "gpt2" and name.endswith(_INTO_RESIDUAL)
            nn.init.normal_(parameter, std=0.02 / (2 * n_layer) ** 0.5 if smaller else 0.02)
        elif scheme == "uniform":
            nn.init.uniform_(parameter, -0.04, 0.04)
        elif scheme == "xavier":
            nn.init.xavier_uniform_(parameter)
        else:
            nn.init.kaiming_normal_(parameter)


def _initialize_like_nanochat(name, parameter, is_embedding):
    if is_embedding or name.endswith("head.weight"):
        nn.init.normal_(parameter, std=1.0 if is_embedding else 0.001)
    elif name.endswith(_INTO_RESIDUAL):
        nn.init.zeros_(parameter)
    else:
        bound = (3 / parameter[0].numel()) ** 0.5
        nn.init.uniform_(parameter, -bound, bound)
