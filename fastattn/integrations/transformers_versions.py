"""What differs between the mask functions of transformers 4.57 and of the newest version.

Up to 5.5 a mask function gets `cache_position`, the positions of the queries; later it gets their number and the first
one. `fastattn.integrations.transformers` is written for the newer form.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import masking_utils

_PARAMETERS = inspect.signature(masking_utils.sdpa_mask).parameters
TAKES_POSITIONS = "q_length" not in _PARAMETERS

# the oldest version has no function for masks of both directions: its encoders make theirs themselves
bidirectional_mask_function = getattr(masking_utils, "bidirectional_mask_function", None)


def is_tracing(t: Any) -> bool:
    """Whether a graph is being traced."""
    newer = getattr(masking_utils, "is_tracing", None)
    if newer is not None:
        return newer(t)
    return torch.jit.is_tracing() or isinstance(t, torch.fx.Proxy) or torch.compiler.is_compiling()


def padding_mask(attention_mask: torch.Tensor | None, kv_length: int, kv_offset: int) -> torch.Tensor | None:
    """The padding of all keys up to kv_offset + kv_length."""
    options = {"_slice": False} if "_slice" in inspect.signature(masking_utils.prepare_padding_mask).parameters else {}
    return masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset, **options)


def dense_mask(q_length: int, q_offset: Any, device: Any, **given: Any) -> torch.Tensor | None:
    """`sdpa_mask` of the installed version, under the newer arguments."""
    if TAKES_POSITIONS:
        positions = torch.arange(q_length, device=device) + q_offset
        return masking_utils.sdpa_mask(cache_position=positions, **given)
    newest: Callable = masking_utils.sdpa_mask  # its annotations leave out a tensor as q_offset
    return newest(q_length=q_length, q_offset=q_offset, device=device, **given)


def mask_of_known_pattern(**given: Any) -> torch.Tensor | None:
    """`dense_mask` of a mask function of transformers itself.

    The older form calls the function under vmap, which does not work below __torch_dispatch__. Here the indices are
    broadcast, as in the newer form.
    """
    if not TAKES_POSITIONS:
        return dense_mask(**given)
    names = ("batch_size", "q_length", "kv_length", "q_offset", "kv_offset", "device", "mask_function")
    batch, n_queries, n_keys, q_offset, kv_offset, device, function = (given[name] for name in names)
    padding = padding_mask(given["attention_mask"], n_keys, kv_offset)
    if padding is not None:
        function = masking_utils.and_masks(function, masking_utils.padding_mask_function(padding))
    rows, heads = torch.arange(batch, device=device), torch.arange(1, device=device)
    query = torch.arange(n_queries, device=device) + q_offset
    key = torch.arange(n_keys, device=device) + kv_offset
    mask = function(rows[:, None, None, None], heads[:, None, None], query[:, None], key)
    return mask.expand(batch, 1, n_queries, n_keys)


def for_installed_version(function: Callable) -> Callable:
    """A mask function with the newer arguments, in the form that the installed version calls."""
    if not TAKES_POSITIONS:
        return function

    def mask(*, cache_position, **given):
        # while a graph is traced, a number must not be read off a tensor
        offset = cache_position[0] if is_tracing(cache_position) else int(cache_position[0])
        return function(q_length=len(cache_position), q_offset=offset, device=cache_position.device, **given)

    return mask
