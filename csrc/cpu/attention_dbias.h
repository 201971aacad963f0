#pragma once
// dbias of the backward. The tasks for dk and dv compute it, unless it is summed over more dimensions than they cover.
// Then it has a pass of its own.
#include <algorithm>

#include "attention_gradient.h"

namespace {

// Writes ds[key][lane] of a tile to rows of T, or adds it to them.
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

// The rows of dbias of one head, or of their fp32 sum.
struct DbiasRows {
  void* data;
  int64_t stride;
  DType dtype;

  DbiasRows(const AttentionCpuArgs& args, int64_t b, int64_t h) : stride(args.dbias.row), dtype(args.bias_dtype) {
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

// The part of dbias that a task of the backward computes: for one sequence, or summed over a batch. In the second case
// the task adds all sequences in order; for 16-bit dtypes it adds them in a buffer of its own.
class TaskDbias {
 public:
  static int64_t floats(const AttentionCpuArgs& args) { return sums(args) ? round_up(sums(args), 16) + 16 : 0; }

  TaskDbias(const AttentionCpuArgs& args, Arena& arena)
      : args_(args),
        wanted_(args.dbias.data && args.dbias_from != AttentionCpuArgs::DbiasFrom::kOwnPass),
        sum_(sums(args) ? arena.take(sums(args) + kVec) : nullptr),
        own_(args, 0, 0),
        rows_(own_) {}

  // The number of sequences that a task sums over.
  static int64_t sequences(const AttentionCpuArgs& args) { return whole_batch(args) ? args.batch : 1; }

  // Selects query head h of a sequence, which is the g-th head of the task's group. The sequence is number n of the
  // task.
  void select_head(const Sequence& sequence, int64_t h, int64_t g, int64_t n) {
    adds_ = n > 0;
    ends_ = n == sequences(args_) - 1;
    own_ = DbiasRows(args_, sequence.index, h);
    rows_ = sum_ ? DbiasRows(sum_ + g * args_.seqlen_q * args_.seqlen_k, args_.seqlen_k) : own_;
  }

  void store(const float* ds, int64_t i0, int rows, int64_t j0, int keys) const {
    if (wanted_) {
      rows_.store(ds, i0, rows, j0, keys, adds_);
    }
  }
  // Zeroes the part that no query of a block sees.
  void zero(int64_t i0, int rows, int64_t j0, int64_t keys) const {
    if (wanted_ && !adds_) {
      rows_.zero(i0, rows, j0, keys);
    }
  }
  void finish_piece(int64_t first_key, int64_t keys) const {
    if (sum_ && ends_) {
      own_.narrow(sum_of_head(), args_.seqlen_k, args_.seqlen_q, first_key, keys);
    }
  }

 private:
  static bool whole_batch(const AttentionCpuArgs& args) {
    return args.dbias.data && args.dbias_from == AttentionCpuArgs::DbiasFrom::kWholeBatch;
  }
  static int64_t sums(const AttentionCpuArgs& args) {
    return whole_batch(args) && args.bias_dtype != DType::kFloat32
               ? heads_per_key_head(args) * args.seqlen_q * args.seqlen_k
               : 0;
  }
  const float* sum_of_head() const { return static_cast<const float*>(rows_.data); }

  const AttentionCpuArgs& args_;
  const bool wanted_;
  float* sum_;
  DbiasRows own_, rows_;  // the rows of the head in dbias, and where they are summed
  bool adds_ = false, ends_ = true;
};

// dbias with summed dimensions, in a separate pass that recomputes p and ds. A task is a part of one (batch, head) of
// dbias: a block of queries if dbias has rows, otherwise a tile of keys if it has columns, otherwise everything. It
// adds its heads in order, so no two tasks write to the same place.
template <typename T, bool kPairs>
class BiasGradient {
 public:
  static int64_t floats(const AttentionCpuArgs& args) {
    return Scores::kArena + QueryBlock<T, kPairs>::floats(args) + TileGradient<T, kPairs>::floats(args, kKeys) +
           3 * round_up(sums(args), kVec) * kLanes;
  }

  BiasGradient(const AttentionCpuArgs& args, Arena& arena)
      : args_(args),
        sums_(sums(args)),
        scores_(args, arena, true),
        block_(args, arena),
        tile_(args, arena, kKeys),
        sum_(arena.take(round_up(sums(args), kVec) * kLanes)),
        total_(reinterpret_cast<double*>(arena.take(2 * round_up(sums(args), kVec) * kLanes))) {}

  void run() {
    const int64_t blocks = (args_.seqlen_q + kLanes - 1) / kLanes;
    const int64_t parts = has_rows_ ? blocks : has_keys_ ? key_tiles(args_) : 1;
    const int64_t slabs_b = args_.dbias.batch ? args_.batch : 1, slabs_h = args_.dbias.head ? args_.n_heads : 1;
    for (int64_t task; (task = next_task(args_)) < slabs_b * slabs_h * parts;) {
      run_part(task / parts / slabs_h, task / parts % slabs_h, task % parts);
    }
  }

 private:
  static int64_t key_tiles(const AttentionCpuArgs& args) { return (args.seqlen_k + kKeys - 1) / kKeys; }
  static int64_t sums(const AttentionCpuArgs& args) {
    return args.dbias.key == 0 ? 1 : args.dbias.row != 0 ? key_tiles(args) * kKeys : kKeys;
  }

  // slab_b, slab_h: the first batch entry and head to sum
  void run_part(int64_t slab_b, int64_t slab_h, int64_t part) {
    zero(sum_, round_up(sums_, kVec) * kLanes);
    std::fill(total_, total_ + sums_ * kLanes, 0.);
    terms_ = 0;
    const bool all_keys = has_rows_ || !has_keys_;
    const int64_t first_key = all_keys ? 0 : part * kKeys, last_key = all_keys ? args_.seqlen_k : first_key + kKeys;
    const int64_t first_row = has_rows_ ? part * kLanes : 0;
    const int64_t end_row = has_rows_ && first_row + kLanes < args_.seqlen_q ? first_row + kLanes : args_.seqlen_q;
    for (int64_t b = slab_b; b < (args_.dbias.batch ? slab_b + 1 : args_.batch); ++b) {
      const Sequence sequence(args_, b);
      for (int64_t h = slab_h; h < (args_.dbias.head ? slab_h + 1 : args_.n_heads); ++h) {
        scores_.select_head(sequence, h);
        for (int64_t i0 = first_row; i0 < end_row; i0 += kLanes) {
          add_block(sequence, h, i0, first_key, last_key);
        }
      }
    }
    add_to_total();
    for (int64_t x = 0; x < sums_ * kLanes; ++x) {
      sum_[x] = static_cast<float>(total_[x]);
    }
    if (!has_rows_) {
      sum_lanes();
    }
    const int rows = has_rows_ ? static_cast<int>(end_row - first_row) : 1;
    const int64_t end_key = !has_keys_ ? first_key + 1 : last_key < args_.seqlen_k ? last_key : args_.seqlen_k;
    const DbiasRows dbias(args_, slab_b, slab_h);
    for (int64_t j = first_key; j < end_key; j += kKeys) {
      dbias.store(sum_ + (j - first_key) * kLanes, first_row, rows, j, at_most(end_key - j, kKeys), false);
    }
  }

  // Adds ds for a block of queries and the keys [first_key, last_key).
  void add_block(const Sequence& sequence, int64_t h, int64_t i0, int64_t first_key, int64_t last_key) {
    const int64_t group = heads_per_key_head(args_);
    const T* k = sequence.rows<const T>(args_.k, h / group, 0);
    const T* v = sequence.rows<const T>(args_.v, h / group, 0);
    const int rows = sequence.block_rows(i0);
    const int width = static_cast<int>(round_up(rows, kVec));
    float *const sum = sum_, *const ds = tile_.ds;
    block_.load(sequence, h, i0, false);
    const KeyRange range = scores_.key_range(i0, rows, first_key, last_key);
    for (int64_t j0 = range.begin; j0 < range.end; j0 += kKeys) {
      const int keys = at_most(range.end - j0, kKeys);
      if (!scores_.prepare(i0, rows, j0, keys)) {
        continue;
      }
      tile_.load_keys(k + j0 * args_.k.row, v + j0 * args_.v.row, keys);
      tile_.run(scores_, block_, 0, keys, rows);
      for (int r = 0; r < keys; ++r) {
        float* at = sum + (has_keys_ ? j0 + r - first_key : 0) * kLanes;
        for (int x = 0; x < width; x += kVec) {
          (Vec::load(at + x) + Vec::load(ds + r * kLanes + x)).store(at + x);
        }
      }
      terms_ += has_keys_ ? 0 : keys;
      if (terms_ >= kTerms) {
        add_to_total();
      }
    }
    if (has_keys_ && ++terms_ == kTerms) {
      add_to_total();
    }
  }

  void add_to_total() {
    for (int64_t x = 0; x < sums_ * kLanes; ++x) {
      total_[x] += sum_[x];
    }
    zero(sum_, sums_ * kLanes);
    terms_ = 0;
  }

  void sum_lanes() {
    for (int64_t r = 0; r < sums_; ++r) {
      Vec lanes = Vec::fill(0.f);
      for (int x = 0; x < kLanes; x += kVec) {
        lanes = lanes + Vec::load(sum_ + r * kLanes + x);
      }
      sum_[r * kLanes] = lanes.sum();
    }
  }

  const AttentionCpuArgs& args_;
  const bool has_rows_ = args_.dbias.row != 0, has_keys_ = args_.dbias.key != 0;
  const int64_t sums_;  // the number of sums in a task
  Scores scores_;
  QueryBlock<T, kPairs> block_;
  TileGradient<T, kPairs> tile_;
  // [key][lane]. sum_ is added to total_ after kTerms terms, because longer chains of fp32 additions lose digits.
  static constexpr int64_t kTerms = 64;
  float* sum_;
  double* total_;
  int64_t terms_ = 0;
};

template <typename T, bool kPairs>
void bias_gradient(const AttentionCpuArgs& args) {
  Arena arena(BiasGradient<T, kPairs>::floats(args));
  if (arena.failed()) {
    *args.failed = true;
    return;
  }
  BiasGradient<T, kPairs>(args, arena).run();
}

}  // namespace
