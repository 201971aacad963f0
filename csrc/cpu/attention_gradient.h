#pragma once
// Shared by the passes of the attention backward: a packed block of queries, and the gradient of one tile of scores.
//
//   p = e^(s - lse),  ds = p ∘ (dp - delta),  with s = K·Qᵀ, dp = V·dOutᵀ
//
// lse is read in two parts. If it is large, one fp32 number has no digits left for the sum of the row, and the p of a
// row would not add up to 1.
#include "attention_fwd.h"

namespace {

// Writes fp32 rows (rows, width), times factor, as T.
template <typename T>
void store_rows(T* dst, int64_t stride, float* src, int64_t width, int rows, int64_t cols, float factor) {
  for (int r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; c += kVec) {
      (Vec::load(src + r * width + c) * Vec::fill(factor)).store(src + r * width + c);
    }
    narrow_row(dst + r * stride, src + r * width, cols);
  }
}

// dst += src * factor
inline void add_rows(float* dst, int64_t stride, const float* src, int64_t width, int rows, int64_t cols,
                     float factor) {
  for (int r = 0; r < rows; ++r) {
    float* to = dst + r * stride;
    const float* from = src + r * width;
    int64_t c = 0;
    for (; c + kVec <= cols; c += kVec) {
      fma(Vec::load(from + c), Vec::fill(factor), Vec::load(to + c)).store(to + c);
    }
    if (const int rest = static_cast<int>(cols - c)) {
      fma(Vec::load(from + c), Vec::fill(factor), Vec::load(to + c, rest)).store(to + c, rest);
    }
  }
}

template <typename T>
void zero_rows(T* dst, int64_t stride, int rows, int64_t cols) {
  for (int r = 0; r < rows; ++r) {
    std::memset(static_cast<void*>(dst + r * stride), 0, cols * sizeof(T));
  }
}

// A packed block of queries of one head. It is transposed for products over head_dim and in depth order for products
// over queries. It includes lse and delta = rowsum(dout ∘ out) - dlse. lse is high + low: high in the unit of the
// scores, low times log2(e). Lanes past the end have lse = inf, so their p is 0.
template <typename T, bool kPairs>
class QueryBlock {
 public:
  static int64_t floats(const AttentionCpuArgs& args) {
    const int64_t width = round_up(args.head_dim, kVec), width_v = round_up(args.head_dim_v, kVec);
    return kLanes * (2 * (width + width_v) + 3 + (width > width_v ? width : width_v));
  }

  QueryBlock(const AttentionCpuArgs& args, Arena& arena)
      : args_(args),
        width_(round_up(args.head_dim, kVec)),
        width_v_(round_up(args.head_dim_v, kVec)),
        q_t_(arena.take(kLanes * width_)),
        dout_t_(arena.take(kLanes * width_v_)),
        q_depth_(arena.take(kLanes * width_)),
        dout_depth_(arena.take(kLanes * width_v_)),
        lse_high_(arena.take(kLanes)),
        lse_low_(arena.take(kLanes)),
        delta_(arena.take(kLanes)),
        stage_(arena.take(kLanes * (width_ > width_v_ ? width_ : width_v_))) {}

  // Packs the block that begins at query i0.
  void load(const Sequence& sequence, int64_t h, int64_t i0, bool for_products_over_queries) {
    const int rows = sequence.block_rows(i0);
    const int64_t start = sequence.q_start + i0;
    q_ = sequence.rows<const T>(args_.q, h, start);
    dout_ = sequence.rows<const T>(args_.dout, h, start);
    const T* out = sequence.rows<const T>(args_.out, h, start);
    const int64_t lse_at = sequence.lse_offset(args_, h) + i0;
    pack_lanes<kPairs>(q_t_, q_, args_.q.row, rows, args_.head_dim, stage_);
    pack_lanes<kPairs>(dout_t_, dout_, args_.dout.row, rows, args_.head_dim_v, stage_);
    if (for_products_over_queries) {
      if (!direct(args_.head_dim)) {
        pack_depth<kPairs>(q_depth_, width_, q_, args_.q.row, rows, args_.head_dim, nullptr);
      }
      if (!direct(args_.head_dim_v)) {
        pack_depth<kPairs>(dout_depth_, width_v_, dout_, args_.dout.row, rows, args_.head_dim_v, nullptr);
      }
    }
    for (int r = 0; r < kLanes; ++r) {
      lse_high_[r] = kInf;
      lse_low_[r] = 0.f;
      delta_[r] = 0.f;
    }
    const bool natural = Scores::natural(args_);
    for (int r = 0; r < rows; ++r) {
      const float high = args_.lse[lse_at + r], low = args_.lse_low ? args_.lse_low[lse_at + r] : 0.f;
      if (natural && high != -kInf) {
        lse_high_[r] = high;
        lse_low_[r] = low * kLog2e;
      } else if (high != -kInf) {
        const double exact = (static_cast<double>(high) + low) / kLn2;
        lse_high_[r] = static_cast<float>(exact);
        lse_low_[r] = static_cast<float>(exact - lse_high_[r]);
      }
      const T *row_dout = dout_ + r * args_.dout.row, *row_out = out + r * args_.out.row;
      Vec sum = Vec::fill(0.f);
      int64_t d = 0;
      for (; d + kVec <= args_.head_dim_v; d += kVec) {
        sum = fma(Vec::load(row_dout + d), Vec::load(row_out + d), sum);
      }
      if (const int rest = static_cast<int>(args_.head_dim_v - d)) {
        sum = fma(Vec::load(row_dout + d, rest), Vec::load(row_out + d, rest), sum);
      }
      delta_[r] = sum.sum() - (args_.dlse ? args_.dlse[lse_at + r] : 0.f);
    }
  }

  const float* q_t() const { return q_t_; }
  const float* dout_t() const { return dout_t_; }
  const float* lse_high() const { return lse_high_; }
  const float* lse_low() const { return lse_low_; }
  const float* delta() const { return delta_; }

  // The right operand of a product over queries.
  Operand q_depth() const { return depth(q_, args_.q.row, args_.head_dim, q_depth_, width_); }
  Operand dout_depth() const { return depth(dout_, args_.dout.row, args_.head_dim_v, dout_depth_, width_v_); }

 private:
  static bool direct(int64_t cols) { return sizeof(T) == sizeof(float) && cols % kVec == 0; }
  static Operand depth(const T* rows, int64_t stride, int64_t cols, const float* packed, int64_t width) {
    return direct(cols) ? Operand{reinterpret_cast<const float*>(rows), stride} : Operand{packed, width};
  }

  const AttentionCpuArgs& args_;
  const int64_t width_, width_v_;
  const T *q_ = nullptr, *dout_ = nullptr;
  float *q_t_, *dout_t_, *q_depth_, *dout_depth_, *lse_high_, *lse_low_, *delta_, *stage_;
};

// p and ds of one tile. p includes dropout; ds does not include the slope of the softcap.
template <typename T, bool kPairs>
class TileGradient {
 public:
  static int64_t floats(const AttentionCpuArgs& args, int64_t keys) {
    const int64_t width = round_up(args.head_dim, kVec), width_v = round_up(args.head_dim_v, kVec);
    return 2 * kLanes * kKeys + copied(keys) * (width + width_v) + kKeys * width + 3 * kSlots;
  }

  // load_keys takes at most `keys` keys.
  TileGradient(const AttentionCpuArgs& args, Arena& arena, int64_t keys)
      : p(arena.take(kLanes * kKeys)),
        ds(arena.take(kLanes * kKeys)),
        args_(args),
        k_copy_(arena.take(copied(keys) * round_up(args.head_dim, kVec))),
        v_copy_(arena.take(copied(keys) * round_up(args.head_dim_v, kVec))),
        k_depth_(arena.take(kKeys * round_up(args.head_dim, kVec))),
        p_slots_(arena.take(kSlots)),
        ds_slots_(arena.take(kSlots)),
        ds_depth_(arena.take(kSlots)) {}

  void load_keys(const T* k, const T* v, int keys) {
    rows_k_ = k;
    k_ = left_rows<T, kPairs>(k, args_.k.row, keys, args_.head_dim, k_copy_);
    v_ = left_rows<T, kPairs>(v, args_.v.row, keys, args_.head_dim_v, v_copy_);
  }

  // Computes p and ds for a block and the loaded keys from number `skip` on. The caller must have called
  // scores.prepare() for these keys.
  void run(Scores& scores, const QueryBlock<T, kPairs>& block, int64_t skip, int keys, int rows) {
    const int lane_vecs = (rows + kVec - 1) / kVec;
    product_into_scores<kPairs>(k_.data + skip * k_.ld, k_.ld, block.q_t(), slots<kPairs>(args_.head_dim), p, keys,
                                rows, scores.diagonal());
    product_into_scores<kPairs>(v_.data + skip * v_.ld, v_.ld, block.dout_t(), slots<kPairs>(args_.head_dim_v), ds,
                                keys, rows, scores.diagonal());
    float c = scores.multiplier();
    if (scores.finish_needed()) {
      scores.finish(p, keys, lane_vecs);
      c = 1.f;
    }
    const float* keep = args_.dropout.rng ? scores.keep(keys, lane_vecs) : nullptr;
    if (Scores::natural(args_)) {
      weigh<true>(scores, block, c, keep, keys, lane_vecs);
    } else {
      weigh<false>(scores, block, c, keep, keys, lane_vecs);
    }
  }

  // Multiplies ds by the slope of the softcap.
  void multiply_by_slope_of_cap(const Scores& scores, int keys) {
    for (int r = 0; args_.softcap > 0 && r < keys; ++r) {
      for (int at = r * kLanes + first_lane(r, scores.diagonal()); at < (r + 1) * kLanes; at += kVec) {
        (Vec::load(ds + at) * Vec::load(scores.slope_of_cap() + at)).store(ds + at);
      }
    }
  }

  // dv += p·dout and dk += ds·q for the keys of run().
  void add_to_keys(const Scores& scores, const QueryBlock<T, kPairs>& block, int keys, int rows, float* dk,
                   int64_t width, float* dv, int64_t width_v) {
    Operand left = lanes_in_slots(p, keys, rows, p_slots_), right = block.dout_depth();
    product_over_lanes<kPairs>(left.data, left.ld, right.data, right.ld, rows, dv, width_v, keys, args_.head_dim_v,
                               scores.diagonal());
    left = lanes_in_slots(ds, keys, rows, ds_slots_), right = block.q_depth();
    product_over_lanes<kPairs>(left.data, left.ld, right.data, right.ld, rows, dk, width, keys, args_.head_dim,
                               scores.diagonal());
  }

  // dqᵀ += kᵀ·ds for the keys of run(), which start at number `skip`.
  void add_to_queries(const Scores& scores, int64_t skip, int keys, int rows, float* dq_t) {
    const float* right = ds;
    if constexpr (kPairs) {
#if defined(__AVX512BF16__)
      float *const tile_ds = ds, *const slots = ds_depth_;
      for (int r = 0; r < keys; r += 2) {
        for (int at = r * kLanes; at < r * kLanes + rows; at += kVec) {
          const Vec high = r + 1 < keys ? Vec::load(tile_ds + at + kLanes) : Vec::fill(0.f);
          _mm512_storeu_si512(slots + at - r / 2 * kLanes, round_pairs(Vec::load(tile_ds + at), high));
        }
      }
      right = slots;
#endif
    }
    Operand left{k_.data + skip * k_.ld, k_.ld};
    if (kPairs || scores.seen()) {
      left = left_depth<T, kPairs>(rows_k_ + skip * args_.k.row, args_.k.row, keys, args_.head_dim, scores.seen(),
                                   k_depth_);
    }
    product_over_keys<kPairs>(left.data, left.ld, right, keys, dq_t, args_.head_dim, rows, scores.diagonal(),
                              Start::kAdd);
  }

  float *p, *ds;

 private:
  static constexpr float kLeastFloat = 1e-45f;  // the smallest positive float
  static constexpr int64_t kSlots = kPairs ? kLanes * kKeys / 2 : 0;
  static int64_t copied(int64_t keys) { return sizeof(T) == sizeof(float) ? 0 : keys; }

  // The exponent of p: a score minus the high part of lse. It can exceed 0 only if lse comes from another backend,
  // which rounded the scores differently; if the bias is large, the excess can be large too, so it is clamped.
  template <bool kNatural>
  static Vec probability(Vec difference, Vec low) {
    constexpr bool kShort = sizeof(T) == 2;
    return kNatural ? exp2<kShort>(fma(min(Vec::fill(0.f), difference), Vec::fill(kLog2e), -low))
                    : exp2<kShort>(difference - low);
  }

  // Turns the scores in p and dp in ds into p and ds.
  template <bool kNatural>
  void weigh(const Scores& scores, const QueryBlock<T, kPairs>& block, float c, const float* keep, int keys,
             int lane_vecs) {
    float *const tile_p = p, *const tile_ds = ds;  // a vector store may alias a member, but not these locals
    for (int x = 0; x < lane_vecs * kVec; x += kVec) {
      const Vec factor = Vec::fill(c), high = Vec::load(block.lse_high() + x), low = Vec::load(block.lse_low() + x);
      const Vec delta = Vec::load(block.delta() + x);
      const int seen = keys_seen(x, scores.diagonal(), keys);
      for (int r = seen; r < keys; ++r) {
        Vec::fill(0.f).store(tile_p + r * kLanes + x);
        Vec::fill(0.f).store(tile_ds + r * kLanes + x);
      }
      for (int r = 0; r < seen; ++r) {
        float *at_p = tile_p + r * kLanes + x, *at_ds = tile_ds + r * kLanes + x;
        Vec weight = probability<kNatural>(fma(Vec::load(at_p), factor, -high), low), dp = Vec::load(at_ds);
        const Vec unkept = weight;
        if (keep) {
          const Vec kept = Vec::load(keep + r * kLanes + x);
          dp = dp * kept;
          weight = weight * kept;
        }
        weight.store(at_p);
        // If p is 0, dp may be anything, because it may come from a hidden key.
        select(unkept < Vec::fill(kLeastFloat), Vec::fill(0.f), unkept * (dp - delta)).store(at_ds);
      }
    }
  }

  // A tile [key][lane] as the left operand of a product over lanes.
  static Operand lanes_in_slots(const float* tile, int keys, int rows, float* copy) {
    if constexpr (kPairs) {
#if defined(__AVX512BF16__)
      constexpr int64_t ld = kLanes / 2;
      for (int r = 0; r < keys; ++r) {
        for (int x = 0; x < rows; x += kVec) {
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(copy + r * ld + x / 2),
                              reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(Vec::load(tile + r * kLanes + x).v)));
        }
      }
      return {copy, ld};
#endif
    }
    return {tile, kLanes};
  }

  const AttentionCpuArgs& args_;
  float *k_copy_, *v_copy_, *k_depth_, *p_slots_, *ds_slots_, *ds_depth_;
  const T* rows_k_ = nullptr;
  Operand k_{}, v_{};
};

}  // namespace
