#pragma once
// Attention forward. A task is a block of kLanes queries of one head. It visits its keys tile by tile.
//
//   s = K·Qᵀ,  m' = max(m, s),  alpha = e^(m - m'),  p = e^(s - m'),  l = l * alpha + sum p,  oᵀ = oᵀ * alpha + Vᵀ·p
//
// If scores are kept times log2(e), e^x becomes 2^x.
#include <cmath>

#include "attention_scores.h"

namespace {

// K or V as the left operand of a product over head_dim: read in place if possible, otherwise copied into slots.
template <typename T, bool kPairs>
Operand left_rows(const T* src, int64_t stride, int rows, int64_t cols, float* copy) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return {reinterpret_cast<const float*>(src), stride};
  }
  if (kPairs && cols % 2 == 0 && stride % 2 == 0) {
    return {reinterpret_cast<const float*>(src), stride / 2};
  }
  const int64_t ld = round_up(slots<kPairs>(cols), kVec);
  for (int r = 0; r < rows; ++r) {
    slot_row<kPairs>(copy + r * ld, src + r * stride, cols, ld);
  }
  return {copy, ld};
}

// K or V as the transposed left operand of a product over the keys.
template <typename T, bool kPairs>
Operand left_depth(const T* src, int64_t stride, int rows, int64_t cols, const uint8_t* seen, float* copy) {
  if (sizeof(T) == sizeof(float) && !seen) {
    return {reinterpret_cast<const float*>(src), stride};
  }
  const int64_t ld = round_up(cols, kVec);
  pack_depth<kPairs>(copy, ld, src, stride, rows, cols, seen);
  return {copy, ld};
}

// Adds one tile to the running softmax. The scores s become weights p (in place, or in slots of two rows with kPairs).
template <bool kPairs, bool kShort, bool kNatural>
inline void online_softmax(float* s, int all_keys, int64_t diagonal, int lane_vecs, float c, const float* keep,
                           float* p, float* m, float* l, float* alpha) {
  const Vec factor = Vec::fill(c);
  for (int x = 0; x < lane_vecs * kVec; x += kVec) {
    const int keys = keys_seen(x, diagonal, all_keys);
    if (keys == 0) {
      Vec::fill(1.f).store(alpha + x);
      continue;
    }
    Vec most = Vec::load(s + x), other = most;
    for (int r = 1; r + 1 < keys; r += 2) {
      most = max(most, Vec::load(s + r * kLanes + x));
      other = max(other, Vec::load(s + (r + 1) * kLanes + x));
    }
    most = max(max(most, other), Vec::load(s + (keys - 1) * kLanes + x));
    const Vec before = Vec::load(m + x);
    const Vec now = max(most * factor, before);
    now.store(m + x);
    const Vec base = select(now < Vec::fill(-kFloatMax), Vec::fill(0.f), now);
    const Vec rescale = exp2<kShort>(exponent_of_2<kNatural>(before - base));
    rescale.store(alpha + x);
    Vec sum = Vec::fill(0.f);
    const auto weight = [&](int r) {
      const Vec w = exp2<kShort>(exponent_of_2<kNatural>(fma(Vec::load(s + r * kLanes + x), factor, -base)));
      sum = sum + w;
      return keep ? w * Vec::load(keep + r * kLanes + x) : w;
    };
    if constexpr (kPairs) {
#if defined(__AVX512BF16__)
      for (int r = 0; r < keys; r += 2) {
        const Vec low = weight(r), high = r + 1 < keys ? weight(r + 1) : Vec::fill(0.f);
        _mm512_storeu_si512(p + r / 2 * kLanes + x, round_pairs(low, high));
      }
#endif
    } else {
      for (int r = 0; r < keys; ++r) {
        weight(r).store(p + r * kLanes + x);
      }
    }
    fma(Vec::load(l + x), rescale, sum).store(l + x);
  }
}

// lse = most + log(total), and the part of lse that fp32 loses if the maximum is large.
inline void store_lse(double most, float total, float* lse, float* low) {
  const float log_total = std::log(total);
  *lse = total == 0.f ? -kInf : static_cast<float>(most + log_total);
  if (low) {
    *low = total == 0.f ? 0.f : static_cast<float>(most - *lse + log_total);
  }
}

// The total of a row that sees a key is at least 1; otherwise it is 0.
constexpr float kLeastTotal = 1e-37f;

template <typename T, bool kPairs>
void forward(const AttentionCpuArgs& args) {
  const int64_t group = heads_per_key_head(args);
  const int64_t blocks = (args.seqlen_q + kLanes - 1) / kLanes;
  const int64_t tasks = args.batch * args.n_heads * blocks;
  const int64_t width = round_up(slots<kPairs>(args.head_dim), kVec), width_v = round_up(args.head_dim_v, kVec);
  const int64_t widest = width > width_v ? width : width_v;
  Arena arena(Scores::kArena + kLanes * (width + widest + 2 * width_v + 2 * kKeys + 3) + kKeys * (width + width_v));
  if (arena.failed()) {
    *args.failed = true;
    return;
  }
  Scores scores(args, arena, false);
  const bool natural = Scores::natural(args);
  constexpr bool kShort = sizeof(T) == 2;
  float* q_t = arena.take(kLanes * width);
  float* stage = arena.take(kLanes * widest);
  float* o_t = arena.take(kLanes * width_v);
  float* o_rows = arena.take(kLanes * width_v);
  float* s = arena.take(kLanes * kKeys);
  float* p = kPairs ? arena.take(kLanes * kKeys) : s;
  float* k_copy = arena.take(kKeys * width);
  float* v_copy = arena.take(kKeys * width_v);
  float *m = arena.take(kLanes), *l = arena.take(kLanes), *alpha = arena.take(kLanes);

  for (int64_t task; (task = next_task(args)) < tasks;) {
    const int64_t b = task / blocks / args.n_heads, h = task / blocks % args.n_heads;
    const int64_t i0 = (blocks - 1 - task % blocks) * kLanes;  // starts with the longest blocks if causal
    const Sequence sequence(args, b);
    if (i0 >= sequence.len_q) {
      continue;
    }
    const int rows = sequence.block_rows(i0);
    const int lane_vecs = (rows + kVec - 1) / kVec;
    scores.select_head(sequence, h);
    const T* k = sequence.rows<const T>(args.k, h / group, sequence.k_start);
    const T* v = sequence.rows<const T>(args.v, h / group, sequence.k_start);
    pack_lanes<kPairs>(q_t, sequence.rows<const T>(args.q, h, sequence.q_start + i0), args.q.row, rows, args.head_dim,
                       stage);
    for (int x = 0; x < kLanes; ++x) {
      m[x] = -kInf;
      l[x] = 0.f;
    }

    bool first = true;
    const KeyRange range = scores.key_range(i0, rows, 0, sequence.len_k);
    for (int64_t j0 = range.begin; j0 < range.end; j0 += kKeys) {
      const int keys = at_most(range.end - j0, kKeys);
      if (!scores.prepare(i0, rows, j0, keys)) {
        continue;
      }
      Operand left = left_rows<T, kPairs>(k + j0 * args.k.row, args.k.row, keys, args.head_dim, k_copy);
      product_into_scores<kPairs>(left.data, left.ld, q_t, slots<kPairs>(args.head_dim), s, keys, rows,
                                  scores.diagonal());
      float c = scores.multiplier();
      if (scores.finish_needed()) {
        scores.finish(s, keys, lane_vecs);
        c = 1.f;
      }
      const float* keep = args.dropout.rng ? scores.keep(keys, lane_vecs) : nullptr;
      if (natural) {
        online_softmax<kPairs, kShort, true>(s, keys, scores.diagonal(), lane_vecs, c, keep, p, m, l, alpha);
      } else {
        online_softmax<kPairs, kShort, false>(s, keys, scores.diagonal(), lane_vecs, c, keep, p, m, l, alpha);
      }
      left = left_depth<T, kPairs>(v + j0 * args.v.row, args.v.row, keys, args.head_dim_v, scores.seen(), v_copy);
      product_over_keys<kPairs>(left.data, left.ld, p, keys, o_t, args.head_dim_v, rows, scores.diagonal(),
                                first ? Start::kZero : Start::kScale, alpha);
      first = false;
    }
    if (first) {
      zero(o_t, kLanes * width_v);
    }

    // adds the sink to the denominator; out = oᵀ / l
    for (int x = 0; x < lane_vecs * kVec; x += kVec) {
      Vec most = Vec::load(m + x), total = Vec::load(l + x), scale = Vec::fill(1.f);
      if (args.sink) {
        const Vec sink = Vec::fill(args.sink[h]);
        const Vec now = max(most, sink);
        const Vec base = select(now < Vec::fill(-kFloatMax), Vec::fill(0.f), now);
        scale = exp2<false>(exponent_of_2<true>(most - base));
        total = fma(total, scale, exp2<false>(exponent_of_2<true>(sink - base)));
        most = now;
      }
      most.store(m + x);
      total.store(l + x);
      select(total < Vec::fill(kLeastTotal), Vec::fill(0.f), scale / total).store(alpha + x);
    }
    const int64_t lse_at = sequence.lse_offset(args, h) + i0;
    for (int r = 0; args.lse && r < rows; ++r) {
      store_lse(m[r] * (natural ? 1.0 : kLn2), l[r], args.lse + lse_at + r,
                args.lse_low ? args.lse_low + lse_at + r : nullptr);
    }
    for (int64_t d = 0; d < args.head_dim_v; ++d) {
      for (int x = 0; x < lane_vecs * kVec; x += kVec) {
        float* at = o_t + d * kLanes + x;
        (Vec::load(at) * Vec::load(alpha + x)).store(at);
      }
    }
    transpose(o_rows, width_v, o_t, kLanes, width_v, lane_vecs * kVec);
    T* out = sequence.rows<T>(args.out, h, sequence.q_start + i0);
    for (int r = 0; r < rows; ++r) {
      narrow_row(out + r * args.out.row, o_rows + r * width_v, args.head_dim_v);
    }
  }
}

}  // namespace
