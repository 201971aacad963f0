#pragma once
// The layout of tiles of 16-bit elements in shared memory, and its description for wgmma. This file has index functions
// only, for host and device.
//
// A tile of `rows` x n elements consists of panels, one after another. A panel has `rows` rows of 64 elements, or of 32
// if n is not a multiple of 64. So a panel consists of whole swizzle atoms (eight rows), the only matrices that the PTX
// ISA describes. Within an atom the 16-byte chunks are permuted, so the same column of eight rows is in eight different
// groups of banks. In rows of 128 bytes, chunk c of row r is at position c ^ (r % 8); in rows of 64 bytes, it is at
// position c ^ (r / 2 % 4). Each panel starts at a multiple of the size of an atom. TMA writes these layouts
// (CU_TENSOR_MAP_SWIZZLE_128B and 64B), and wgmma reads them.
//
// PTX ISA: "Tensor Swizzling modes"; wgmma "Shared Memory Matrix Layout", "Strides", "Matrix Descriptor Format".
#include <cstdint>

#ifdef __CUDACC__
#define FASTATTN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTATTN_HOST_DEVICE inline
#endif

namespace fastattn::sm90 {

constexpr int kAlignment = 1024;  // the alignment of tiles: the size of the largest atom

// Returns the columns of a panel of a tile with `cols` columns.
FASTATTN_HOST_DEVICE constexpr int panel_cols(int cols) {
  return cols % 64 == 0 ? 64 : 32;
}
// The bytes of a row of a panel with kPanel columns.
template <int kPanel>
constexpr int kRowBytes = 2 * kPanel;
template <int kPanel>
constexpr int kAtomBytes = 8 * kRowBytes<kPanel>;

// The offset in bytes of element (row, col) in a tile of `rows` rows.
template <int kPanel>
FASTATTN_HOST_DEVICE constexpr int tile_offset(int row, int col, int rows) {
  const int byte = col % kPanel * 2;
  const int chunk = byte / 16 ^ row * kPanel / 64 % (kPanel / 8);
  return (col / kPanel * rows + row) * kRowBytes<kPanel> + chunk * 16 + byte % 16;
}

// A descriptor has fields in units of 16 bytes. Bits 0-13 hold the address, and bits 16-29 the leading offset. Bits
// 32-45 hold the stride offset, which is the distance between groups of eight rows here. Bits 62-63 are 1 for the
// 128-byte swizzle and 2 for the 64-byte swizzle.
template <int kPanel>
FASTATTN_HOST_DEVICE constexpr uint64_t matrix_descriptor(uint32_t address, uint32_t leading) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(kAtomBytes<kPanel> >> 4) << 32 | uint64_t{kPanel == 64 ? 1 : 2} << 62;
}

// Describes one K step of wgmma, from column 16 * step on, of a tile whose rows are M or N and whose columns are K
// ("K-major"). The hardware applies the swizzle to the sum of address and offset, so a step within a row is a plain
// addition. The leading offset is not used.
template <int kPanel>
FASTATTN_HOST_DEVICE constexpr uint64_t k_major(uint32_t tile, int rows, int step) {
  constexpr int kSteps = kPanel / 16;
  const uint32_t offset = step / kSteps * rows * kRowBytes<kPanel> + step % kSteps * 32;
  return matrix_descriptor<kPanel>(tile, 16) + (offset >> 4);  // addresses are below 2^18, so there is no carry
}

// Describes one K step, from row 16 * step on, of a tile whose rows are K and whose columns are N ("MN-major"). The
// leading offset is the distance between panels.
template <int kPanel>
FASTATTN_HOST_DEVICE constexpr uint64_t mn_major(uint32_t tile, int rows, int step) {
  return matrix_descriptor<kPanel>(tile, rows * kRowBytes<kPanel>) + (step * 2 * kAtomBytes<kPanel> >> 4);
}

}  // namespace fastattn::sm90
