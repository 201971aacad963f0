#pragma once
// Attention backward. It visits the keys piece by piece, for each piece all blocks of queries, for each block the tiles
// of the piece, five products each; dK and dV of a piece and dQᵀ of a block over a piece are summed in fp32. One task
// is all pieces of one key head, or a single piece where heads are few. No order depends on threads.
//
//   p = e^(s - lse),  ds = p ∘ (dp - delta),  dV += p·dO,  dK += ds·Q,  dQᵀ += Kᵀ·ds,  with s = K·Qᵀ, dp = V·dOᵀ
//
// dQ of a block is the sum over the pieces that it sees, in their order. In fp32 it is summed where it ends up, and
// tasks of one piece wait for their turn. In 16 bits a task of all pieces sums it in fp32 of its own; tasks of one
// piece leave it to query_gradient, which makes p and ds again. So where heads are few no buffer grows with seqlen, and
// elsewhere none exceeds one head per thread.
#include <thread>

#include "attention_gradient.h"

namespace {

using fastattn::kAttentionPieceKeys;

// ds[key][lane] of a tile -> rows of T; with `add` to what is there
template <typename T>
void store_transposed(T* dst, int64_t stride, const float* ds, int rows, int keys, bool add) {
  for (int r = 0; r < rows; r += kVec) {
    for (int j = 0; j < keys; j += kVec) {
      Vec t[kVec];
      load_transposed(t, ds + j * kLanes + r, kLanes);
      const int rest = keys - j < kVec ? keys - j : 0;
      for (int x = 0; x < kVec && r + x < rows; ++x) {
        T* at = dst + (r + x) * stride + j;
        if (rest) {
          (add ? t[x] + Vec::load(at, rest) : t[x]).store(at, rest);
        } else {
          (add ? t[x] + Vec::load(at) : t[x]).store(at);
        }
      }
    }
  }
}

// The rows of one head's dbias, or of their sum in fp32.
struct DbiasRows {
  void* data;
  int64_t stride;
  DType dtype;

  DbiasRows(const AttentionArgs& args, int64_t b, int64_t h) : stride(args.dbias.row), dtype(args.bias_dtype) {
    const int64_t size = dtype == DType::kFloat32 ? 4 : 2;
    data = static_cast<char*>(const_cast<void*>(args.dbias.data)) + (b * args.dbias.batch + h * args.dbias.head) * size;
  }
  DbiasRows(float* sum, int64_t cols) : data(sum), stride(cols), dtype(DType::kFloat32) {}

  void store(const float* ds, int64_t i0, int rows, int64_t j0, int keys, bool add) const {
    with_storage_type(dtype, [&](auto type) {
      store_transposed(static_cast<decltype(type)*>(data) + i0 * stride + j0, stride, ds, rows, keys, add);
    });
  }
  void zero(int64_t i0, int rows, int64_t j0, int64_t keys) const {
    with_storage_type(dtype, [&](auto type) {
      for (int r = 0; r < rows; ++r) {
        std::memset(static_cast<void*>(static_cast<decltype(type)*>(data) + (i0 + r) * stride + j0), 0,
                    keys * sizeof(type));
      }
    });
  }
  void narrow(const float* sum, int64_t cols, int64_t rows, int64_t j0, int64_t keys) const {
    with_storage_type(dtype, [&](auto type) {
      for (int64_t i = 0; i < rows; ++i) {
        narrow_row(static_cast<decltype(type)*>(data) + i * stride + j0, sum + i * cols + j0, keys);
      }
    });
  }
};

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
  const bool whole_batch = args.dbias.data && args.dbias_from == AttentionArgs::DbiasFrom::kWholeBatch;
  const int64_t dbias_floats = args.seqlen_q * args.seqlen_k;
  const int64_t dbias_sums = whole_batch && args.bias_dtype != DType::kFloat32 ? group : 0;
  Arena arena(Scores::kArena + QueryBlock<T, kPairs>::floats(args) + TileGradient<T, kPairs>::floats(args, piece_keys) +
              round_up(dbias_sums * dbias_floats, 16) + 16 + dq_sum_rows * width +
              kept * piece_keys * (width + width_v) + 2 * kLanes * width);
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
  float* dbias_sum = dbias_sums ? arena.take(dbias_sums * dbias_floats + kVec) : nullptr;

  const bool direct_dbias = args.dbias.data && args.dbias_from != AttentionArgs::DbiasFrom::kOwnPass;
  // a dbias that the sequences of a batch share is summed in their order by one task, in 16 bits in memory of its own
  const int64_t batch_of_task = whole_batch ? args.batch : 1;
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
      const DbiasRows dbias_of_head(args, b, h);
      const DbiasRows dbias = dbias_sum ? DbiasRows(dbias_sum + g * dbias_floats, args.seqlen_k) : dbias_of_head;
      double dsink = 0;  // a sum of any length
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
          scores.key_range(i0, rows, 0, sequence.len_k, begin, end);
          // the piece that begins the sum of dq; the first one if the block sees no key
          const int64_t starts_dq = begin < end ? begin / kAttentionPieceKeys : 0;
          scores.key_range(i0, rows, first_key, end_key, begin, end);
          if (direct_dbias && first_of_task) {
            const int64_t split = begin < end ? begin : last_key;
            dbias.zero(i0, rows, first_key, split - first_key);
            dbias.zero(i0, rows, begin < end ? end : last_key, begin < end ? last_key - end : 0);
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
              const float share = (args.sink[h] - block.lse_high()[r]) * kLog2e - block.lse_low()[r];
              dsink -= std::exp2(share) * block.delta()[r];
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
                dbias.zero(i0, rows, j0, keys);
              }
              continue;
            }
            tile.run(scores, block, skip, keys, rows);
            if (direct_dbias) {
              dbias.store(tile.ds, i0, rows, j0, keys, !first_of_task);
            }
            tile.multiply_by_slope_of_cap(scores, keys);
            tile.add_to_keys(scores, block, keys, rows, dk_piece + skip * width, width, dv_piece + skip * width_v,
                             width_v);
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
        if (dbias_sum && n % batch_of_task == batch_of_task - 1) {
          dbias_of_head.narrow(dbias_sum + g * dbias_floats, args.seqlen_k, args.seqlen_q, first_key, stored_keys);
        }
        if (g == group - 1) {
          store_rows(sequence.rows<T>(args.dk, kv, sequence.k_start + first_key), args.dk.row, dk_piece, width,
                     stored_keys, args.head_dim, args.scale);
          store_rows(sequence.rows<T>(args.dv, kv, sequence.k_start + first_key), args.dv.row, dv_piece, width_v,
                     stored_keys, args.head_dim_v, 1.f);
        }
      }
      if (args.dsink_partial && first_piece == 0) {
        args.dsink_partial[b * args.n_heads + h] = static_cast<float>(dsink);
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
    scores.key_range(i0, rows, 0, sequence.len_k, begin, end);
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
              3 * round_up(sums, kVec) * kLanes);
  if (arena.failed()) {
    *args.failed = true;
    return;
  }
  Scores scores(args, arena, true);
  QueryBlock<T, kPairs> block(args, arena);
  TileGradient<T, kPairs> tile(args, arena, kKeys);
  // [key][lane]; `sum` takes kTerms terms before it is added to `total`: a longer chain in fp32 loses digits
  constexpr int64_t kTerms = 64;
  float* sum = arena.take(round_up(sums, kVec) * kLanes);
  double* total = reinterpret_cast<double*>(arena.take(2 * round_up(sums, kVec) * kLanes));

  for (int64_t task; (task = args.next->fetch_add(1, std::memory_order_relaxed)) < slabs_b * slabs_h * parts;) {
    const int64_t part = task % parts, slab_h = task / parts % slabs_h, slab_b = task / parts / slabs_h;
    zero(sum, round_up(sums, kVec) * kLanes);
    std::fill(total, total + sums * kLanes, 0.);
    int64_t terms = 0;
    const auto add_to_total = [&] {
      for (int64_t x = 0; x < sums * kLanes; ++x) {
        total[x] += sum[x];
      }
      zero(sum, sums * kLanes);
      terms = 0;
    };
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
          scores.key_range(i0, rows, first_key, last_key, begin, end);
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
            terms += has_keys ? 0 : keys;
            if (terms >= kTerms) {
              add_to_total();
            }
          }
          if (has_keys && ++terms == kTerms) {
            add_to_total();
          }
        }
      }
    }
    add_to_total();
    for (int64_t x = 0; x < sums * kLanes; ++x) {
      sum[x] = static_cast<float>(total[x]);
    }
    if (!has_rows) {  // sum over the lanes as well
      for (int64_t r = 0; r < sums; ++r) {
        Vec lanes = Vec::fill(0.f);
        for (int x = 0; x < kLanes; x += kVec) {
          lanes = lanes + Vec::load(sum + r * kLanes + x);
        }
        sum[r * kLanes] = lanes.sum();
      }
    }
    const int64_t i0 = has_rows ? part * kLanes : 0;
    const int rows = has_rows ? static_cast<int>(args.seqlen_q - i0 < kLanes ? args.seqlen_q - i0 : kLanes) : 1;
    const int64_t keys = !has_keys ? 1 : last_key < args.seqlen_k ? last_key - first_key : args.seqlen_k - first_key;
    for (int64_t j = 0; j < keys; j += kKeys) {
      DbiasRows(args, slab_b, slab_h)
          .store(sum + j * kLanes, i0, rows, first_key + j, static_cast<int>(keys - j < kKeys ? keys - j : kKeys),
                 false);
    }
  }
}

}  // namespace
