#pragma once
// Attention backward. The loops are: pieces of keys, blocks of queries, tiles of the piece. Each tile takes five matrix
// products. dK and dV of a piece, and dQᵀ of a block over a piece, are summed in fp32. A task is all pieces of one key
// head, or one piece if there are few heads. No order of additions depends on threads.
//
//   p = e^(s - lse),  ds = p ∘ (dp - delta),  dV += p·dOut,  dK += ds·Q,  dQᵀ += Kᵀ·ds,  with s = K·Qᵀ, dp = V·dOutᵀ
#include "attention_dbias.h"
#include "attention_dq.h"

namespace {

using fastattn::kAttentionPieceKeys;

// Keys [first, last) of a sequence; those before `end` are visible.
struct Piece {
  int64_t index, first, last, end;

  Piece(const Sequence& sequence, int64_t n) : index(n), first(n * kAttentionPieceKeys) {
    last = first + kAttentionPieceKeys < sequence.rows_k ? first + kAttentionPieceKeys : sequence.rows_k;
    end = last < sequence.len_k ? last : sequence.len_k;
  }
  int keys() const { return static_cast<int>(last > first ? last - first : 0); }
};

// Dq is DqInPlace, DqOwnSum or DqLater.
template <typename T, bool kPairs, class Dq>
class Backward {
 public:
  static int64_t floats(const AttentionCpuArgs& args) {
    const Sizes sizes(args);
    return Scores::kArena + QueryBlock<T, kPairs>::floats(args) +
           TileGradient<T, kPairs>::floats(args, sizes.piece_keys) + TaskDbias::floats(args) + Dq::floats(args) +
           BlockDq::floats(args) + sizes.kept * sizes.piece_keys * (sizes.width + sizes.width_v);
  }

  Backward(const AttentionCpuArgs& args, Arena& arena)
      : args_(args),
        sizes_(args),
        scores_(args, arena, true),
        block_(args, arena),
        tile_(args, arena, sizes_.piece_keys),
        dbias_(args, arena),
        dq_(args, arena),
        block_dq_(args, arena),
        dk_(arena.take(sizes_.kept * sizes_.piece_keys * sizes_.width)),
        dv_(arena.take(sizes_.kept * sizes_.piece_keys * sizes_.width_v)) {}

  void run() {
    const int64_t sequences = TaskDbias::sequences(args_), slabs = args_.batch / sequences * args_.n_kv_heads;
    const int64_t tasks = slabs * (args_.piece_per_task ? sizes_.pieces : 1);
    for (int64_t task; (task = next_task(args_)) < tasks;) {
      // All tasks of a piece come before those of the next piece, so a waiting task only waits for one that is already
      // running.
      const int64_t slab = task % slabs, piece = task / slabs;
      for (int64_t n = 0; n < sequences; ++n) {
        const Sequence sequence(args_, slab / args_.n_kv_heads + n);
        for (int64_t g = 0; g < sizes_.group; ++g) {
          run_head(sequence, slab % args_.n_kv_heads, g, n, piece);
        }
      }
    }
  }

 private:
  struct Sizes {
    int64_t group, pieces, piece_keys, width, width_v;
    int64_t kept;  // the number of pieces whose dk and dv are kept until all heads of the group are added

    explicit Sizes(const AttentionCpuArgs& args)
        : group(heads_per_key_head(args)),
          pieces(args.seqlen_k > kAttentionPieceKeys ? (args.seqlen_k + kAttentionPieceKeys - 1) / kAttentionPieceKeys
                                                     : 1),
          piece_keys(pieces > 1 ? kAttentionPieceKeys : round_up(args.seqlen_k, kKeys)),
          width(round_up(args.head_dim, kVec)),
          width_v(round_up(args.head_dim_v, kVec)),
          kept(group > 1 && !args.piece_per_task ? pieces : 1) {}
  };
  // The sums of dk and dv of a piece.
  struct KeySums {
    float *dk, *dv;
  };

  // Processes query head number g of the group that shares a key head. With piece_per_task it processes only
  // first_piece, otherwise all pieces. The sequence is number n of this task.
  void run_head(const Sequence& sequence, int64_t kv, int64_t g, int64_t n, int64_t first_piece) {
    const int64_t h = kv * sizes_.group + g, end_piece = args_.piece_per_task ? first_piece + 1 : sizes_.pieces;
    scores_.select_head(sequence, h);
    dbias_.select_head(sequence, h, g, n);
    dq_.select_head(sequence, h);
    dsink_ = 0;
    for (int64_t p = first_piece; p < end_piece; ++p) {
      const Piece piece(sequence, p);
      if (p > 0 && piece.keys() == 0) {
        break;
      }
      run_piece(sequence, piece, kv, g);
    }
    if (args_.dsink_partial && first_piece == 0) {
      args_.dsink_partial[sequence.index * args_.n_heads + h] = static_cast<float>(dsink_);
    }
    dq_.finish_head();
  }

  void run_piece(const Sequence& sequence, const Piece& piece, int64_t kv, int64_t g) {
    const int64_t at = sizes_.kept > 1 ? piece.index * sizes_.piece_keys : 0;
    const KeySums sums{dk_ + at * sizes_.width, dv_ + at * sizes_.width_v};
    if (g == 0) {
      zero(sums.dk, piece.keys() * sizes_.width);
      zero(sums.dv, piece.keys() * sizes_.width_v);
    }
    const int64_t first = sequence.k_start + piece.first;
    if (piece.first < piece.end) {
      tile_.load_keys(sequence.rows<const T>(args_.k, kv, first), sequence.rows<const T>(args_.v, kv, first),
                      static_cast<int>(piece.end - piece.first));
    }
    for (int64_t i0 = 0; i0 < sequence.len_q; i0 += kLanes) {
      run_block(sequence, piece, kv * sizes_.group + g, i0, sums);
    }
    dbias_.finish_piece(piece.first, piece.keys());
    // The rows after seqlens_k are also written, as zeros.
    if (g == sizes_.group - 1) {
      store_rows(sequence.rows<T>(args_.dk, kv, first), args_.dk.row, sums.dk, sizes_.width, piece.keys(),
                 args_.head_dim, args_.scale);
      store_rows(sequence.rows<T>(args_.dv, kv, first), args_.dv.row, sums.dv, sizes_.width_v, piece.keys(),
                 args_.head_dim_v, 1.f);
    }
  }

  // Processes the block of queries from i0 and the keys of a piece.
  void run_block(const Sequence& sequence, const Piece& piece, int64_t h, int64_t i0, const KeySums& sums) {
    const int rows = sequence.block_rows(i0);
    const KeyRange all = scores_.key_range(i0, rows, 0, sequence.len_k);
    const KeyRange range = scores_.key_range(i0, rows, piece.first, piece.end);
    // the first piece that is added to dq; 0 if the block sees no key
    const int64_t first_piece = all.empty() ? 0 : all.begin / kAttentionPieceKeys;
    if (piece.index == first_piece) {
      dq_.begin(i0, rows);
    }
    const int64_t end_hidden = range.empty() ? piece.last : range.begin;
    dbias_.zero(i0, rows, piece.first, end_hidden - piece.first);
    const bool with_sink = args_.dsink_partial && piece.index == 0;
    if (with_sink || !range.empty()) {
      block_.load(sequence, h, i0, !range.empty());
    }
    if (with_sink) {
      add_to_sink(args_.sink[h], rows);
    }
    if (range.empty()) {
      return;
    }
    dbias_.zero(i0, rows, range.end, piece.last - range.end);
    block_dq_.clear();
    for (int64_t j0 = range.begin; j0 < range.end; j0 += kKeys) {
      run_tile(i0, rows, j0, at_most(range.end - j0, kKeys), j0 - piece.first, sums);
    }
    if constexpr (Dq::kMakesDq) {
      dq_.add(i0, rows, block_dq_, piece.index - first_piece);
    }
  }

  // skip: the number of keys of the piece before this tile
  void run_tile(int64_t i0, int rows, int64_t j0, int keys, int64_t skip, const KeySums& sums) {
    if (!scores_.prepare(i0, rows, j0, keys)) {
      dbias_.zero(i0, rows, j0, keys);
      return;
    }
    tile_.run(scores_, block_, skip, keys, rows);
    dbias_.store(tile_.ds, i0, rows, j0, keys);
    tile_.multiply_by_slope_of_cap(scores_, keys);
    tile_.add_to_keys(scores_, block_, keys, rows, sums.dk + skip * sizes_.width, sizes_.width,
                      sums.dv + skip * sizes_.width_v, sizes_.width_v);
    if constexpr (Dq::kMakesDq) {
      tile_.add_to_queries(scores_, skip, keys, rows, block_dq_.transposed());
    }
  }

  void add_to_sink(float sink, int rows) {
    for (int r = 0; r < rows; ++r) {
      const float share = (sink - block_.lse_high()[r]) * kLog2e - block_.lse_low()[r];
      dsink_ -= std::exp2(share) * block_.delta()[r];
    }
  }

  const AttentionCpuArgs& args_;
  const Sizes sizes_;
  Scores scores_;
  QueryBlock<T, kPairs> block_;
  TileGradient<T, kPairs> tile_;
  TaskDbias dbias_;
  Dq dq_;
  BlockDq block_dq_;
  float *dk_, *dv_;
  double dsink_ = 0;  // in fp64, as the sum may be long
};

template <typename T, bool kPairs, class Dq>
void run_backward(const AttentionCpuArgs& args) {
  Arena arena(Backward<T, kPairs, Dq>::floats(args));
  if (arena.failed()) {
    *args.failed = true;
    return;
  }
  Backward<T, kPairs, Dq>(args, arena).run();
}

template <typename T, bool kPairs>
void backward(const AttentionCpuArgs& args) {
  if constexpr (sizeof(T) == sizeof(float)) {
    run_backward<T, kPairs, DqInPlace>(args);
  } else if (args.piece_per_task) {
    run_backward<T, kPairs, DqLater>(args);
  } else {
    run_backward<T, kPairs, DqOwnSum<T>>(args);
  }
}

}  // namespace
