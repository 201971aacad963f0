#pragma once
// Attention backward: one task is the keys of one key head, or a chunk of them. It visits them tile by tile and for
// each tile all blocks of queries, five products each; dqᵀ stays in fp32 until the task ends. No order depends on
// threads.
//
//   p = 2^(s - lse),  ds = p ∘ (dp - delta),  dV += p·dO,  dK += ds·Q,  dQᵀ += Kᵀ·ds,  with s = K·Qᵀ, dp = V·dOᵀ
#include "attention_fwd.h"

namespace {

// A block of queries of one head, packed: transposed for the products over head_dim, in depth order for those over
// queries, with lse and delta = rowsum(do ∘ out) - dlse. Lanes past the end have lse inf, so that their p is 0.
template <typename T, bool kPairs>
class QueryBlocks {
 public:
  static int64_t floats(const AttentionArgs& args, int64_t blocks) {
    const int64_t width = round_up(args.head_dim, kVec), width_v = round_up(args.head_dim_v, kVec);
    return kLanes * (2 * blocks * (width + width_v + 1) + (width > width_v ? width : width_v)) + 64;
  }

  QueryBlocks(const AttentionArgs& args, Arena& arena, int64_t blocks)
      : args_(args),
        width_(round_up(args.head_dim, kVec)),
        width_v_(round_up(args.head_dim_v, kVec)),
        q_t_(arena.take(blocks * kLanes * width_)),
        do_t_(arena.take(blocks * kLanes * width_v_)),
        q_depth_(arena.take(blocks * kLanes * width_)),
        do_depth_(arena.take(blocks * kLanes * width_v_)),
        lse_(arena.take(blocks * kLanes)),
        delta_(arena.take(blocks * kLanes)),
        stage_(arena.take(kLanes * (width_ > width_v_ ? width_ : width_v_))) {}

  // Pack the block that begins at query i0 as number `slot`.
  void load(const Sequence& sequence, int64_t h, int64_t i0, int64_t slot, bool for_products_over_queries) {
    const int rows = static_cast<int>(sequence.len_q - i0 < kLanes ? sequence.len_q - i0 : kLanes);
    const int64_t start = sequence.q_start + i0;
    const T* q = sequence.rows<const T>(args_.q, h, start);
    const T* d_o = sequence.rows<const T>(args_.dout, h, start);
    const T* out = sequence.rows<const T>(args_.out, h, start);
    const int64_t lse_at = sequence.lse_offset(args_, h) + i0;
    pack_lanes<kPairs>(q_t_ + slot * kLanes * width_, q, args_.q.row, rows, args_.head_dim, stage_);
    pack_lanes<kPairs>(do_t_ + slot * kLanes * width_v_, d_o, args_.dout.row, rows, args_.head_dim_v, stage_);
    if (for_products_over_queries) {
      if (!direct(args_.head_dim)) {
        pack_depth<kPairs>(q_depth_ + slot * kLanes * width_, width_, q, args_.q.row, rows, args_.head_dim, nullptr);
      }
      if (!direct(args_.head_dim_v)) {
        pack_depth<kPairs>(do_depth_ + slot * kLanes * width_v_, width_v_, d_o, args_.dout.row, rows, args_.head_dim_v,
                           nullptr);
      }
    }
    float *lse = lse_ + slot * kLanes, *delta = delta_ + slot * kLanes;
    for (int r = 0; r < kLanes; ++r) {
      lse[r] = kInf;
      delta[r] = 0.f;
    }
    for (int r = 0; r < rows; ++r) {
      const float value = args_.lse[lse_at + r];
      lse[r] = value == -kInf ? kInf : value * kLog2e;
      Vec sum = Vec::fill(0.f);
      int64_t d = 0;
      for (; d + kVec <= args_.head_dim_v; d += kVec) {
        sum = fma(Vec::load(d_o + r * args_.dout.row + d), Vec::load(out + r * args_.out.row + d), sum);
      }
      if (const int rest = static_cast<int>(args_.head_dim_v - d)) {
        sum = fma(Vec::load(d_o + r * args_.dout.row + d, rest), Vec::load(out + r * args_.out.row + d, rest), sum);
      }
      delta[r] = sum.sum() - (args_.dlse ? args_.dlse[lse_at + r] : 0.f);
    }
  }

  const float* q_t(int64_t slot) const { return q_t_ + slot * kLanes * width_; }
  const float* do_t(int64_t slot) const { return do_t_ + slot * kLanes * width_v_; }
  const float* lse(int64_t slot) const { return lse_ + slot * kLanes; }
  const float* delta(int64_t slot) const { return delta_ + slot * kLanes; }

  // The right operand of a product over queries.
  const float* q_depth(const Sequence& sequence, int64_t h, int64_t slot, int64_t& ld) const {
    return depth(sequence, args_.q, h, slot, args_.head_dim, q_depth_, width_, ld);
  }
  const float* do_depth(const Sequence& sequence, int64_t h, int64_t slot, int64_t& ld) const {
    return depth(sequence, args_.dout, h, slot, args_.head_dim_v, do_depth_, width_v_, ld);
  }

 private:
  static bool direct(int64_t cols) { return sizeof(T) == sizeof(float) && cols % kVec == 0; }
  const float* depth(const Sequence& sequence, const fastattn::HeadTensor& t, int64_t h, int64_t slot, int64_t cols,
                     const float* packed, int64_t width, int64_t& ld) const {
    if (direct(cols)) {
      ld = t.row;
      return sequence.rows<const float>(t, h, sequence.q_start + slot * kLanes);
    }
    ld = width;
    return packed + slot * kLanes * width;
  }

  const AttentionArgs& args_;
  const int64_t width_, width_v_;
  float *q_t_, *do_t_, *q_depth_, *do_depth_, *lse_, *delta_, *stage_;
};

// p and ds of one tile. After run(): p and ds in fp32, p with dropout, ds before the slope of the cap.
template <typename T, bool kPairs>
class TileGradient {
 public:
  static int64_t floats(const AttentionArgs& args) {
    return 2 * kLanes * kKeys + kKeys * (round_up(args.head_dim, kVec) + round_up(args.head_dim_v, kVec)) + 64;
  }

  TileGradient(const AttentionArgs& args, Arena& arena)
      : p(arena.take(kLanes * kKeys)),
        ds(arena.take(kLanes * kKeys)),
        args_(args),
        k_copy_(arena.take(kKeys * round_up(args.head_dim, kVec))),
        v_copy_(arena.take(kKeys * round_up(args.head_dim_v, kVec))) {}

  void load_keys(const T* k, const T* v, int keys) {
    k_ = left_rows<T, kPairs>(k, args_.k.row, keys, args_.head_dim, k_copy_, ldk_);
    v_ = left_rows<T, kPairs>(v, args_.v.row, keys, args_.head_dim_v, v_copy_, ldv_);
  }

  // Keys skip.. of the loaded ones against a block; scores.prepare() has been called for them.
  void run(Scores& scores, const QueryBlocks<T, kPairs>& blocks, int64_t slot, int64_t skip, int keys, int rows) {
    const int lane_vecs = (rows + kVec - 1) / kVec;
    product<kPairs, false>(k_ + skip * ldk_, ldk_, blocks.q_t(slot), kLanes, slots<kPairs>(args_.head_dim), p, kLanes,
                           keys, rows, Start::kZero);
    product<kPairs, false>(v_ + skip * ldv_, ldv_, blocks.do_t(slot), kLanes, slots<kPairs>(args_.head_dim_v), ds,
                           kLanes, keys, rows, Start::kZero);
    float c = scores.multiplier();
    if (scores.finish_needed()) {
      scores.finish(p, keys, lane_vecs);
      c = 1.f;
    }
    const float* keep = args_.dropout.rng ? scores.keep(keys, lane_vecs) : nullptr;
    for (int x = 0; x < lane_vecs * kVec; x += kVec) {
      const Vec factor = Vec::fill(c), base = -Vec::load(blocks.lse(slot) + x),
                delta = Vec::load(blocks.delta(slot) + x);
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

  float *p, *ds;

 private:
  const AttentionArgs& args_;
  float *k_copy_, *v_copy_;
  const float *k_ = nullptr, *v_ = nullptr;
  int64_t ldk_ = 0, ldv_ = 0;
};

inline int block_rows(const Sequence& sequence, int64_t i0) {
  return static_cast<int>(sequence.len_q - i0 < kLanes ? sequence.len_q - i0 : kLanes);
}

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

inline void zero_dbias(const AttentionArgs& args, int64_t offset, int64_t i0, int rows, int64_t j0, int keys) {
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

template <typename T, bool kPairs>
void backward(const AttentionArgs& args) {
  const int64_t group = args.n_heads / (args.n_kv_heads ? args.n_kv_heads : 1);
  const int64_t blocks = (args.seqlen_q + kLanes - 1) / kLanes;
  const int64_t tiles = (args.seqlen_k + kKeys - 1) / kKeys;
  const int64_t chunk_tiles = (tiles + args.chunks - 1) / args.chunks;
  const int64_t width = round_up(args.head_dim, kVec), width_v = round_up(args.head_dim_v, kVec);
  const int64_t kept_tiles = group > 1 ? chunk_tiles : 1;  // dk and dv of several heads are summed in fp32
  Arena arena(Scores::kArena + QueryBlocks<T, kPairs>::floats(args, blocks) + TileGradient<T, kPairs>::floats(args) +
              blocks * kLanes * width + kept_tiles * kKeys * (width + width_v) + kKeys * width + kLanes * width +
              3 * kLanes * kKeys);
  if (arena.failed()) {
    *args.failed = true;
    return;
  }
  Scores scores(args, arena, true);
  QueryBlocks<T, kPairs> queries(args, arena, blocks);
  TileGradient<T, kPairs> tile(args, arena);
  float* dq_t = arena.take(blocks * kLanes * width);
  float* dk = arena.take(kept_tiles * kKeys * width);
  float* dv = arena.take(kept_tiles * kKeys * width_v);
  float* k_copy = arena.take(kKeys * width);
  float* dq_rows = arena.take(kLanes * width);
  float* stage = arena.take(kLanes * kKeys);
  [[maybe_unused]] float* p_rows = arena.take(kLanes * kKeys / 2);
  [[maybe_unused]] float* ds_rows = arena.take(kLanes * kKeys / 2);
  [[maybe_unused]] float* ds_depth = arena.take(kLanes * kKeys / 2);

  const bool direct_dbias = args.dbias.data && args.dbias_from != AttentionArgs::DbiasFrom::kOwnPass;
  // a dbias that the sequences of a batch share is summed in their order by one task
  const int64_t batch_of_task = args.dbias_from == AttentionArgs::DbiasFrom::kWholeBatch ? args.batch : 1;
  const int64_t tasks = args.batch / batch_of_task * args.n_kv_heads * args.chunks;
  for (int64_t n = 0, task = 0;; ++n) {
    if (n % batch_of_task == 0 && (task = args.next->fetch_add(1, std::memory_order_relaxed)) >= tasks) {
      break;
    }
    const int64_t chunk = task % args.chunks, kv = task / args.chunks % args.n_kv_heads;
    const int64_t b = task / args.chunks / args.n_kv_heads + n % batch_of_task;
    const bool first_of_task = n % batch_of_task == 0;
    const Sequence sequence(args, b);
    const T* k = sequence.rows<const T>(args.k, kv, sequence.k_start);
    const T* v = sequence.rows<const T>(args.v, kv, sequence.k_start);
    const int64_t first_key = chunk * chunk_tiles * kKeys;
    // rows of dk and dv past seqlens_k are written too, as zeros
    const int64_t stored = args.cu_seqlens_k ? args.cu_seqlens_k[b + 1] - sequence.k_start : args.seqlen_k;
    const int64_t last_key = first_key + chunk_tiles * kKeys < stored ? first_key + chunk_tiles * kKeys : stored;

    for (int64_t g = 0; g < group; ++g) {
      const int64_t h = kv * group + g;
      scores.select_head(sequence, h);
      for (int64_t i0 = 0; i0 < sequence.len_q; i0 += kLanes) {
        queries.load(sequence, h, i0, i0 / kLanes, true);
      }
      if (args.dsink_partial && chunk == 0) {
        float total = 0.f;
        for (int64_t i = 0; i < sequence.len_q; ++i) {
          total -= std::exp2(args.sink[h] * kLog2e - queries.lse(0)[i]) * queries.delta(0)[i];
        }
        args.dsink_partial[b * args.n_heads + h] = total;
      }
      zero(dq_t, (sequence.len_q + kLanes - 1) / kLanes * kLanes * width);

      for (int64_t j0 = first_key; j0 < last_key; j0 += kKeys) {
        const int64_t kept = group > 1 ? (j0 - first_key) / kKeys : 0;
        float *dk_tile = dk + kept * kKeys * width, *dv_tile = dv + kept * kKeys * width_v;
        if (g == 0) {
          zero(dk_tile, kKeys * width);
          zero(dv_tile, kKeys * width_v);
        }
        const int tile_keys = static_cast<int>(last_key - j0 < kKeys ? last_key - j0 : kKeys);
        const int64_t end_key = j0 + kKeys < sequence.len_k ? j0 + kKeys : sequence.len_k;
        if (j0 < end_key) {
          tile.load_keys(k + j0 * args.k.row, v + j0 * args.v.row, static_cast<int>(end_key - j0));
        }
        for (int64_t i0 = 0; i0 < sequence.len_q; i0 += kLanes) {
          const int rows = block_rows(sequence, i0);
          int64_t begin, end, ld;
          scores.key_range(i0, rows, begin, end);
          begin = begin > j0 ? begin : j0;
          end = end < end_key ? end : end_key;
          const int keys = static_cast<int>(end - begin);
          const bool seen = keys > 0 && scores.prepare(i0, rows, begin, keys);
          if (direct_dbias && first_of_task && (!seen || keys < tile_keys)) {
            zero_dbias(args, b * args.dbias.batch + h * args.dbias.head, i0, rows, j0, tile_keys);
          }
          if (!seen) {
            continue;
          }
          const int64_t slot = i0 / kLanes, skip = begin - j0;
          tile.run(scores, queries, slot, skip, keys, rows);
          if (direct_dbias) {
            store_dbias(args, b * args.dbias.batch + h * args.dbias.head, tile.ds, i0, rows, begin, keys, stage,
                        !first_of_task);
          }
          if (args.softcap > 0) {
            for (int64_t at = 0; at < keys * kLanes; at += kVec) {
              (Vec::load(tile.ds + at) * Vec::load(scores.slope_of_cap() + at)).store(tile.ds + at);
            }
          }
          const float *p_left = tile.p, *ds_left = tile.ds, *ds_right = tile.ds;
          int64_t ld_left = kLanes;
          if constexpr (kPairs) {
#if defined(__AVX512BF16__)
            for (int r = 0; r < keys; r += 2) {
              for (int x = 0; x < rows; x += kVec) {
                const bool two = r + 1 < keys;
                const int at = r * kLanes + x;
                const Vec low = Vec::load(tile.ds + at), high = two ? Vec::load(tile.ds + at + kLanes) : Vec::fill(0.f);
                _mm512_storeu_si512(ds_depth + r / 2 * kLanes + x, round_pairs(low, high));
                const auto round = [&](float* dst, int from, Vec value) {
                  _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + from / 2),
                                      reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value.v)));
                };
                round(ds_rows, at, low);
                round(p_rows, at, Vec::load(tile.p + at));
                if (two) {
                  round(ds_rows, at + kLanes, high);
                  round(p_rows, at + kLanes, Vec::load(tile.p + at + kLanes));
                }
              }
            }
            p_left = p_rows;
            ds_left = ds_rows;
            ds_right = ds_depth;
            ld_left = kLanes / 2;
#endif
          }
          const float* right = queries.do_depth(sequence, h, slot, ld);
          product<kPairs, false>(p_left, ld_left, right, ld, slots<kPairs>(rows), dv_tile + skip * width_v, width_v,
                                 keys, args.head_dim_v, Start::kAdd);
          right = queries.q_depth(sequence, h, slot, ld);
          product<kPairs, false>(ds_left, ld_left, right, ld, slots<kPairs>(rows), dk_tile + skip * width, width, keys,
                                 args.head_dim, Start::kAdd);
          const float* left =
              left_depth<T, kPairs>(k + begin * args.k.row, args.k.row, keys, args.head_dim, scores.seen(), k_copy, ld);
          product<kPairs, true>(left, ld, ds_right, kLanes, slots<kPairs>(keys), dq_t + slot * kLanes * width, kLanes,
                                args.head_dim, rows, Start::kAdd);
        }
        if (g == group - 1) {
          store_rows(sequence.rows<T>(args.dk, kv, sequence.k_start + j0), args.dk.row, dk_tile, width, tile_keys,
                     args.head_dim, args.scale);
          store_rows(sequence.rows<T>(args.dv, kv, sequence.k_start + j0), args.dv.row, dv_tile, width_v, tile_keys,
                     args.head_dim_v, 1.f);
        }
      }

      for (int64_t i0 = 0; i0 < sequence.len_q; i0 += kLanes) {
        const int rows = block_rows(sequence, i0);
        transpose(dq_rows, width, dq_t + i0 * width, kLanes, width, round_up(rows, kVec));
        if (args.chunks == 1) {
          store_rows(sequence.rows<T>(args.dq, h, sequence.q_start + i0), args.dq.row, dq_rows, width, rows,
                     args.head_dim, args.scale);
        } else {
          const int64_t row = ((chunk * args.batch + b) * args.n_heads + h) * args.seqlen_q + i0;
          std::memcpy(args.dq_partial + row * width, dq_rows, rows * width * sizeof(float));
        }
      }
    }
  }
}

// dq = scale * the sum of its chunks, in their order: one task is a (batch, head).
template <typename T>
void reduce_dq(const AttentionArgs& args) {
  const int64_t width = round_up(args.head_dim, kVec), heads = args.batch * args.n_heads;
  for (int64_t task; (task = args.next->fetch_add(1, std::memory_order_relaxed)) < heads;) {
    const int64_t h = task % args.n_heads;
    const Sequence sequence(args, task / args.n_heads);
    for (int64_t i = 0; i < sequence.len_q; ++i) {
      float* sum = args.dq_partial + (task * args.seqlen_q + i) * width;
      for (int64_t chunk = 1; chunk < args.chunks; ++chunk) {
        const float* part = sum + chunk * heads * args.seqlen_q * width;
        for (int64_t c = 0; c < width; c += kVec) {
          (Vec::load(sum + c) + Vec::load(part + c)).store(sum + c);
        }
      }
      store_rows(sequence.rows<T>(args.dq, h, sequence.q_start + i), args.dq.row, sum, width, 1, args.head_dim,
                 args.scale);
    }
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
  Arena arena(Scores::kArena + QueryBlocks<T, kPairs>::floats(args, 1) + TileGradient<T, kPairs>::floats(args) +
              (round_up(sums, kVec) + kKeys) * kLanes);
  if (arena.failed()) {
    *args.failed = true;
    return;
  }
  Scores scores(args, arena, true);
  QueryBlocks<T, kPairs> queries(args, arena, 1);
  TileGradient<T, kPairs> tile(args, arena);
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
          queries.load(sequence, h, i0, 0, false);
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
            tile.run(scores, queries, 0, 0, keys, rows);
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
