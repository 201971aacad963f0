"""Functions of rotary application as other people write them, and a count of the calls that our op serves."""

import torch

from fastattn.drop_in import rotary_forms
from fastattn.ops.rotary import rotate_tokens


def turn_half(x):
    low, high = x.chunk(2, -1)
    return torch.cat((-high, low), -1)


def turn_neighbours(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def apply_rotary(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + turn_half(q) * sin, k * cos + turn_half(k) * sin


def apply_rotary_to_a_part(q, k, cos, sin):
    n = cos.shape[-1]
    turned = apply_rotary(q[..., :n], k[..., :n], cos, sin)
    return tuple(torch.cat([t, x[..., n:]], -1) for t, x in zip(turned, (q, k), strict=True))


def apply_rotary_interleaved(q, k, cos, sin):
    cos, sin = cos[:, None].float(), sin[:, None].float()
    return tuple((x.float() * cos + turn_neighbours(x.float()) * sin).to(x.dtype) for x in (q, k))


def apply_rotary_of_half_tables(q, k, cos, sin):
    return apply_rotary(q, k, torch.cat([cos, cos], -1), torch.cat([sin, sin], -1))


def apply_rotary_packed(q, k, cos, sin):
    return apply_rotary(q, k, cos, sin, unsqueeze_dim=-2)


def apply_rotary_backwards(q, k, cos, sin):
    return apply_rotary(q, k, cos, -sin)


def apply_rotary_of_first_half(q, k, cos, sin):
    """As GLM has it."""
    half = cos.shape[-1] // 2
    cos, sin = (t[:, None, :, :half].repeat_interleave(2, -1) for t in (cos, sin))
    return q * cos + turn_neighbours(q) * sin, k * cos + turn_neighbours(k) * sin


def apply_rotary_and_sort(q, k, cos, sin):
    """As DeepSeek V3 has it."""
    turned = apply_rotary_of_first_half(q, k, cos, sin)
    return tuple(torch.cat([t[..., ::2], t[..., 1::2]], -1) for t in turned)


def apply_rotary_to_one(tensor, sin, cos):
    """As GPT-J has it."""
    cos, sin = (t[:, :, None].repeat_interleave(2, -1) for t in (cos, sin))
    return tensor * cos + turn_neighbours(tensor) * sin


def apply_rotary_by_broadcast(x, cos, sin):
    """As modules have it whose tables are (1, tokens, 1, pairs)."""
    low, high = x.chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


def apply_rotary_complex(xq, xk, freqs_cis):
    """As Llama 4 has it."""
    complex_numbers = (torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) for x in (xq, xk))
    turned = (torch.view_as_real(x * freqs_cis[:, :, None]).flatten(-2) for x in complex_numbers)
    return tuple(t.type_as(x) for t, x in zip(turned, (xq, xk), strict=True))


def apply_rotary_and_scale(q, k, cos, sin):
    q, k = apply_rotary(q, k, cos, sin)
    return 2 * q, k


def apply_rotary_detached(q, k, cos, sin):
    return tuple(t.detach() for t in apply_rotary(q, k, cos, sin))


def apply_rotary_in_eight_bits(q, k, cos, sin):
    """Right in fp32; in bfloat16 it rounds to fewer bits."""
    out = apply_rotary(q, k, cos, sin)
    return out if q.dtype == torch.float32 else tuple(t.to(torch.float8_e5m2).to(q.dtype) for t in out)


def apply_rotary_to_many(q, k, cos, sin):
    return apply_rotary(q, k, cos, sin) if q.shape[2] > 1 else (q, k)


def apply_rotary_on_a_gpu(q, k, cos, sin):
    raise RuntimeError("q must be on a GPU")


def apply_rotary_to_q(x, cos, sin):
    return x * cos + turn_half(x) * sin


SERVED = (
    apply_rotary,
    apply_rotary_to_a_part,
    apply_rotary_interleaved,
    apply_rotary_of_half_tables,
    apply_rotary_packed,
    apply_rotary_backwards,
    apply_rotary_of_first_half,
    apply_rotary_and_sort,
    apply_rotary_to_one,
    apply_rotary_by_broadcast,
    apply_rotary_complex,
    apply_rotary_to_q,
)


def count_calls(monkeypatch):
    """The calls of our op, without those of the checks, which run once."""
    for function in SERVED:
        rotary_forms.forms_of(function)
    found = []

    def counted(*args, **kwargs):
        found.append(args)
        return rotate_tokens(*args, **kwargs)

    monkeypatch.setattr(rotary_forms, "rotate_tokens", counted)
    return found
