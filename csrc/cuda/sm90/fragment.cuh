#pragma once
// Which thread of a warpgroup holds which element of a wgmma operand. This file has index functions only, for host and
// device.
//
// A thread holds two of the 64 rows; they are 8 apart. Four threads share a row; each has two neighbouring columns of
// every eight. The rounded accumulators of 16 columns are the A operand of a K step of 16, so threads need not exchange
// data.
//
// PTX ISA: wgmma "Register Fragments and Shared Memory Matrix Layouts", accumulator D and matrix A for .m64nNk16.
#include "cuda/sm90/swizzle.cuh"

namespace fastattn::sm90 {

// The row of element i of the accumulators of `thread` (0 to 127). The next function returns its column.
FASTATTN_HOST_DEVICE constexpr int accumulator_row(int thread, int i) {
  return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
}
FASTATTN_HOST_DEVICE constexpr int accumulator_col(int thread, int i) {
  return i / 4 * 8 + thread % 4 * 2 + i % 2;
}

// Returns which of the thread's two rows accumulator i belongs to.
FASTATTN_HOST_DEVICE constexpr int row_of(int i) {
  return i / 2 % 2;
}

// The offset of accumulator i in a tile of `rows` rows, relative to accumulator 0. It takes one instruction, because
// rows 8 apart have the same swizzle, and columns 8 apart in a row differ in the bits of their chunk.
template <int kPanel>
FASTATTN_HOST_DEVICE constexpr int first_offset(int thread) {
  return tile_offset<kPanel>(accumulator_row(thread, 0), accumulator_col(thread, 0), 64);
}
template <int kPanel>
FASTATTN_HOST_DEVICE constexpr int accumulator_offset(int first, int i, int rows) {
  const int col = accumulator_col(0, i);
  return (first ^ col % kPanel / 8 * 16) + col % 8 * 2 +
         (col / kPanel * rows + accumulator_row(0, i)) * kRowBytes<kPanel>;
}

// Register `reg` (0 to 3) of the A operand holds two columns of the row; `half` 0 is in the lower bits.
FASTATTN_HOST_DEVICE constexpr int operand_row(int thread, int reg) {
  return thread / 32 * 16 + thread % 32 / 4 + reg % 2 * 8;
}
FASTATTN_HOST_DEVICE constexpr int operand_col(int thread, int reg, int half) {
  return reg / 2 * 8 + thread % 4 * 2 + half;
}

}  // namespace fastattn::sm90
