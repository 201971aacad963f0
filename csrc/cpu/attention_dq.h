#pragma once
// dq of the backward. For each block of queries, it is the sum over the pieces of keys that the block sees, in order.
// In fp32 the sum is made in args.dq; if each task has one piece, the tasks wait for their turn. For 16-bit dtypes, a
// task of all pieces sums in its own fp32 buffer. Tasks of one piece leave dq to query_gradient, which recomputes p and
// ds. So with few heads no buffer grows with seqlen, and with many heads there is at most a buffer of one head per
// thread.
#include <thread>

#include "attention_gradient.h"

namespace {

// dQᵀ of a block of queries over some keys, and its transpose.
class BlockDq {
 public:
  static int64_t floats(const AttentionCpuArgs& args) { return 2 * kLanes * round_up(args.head_dim, kVec); }

  BlockDq(const AttentionCpuArgs& args, Arena& arena)
      : width_(round_up(args.head_dim, kVec)),
        transposed_(arena.take(kLanes * width_)),
        rows_(arena.take(kLanes * width_)) {}

  void clear() { zero(transposed_, kLanes * width_); }
  float* transposed() { return transposed_; }
  float* rows(int count) {
    transpose(rows_, width_, transposed_, kLanes, width_, round_up(count, kVec));
    return rows_;
  }
  int64_t width() const { return width_; }

 private:
  const int64_t width_;
  float *transposed_, *rows_;
};

// The three ways to sum dq. begin() is called before the first piece that a block sees. add() is called for every piece
// that it sees, after `before` earlier ones.
class DqInPlace {
 public:
  static constexpr bool kMakesDq = true;
  static int64_t floats(const AttentionCpuArgs&) { return 0; }

  DqInPlace(const AttentionCpuArgs& args, Arena&) : args_(args) {}

  void select_head(const Sequence& sequence, int64_t h) {
    const int64_t blocks = (args_.seqlen_q + kLanes - 1) / kLanes;
    rows_ = sequence.rows<float>(args_.dq, h, sequence.q_start);
    turns_ = args_.piece_per_task ? args_.dq_turns + (sequence.index * args_.n_heads + h) * blocks : nullptr;
  }
  void begin(int64_t i0, int rows) { zero_rows(rows_ + i0 * args_.dq.row, args_.dq.row, rows, args_.head_dim); }
  void add(int64_t i0, int rows, BlockDq& block, int64_t before) {
    const float* sum = block.rows(rows);
    std::atomic<int32_t>* turn = turns_ ? turns_ + i0 / kLanes : nullptr;
    while (turn && turn->load(std::memory_order_acquire) != before) {
      std::this_thread::yield();
    }
    add_rows(rows_ + i0 * args_.dq.row, args_.dq.row, sum, block.width(), rows, args_.head_dim, args_.scale);
    if (turn) {
      turn->store(static_cast<int32_t>(before + 1), std::memory_order_release);
    }
  }
  void finish_head() {}

 private:
  const AttentionCpuArgs& args_;
  float* rows_ = nullptr;
  std::atomic<int32_t>* turns_ = nullptr;
};

template <typename T>
class DqOwnSum {
 public:
  static constexpr bool kMakesDq = true;
  static int64_t floats(const AttentionCpuArgs& args) {
    return round_up(args.seqlen_q, kLanes) * round_up(args.head_dim, kVec);
  }

  DqOwnSum(const AttentionCpuArgs& args, Arena& arena)
      : args_(args), width_(round_up(args.head_dim, kVec)), sum_(arena.take(floats(args))) {}

  void select_head(const Sequence& sequence, int64_t h) {
    rows_ = sequence.rows<T>(args_.dq, h, sequence.q_start);
    count_ = static_cast<int>(sequence.len_q);
  }
  void begin(int64_t i0, int rows) { zero(sum_ + i0 * width_, rows * width_); }
  void add(int64_t i0, int rows, BlockDq& block, int64_t) {
    add_rows(sum_ + i0 * width_, width_, block.rows(rows), width_, rows, width_, 1.f);
  }
  void finish_head() { store_rows(rows_, args_.dq.row, sum_, width_, count_, args_.head_dim, args_.scale); }

 private:
  const AttentionCpuArgs& args_;
  const int64_t width_;
  float* sum_;
  T* rows_ = nullptr;
  int count_ = 0;
};

class DqLater {
 public:
  static constexpr bool kMakesDq = false;
  static int64_t floats(const AttentionCpuArgs&) { return 0; }

  DqLater(const AttentionCpuArgs&, Arena&) {}

  void select_head(const Sequence&, int64_t) {}
  void begin(int64_t, int) {}
  void finish_head() {}
};

// dq in a separate pass. A task is a block of queries of one head.
template <typename T, bool kPairs>
void query_gradient(const AttentionCpuArgs& args) {
  const int64_t group = heads_per_key_head(args);
  const int64_t blocks = (args.seqlen_q + kLanes - 1) / kLanes, tasks = args.batch * args.n_heads * blocks;
  Arena arena(Scores::kArena + QueryBlock<T, kPairs>::floats(args) + TileGradient<T, kPairs>::floats(args, kKeys) +
              BlockDq::floats(args));
  if (arena.failed()) {
    *args.failed = true;
    return;
  }
  Scores scores(args, arena, true);
  QueryBlock<T, kPairs> block(args, arena);
  TileGradient<T, kPairs> tile(args, arena, kKeys);
  BlockDq dq(args, arena);
  for (int64_t task; (task = next_task(args)) < tasks;) {
    const int64_t b = task / blocks / args.n_heads, h = task / blocks % args.n_heads;
    const int64_t i0 = (blocks - 1 - task % blocks) * kLanes;  // starts with the longest blocks if causal
    const Sequence sequence(args, b);
    if (i0 >= sequence.len_q) {
      continue;
    }
    const int rows = sequence.block_rows(i0);
    const T* k = sequence.rows<const T>(args.k, h / group, sequence.k_start);
    const T* v = sequence.rows<const T>(args.v, h / group, sequence.k_start);
    scores.select_head(sequence, h);
    const KeyRange range = scores.key_range(i0, rows, 0, sequence.len_k);
    block.load(sequence, h, i0, false);
    dq.clear();
    for (int64_t j0 = range.begin; j0 < range.end; j0 += kKeys) {
      const int keys = at_most(range.end - j0, kKeys);
      if (!scores.prepare(i0, rows, j0, keys)) {
        continue;
      }
      tile.load_keys(k + j0 * args.k.row, v + j0 * args.v.row, keys);
      tile.run(scores, block, 0, keys, rows);
      tile.multiply_by_slope_of_cap(scores, keys);
      tile.add_to_queries(scores, 0, keys, rows, dq.transposed());
    }
    store_rows(sequence.rows<T>(args.dq, h, sequence.q_start + i0), args.dq.row, dq.rows(rows), dq.width(), rows,
               args.head_dim, args.scale);
  }
}

}  // namespace
