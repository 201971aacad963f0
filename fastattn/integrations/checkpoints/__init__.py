"""Families of models in folders of Hugging Face: names and shapes in, names and shapes out.

A family has `kinds` (values of model_type), `read_shape(config, names)`, `read_weights(tensors, shape)`,
`write_config(model)` and `write_weights(model)`. What it cannot express raises ValueError.
"""

from .bert import BERT
from .decoders import DECODERS
from .gpt2 import GPT2

FAMILIES = (*DECODERS, GPT2, BERT)
