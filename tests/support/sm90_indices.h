// The index functions of csrc/cuda/sm90 and the order of the tiles, as functions that tests/kernels/test_sm90_units.py
// calls on the host. sm90_units.cu includes this file.
#pragma once

#include <algorithm>

#include "cuda/sm90/attention_common.cuh"

using namespace fastattn;
using namespace fastattn::sm90;

extern "C" {

// The values of the index functions for one argument, for the models in the tests.
__attribute__((visibility("default"))) void unit_index(int thread, int i, int* out) {
  out[0] = accumulator_row(thread, i);
  out[1] = accumulator_col(thread, i);
  out[2] = operand_row(thread, i);
  out[3] = operand_col(thread, i, 0);
  out[4] = operand_col(thread, i, 1);
}
__attribute__((visibility("default"))) int unit_accumulator_offset(int thread, int i, int rows, int panel) {
  return panel == 64 ? accumulator_offset<64>(first_offset<64>(thread), i, rows)
                     : accumulator_offset<32>(first_offset<32>(thread), i, rows);
}
__attribute__((visibility("default"))) int unit_tile_offset(int row, int col, int rows, int panel) {
  return panel == 64 ? tile_offset<64>(row, col, rows) : tile_offset<32>(row, col, rows);
}
__attribute__((visibility("default"))) uint64_t unit_descriptor(bool k_is_inner, uint32_t tile, int rows, int step,
                                                                int panel) {
  if (panel == 64) {
    return k_is_inner ? k_major<64>(tile, rows, step) : mn_major<64>(tile, rows, step);
  }
  return k_is_inner ? k_major<32>(tile, rows, step) : mn_major<32>(tile, rows, step);
}

// The tiles of a call in the order of work. shape is (batch, n_heads, n_kv_heads, seqlen_q, seqlen_k, left, right,
// top_left). Tiles of keys may be with_dq. out has (batch, head, row, begin, full_begin, full_end, end) per tile.
// Returns the number of tiles, at most `room`. The sizes of tiles (`rows`) and blocks (`block`) are those of the
// kernels.
__attribute__((visibility("default"))) int unit_tiles(const int* shape, bool of_keys, bool with_dq, int rows, int block,
                                                      int head_dim, int* out, int room) {
  const AttentionShape s{nullptr,  nullptr,  nullptr,  shape[0], shape[1],     shape[2],
                         shape[3], shape[4], shape[5], shape[6], shape[7] != 0};
  const TileOrder order = of_keys ? key_order(s, rows, head_dim, with_dq) : query_order(s, rows, head_dim);
  for (int64_t index = 0; index < std::min<int64_t>(order.count(), room); ++index) {
    const auto write = [&](int batch, int head, int row, const Blocks& b) {
      const int values[] = {batch, head, row, b.begin, b.full_begin, b.full_end, b.end};
      std::copy(values, values + 7, out + 7 * index);
    };
    const auto write_queries = [&](const auto& tile) { write(tile.batch, tile.head, tile.row, tile.keys); };
    if (of_keys) {
      const KeyTile<128, 64> tile(s, order, index);
      write(tile.batch, tile.kv_head, tile.row, tile.queries);
    } else if (rows == 192) {
      write_queries(QueryTile<192, 128>(s, order, index));
    } else if (block == 128) {
      write_queries(QueryTile<128, 128>(s, order, index));
    } else if (block == 176) {
      write_queries(QueryTile<128, 176>(s, order, index));
    } else if (block == 112) {
      write_queries(QueryTile<128, 112>(s, order, index));
    } else {
      write_queries(QueryTile<128, 80>(s, order, index));
    }
  }
  return static_cast<int>(order.count());
}

// Packed rows: writes (sequence, tile within it) for each tile of `rows` rows. Returns the number of tiles, at most
// `room`.
__attribute__((visibility("default"))) int unit_packed_tiles(const int32_t* cu_seqlens, int batch, int total, int rows,
                                                             int* out, int room) {
  const int count = count_tiles(true, total, batch, rows);
  for (int tile = 0; tile < std::min(count, room); ++tile) {
    const PackedTile found = find_tile(cu_seqlens, batch, rows, tile);
    out[2 * tile] = found.sequence;
    out[2 * tile + 1] = found.within;
  }
  return count;
}

// The same for a cache: shape is (batch, n_heads, n_kv_heads, seqlen_q, seqlen_new, capacity, left, right, splits), out
// has (split, batch, key head, row, begin, end) per block of threads.
__attribute__((visibility("default"))) int unit_decode_tiles(const int* shape, const int32_t* lengths, int* out,
                                                             int room) {
  const DecodeShape s{lengths,  shape[0], shape[1], shape[2], shape[3],
                      shape[4], shape[5], shape[6], shape[7], shape[8]};
  using Tile = DecodeTile<kSlab, kDecodeKeysSm90>;
  const int tiles = s.batch * s.n_kv_heads * Tile::row_blocks(s);
  for (int index = 0; index < std::min(tiles * s.splits, room); ++index) {
    const int split = index / tiles;
    const Tile tile(s, index % tiles, split);
    const int values[] = {split, tile.batch, tile.kv_head, tile.row, tile.keys.begin, tile.keys.end};
    std::copy(values, values + 6, out + 6 * index);
  }
  return tiles * s.splits;
}
__attribute__((visibility("default"))) int unit_choose_splits(int tiles, int key_blocks, int slots, int most) {
  return choose_splits(tiles, key_blocks, slots, most);
}
}
