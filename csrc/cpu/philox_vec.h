#pragma once
// The keep decisions of dropout for consecutive columns of a row. One Philox4x32-10 block decides 8 columns, and one
// bit is stored per column: a block of columns is drawn first and then used by the loop over the row.
//
// A register holds one 32-bit word of kBlocks counters in the low halves of its 64-bit lanes. The multiplication leaves
// values in the high halves that are never read again. So a round is 2 products, 2 shifts and 2 (three-way) xors. With
// AVX-512, a group of 8 columns costs about 9 instructions. The result is equal to reference.philox_keep bit for bit.
#include "api.h"
#include "vec.h"

namespace {

#if defined(__AVX512F__)

using Words = __m512i;
constexpr int kBlocks = 8;

inline Words words(uint32_t value) {
  return _mm512_set1_epi64(value);
}
inline Words consecutive(uint32_t first) {  // in the order that the unpacking in keep_bits reverses
  return _mm512_add_epi32(_mm512_set1_epi64(first), _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7));
}
inline Words multiply(Words a, Words b) {
  return _mm512_mul_epu32(a, b);
}
inline Words high_xor(Words product, Words a, Words key) {
  return _mm512_ternarylogic_epi64(_mm512_srli_epi64(product, 32), a, key, 0x96);
}
inline void keep_bits(const Words word[4], uint32_t threshold, uint8_t* keep) {
  const __m512i words01 = _mm512_mask_shuffle_epi32(word[0], 0xaaaa, word[1], _MM_PERM_CCAA);
  const __m512i words23 = _mm512_mask_shuffle_epi32(word[2], 0xaaaa, word[3], _MM_PERM_CCAA);
  const __m512i below = _mm512_set1_epi16(static_cast<int16_t>(threshold - 1));
  const uint64_t low = _mm512_cmpgt_epu16_mask(_mm512_unpacklo_epi64(words01, words23), below);
  const uint64_t high = _mm512_cmpgt_epu16_mask(_mm512_unpackhi_epi64(words01, words23), below);
  const uint64_t bits = high << 32 | low;
  std::memcpy(keep, &bits, sizeof(bits));
}

#elif defined(__AVX2__)

using Words = __m256i;
constexpr int kBlocks = 4;

inline Words words(uint32_t value) {
  return _mm256_set1_epi64x(value);
}
inline Words consecutive(uint32_t first) {
  return _mm256_add_epi32(_mm256_set1_epi64x(first), _mm256_setr_epi64x(0, 1, 2, 3));
}
inline Words multiply(Words a, Words b) {
  return _mm256_mul_epu32(a, b);
}
inline Words high_xor(Words product, Words a, Words key) {
  return _mm256_xor_si256(_mm256_srli_epi64(product, 32), _mm256_xor_si256(a, key));
}
inline void keep_bits(const Words word[4], uint32_t threshold, uint8_t* keep) {
  const __m256i words01 = _mm256_blend_epi32(word[0], _mm256_slli_epi64(word[1], 32), 0b10101010);
  const __m256i words23 = _mm256_blend_epi32(word[2], _mm256_slli_epi64(word[3], 32), 0b10101010);
  const __m256i below = _mm256_set1_epi16(static_cast<int16_t>(threshold - 1));
  const auto dropped = [&](__m256i halfwords) {
    return _mm256_cmpeq_epi16(_mm256_subs_epu16(halfwords, below), _mm256_setzero_si256());
  };
  const __m256i bytes = _mm256_packs_epi16(dropped(_mm256_unpacklo_epi64(words01, words23)),
                                           dropped(_mm256_unpackhi_epi64(words01, words23)));
  const uint32_t bits = ~static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
  std::memcpy(keep, &bits, sizeof(bits));
}

#else

using Words = uint64_t;
constexpr int kBlocks = 1;

inline Words words(uint32_t value) {
  return value;
}
inline Words consecutive(uint32_t first) {
  return first;
}
inline Words multiply(Words a, Words b) {
  return (a & 0xffffffff) * b;
}
inline Words high_xor(Words product, Words a, Words key) {
  return product >> 32 ^ a ^ key;
}
inline void keep_bits(const Words word[4], uint32_t threshold, uint8_t* keep) {
  uint8_t bits = 0;
  for (int column = 0; column < 8; ++column) {
    const uint32_t halfword = word[column / 2] >> (column % 2 * 16) & 0xffff;
    bits |= static_cast<uint8_t>(halfword >= threshold) << column;
  }
  *keep = bits;
}

#endif

// The number of bytes that draw_keep writes for `cols` columns.
constexpr int64_t keep_bytes(int64_t cols) {
  return (cols + 63) / 64 * 8;
}

// Draws columns [first, first + cols) of (row, slab); first is a multiple of 8. Bit i % 8 of keep[i / 8] is set if
// column first + i is kept. dropout.threshold must be above 0. Whole vectors are written: keep needs keep_bytes(cols)
// bytes.
inline void draw_keep(const fastattn::Dropout& dropout, uint32_t row, uint32_t slab, int64_t first, int64_t cols,
                      uint8_t* keep) {
  const uint64_t seed = static_cast<uint64_t>(dropout.rng[0]);
  const uint32_t offset = static_cast<uint32_t>(dropout.rng[1]);
  for (int64_t i = 0; i < cols; i += 8 * kBlocks) {
    uint32_t key0 = static_cast<uint32_t>(seed);
    uint32_t key1 = static_cast<uint32_t>(seed >> 32);
    Words word[4] = {consecutive(static_cast<uint32_t>((first + i) / 8)), words(row), words(slab), words(offset)};
    for (int round = 0; round < 10; ++round) {
      const Words product0 = multiply(word[0], words(0xD2511F53u));
      const Words product1 = multiply(word[2], words(0xCD9E8D57u));
      word[0] = high_xor(product1, word[1], words(key0));
      word[1] = product1;
      word[2] = high_xor(product0, word[3], words(key1));
      word[3] = product0;
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    keep_bits(word, dropout.threshold, keep + i / 8);
  }
}

// Returns the mask of kept columns i to i + Vec::kSize - 1 of a drawn block; i is a multiple of Vec::kSize.
inline Mask keep_mask(const uint8_t* keep, int64_t i) {
#if defined(__AVX512F__)
  uint16_t bits;
  std::memcpy(&bits, keep + i / 8, sizeof(bits));
  return {bits};
#elif defined(__AVX2__)
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i bits = _mm256_set1_epi32(keep[i / 8]);
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(bits, lane), lane))};
#else
  const int bits = keep[i / 8] >> (i & 4);
  return {Int4{-(bits & 1), -(bits >> 1 & 1), -(bits >> 2 & 1), -(bits >> 3 & 1)}};
#endif
}

}  // namespace
