#pragma once
// Which tiles of attention there are, in which order they are worked on, and which blocks of the other side each one
// sees. Index arithmetic only, for host and device. Positions and window sides are below 2^29, so that sums fit.
#include <algorithm>
#include <cmath>

#include "api.h"
#include "cuda/sm90/swizzle.cuh"

namespace fastattn::sm90 {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr int kFar = 1 << 29;    // an unlimited side of a window
constexpr int kStatsRows = 128;  // rows of lse and delta in the workspace of the backward are a multiple of this

struct AttentionShape {
  const int32_t *seqlens_k, *cu_seqlens_q, *cu_seqlens_k;
  int batch, n_heads, n_kv_heads, seqlen_q, seqlen_k;  // packed: of all sequences together
  int left, right;                                     // of the window
  bool top_left;

  FASTATTN_HOST_DEVICE int group() const { return n_heads / n_kv_heads; }
  // Whether keys that a tensor map would read lie behind those of a sequence
  FASTATTN_HOST_DEVICE bool ragged_keys() const { return cu_seqlens_k != nullptr || seqlens_k != nullptr; }
  FASTATTN_HOST_DEVICE bool packed() const { return cu_seqlens_q != nullptr; }
  FASTATTN_HOST_DEVICE int batched() const { return packed() ? 1 : batch; }  // of the tensors
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

// Row x of one side sees positions low(x) to high(x) of the other, which has `length` of them.
struct Band {
  int off, left, right, length;

  FASTATTN_HOST_DEVICE int low(int x) const { return x + off - left; }
  FASTATTN_HOST_DEVICE int high(int x) const { return smaller(length - 1, x + off + right); }
};

// Packed rows are divided into tiles of `rows`: sequence b begins with tile cu_seqlens[b] / rows + b. So it gets at
// least as many as its rows need, and all together count_tiles: that grows with the rows and not with the longest
// sequence. The rows behind the last sequence come after it as if they were one more, which has nothing on the other
// side.
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
  int index;                   // along the batch dimension of the tensors: 0 if packed
  int q_begin, q_len;          // first row and number of rows
  int k_begin, k_len, k_rows;  // k_len of the k_rows are visible
  int stats_begin;             // row in the workspace of the backward
  Band of_queries, of_keys;    // what a query sees of the keys, and a key of the queries

  FASTATTN_HOST_DEVICE Sequence(const AttentionShape& shape, int b)
      : index(b), q_begin(0), q_len(shape.seqlen_q), k_begin(0), k_rows(shape.seqlen_k), stats_begin(0) {
    bool behind = false;  // the last sequence
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

// A tile of a head of queries for what takes no keys, and where its rows begin in the workspace of the backward
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

// Blocks begin to end - 1 are seen by some row; of these full_begin to full_end - 1 by every row in every position.
struct Blocks {
  int begin, full_begin, full_end, end;
};

// What rows first to last see, in blocks of `block` positions
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

// The order of work: heads (of all sequences; packed ones count as one) in sets whose streamed operands stay in the L2
// cache, within a set the rows that see most first, within a row the heads.
struct TileOrder {
  int row_blocks, heads, set;  // set: heads that go together
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

  // `cu_seqlens`: of packed rows, or null; n_heads: of one sequence; rows: of a tile
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

// kRows queries of one head and the blocks of kBlock keys that they see
template <int kRows, int kBlock>
struct QueryTile {
  int batch, head, row;  // row: within the sequence
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

// kRows keys of one key head and the blocks of kBlock queries that see them, in every query head of the group
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

// Heads that go together in the order of work: the keys and values of all, or the queries and gradients that the
// backward streams instead, are at most 32 MiB; whole groups of query heads that share keys.
FASTATTN_HOST_DEVICE int kv_heads_per_set(const AttentionShape& shape, int streamed_rows, int row_bytes) {
  constexpr int64_t kCache = 32 << 20;
  const int64_t bytes = larger(1, streamed_rows) * int64_t{row_bytes};
  const int64_t heads = kCache / bytes, all = int64_t{shape.batched()} * shape.n_kv_heads;
  return static_cast<int>(heads < 1 ? 1 : heads < all ? heads : all);
}

// Queries last to first: under a causal mask the last ones see most. Keys first to last. with_dq: sums in fp32 go by
// too.
FASTATTN_HOST_DEVICE TileOrder query_order(const AttentionShape& shape, int rows, int head_dim) {
  return {count_tiles(shape.packed(), shape.seqlen_q, shape.batch, rows), shape.batched() * shape.n_heads,
          kv_heads_per_set(shape, shape.seqlen_k, head_dim * 4) * shape.group(), true};
}
FASTATTN_HOST_DEVICE TileOrder key_order(const AttentionShape& shape, int rows, int head_dim, bool with_dq) {
  return {count_tiles(shape.packed(), shape.seqlen_k, shape.batch, rows), shape.batched() * shape.n_kv_heads,
          kv_heads_per_set(shape, shape.seqlen_q * shape.group(), head_dim * (with_dq ? 8 : 4)), false};
}

// Attention of a few queries on a cache: every block of threads has a share of the keys of a sequence, so there is no
// order of work.
struct DecodeShape {
  const int32_t* lengths;  // without the seqlen_new keys that were appended
  int batch, n_heads, n_kv_heads, seqlen_q, seqlen_new, capacity;
  int left, right;  // of the window
  int splits;

  FASTATTN_HOST_DEVICE int group() const { return n_heads / n_kv_heads; }
  FASTATTN_HOST_DEVICE int rows() const { return group() * seqlen_q; }  // of a key head: query by query its heads
};

// kRows rows of a key head, and of the blocks of kBlock keys that they see those of one split
template <int kRows, int kBlock>
struct DecodeTile {
  int batch, kv_head, row;
  Band band;  // of queries
  Blocks keys;

  FASTATTN_HOST_DEVICE DecodeTile(const DecodeShape& shape, int index, int split)
      : batch(index / row_blocks(shape) / shape.n_kv_heads),
        kv_head(index / row_blocks(shape) % shape.n_kv_heads),
        row(index % row_blocks(shape) * kRows) {
    const int length = larger(0, smaller(shape.lengths[batch] + shape.seqlen_new, shape.capacity));
    band = {length - shape.seqlen_q, shape.left, shape.right, length};
    const int last = smaller(row + kRows, shape.rows()) - 1;
    keys = visible_blocks(band, row / shape.group(), last / shape.group(), kBlock);
    const int64_t count = keys.end - keys.begin;  // shares differ by one block at most
    keys.end = keys.begin + static_cast<int>(count * (split + 1) / shape.splits);
    keys.begin += static_cast<int>(count * split / shape.splits);
  }
  FASTATTN_HOST_DEVICE static int row_blocks(const DecodeShape& shape) { return blocks_of(shape.rows(), kRows); }
};

// The least number of splits whose last wave of blocks leaves little of the device idle; lengths are not known to the
// host. kernels/attention_decode.py does the same.
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
