"""What several families share: activations, required values of a config, rotary angles, windows."""

import math

from fastattn.models.shape import RotaryConfig

# name in a config → ours; the first name of each of ours is written
ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "silu": "silu",
    "swish": "silu",
}  # fmt: skip


def check_needed(config, needed):
    """Raise ValueError unless the config has these values, or leaves them out."""
    for name, value in needed.items():
        if config.get(name, value) not in (value, None):
            raise ValueError(f"{name} must be {value!r}, got {config[name]!r}")


def look_up(table, value, what):
    """table[value]; ValueError if it is missing."""
    if value not in table:
        raise ValueError(f"{what} must be one of {', '.join(table)}, got {value!r}")
    return table[value]


def reverse(table):
    """{value: first key}."""
    reversed_table = {}
    for key, value in table.items():
        reversed_table.setdefault(value, key)
    return reversed_table


def read_rotary(config, default_base):
    """The RotaryConfig of a config, in the form of transformers 4 or 5."""
    given, local = config.get("rope_parameters") or {}, None
    if "full_attention" in given:  # one entry for layers without a window, one for layers with a window
        local = (given.get("sliding_attention") or {}).get("rope_theta")
        check_needed(given.get("sliding_attention") or {}, {"rope_type": "default"})
        given = given["full_attention"]
    elif config.get("rope_local_base_freq") is not None:
        local = config["rope_local_base_freq"]
    given = {"rope_theta": config.get("rope_theta") or default_base, **(config.get("rope_scaling") or {}), **given}
    check_needed(given, {"partial_rotary_factor": 1.0, "truncate": True, "mscale": None, "mscale_all_dim": None})
    scalings = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
    kind = look_up(scalings, given.get("rope_type", given.get("type", "default")), "the rope_type")
    values = {"base": float(given["rope_theta"]), "local_base": local if local is None else float(local)}
    if kind != "none":
        values |= {"scaling": kind, "factor": float(given["factor"])}
    if kind in ("llama3", "yarn"):
        original = given.get("original_max_position_embeddings") or config["max_position_embeddings"]
        names = ("low_freq_factor", "high_freq_factor") if kind == "llama3" else ("beta_slow", "beta_fast")
        defaults = (1.0, 4.0) if kind == "llama3" else (1.0, 32.0)
        low, high = (float(given.get(name) or value) for name, value in zip(names, defaults, strict=True))
        values |= {"original_length": original, "low_frequency": low, "high_frequency": high}
    if kind == "yarn" and given.get("attention_factor") is not None:
        values["attention_factor"] = float(given["attention_factor"])
    return RotaryConfig(**values)


def write_rotary(rotary, by_layer_type):
    """The entries of a config for a RotaryConfig, in the forms of transformers 4 and 5."""
    scaling = {}
    if rotary.scaling != "none":
        scaling = {"rope_type": rotary.scaling, "factor": rotary.factor}
    if rotary.scaling in ("llama3", "yarn"):
        names = ("low_freq_factor", "high_freq_factor") if rotary.scaling == "llama3" else ("beta_slow", "beta_fast")
        scaling |= dict(zip(names, (rotary.low_frequency, rotary.high_frequency), strict=True))
        scaling["original_max_position_embeddings"] = rotary.original_length
    if rotary.attention_factor is not None:
        scaling["attention_factor"] = rotary.attention_factor
    new = {"rope_type": "default", "rope_theta": rotary.base, **scaling}
    if by_layer_type:
        new = {"full_attention": new, "sliding_attention": {"rope_type": "default", "rope_theta": rotary.local_base}}
        return {"rope_parameters": new}
    return {"rope_theta": rotary.base, "rope_scaling": scaling or None, "rope_parameters": new}


def read_windows(config, missing):
    """(window, window_pattern) of a config; missing: the pattern without layer_types, such as "SL", or None."""
    n_layer, window, kinds = config["num_hidden_layers"], config.get("sliding_window"), config.get("layer_types")
    if config.get("use_sliding_window") is False or window is None:
        return None, "S"
    if kinds is not None:
        letters = {"sliding_attention": "S", "full_attention": "L"}
        pattern = "".join(look_up(letters, kind, "a layer type") for kind in kinds)
    elif "max_window_layers" in config:
        pattern = "L" * config["max_window_layers"] + "S" * n_layer
    elif missing is not None:
        every = config.get("sliding_window_pattern", len(missing))
        pattern = ("S" * (every - 1) + "L") * n_layer if "L" in missing else "S"
    else:
        raise ValueError("layer_types must say which layers have a sliding_window, got none")
    pattern = (pattern * n_layer)[:n_layer]
    if "S" not in pattern:
        return None, "S"
    lengths = range(1, n_layer + 1)  # the shortest pattern that repeats
    return window, next(pattern[:n] for n in lengths if pattern == (pattern[:n] * n_layer)[:n_layer])


def write_windows(shape):
    """{"sliding_window", "use_sliding_window", "layer_types"} of a Shape."""
    windows = [shape.window_of(layer) for layer in range(shape.n_layer)]
    kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
    window = shape.window if any(windows) else None
    return {"sliding_window": window, "use_sliding_window": window is not None, "layer_types": kinds}


def differences(shape, other):
    """Names of the fields in which two Shapes differ, apart from dropout and from how they are trained."""
    found = []
    for name in vars(shape):
        if name in ("dropout", "checkpointing", "layers", "window_pattern"):
            continue
        ours, theirs = (_plain(s, name) for s in (shape, other))
        same = math.isclose(ours, theirs) if isinstance(ours, float) and isinstance(theirs, float) else ours == theirs
        if not same:
            found.append(name)
    return found


def _plain(shape, name):
    """The value of a field with its default filled in."""
    if name == "rotary" and shape.positions != "rotary":
        return None
    return {
        "n_kv_head": lambda: shape.kv_heads, "head_dim": lambda: shape.head_width, "d_ff": lambda: shape.hidden,
        "qkv_bias": lambda: shape.bias if shape.qkv_bias is None else shape.qkv_bias,
        "attention_scale": lambda: float(shape.attention_scale or shape.head_width**-0.5),
        "window": lambda: [shape.window_of(layer) for layer in range(shape.n_layer)],
    }.get(name, lambda: getattr(shape, name))()  # fmt: skip
