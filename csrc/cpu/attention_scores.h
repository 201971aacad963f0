#pragma once
// The operations on a tile of scores between the two products of attention: bounds, mask, bias, ALiBi, softcap,
// dropout. Scores are kept times log2(e), so that the softmax needs only 2^x and one FMA for its argument. With a bias,
// ALiBi or a sink, scores are kept unscaled: a value near FLT_MAX times log2(e) would be infinite, and scores that a
// large bias makes equal would be rounded to different values.
#include "attention_sequence.h"

namespace {

// The mask, bias and other features for one (batch, head), tile by tile. prepare() comes before the product, finish()
// after it.
class Scores {
 public:
  static constexpr int64_t kArena = 4 * kLanes * kKeys;

  static bool natural(const AttentionCpuArgs& args) { return args.bias.data || args.alibi_slopes || args.sink; }

  Scores(const AttentionCpuArgs& args, Arena& arena, bool backward)
      : args_(args),
        unit_(natural(args) ? 1.f : kLog2e),
        multiplier_(args.scale * unit_),
        add_(arena.take(kLanes * kKeys)),
        stage_(arena.take(kLanes * kKeys)),
        keep_(arena.take(kLanes * kKeys)),
        slope_of_cap_(arena.take(kLanes * kKeys)),
        backward_(backward) {}

  void select_head(const Sequence& sequence, int64_t head) {
    sequence_ = &sequence;
    const int64_t b = sequence.index;
    mask_ = args_.mask.data
                ? static_cast<const uint8_t*>(args_.mask.data) + b * args_.mask.batch + head * args_.mask.head
                : nullptr;
    bias_offset_ = b * args_.bias.batch + head * args_.bias.head;
    slope_ = args_.alibi_slopes ? args_.alibi_slopes[b * args_.alibi_batch + head] : 0.f;
    slab_ = static_cast<uint32_t>(b * args_.n_heads + head);
  }

  // The keys of [first, last) that at least one query of the block may see.
  KeyRange key_range(int64_t i0, int64_t rows, int64_t first, int64_t last) {
    const Sequence& s = *sequence_;
    KeyRange range{first, last < s.len_k ? last : s.len_k};
    if (args_.window_left >= 0 && i0 + s.off - args_.window_left > range.begin) {
      range.begin = i0 + s.off - args_.window_left;
    }
    if (args_.window_right >= 0 && i0 + rows + s.off + args_.window_right < range.end) {
      range.end = i0 + rows + s.off + args_.window_right;
    }
    range_ = range;
    return range;
  }

  // Reads mask and bias for queries from i0 and keys from j0. Returns false if they hide the whole tile.
  bool prepare(int64_t i0, int rows, int64_t j0, int keys) {
    i0_ = i0;
    j0_ = j0;
    const int64_t stands_at = i0 + sequence_->off;
    diagonal_ = args_.window_right >= 0 ? stands_at + args_.window_right - j0 : kKeys;
    edge_ = diagonal_ < keys - 1 || (args_.window_left >= 0 && j0 < stands_at + rows - 1 - args_.window_left);
    kind_ = Kind::kNone;
    seen_ = nullptr;
    if (!mask_ && !args_.bias.data) {
      return true;
    }
    const bool per_key = (!mask_ || args_.mask.row == 0) && (!args_.bias.data || args_.bias.row == 0);
    if (mask_ && !args_.bias.data && args_.mask.key == 1) {  // many tiles of a mask are all true
      int64_t visible = 0;
      const int distinct = per_key ? 1 : rows;
      for (int r = 0; r < distinct; ++r) {
        const uint8_t* row = mask_ + (i0 + r) * args_.mask.row + j0;
        int ones = 0;
        for (int j = 0; j < keys; ++j) {
          ones += row[j] != 0;
        }
        visible += ones;
      }
      if (visible == 0 || visible == int64_t{distinct} * keys) {
        return visible != 0;
      }
    }
    if (per_key) {
      bool some = false, all = true;
      additive_row(add_, i0, j0, keys);
      for (int j = 0; j < keys; ++j) {
        flags_[j] = !(add_[j] == -kInf);
        some |= flags_[j];
        all &= flags_[j];
      }
      kind_ = Kind::kPerKey;
      seen_ = all ? nullptr : flags_;
      return some;
    }
    if (adds_directly(i0, rows, j0, keys)) {
      kind_ = Kind::kDirect;
      return true;
    }
    additive_tile(i0, rows, j0, keys);
    kind_ = Kind::kTile;
    return find_seen(rows, keys);
  }

  // Lane x of the tile does not see the keys after number x + diagonal().
  int64_t diagonal() const { return diagonal_; }

  // The keys that at least one query of the tile sees, or null if all are seen. Valid after finish().
  const uint8_t* seen() const { return seen_; }
  const float* slope_of_cap() const { return slope_of_cap_; }

  // False if the product needs no further step, so that finish() can be skipped.
  bool finish_needed() const {
    return edge_ || kind_ != Kind::kNone || args_.softcap > 0 || slope_ != 0.f || multiplier_ <= 0;
  }
  float multiplier() const { return multiplier_; }

  // Turns raw products s[key][lane] into scores in their unit, -inf where hidden. Keys that no lane of a panel sees are
  // left unchanged.
  void finish(float* s, int keys, int lane_vecs) {
    const float cap = args_.softcap;
    if (kind_ == Kind::kDirect) {
      with_storage_type(args_.bias_dtype, [&](auto type) { multiply_and_add_bias<decltype(type)>(s); });
      if (slope_ == 0.f && !edge_) {
        return;
      }
    }
    const bool adds = kind_ == Kind::kPerKey || kind_ == Kind::kTile;
    const Vec multiplier = Vec::fill(kind_ == Kind::kDirect ? 1.f : cap > 0 ? args_.scale / cap : multiplier_);
    const Vec hidden = Vec::fill(-kInf);
    const int64_t stands_at = i0_ + sequence_->off;
    for (int r = 0; r < keys; ++r) {
      const int64_t j = j0_ + r;
      const float first = bound(args_.window_right >= 0 ? j - stands_at - args_.window_right : -1);
      const float last = bound(args_.window_left >= 0 ? j - stands_at + args_.window_left : kLanes);
      for (int x = first_lane(r, diagonal_) / kVec; x < lane_vecs; ++x) {
        float* at = s + r * kLanes + x * kVec;
        Vec product = Vec::load(at), factor = multiplier;
        if (cap > 0) {
          product = tanh(product * multiplier);
          factor = Vec::fill(cap * unit_);
          if (backward_) {
            fnma(product, product, Vec::fill(1.f)).store(slope_of_cap_ + r * kLanes + x * kVec);
          }
        }
        Vec score = product * factor;
        if (adds) {
          const float* add = add_ + (kind_ == Kind::kPerKey ? r : r * kLanes + x * kVec);
          score = add_or_hide(product, factor, kind_ == Kind::kPerKey ? Vec::fill(*add) : Vec::load(add));
        }
        if (slope_ != 0.f) {
          const Vec distance = lanes_from(static_cast<float>(stands_at - j + x * kVec));
          score = fnma(Vec::fill(slope_), abs(distance), score);
        }
        if (edge_) {
          const Vec lane = lanes_from(static_cast<float>(x * kVec));
          score = select(lane < Vec::fill(first), hidden, score);
          score = select(Vec::fill(last) < lane, hidden, score);
        }
        score.store(at);
      }
    }
  }

  // Returns the tile of dropout factors: 0 or dropout.scale.
  const float* keep(int keys, int lane_vecs) {
    for (int r = 0; r < keys;) {
      const int64_t j = j0_ + r;
      const int first = static_cast<int>(j % 8);
      const int count = 8 - first < keys - r ? 8 - first : keys - r;
      for (int x = 0; x < lane_vecs; ++x) {
        keep_group(keep_ + r * kLanes + x * kVec, static_cast<uint32_t>(j / 8), first, count,
                   static_cast<uint32_t>(i0_ + x * kVec), slab_, args_.dropout);
      }
      r += count;
    }
    return keep_;
  }

 private:
  // what mask and bias add: nothing, one number per key, the tile add_, or a bias that is read while it is added
  enum class Kind { kNone, kPerKey, kTile, kDirect };

  static float bound(int64_t lane) { return static_cast<float>(lane < -1 ? -1 : lane > kLanes ? kLanes : lane); }

  template <typename T>
  void bias_row(float* dst, int64_t i, int64_t j0, int keys) const {
    const ScoreTensor& t = args_.bias;
    const T* src = bias_at<T>(i, j0);
    if (t.key == 1) {
      widen_row(dst, src, keys, kKeys);
    } else {
      for (int j = 0; j < kKeys; ++j) {
        dst[j] = j < keys ? to_float(src[j * t.key]) : 0.f;
      }
    }
  }

  // This is always an FMA, so that the forward and the backward round a score the same way. A product that -inf hides
  // may be NaN.
  static Vec add_or_hide(Vec product, Vec factor, Vec add) {
    return select(add < Vec::fill(-kFloatMax), Vec::fill(-kInf), fma(product, factor, add));
  }

  // Whole tiles of a row-major bias need no copy. A tile whose first element is -inf may be hidden altogether, which
  // must be known before the product.
  bool adds_directly(int64_t i0, int rows, int64_t j0, int keys) const {
    const ScoreTensor& t = args_.bias;
    if (mask_ || args_.softcap > 0 || t.key != 1 || rows != kLanes || keys != kKeys) {
      return false;
    }
    float corner;
    with_storage_type(args_.bias_dtype, [&](auto type) { corner = to_float(*bias_at<decltype(type)>(i0, j0)); });
    return corner != -kInf;
  }

  template <typename T>
  const T* bias_at(int64_t i, int64_t j) const {
    return static_cast<const T*>(args_.bias.data) + bias_offset_ + i * args_.bias.row + j * args_.bias.key;
  }

  template <typename T>
  void multiply_and_add_bias(float* s) {
    const T* bias = bias_at<T>(i0_, j0_);
    const Vec multiplier = Vec::fill(multiplier_);
    Vec least = Vec::fill(0.f);
    const auto apply = [&](float* at, Vec add) __attribute__((always_inline)) {
      add_or_hide(Vec::load(at), multiplier, add).store(at);
      least = min(add, least);  // NaN leaves `least` unchanged
    };
    // Prefetches the next tile. Its short rows are too far apart for the hardware prefetcher.
    const int64_t to_next = j0_ + kKeys < range_.end ? kKeys : kLanes * args_.bias.row + range_.begin - j0_;
    constexpr int kSlots = kKeys * static_cast<int>(sizeof(T)) / static_cast<int>(sizeof(float));
    for (int r = 0; r < kLanes; r += kVec) {
      for (int slot = 0; slot < kSlots; slot += kVec) {
        Vec t[kVec];
        constexpr int kKeysOfSlot = kKeys / kSlots;
        const T* square = bias + r * args_.bias.row + slot * kKeysOfSlot;
        load_transposed(t, square, args_.bias.row);
        for (int x = 0; x < kVec; ++x) {
          __builtin_prefetch(square + x * args_.bias.row + to_next, 0, 2);
        }
#pragma GCC unroll 16
        for (int x = 0; x < kVec; ++x) {
          float* at = s + (slot + x) * kKeysOfSlot * kLanes + r;
          if constexpr (kKeysOfSlot == 1) {
            apply(at, t[x]);
          } else {
            Vec even, odd;
            t[x].template halves<T>(even, odd);
            apply(at, even);
            apply(at + kLanes, odd);
          }
        }
      }
    }
    if ((-least).max() == kInf) {
      additive_tile(i0_, kLanes, j0_, kKeys);
      find_seen(kLanes, kKeys);
    }
  }

  // Determines which keys the tile add_ shows. Returns false if none.
  bool find_seen(int rows, int keys) {
    bool some = false, all = true;
    for (int j = 0; j < keys; ++j) {
      Vec most = Vec::fill(-kInf);
      for (int x = 0; x < rows; x += kVec) {
        most = max(most, Vec::load(add_ + j * kLanes + x));
      }
      flags_[j] = !(most.max() == -kInf);
      some |= flags_[j];
      all &= flags_[j];
    }
    seen_ = all ? nullptr : flags_;
    return some;
  }

  void additive_tile(int64_t i0, int rows, int64_t j0, int keys) {
    for (int r = 0; r < rows; ++r) {
      additive_row(stage_ + r * kKeys, i0 + r, j0, keys);
    }
    const int width = static_cast<int>(round_up(rows, kVec));
    for (int r = rows; r < width; ++r) {
      for (int j = 0; j < kKeys; ++j) {
        stage_[r * kKeys + j] = -kInf;
      }
    }
    transpose(add_, kLanes, stage_, kKeys, width, keys);
  }

  // Writes what is added to the scores of query i and keys from j0: kKeys floats, -inf where the mask hides.
  void additive_row(float* dst, int64_t i, int64_t j0, int keys) const {
    if (!args_.bias.data) {
      zero(dst, kKeys);
    } else {
      with_storage_type(args_.bias_dtype, [&](auto type) { bias_row<decltype(type)>(dst, i, j0, keys); });
    }
    if (mask_) {
      const uint8_t* row = mask_ + i * args_.mask.row + j0 * args_.mask.key;
      for (int j = 0; j < keys; ++j) {
        dst[j] = row[j * args_.mask.key] ? dst[j] : -kInf;
      }
    }
  }

  const AttentionCpuArgs& args_;
  const Sequence* sequence_ = nullptr;
  const float unit_;  // the stored value of a score of 1
  const float multiplier_;
  float *add_, *stage_, *keep_, *slope_of_cap_;
  const bool backward_;
  const uint8_t* mask_ = nullptr;
  int64_t bias_offset_ = 0;
  float slope_ = 0.f;
  uint32_t slab_ = 0;
  KeyRange range_{};
  int64_t i0_ = 0, j0_ = 0, diagonal_ = kKeys;
  bool edge_ = false;
  Kind kind_ = Kind::kNone;
  const uint8_t* seen_ = nullptr;
  uint8_t flags_[kKeys];
};

}  // namespace
