"""flash_attn_with_kvcache: its cache, positions, rotary embedding, layouts and refused calls."""

import pytest
import torch
from attention_cases import normal

from fastattn import reference
from fastattn.integrations import flash_attn


def swapped(*tensors):
    return [t.transpose(1, 2) for t in tensors]


class TestKvCache:
    """A cache (3, 40, 2, 16) with 9, 0 and 25 valid keys, and queries on it, with grouped heads."""

    lengths = torch.tensor([9, 0, 25], dtype=torch.int32)

    def tensors(self, seqlen_q=3, seqlen_new=3, rows=3):
        q = normal(3, seqlen_q, 4, 16, seed=1).detach()
        caches = [normal(rows, 40, 2, 16, seed=seed).detach() for seed in (2, 3)]
        new = [normal(3, seqlen_new, 2, 16, seed=seed).detach() for seed in (4, 5)]
        return q, caches, new

    def expected(self, q, k_cache, v_cache, lengths, rows=range(3), leftpad=(0, 0, 0), causal=False, **options):
        """Sequence by sequence in fp64: `lengths` valid keys, including new ones, of which `leftpad` are hidden."""
        outs = []
        for b, (row, length, pad) in enumerate(zip(rows, lengths, leftpad, strict=True)):
            length = int(length)
            tensors = q[b, None], k_cache[row, None, :length], v_cache[row, None, :length]
            mask = (torch.arange(length) >= pad).expand(1, 1, q.shape[1], length)
            out, lse = reference.attention(
                *swapped(*(t.double() for t in tensors)), causal=causal, mask=mask, **options
            )
            outs.append((out.transpose(1, 2), lse))
        return [torch.cat(parts).float() for parts in zip(*outs, strict=True)]

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"causal": True},
            {"causal": True, "window": (4, 0), "softcap": 2.0, "scale": 0.3},
            {"window": (6, 1), "alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4])},
        ],
    )
    @pytest.mark.parametrize("append", [False, True])
    def test_values_and_the_cache_afterwards(self, append, options):
        q, (k_cache, v_cache), (k, v) = self.tensors()
        lengths = self.lengths + 3 * append
        wanted = [t.clone() for t in (k_cache, v_cache)]
        if append:
            for t, new in zip(wanted, (k, v), strict=True):
                for b, length in enumerate(self.lengths):
                    t[b, length : length + 3] = new[b]
        theirs = {"window": "window_size", "scale": "softmax_scale"}
        out, lse = flash_attn.flash_attn_with_kvcache(
            q, k_cache, v_cache, *((k, v) if append else ()), cache_seqlens=self.lengths, return_softmax_lse=True,
            **{theirs.get(name, name): value for name, value in options.items()},
        )  # fmt: skip
        expected, expected_lse = self.expected(q, *wanted, lengths, **options)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)
        assert out.is_contiguous()
        assert k_cache.equal(wanted[0])
        assert v_cache.equal(wanted[1])

    def test_lengths_may_be_an_int_or_none(self):
        q, caches, _ = self.tensors(rows=5)
        rows = torch.tensor([3, 1, 4], dtype=torch.int32)
        for given, lengths in ((7, [7] * 3), (None, [40] * 3)):
            out = flash_attn.flash_attn_with_kvcache(q, *caches, cache_seqlens=given, cache_batch_idx=rows, causal=True)
            expected = self.expected(q, *caches, lengths, rows.tolist(), causal=True)[0]
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)

    def test_rows_of_a_larger_cache_and_left_padding(self):
        q, caches, _ = self.tensors(rows=5)
        rows, pads = [4, 0, 2], [3, 0, 20]
        out = flash_attn.flash_attn_with_kvcache(
            q, *caches, cache_seqlens=self.lengths, causal=True, cache_batch_idx=torch.tensor(rows, dtype=torch.int32),
            cache_leftpad=torch.tensor(pads, dtype=torch.int32),
        )  # fmt: skip
        expected = self.expected(q, *caches, self.lengths, rows, pads, causal=True)[0]
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("num_splits", [0, 1, 3])
    def test_paged(self, num_splits):
        q, caches, new = self.tensors()
        table = torch.randperm(9, generator=torch.Generator().manual_seed(0)).view(3, 3).int()
        pages = []
        for cache in caches:
            pages.append(torch.empty(9, 16, 2, 16))
            for b in range(3):
                for n in range(3):
                    part = cache[b, 16 * n : 16 * n + 16]
                    pages[-1][table[b, n], : len(part)] = part
        arguments = {"cache_seqlens": self.lengths, "causal": True, "num_splits": num_splits}
        out = flash_attn.flash_attn_with_kvcache(q, *pages, *new, block_table=table, **arguments)
        expected = flash_attn.flash_attn_with_kvcache(q, *caches, *new, **arguments)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        whole = flash_attn.flash_attn_with_kvcache(q, *pages, block_table=table)  # all 48 positions count as valid
        assert whole.shape == q.shape

    def test_steps_equal_one_causal_call(self):
        q, k, v = (normal(2, 12, heads, 16, seed=n).detach() for n, heads in enumerate((4, 2, 2)))
        expected = flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(5, 0))
        caches = [torch.full((2, 12, 2, 16), torch.nan) for _ in range(2)]
        done = 0
        for step in (5, 1, 1, 2, 3):
            now = slice(done, done + step)
            out = flash_attn.flash_attn_with_kvcache(
                q[:, now], *caches, k[:, now], v[:, now], cache_seqlens=done, causal=True, window_size=(5, 0)
            )
            torch.testing.assert_close(out, expected[:, now], atol=1e-5, rtol=1e-5)
            done += step
        assert caches[0].equal(k)
        assert caches[1].equal(v)

    @pytest.mark.parametrize("interleaved", [False, True])
    @pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (30, -1)}])
    def test_rotary(self, options, interleaved):
        """Each query is rotated by its position, but all by cache_seqlens without causal and window."""
        q, caches, new = self.tensors()
        angles = torch.rand(40, 4, generator=torch.Generator().manual_seed(6)) * 6

        def rotated(t, steps):
            angle = angles[self.lengths[:, None] + steps][:, :, None]  # of rotary_dim 8, half of the head
            pairs = t[..., :8].unflatten(-1, (4, 2) if interleaved else (2, 4))
            x, y = pairs.unbind(-1 if interleaved else -2)
            turned = angle.cos() * x - angle.sin() * y, angle.sin() * x + angle.cos() * y
            return torch.cat((torch.stack(turned, -1 if interleaved else -2).flatten(-2), t[..., 8:]), -1)

        steps = torch.arange(3)
        new_rotated = rotated(new[0], steps), new[1]
        wanted = [t.clone() for t in caches]
        expected = flash_attn.flash_attn_with_kvcache(
            rotated(q, steps if options else torch.zeros_like(steps)), *wanted, *new_rotated,
            cache_seqlens=self.lengths, **options,
        )  # fmt: skip
        out = flash_attn.flash_attn_with_kvcache(
            q, *caches, *new, angles.cos(), angles.sin(), self.lengths, rotary_interleaved=interleaved, **options
        )
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(caches, wanted, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"q": torch.ones(3, 4, 16)}, ValueError, r"q must be \(batch, seqlen, heads, head_dim\)"),
            ({"v": None}, ValueError, "k and v must be given together, got only k"),
            ({"cache_seqlens": None}, ValueError, "k and v need cache_seqlens"),
            ({"rotary_cos": torch.ones(40, 8)}, ValueError, "rotary_cos and rotary_sin must be given together"),
            ({"rotary_cos": torch.ones(40, 8), "rotary_sin": torch.ones(40, 8), "k": None, "v": None}, ValueError,
             "need k and v"),
            ({"cache_seqlens": torch.tensor([9, 0, 38]).int()}, ValueError, r"cache_seqlens .* got \[9, 0, 38\]"),
            ({"cache_batch_idx": torch.tensor([0, 1, 1]).int()}, ValueError, "distinct"),
            ({"num_splits": -1}, ValueError, "num_splits"),
            ({"q": torch.ones(3, 3, 4, 16, requires_grad=True)}, RuntimeError, "no backward"),
        ],
    )  # fmt: skip
    def test_mistakes_are_named(self, change, error, message):
        q, (k_cache, v_cache), (k, v) = self.tensors()
        arguments = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v, "cache_seqlens": self.lengths}
        with pytest.raises(error, match=message):
            flash_attn.flash_attn_with_kvcache(**(arguments | change))
