#pragma once
// The layout of tiles of 16-bit elements in shared memory, and its description for wgmma. Index functions only, for
// host and device.
//
// A tile of `rows` x 64 p elements consists of p panels, one after another, of `rows` rows of 128 bytes. Each panel
// starts at a multiple of 1024 bytes. Within a row the eight 16-byte chunks are permuted: chunk c of row r is at
// position c ^ (r % 8), so the same column of eight rows is in eight different groups of banks. TMA writes this layout
// (CU_TENSOR_MAP_SWIZZLE_128B) and wgmma reads it.
//
// PTX ISA: "Tensor Swizzling modes"; wgmma "Shared Memory Matrix Layout", "Strides", "Matrix Descriptor Format".
#include <cstdint>

#ifdef __CUDACC__
#define FASTATTN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTATTN_HOST_DEVICE inline
#endif

namespace fastattn::sm90 {

constexpr int kPanelCols = 64;    // of 16-bit elements
constexpr int kRowBytes = 128;    // of a panel
constexpr int kAtomBytes = 1024;  // eight rows; then the pattern repeats

// The offset in bytes of element (row, col) in a tile of `rows` rows.
FASTATTN_HOST_DEVICE constexpr int tile_offset(int row, int col, int rows) {
  const int panel = col / kPanelCols;
  const int byte = col % kPanelCols * 2;
  const int chunk = byte / 16 ^ row % 8;
  return (panel * rows + row) * kRowBytes + chunk * 16 + byte % 16;
}

// Fields in units of 16 bytes: bits 0-13 address, 16-29 leading offset, 32-45 stride offset; 62-63: 1 = 128-byte
// swizzle.
FASTATTN_HOST_DEVICE constexpr uint64_t matrix_descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | uint64_t{1} << 62;
}

// A tile whose rows are M or N and whose columns are K ("K-major"), from column 16 * step on: one K step of wgmma. The
// hardware applies the swizzle to the sum of address and offset, so a step within a row is a plain addition. `stride`
// is the distance between groups of eight rows; the leading offset is not used.
FASTATTN_HOST_DEVICE constexpr uint64_t k_major(uint32_t tile, int rows, int step) {
  constexpr int kSteps = kPanelCols / 16;
  const uint32_t offset = step / kSteps * rows * kRowBytes + step % kSteps * 32;
  return matrix_descriptor(tile, 16, kAtomBytes) + (offset >> 4);  // addresses are below 2^18, so there is no carry
}

// A tile whose rows are K and whose columns are N ("MN-major"), from row 16 * step on. `stride` is the distance between
// groups of eight rows, the leading offset the distance between panels.
FASTATTN_HOST_DEVICE constexpr uint64_t mn_major(uint32_t tile, int rows, int step) {
  return matrix_descriptor(tile, rows * kRowBytes, kAtomBytes) + (step * 2 * kAtomBytes >> 4);
}

}  // namespace fastattn::sm90
