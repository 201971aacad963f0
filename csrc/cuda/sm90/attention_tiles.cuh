#pragma once
// The tiles of attention, their order, and the blocks of the other side that each one sees. This file has index
// arithmetic only, for host and device. Positions and window sides are below 2^29, so that sums do not overflow.
#include <algorithm>
#include <cmath>

#include "api.h"
#include "cuda/sm90/swizzle.cuh"

namespace fastattn::sm90 {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr int kFar = 1 << 29;    // an unlimited side of a window
constexpr int kStatsRows = 128;  // the backward's workspace pads the rows of lse and delta to a multiple of this

struct AttentionShape {
  const int32_t *seqlens_k, *cu_seqlens_q, *cu_seqlens_k;
  // If the sequences are packed, seqlen_q and seqlen_k are the numbers of rows of the tensors.
  int batch, n_heads, n_kv_heads, seqlen_q, seqlen_k;
  int left, right;  // the sides of the window
  bool top_left;

  FASTATTN_HOST_DEVICE int group() const { return n_heads / n_kv_heads; }
  // True if a tensor map may read keys after the end of a sequence.
  FASTATTN_HOST_DEVICE bool ragged_keys() const { return cu_seqlens_k != nullptr || seqlens_k != nullptr; }
  FASTATTN_HOST_DEVICE bool packed() const { return cu_seqlens_q != nullptr; }
  FASTATTN_HOST_DEVICE int batched() const { return packed() ? 1 : batch; }  // the batch size of the tensors
};

FASTATTN_HOST_DEVICE constexpr int smaller(int a, int b) {
  return a < b ? a : b;
}
FASTATTN_HOST_DEVICE constexpr int larger(int a, int b) {
  return a > b ? a : b;
}
FASTATTN_HOST_DEVICE constexpr int blocks_of(int length, int block) {
  return (length + block - 1) / block;
}

// Row x of one side sees positions low(x) to high(x) of the other side, which has `length` positions.
struct Band {
  int off, left, right, length;

  FASTATTN_HOST_DEVICE int low(int x) const { return x + off - left; }
  FASTATTN_HOST_DEVICE int high(int x) const { return smaller(length - 1, x + off + right); }
};

// Packed rows are divided into tiles of `rows` rows: sequence b begins with tile cu_seqlens[b] / rows + b. Each
// sequence gets at least as many tiles as its rows need. The total, count_tiles, grows with the number of rows, not
// with the longest sequence. Rows after the last sequence are treated as one more sequence, which sees nothing.
struct PackedTile {
  int sequence, within;
};
FASTATTN_HOST_DEVICE int first_tile(const int32_t* cu_seqlens, int sequence, int rows) {
  return cu_seqlens[sequence] / rows + sequence;
}
FASTATTN_HOST_DEVICE int count_tiles(bool packed, int length, int batch, int rows) {
  return packed ? length / rows + batch + 1 : blocks_of(length, rows);
}
FASTATTN_HOST_DEVICE PackedTile find_tile(const int32_t* cu_seqlens, int batch, int rows, int tile) {
  int low = 0, high = batch;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (first_tile(cu_seqlens, middle, rows) <= tile) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return {low, tile - first_tile(cu_seqlens, low, rows)};
}

struct Sequence {
  int index;                   // in the batch dimension of the tensors; 0 if packed
  int q_begin, q_len;          // first row and number of rows
  int k_begin, k_len, k_rows;  // the first k_len of the k_rows are visible
  int stats_begin;             // the first row in the workspace of the backward
  Band of_queries, of_keys;    // the keys that a query sees, and the queries that see a key

  FASTATTN_HOST_DEVICE Sequence(const AttentionShape& shape, int b)
      : index(b), q_begin(0), q_len(shape.seqlen_q), k_begin(0), k_rows(shape.seqlen_k), stats_begin(0) {
    bool behind = false;  // the rows after the last sequence
    if (shape.packed()) {
      behind = b == shape.batch;
      index = 0;
      q_begin = shape.cu_seqlens_q[b];
      q_len = (behind ? shape.seqlen_q : shape.cu_seqlens_q[b + 1]) - q_begin;
      k_begin = shape.cu_seqlens_k[b];
      k_rows = (behind ? shape.seqlen_k : shape.cu_seqlens_k[b + 1]) - k_begin;
      stats_begin = first_tile(shape.cu_seqlens_q, b, kStatsRows) * kStatsRows;
    }
    k_len = behind ? 0 : shape.seqlens_k != nullptr ? larger(0, smaller(shape.seqlens_k[b], k_rows)) : k_rows;
    const int off = shape.top_left ? 0 : k_len - q_len;
    of_queries = {off, shape.left, shape.right, k_len};
    of_keys = {-off, shape.right, shape.left, q_len};
  }
};

// A tile of a query head for passes that read no keys, and its first row in the workspace of the backward.
struct RowTile {
  int batch, row;
  Sequence sequence;

  FASTATTN_HOST_DEVICE RowTile(const AttentionShape& shape, int b, int r)
      : batch(b), row(r * kStatsRows), sequence(shape, b) {}
  FASTATTN_HOST_DEVICE static RowTile find(const AttentionShape& shape, int b, int tile) {
    if (!shape.packed()) {
      return {shape, b, tile};
    }
    const PackedTile place = find_tile(shape.cu_seqlens_q, shape.batch, kStatsRows, tile);
    return {shape, place.sequence, place.within};
  }
};

// At least one row sees blocks [begin, end). Of these, every row sees all of [full_begin, full_end).
struct Blocks {
  int begin, full_begin, full_end, end;
};

// What rows `first` to `last` see, in blocks of `block` positions.
FASTATTN_HOST_DEVICE Blocks visible_blocks(const Band& band, int first, int last, int block) {
  const int low = larger(0, band.low(first)), high = band.high(last);
  if (first > last || low > high) {
    return {0, 0, 0, 0};
  }
  Blocks blocks;
  blocks.begin = low / block;
  blocks.end = high / block + 1;
  blocks.full_begin = smaller(blocks_of(larger(0, band.low(last)), block), blocks.end);
  blocks.full_end = larger(0, band.high(first) + 1) / block;
  blocks.full_begin = larger(blocks.full_begin, blocks.begin);
  blocks.full_end = larger(smaller(blocks.full_end, blocks.end), blocks.full_begin);
  return blocks;
}

// The order of tiles. Heads form sets whose streamed operands stay in the L2 cache. Each sequence has its own heads,
// but packed sequences count as one sequence. Within a set, the rows that see most come first. The heads of the same
// rows follow each other.
struct TileOrder {
  int row_blocks, heads, set;  // set: the number of heads in a set
  bool last_first;

  struct Place {
    int row_block, head;
  };
  struct InSequence {
    int batch, head, row_block;
  };
  FASTATTN_HOST_DEVICE int64_t count() const { return int64_t{row_blocks} * heads; }

  FASTATTN_HOST_DEVICE Place place(int64_t tile) const {
    const int64_t per_set = int64_t{row_blocks} * set;
    const int first = static_cast<int>(tile / per_set) * set;
    const int rest = static_cast<int>(tile % per_set);
    const int together = smaller(set, heads - first);
    const int block = rest / together;
    return {last_first ? row_blocks - 1 - block : block, first + rest % together};
  }

  // cu_seqlens belongs to packed rows, or is null. n_heads is per sequence, and rows is per tile.
  FASTATTN_HOST_DEVICE InSequence in_sequence(int64_t tile, const int32_t* cu_seqlens, int batch, int n_heads,
                                              int rows) const {
    const Place found = place(tile);
    if (cu_seqlens == nullptr) {
      return {found.head / n_heads, found.head % n_heads, found.row_block};
    }
    const PackedTile packed = find_tile(cu_seqlens, batch, rows, found.row_block);
    return {packed.sequence, found.head, packed.within};
  }
};

// A tile of kRows queries of one head, and the blocks of kBlock keys that they see.
template <int kRows, int kBlock>
struct QueryTile {
  int batch, head, row;  // row counts within the sequence
  Sequence sequence;
  Blocks keys;

  FASTATTN_HOST_DEVICE QueryTile(const AttentionShape& shape, const TileOrder& order, int64_t index)
      : QueryTile(shape, order.in_sequence(index, shape.cu_seqlens_q, shape.batch, shape.n_heads, kRows)) {}
  FASTATTN_HOST_DEVICE QueryTile(const AttentionShape& shape, const TileOrder::InSequence& place)
      : batch(place.batch),
        head(place.head),
        row(place.row_block * kRows),
        sequence(shape, batch),
        keys(visible_blocks(sequence.of_queries, row, smaller(row + kRows, sequence.q_len) - 1, kBlock)) {}
  FASTATTN_HOST_DEVICE bool exists() const { return row < sequence.q_len; }
};

// A tile of kRows keys of one key head, and the blocks of kBlock queries that see them, in every query head of the
// group.
template <int kRows, int kBlock>
struct KeyTile {
  int batch, kv_head, row;
  Sequence sequence;
  Blocks queries;

  FASTATTN_HOST_DEVICE KeyTile(const AttentionShape& shape, const TileOrder& order, int64_t index)
      : KeyTile(shape, order.in_sequence(index, shape.cu_seqlens_k, shape.batch, shape.n_kv_heads, kRows)) {}
  FASTATTN_HOST_DEVICE KeyTile(const AttentionShape& shape, const TileOrder::InSequence& place)
      : batch(place.batch),
        kv_head(place.head),
        row(place.row_block * kRows),
        sequence(shape, batch),
        queries(visible_blocks(sequence.of_keys, row, smaller(row + kRows, sequence.k_len) - 1, kBlock)) {}
  FASTATTN_HOST_DEVICE bool exists() const { return row < sequence.k_rows; }
};

// The number of key heads in a set: their keys and values, or the queries and gradients that the backward streams
// instead, take at most 32 MiB. Query heads that share keys are always in one set.
FASTATTN_HOST_DEVICE int kv_heads_per_set(const AttentionShape& shape, int streamed_rows, int row_bytes) {
  constexpr int64_t kCache = 32 << 20;
  const int64_t bytes = larger(1, streamed_rows) * int64_t{row_bytes};
  const int64_t heads = kCache / bytes, all = int64_t{shape.batched()} * shape.n_kv_heads;
  return static_cast<int>(heads < 1 ? 1 : heads < all ? heads : all);
}

// Queries are processed from last to first, because under a causal mask the last ones see most. Keys are processed from
// first to last. with_dq means that fp32 sums are streamed too.
FASTATTN_HOST_DEVICE TileOrder query_order(const AttentionShape& shape, int rows, int head_dim) {
  return {count_tiles(shape.packed(), shape.seqlen_q, shape.batch, rows), shape.batched() * shape.n_heads,
          kv_heads_per_set(shape, shape.seqlen_k, head_dim * 4) * shape.group(), true};
}
FASTATTN_HOST_DEVICE TileOrder key_order(const AttentionShape& shape, int rows, int head_dim, bool with_dq) {
  return {count_tiles(shape.packed(), shape.seqlen_k, shape.batch, rows), shape.batched() * shape.n_kv_heads,
          kv_heads_per_set(shape, shape.seqlen_q * shape.group(), head_dim * (with_dq ? 8 : 4)), false};
}

// Attention of a few queries on a cache. Every block of threads has a share of the keys of a sequence, so there is no
// order of tiles.
struct DecodeShape {
  const int32_t* lengths;  // the lengths without the seqlen_new appended keys
  int batch, n_heads, n_kv_heads, seqlen_q, seqlen_new, capacity;
  int left, right;  // the sides of the window
  int splits;

  FASTATTN_HOST_DEVICE int group() const { return n_heads / n_kv_heads; }
  // The number of rows of a key head: its heads of the first query, then its heads of the next query, and so on.
  FASTATTN_HOST_DEVICE int rows() const { return group() * seqlen_q; }
};

// kRows rows of a key head, and the blocks of kBlock keys of one split that they see.
template <int kRows, int kBlock>
struct DecodeTile {
  int batch, kv_head, row;
  Band band;  // the keys that a query sees
  Blocks keys;

  FASTATTN_HOST_DEVICE DecodeTile(const DecodeShape& shape, int index, int split)
      : batch(index / row_blocks(shape) / shape.n_kv_heads),
        kv_head(index / row_blocks(shape) % shape.n_kv_heads),
        row(index % row_blocks(shape) * kRows) {
    const int length = larger(0, smaller(shape.lengths[batch] + shape.seqlen_new, shape.capacity));
    band = {length - shape.seqlen_q, shape.left, shape.right, length};
    const int last = smaller(row + kRows, shape.rows()) - 1;
    keys = visible_blocks(band, row / shape.group(), last / shape.group(), kBlock);
    // The shares differ by at most one block.
    const int64_t count = keys.end - keys.begin;
    keys.end = keys.begin + static_cast<int>(count * (split + 1) / shape.splits);
    keys.begin += static_cast<int>(count * split / shape.splits);
  }
  FASTATTN_HOST_DEVICE static int row_blocks(const DecodeShape& shape) { return blocks_of(shape.rows(), kRows); }
};

// Returns the smallest number of splits whose last wave of blocks leaves little of the device idle. The host does not
// know the lengths. kernels/attention_decode.py has the same function.
inline int choose_splits(int64_t tiles, int64_t key_blocks, int64_t slots, int most) {
  if (tiles >= 0.8 * slots || key_blocks <= 4) {
    return 1;
  }
  const int limit = static_cast<int>(std::min({int64_t{most}, slots, key_blocks}));
  const auto filled = [&](int splits) {
    const double waves = static_cast<double>(tiles) * splits / slots;
    return waves / std::ceil(waves);
  };
  double best = 0;
  for (int splits = 1; splits <= limit; ++splits) {
    best = std::max(best, filled(splits));
  }
  int splits = 1;
  while (filled(splits) < 0.85 * best) {
    ++splits;
  }
  return splits;
}

}  // namespace fastattn::sm90
