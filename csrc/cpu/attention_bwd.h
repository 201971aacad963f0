#pragma once
// Attention backward. It visits the keys piece by piece, for each piece all blocks of queries, for each block the tiles
// of the piece, five products each; dK and dV of a piece and dQᵀ of a block over a piece are summed in fp32. One task
// is all pieces of one key head, or a single piece where heads are few. No order depends on threads.
//
//   p = 2^(s - lse),  ds = p ∘ (dp - delta),  dV += p·dO,  dK += ds·Q,  dQᵀ += Kᵀ·ds,  with s = K·Qᵀ, dp = V·dOᵀ
//
// dQ of a block is the sum over the pieces that it sees, in their order. In fp32 it is summed where it ends up, and
// tasks of one piece wait for their turn. In 16 bits a task of all pieces sums it in fp32 of its own; tasks of one
// piece leave it to query_gradient, which makes p and ds again. So where heads are few no buffer grows with seqlen, and
// elsewhere none exceeds one head per thread.
#include <thread>

#include "attention_fwd.h"

namespace {

using fastattn::kAttentionPieceKeys;

inline int block_rows(const Sequence& sequence, int64_t i0) {
  return static_cast<int>(sequence.len_q - i0 < kLanes ? sequence.len_q - i0 : kLanes);
}

// A block of queries of one head, packed: transposed for the products over head_dim, in depth order for those over
// queries, with lse and delta = rowsum(do ∘ out) - dlse. Lanes past the end have lse inf, so that their p is 0.
template <typename T, bool kPairs>
class QueryBlock {
 public:
  static int64_t floats(const AttentionArgs& args) {
    const int64_t width = round_up(args.head_dim, kVec), width_v = round_up(args.head_dim_v, kVec);
    return kLanes * (2 * (width + width_v + 1) + (width > width_v ? width : width_v));
  }

  QueryBlock(const AttentionArgs& args, Arena& arena)
      : args_(args),
        width_(round_up(args.head_dim, kVec)),
        width_v_(round_up(args.head_dim_v, kVec)),
        q_t_(arena.take(kLanes * width_)),
        do_t_(arena.take(kLanes * width_v_)),
        q_depth_(arena.take(kLanes * width_)),
        do_depth_(arena.take(kLanes * width_v_)),
        lse_(arena.take(kLanes)),
        delta_(arena.take(kLanes)),
        stage_(arena.take(kLanes * (width_ > width_v_ ? width_ : width_v_))) {}

  // Pack the block that begins at query i0.
  void load(const Sequence& sequence, int64_t h, int64_t i0, bool for_products_over_queries) {
    const int rows = block_rows(sequence, i0);
    const int64_t start = sequence.q_start + i0;
    q_ = sequence.rows<const T>(args_.q, h, start);
    do_ = sequence.rows<const T>(args_.dout, h, start);
    const T* out = sequence.rows<const T>(args_.out, h, start);
    const int64_t lse_at = sequence.lse_offset(args_, h) + i0;
    pack_lanes<kPairs>(q_t_, q_, args_.q.row, rows, args_.head_dim, stage_);
    pack_lanes<kPairs>(do_t_, do_, args_.dout.row, rows, args_.head_dim_v, stage_);
    if (for_products_over_queries) {
      if (!direct(args_.head_dim)) {
        pack_depth<kPairs>(q_depth_, width_, q_, args_.q.row, rows, args_.head_dim, nullptr);
      }
      if (!direct(args_.head_dim_v)) {
        pack_depth<kPairs>(do_depth_, width_v_, do_, args_.dout.row, rows, args_.head_dim_v, nullptr);
      }
    }
    for (int r = 0; r < kLanes; ++r) {
      lse_[r] = kInf;
      delta_[r] = 0.f;
    }
    for (int r = 0; r < rows; ++r) {
      const float value = args_.lse[lse_at + r];
      lse_[r] = value == -kInf ? kInf : value * kLog2e;
      const T *row_do = do_ + r * args_.dout.row, *row_out = out + r * args_.out.row;
      Vec sum = Vec::fill(0.f);
      int64_t d = 0;
      for (; d + kVec <= args_.head_dim_v; d += kVec) {
        sum = fma(Vec::load(row_do + d), Vec::load(row_out + d), sum);
      }
      if (const int rest = static_cast<int>(args_.head_dim_v - d)) {
        sum = fma(Vec::load(row_do + d, rest), Vec::load(row_out + d, rest), sum);
      }
      delta_[r] = sum.sum() - (args_.dlse ? args_.dlse[lse_at + r] : 0.f);
    }
  }

  const float* q_t() const { return q_t_; }
  const float* do_t() const { return do_t_; }
  const float* lse() const { return lse_; }
  const float* delta() const { return delta_; }

  // The right operand of a product over queries.
  const float* q_depth(int64_t& ld) const { return depth(q_, args_.q.row, args_.head_dim, q_depth_, width_, ld); }
  const float* do_depth(int64_t& ld) const {
    return depth(do_, args_.dout.row, args_.head_dim_v, do_depth_, width_v_, ld);
  }

 private:
  static bool direct(int64_t cols) { return sizeof(T) == sizeof(float) && cols % kVec == 0; }
  static const float* depth(const T* rows, int64_t stride, int64_t cols, const float* packed, int64_t width,
                            int64_t& ld) {
    if (direct(cols)) {
      ld = stride;
      return reinterpret_cast<const float*>(rows);
    }
    ld = width;
    return packed;
  }

  const AttentionArgs& args_;
  const int64_t width_, width_v_;
  const T *q_ = nullptr, *do_ = nullptr;
  float *q_t_, *do_t_, *q_depth_, *do_depth_, *lse_, *delta_, *stage_;
};

// p and ds of one tile: p with dropout, ds before the slope of the cap.
template <typename T, bool kPairs>
class TileGradient {
 public:
  static int64_t floats(const AttentionArgs& args, int64_t keys) {
    const int64_t width = round_up(args.head_dim, kVec), width_v = round_up(args.head_dim_v, kVec);
    return 2 * kLanes * kKeys + copied(keys) * (width + width_v) + kKeys * width + 3 * kSlots;
  }

  // load_keys takes at most `keys`
  TileGradient(const AttentionArgs& args, Arena& arena, int64_t keys)
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
    k_ = left_rows<T, kPairs>(k, args_.k.row, keys, args_.head_dim, k_copy_, ldk_);
    v_ = left_rows<T, kPairs>(v, args_.v.row, keys, args_.head_dim_v, v_copy_, ldv_);
  }

  // Keys skip.. of the loaded ones against a block; scores.prepare() has been called for them.
  void run(Scores& scores, const QueryBlock<T, kPairs>& block, int64_t skip, int keys, int rows) {
    const int lane_vecs = (rows + kVec - 1) / kVec;
    product<kPairs, false>(k_ + skip * ldk_, ldk_, block.q_t(), kLanes, slots<kPairs>(args_.head_dim), p, kLanes, keys,
                           rows, Start::kZero);
    product<kPairs, false>(v_ + skip * ldv_, ldv_, block.do_t(), kLanes, slots<kPairs>(args_.head_dim_v), ds, kLanes,
                           keys, rows, Start::kZero);
    float c = scores.multiplier();
    if (scores.finish_needed()) {
      scores.finish(p, keys, lane_vecs);
      c = 1.f;
    }
    const float* keep = args_.dropout.rng ? scores.keep(keys, lane_vecs) : nullptr;
    for (int x = 0; x < lane_vecs * kVec; x += kVec) {
      const Vec factor = Vec::fill(c), base = -Vec::load(block.lse() + x), delta = Vec::load(block.delta() + x);
      for (int r = 0; r < keys; ++r) {
        float *at_p = p + r * kLanes + x, *at_ds = ds + r * kLanes + x;
        Vec weight = exp2<kPairs>(fma(Vec::load(at_p), factor, base)), dp = Vec::load(at_ds);
        const Vec unkept = weight;
        if (keep) {
          const Vec kept = Vec::load(keep + r * kLanes + x);
          dp = dp * kept;
          weight = weight * kept;
        }
        weight.store(at_p);
        // where p is 0, dp may be anything: the value of a key that is not seen
        select(unkept < Vec::fill(1e-45f), Vec::fill(0.f), unkept * (dp - delta)).store(at_ds);
      }
    }
  }

  // ds past the cap
  void multiply_by_slope_of_cap(const Scores& scores, int keys) {
    for (int64_t at = 0; args_.softcap > 0 && at < keys * kLanes; at += kVec) {
      (Vec::load(ds + at) * Vec::load(scores.slope_of_cap() + at)).store(ds + at);
    }
  }

  // dv += p·do, dk += ds·q for the keys of run()
  void add_to_keys(const QueryBlock<T, kPairs>& block, int keys, int rows, float* dk, int64_t width, float* dv,
                   int64_t width_v) {
    int64_t ld_left, ld;
    const float* right = block.do_depth(ld);
    const float* left = lanes_in_slots(p, keys, rows, p_slots_, ld_left);
    product<kPairs, false>(left, ld_left, right, ld, slots<kPairs>(rows), dv, width_v, keys, args_.head_dim_v,
                           Start::kAdd);
    right = block.q_depth(ld);
    left = lanes_in_slots(ds, keys, rows, ds_slots_, ld_left);
    product<kPairs, false>(left, ld_left, right, ld, slots<kPairs>(rows), dk, width, keys, args_.head_dim, Start::kAdd);
  }

  // dqᵀ += kᵀ·ds for the keys skip.. of run()
  void add_to_queries(const Scores& scores, int64_t skip, int keys, int rows, float* dq_t) {
    const float* right = ds;
    if constexpr (kPairs) {
#if defined(__AVX512BF16__)
      for (int r = 0; r < keys; r += 2) {
        for (int at = r * kLanes; at < r * kLanes + rows; at += kVec) {
          const Vec high = r + 1 < keys ? Vec::load(ds + at + kLanes) : Vec::fill(0.f);
          _mm512_storeu_si512(ds_depth_ + at - r / 2 * kLanes, round_pairs(Vec::load(ds + at), high));
        }
      }
      right = ds_depth_;
#endif
    }
    int64_t ld = ldk_;
    const float* left = k_ + skip * ldk_;
    if (kPairs || scores.seen()) {
      left = left_depth<T, kPairs>(rows_k_ + skip * args_.k.row, args_.k.row, keys, args_.head_dim, scores.seen(),
                                   k_depth_, ld);
    }
    product<kPairs, true>(left, ld, right, kLanes, slots<kPairs>(keys), dq_t, kLanes, args_.head_dim, rows,
                          Start::kAdd);
  }

  float *p, *ds;

 private:
  static constexpr int64_t kSlots = kPairs ? kLanes * kKeys / 2 : 0;
  static int64_t copied(int64_t keys) { return sizeof(T) == sizeof(float) ? 0 : keys; }

  // A tile [key][lane] as the left operand of a product over lanes.
  static const float* lanes_in_slots(const float* tile, int keys, int rows, float* copy, int64_t& ld) {
    ld = kLanes;
    if constexpr (kPairs) {
#if defined(__AVX512BF16__)
      ld = kLanes / 2;
      for (int r = 0; r < keys; ++r) {
        for (int x = 0; x < rows; x += kVec) {
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(copy + r * ld + x / 2),
                              reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(Vec::load(tile + r * kLanes + x).v)));
        }
      }
      return copy;
#endif
    }
    return tile;
  }

  const AttentionArgs& args_;
  float *k_copy_, *v_copy_, *k_depth_, *p_slots_, *ds_slots_, *ds_depth_;
  const T* rows_k_ = nullptr;
  const float *k_ = nullptr, *v_ = nullptr;
  int64_t ldk_ = 0, ldv_ = 0;
};

// ds[key][lane] of a tile -> rows of dbias; with `add` (fp32 only) to what is there
template <typename T>
void store_dbias(const fastattn::ScoreTensor& t, int64_t offset, const float* ds, int64_t i0, int rows, int64_t j0,
                 int keys, float* stage, bool add) {
  transpose(stage, kKeys, ds, kLanes, round_up(keys, kVec), round_up(rows, kVec));
  for (int r = 0; r < rows; ++r) {
    T* dst = static_cast<T*>(const_cast<void*>(t.data)) + offset + (i0 + r) * t.row + j0;
    if constexpr (sizeof(T) == sizeof(float)) {
      for (int j = 0; add && j < keys; ++j) {
        stage[r * kKeys + j] += dst[j];
      }
    }
    narrow_row(dst, stage + r * kKeys, keys);
  }
}

inline void store_dbias(const AttentionArgs& args, int64_t offset, const float* ds, int64_t i0, int rows, int64_t j0,
                        int keys, float* stage, bool add) {
  if (args.bias_dtype == DType::kFloat32) {
    store_dbias<float>(args.dbias, offset, ds, i0, rows, j0, keys, stage, add);
  } else if (args.bias_dtype == DType::kBFloat16) {
    store_dbias<BF16>(args.dbias, offset, ds, i0, rows, j0, keys, stage, add);
  } else {
    store_dbias<FP16>(args.dbias, offset, ds, i0, rows, j0, keys, stage, add);
  }
}

inline void zero_dbias(const AttentionArgs& args, int64_t offset, int64_t i0, int rows, int64_t j0, int64_t keys) {
  const int64_t size = args.bias_dtype == DType::kFloat32 ? 4 : 2;
  for (int r = 0; r < rows; ++r) {
    std::memset(
        static_cast<char*>(const_cast<void*>(args.dbias.data)) + (offset + (i0 + r) * args.dbias.row + j0) * size, 0,
        keys * size);
  }
}

// fp32 rows (rows, width) times factor -> T
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

template <typename T, bool kPairs>
void backward(const AttentionArgs& args) {
  constexpr bool kInPlace = sizeof(T) == sizeof(float);
  const int64_t group = args.n_heads / (args.n_kv_heads ? args.n_kv_heads : 1);
  const int64_t blocks = (args.seqlen_q + kLanes - 1) / kLanes;
  const int64_t pieces =
      args.seqlen_k > kAttentionPieceKeys ? (args.seqlen_k + kAttentionPieceKeys - 1) / kAttentionPieceKeys : 1;
  const int64_t piece_keys = pieces > 1 ? kAttentionPieceKeys : round_up(args.seqlen_k, kKeys);
  const int64_t width = round_up(args.head_dim, kVec), width_v = round_up(args.head_dim_v, kVec);
  const int64_t kept = group > 1 && !args.split ? pieces : 1;  // whose dk and dv wait for further heads
  const bool makes_dq = kInPlace || !args.split;
  const int64_t dq_sum_rows = makes_dq && !kInPlace ? blocks * kLanes : 0;
  Arena arena(Scores::kArena + QueryBlock<T, kPairs>::floats(args) + TileGradient<T, kPairs>::floats(args, piece_keys) +
              dq_sum_rows * width + kept * piece_keys * (width + width_v) + 2 * kLanes * width + kLanes * kKeys);
  if (arena.failed()) {
    *args.failed = true;
    return;
  }
  Scores scores(args, arena, true);
  QueryBlock<T, kPairs> block(args, arena);
  TileGradient<T, kPairs> tile(args, arena, piece_keys);
  [[maybe_unused]] float* dq_sum = arena.take(dq_sum_rows * width);
  float* dk = arena.take(kept * piece_keys * width);
  float* dv = arena.take(kept * piece_keys * width_v);
  float* dq_t = arena.take(kLanes * width);
  float* dq_rows = arena.take(kLanes * width);
  float* stage = arena.take(kLanes * kKeys);

  const bool direct_dbias = args.dbias.data && args.dbias_from != AttentionArgs::DbiasFrom::kOwnPass;
  // a dbias that the sequences of a batch share is summed in their order by one task
  const int64_t batch_of_task = args.dbias_from == AttentionArgs::DbiasFrom::kWholeBatch ? args.batch : 1;
  const int64_t slabs = args.batch / batch_of_task * args.n_kv_heads;
  for (int64_t n = 0, task = 0;; ++n) {
    if (n % batch_of_task == 0 &&
        (task = args.next->fetch_add(1, std::memory_order_relaxed)) >= slabs * (args.split ? pieces : 1)) {
      break;
    }
    // the tasks of a piece come before those of the next: whoever waits for a turn waits for a task that has begun
    const int64_t kv = task % slabs % args.n_kv_heads, b = task % slabs / args.n_kv_heads + n % batch_of_task;
    const int64_t first_piece = task / slabs, last_piece = args.split ? first_piece : pieces - 1;
    const bool first_of_task = n % batch_of_task == 0;
    const Sequence sequence(args, b);
    const T* k = sequence.rows<const T>(args.k, kv, sequence.k_start);
    const T* v = sequence.rows<const T>(args.v, kv, sequence.k_start);
    // rows of dk and dv past seqlens_k are written too, as zeros
    const int64_t stored = args.cu_seqlens_k ? args.cu_seqlens_k[b + 1] - sequence.k_start : args.seqlen_k;

    for (int64_t g = 0; g < group; ++g) {
      const int64_t h = kv * group + g;
      const int64_t dbias_offset = b * args.dbias.batch + h * args.dbias.head;
      float dsink = 0.f;
      scores.select_head(sequence, h);
      for (int64_t piece = first_piece; piece <= last_piece; ++piece) {
        const int64_t first_key = piece * kAttentionPieceKeys;
        const int64_t last_key = first_key + kAttentionPieceKeys < stored ? first_key + kAttentionPieceKeys : stored;
        const int64_t end_key = last_key < sequence.len_k ? last_key : sequence.len_k;
        const int stored_keys = static_cast<int>(last_key > first_key ? last_key - first_key : 0);
        if (piece > 0 && stored_keys == 0) {
          break;
        }
        float* dk_piece = dk + (kept > 1 ? piece * piece_keys * width : 0);
        float* dv_piece = dv + (kept > 1 ? piece * piece_keys * width_v : 0);
        if (g == 0) {
          zero(dk_piece, stored_keys * width);
          zero(dv_piece, stored_keys * width_v);
        }
        if (first_key < end_key) {
          tile.load_keys(k + first_key * args.k.row, v + first_key * args.v.row, static_cast<int>(end_key - first_key));
        }
        for (int64_t i0 = 0; i0 < sequence.len_q; i0 += kLanes) {
          const int rows = block_rows(sequence, i0);
          int64_t begin, end;
          scores.key_range(i0, rows, begin, end);
          // the piece that begins the sum of dq; the first one if the block sees no key
          const int64_t starts_dq = begin < end ? begin / kAttentionPieceKeys : 0;
          begin = begin > first_key ? begin : first_key;
          end = end < end_key ? end : end_key;
          if (direct_dbias && first_of_task) {
            const int64_t split = begin < end ? begin : last_key;
            zero_dbias(args, dbias_offset, i0, rows, first_key, split - first_key);
            zero_dbias(args, dbias_offset, i0, rows, begin < end ? end : last_key, begin < end ? last_key - end : 0);
          }
          [[maybe_unused]] T* dq = sequence.rows<T>(args.dq, h, sequence.q_start + i0);
          if (makes_dq && piece == starts_dq) {
            if constexpr (kInPlace) {
              zero_rows(dq, args.dq.row, rows, args.head_dim);
            } else {
              zero(dq_sum + i0 * width, rows * width);
            }
          }
          if (args.dsink_partial && piece == 0) {
            block.load(sequence, h, i0, begin < end);
            for (int r = 0; r < rows; ++r) {
              dsink -= std::exp2(args.sink[h] * kLog2e - block.lse()[r]) * block.delta()[r];
            }
          } else if (begin < end) {
            block.load(sequence, h, i0, true);
          }
          if (begin >= end) {
            continue;
          }
          zero(dq_t, kLanes * width);
          for (int64_t j0 = begin; j0 < end; j0 += kKeys) {
            const int keys = static_cast<int>(end - j0 < kKeys ? end - j0 : kKeys);
            const int64_t skip = j0 - first_key;
            if (!scores.prepare(i0, rows, j0, keys)) {
              if (direct_dbias && first_of_task) {
                zero_dbias(args, dbias_offset, i0, rows, j0, keys);
              }
              continue;
            }
            tile.run(scores, block, skip, keys, rows);
            if (direct_dbias) {
              store_dbias(args, dbias_offset, tile.ds, i0, rows, j0, keys, stage, !first_of_task);
            }
            tile.multiply_by_slope_of_cap(scores, keys);
            tile.add_to_keys(block, keys, rows, dk_piece + skip * width, width, dv_piece + skip * width_v, width_v);
            if (makes_dq) {
              tile.add_to_queries(scores, skip, keys, rows, dq_t);
            }
          }
          if (!makes_dq) {
            continue;
          }
          transpose(dq_rows, width, dq_t, kLanes, width, round_up(rows, kVec));
          if constexpr (kInPlace) {
            std::atomic<int32_t>* turn =
                args.split ? args.dq_turns + (b * args.n_heads + h) * blocks + i0 / kLanes : nullptr;
            while (turn && turn->load(std::memory_order_acquire) != piece - starts_dq) {
              std::this_thread::yield();
            }
            add_rows(dq, args.dq.row, dq_rows, width, rows, args.head_dim, args.scale);
            if (turn) {
              turn->store(static_cast<int32_t>(piece - starts_dq + 1), std::memory_order_release);
            }
          } else {
            add_rows(dq_sum + i0 * width, width, dq_rows, width, rows, width, 1.f);
          }
        }
        if (g == group - 1) {
          store_rows(sequence.rows<T>(args.dk, kv, sequence.k_start + first_key), args.dk.row, dk_piece, width,
                     stored_keys, args.head_dim, args.scale);
          store_rows(sequence.rows<T>(args.dv, kv, sequence.k_start + first_key), args.dv.row, dv_piece, width_v,
                     stored_keys, args.head_dim_v, 1.f);
        }
      }
      if (args.dsink_partial && first_piece == 0) {
        args.dsink_partial[b * args.n_heads + h] = dsink;
      }
      if (makes_dq && !kInPlace) {
        store_rows(sequence.rows<T>(args.dq, h, sequence.q_start), args.dq.row, dq_sum, width,
                   static_cast<int>(sequence.len_q), args.head_dim, args.scale);
      }
    }
  }
}

// dq in a pass of its own: one task is a block of queries of one head.
template <typename T, bool kPairs>
void query_gradient(const AttentionArgs& args) {
  const int64_t group = args.n_heads / (args.n_kv_heads ? args.n_kv_heads : 1);
  const int64_t blocks = (args.seqlen_q + kLanes - 1) / kLanes, tasks = args.batch * args.n_heads * blocks;
  const int64_t width = round_up(args.head_dim, kVec);
  Arena arena(Scores::kArena + QueryBlock<T, kPairs>::floats(args) + TileGradient<T, kPairs>::floats(args, kKeys) +
              2 * kLanes * width);
  if (arena.failed()) {
    *args.failed = true;
    return;
  }
  Scores scores(args, arena, true);
  QueryBlock<T, kPairs> block(args, arena);
  TileGradient<T, kPairs> tile(args, arena, kKeys);
  float* dq_t = arena.take(kLanes * width);
  float* dq_rows = arena.take(kLanes * width);
  for (int64_t task; (task = args.next->fetch_add(1, std::memory_order_relaxed)) < tasks;) {
    const int64_t b = task / blocks / args.n_heads, h = task / blocks % args.n_heads;
    const int64_t i0 = (blocks - 1 - task % blocks) * kLanes;  // causal: the longest first
    const Sequence sequence(args, b);
    if (i0 >= sequence.len_q) {
      continue;
    }
    const int rows = block_rows(sequence, i0);
    const T* k = sequence.rows<const T>(args.k, h / group, sequence.k_start);
    const T* v = sequence.rows<const T>(args.v, h / group, sequence.k_start);
    int64_t begin, end;
    scores.select_head(sequence, h);
    scores.key_range(i0, rows, begin, end);
    block.load(sequence, h, i0, false);
    zero(dq_t, kLanes * width);
    for (int64_t j0 = begin; j0 < end; j0 += kKeys) {
      const int keys = static_cast<int>(end - j0 < kKeys ? end - j0 : kKeys);
      if (!scores.prepare(i0, rows, j0, keys)) {
        continue;
      }
      tile.load_keys(k + j0 * args.k.row, v + j0 * args.v.row, keys);
      tile.run(scores, block, 0, keys, rows);
      tile.multiply_by_slope_of_cap(scores, keys);
      tile.add_to_queries(scores, 0, keys, rows, dq_t);
    }
    transpose(dq_rows, width, dq_t, kLanes, width, round_up(rows, kVec));
    store_rows(sequence.rows<T>(args.dq, h, sequence.q_start + i0), args.dq.row, dq_rows, width, rows, args.head_dim,
               args.scale);
  }
}

// dbias summed over dimensions in a pass of its own, which makes p and ds again. One task is a part of one (batch,
// head) of dbias: a block of queries if it has rows, else a tile of keys if it has columns, else all. It sums over its
// heads in order, so that no two tasks meet.
template <typename T, bool kPairs>
void bias_gradient(const AttentionArgs& args) {
  const int64_t group = args.n_heads / args.n_kv_heads;
  const int64_t blocks = (args.seqlen_q + kLanes - 1) / kLanes, tiles = (args.seqlen_k + kKeys - 1) / kKeys;
  const bool has_rows = args.dbias.row != 0, has_keys = args.dbias.key != 0;
  const int64_t slabs_b = args.dbias.batch ? args.batch : 1, slabs_h = args.dbias.head ? args.n_heads : 1;
  const int64_t parts = has_rows ? blocks : has_keys ? tiles : 1;
  const int64_t sums = has_keys ? (has_rows ? tiles * kKeys : kKeys) : 1;
  Arena arena(Scores::kArena + QueryBlock<T, kPairs>::floats(args) + TileGradient<T, kPairs>::floats(args, kKeys) +
              (round_up(sums, kVec) + kKeys) * kLanes);
  if (arena.failed()) {
    *args.failed = true;
    return;
  }
  Scores scores(args, arena, true);
  QueryBlock<T, kPairs> block(args, arena);
  TileGradient<T, kPairs> tile(args, arena, kKeys);
  float* sum = arena.take(round_up(sums, kVec) * kLanes);  // [key][lane]
  float* stage = arena.take(kLanes * kKeys);

  for (int64_t task; (task = args.next->fetch_add(1, std::memory_order_relaxed)) < slabs_b * slabs_h * parts;) {
    const int64_t part = task % parts, slab_h = task / parts % slabs_h, slab_b = task / parts / slabs_h;
    zero(sum, round_up(sums, kVec) * kLanes);
    const int64_t first_key = has_rows || !has_keys ? 0 : part * kKeys;
    const int64_t last_key = has_rows || !has_keys ? args.seqlen_k : first_key + kKeys;
    for (int64_t b = slab_b; b < (args.dbias.batch ? slab_b + 1 : args.batch); ++b) {
      const Sequence sequence(args, b);
      for (int64_t h = slab_h; h < (args.dbias.head ? slab_h + 1 : args.n_heads); ++h) {
        scores.select_head(sequence, h);
        const T* k = sequence.rows<const T>(args.k, h / group, 0);
        const T* v = sequence.rows<const T>(args.v, h / group, 0);
        for (int64_t i0 = has_rows ? part * kLanes : 0; i0 < (has_rows ? (part + 1) * kLanes : args.seqlen_q);
             i0 += kLanes) {
          if (i0 >= args.seqlen_q) {
            break;
          }
          const int rows = block_rows(sequence, i0);
          block.load(sequence, h, i0, false);
          int64_t begin, end;
          scores.key_range(i0, rows, begin, end);
          begin = begin > first_key ? begin : first_key;
          end = end < last_key ? end : last_key;
          for (int64_t j0 = begin; j0 < end; j0 += kKeys) {
            const int keys = static_cast<int>(end - j0 < kKeys ? end - j0 : kKeys);
            if (!scores.prepare(i0, rows, j0, keys)) {
              continue;
            }
            tile.load_keys(k + j0 * args.k.row, v + j0 * args.v.row, keys);
            tile.run(scores, block, 0, keys, rows);
            for (int r = 0; r < keys; ++r) {
              float* at = sum + (has_keys ? j0 + r - first_key : 0) * kLanes;
              for (int64_t x = 0; x < round_up(rows, kVec); x += kVec) {
                (Vec::load(at + x) + Vec::load(tile.ds + r * kLanes + x)).store(at + x);
              }
            }
          }
        }
      }
    }
    const int64_t offset = slab_b * args.dbias.batch + slab_h * args.dbias.head;
    if (!has_rows) {  // sum over the lanes as well
      for (int64_t r = 0; r < sums; ++r) {
        Vec total = Vec::fill(0.f);
        for (int x = 0; x < kLanes; x += kVec) {
          total = total + Vec::load(sum + r * kLanes + x);
        }
        sum[r * kLanes] = total.sum();
      }
    }
    const int64_t i0 = has_rows ? part * kLanes : 0;
    const int rows = has_rows ? static_cast<int>(args.seqlen_q - i0 < kLanes ? args.seqlen_q - i0 : kLanes) : 1;
    const int64_t keys = !has_keys ? 1 : last_key < args.seqlen_k ? last_key - first_key : args.seqlen_k - first_key;
    for (int64_t j = 0; j < keys; j += kKeys) {
      store_dbias(args, offset, sum + j * kLanes, i0, rows, first_key + j,
                  static_cast<int>(keys - j < kKeys ? keys - j : kKeys), stage, false);
    }
  }
}

}  // namespace
