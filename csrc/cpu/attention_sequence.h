#pragma once
// Shared by the attention kernels for the CPU: the next task, a sequence and its alignment, a range of keys, and the
// dropout of a tile.
#include "../api.h"
#include "tile.h"

namespace {

using fastattn::AttentionCpuArgs;
using fastattn::DType;
using fastattn::ScoreTensor;

// Returns the next task. Threads claim tasks dynamically; results do not depend on which thread takes which.
template <typename Args>
int64_t next_task(const Args& args) {
  return args.next->fetch_add(1, std::memory_order_relaxed);
}

inline int64_t heads_per_key_head(const AttentionCpuArgs& args) {
  return args.n_heads / (args.n_kv_heads ? args.n_kv_heads : 1);
}

constexpr int at_most(int64_t n, int most) {
  return static_cast<int>(n < most ? n : most);
}

// Keys [begin, end); empty if begin >= end.
struct KeyRange {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

// The position of sequence b, and the alignment of its queries to its keys: query i is aligned with key i + off.
struct Sequence {
  int64_t len_q, len_k, rows_k, off, q_start, k_start, index;  // the first len_k of the rows_k keys are visible

  Sequence(const AttentionCpuArgs& args, int64_t b)
      : len_q(args.seqlen_q), len_k(args.seqlen_k), q_start(0), k_start(0), index(b) {
    if (args.cu_seqlens_q) {
      q_start = args.cu_seqlens_q[b];
      k_start = args.cu_seqlens_k[b];
      len_q = args.cu_seqlens_q[b + 1] - q_start;
      len_k = args.cu_seqlens_k[b + 1] - k_start;
    }
    rows_k = len_k;
    if (args.seqlens_k) {
      const int64_t visible = args.seqlens_k[b];
      len_k = visible < 0 ? 0 : visible < len_k ? visible : len_k;
    }
    off = args.top_left ? 0 : len_k - len_q;
  }

  template <typename T>
  T* rows(const fastattn::HeadTensor& t, int64_t head, int64_t start) const {
    return static_cast<T*>(t.data) + index * t.batch + head * t.head + start * t.row;
  }
  // The number of rows in the block that begins at i0.
  int block_rows(int64_t i0) const { return at_most(len_q - i0, kLanes); }
  int64_t lse_offset(const AttentionCpuArgs& args, int64_t head) const {
    return index * args.lse_batch + head * args.lse_head + q_start;
  }
};

inline Vec lanes_from(float first) {
  alignas(64) static constexpr float kIota[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return Vec::load(kIota) + Vec::fill(first);
}

// dst[r][lane] is `scale` if halfword (first + r) % 8 of the Philox block of row + lane is kept, otherwise 0, for r <
// count. Key and counter are those of reference.philox_keep.
inline void keep_group(float* dst, uint32_t group, int first, int count, uint32_t row, uint32_t slab,
                       const fastattn::Dropout& dropout) {
  const uint64_t seed = static_cast<uint64_t>(dropout.rng[0]);
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  const uint32_t offset = static_cast<uint32_t>(dropout.rng[1]);
#if defined(__AVX512F__)
  using Word = __m512i;
  const auto fill = [](uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); };
  const auto multiply = [](Word a, Word m, Word& high) {
    const Word even = _mm512_mul_epu32(a, m), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), m);
    high = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
    return _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
  };
  const auto mix = [](Word a, Word b, Word c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); };
  Word c0 = fill(group), c2 = fill(slab), c3 = fill(offset);
  Word c1 = _mm512_add_epi32(fill(row), _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
#elif defined(__AVX2__)
  using Word = __m256i;
  const auto fill = [](uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); };
  const auto multiply = [](Word a, Word m, Word& high) {
    const Word even = _mm256_mul_epu32(a, m), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), m);
    high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
    return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  };
  const auto mix = [](Word a, Word b, Word c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); };
  Word c0 = fill(group), c2 = fill(slab), c3 = fill(offset);
  Word c1 = _mm256_add_epi32(fill(row), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
#else
  typedef uint32_t Word __attribute__((vector_size(16)));
  const auto fill = [](uint32_t x) { return Word{x, x, x, x}; };
  const auto multiply = [](Word a, Word m, Word& high) {
    for (int i = 0; i < 4; ++i) {
      high[i] = static_cast<uint32_t>(uint64_t{a[i]} * m[i] >> 32);
    }
    return a * m;
  };
  const auto mix = [](Word a, Word b, Word c) { return a ^ b ^ c; };
  Word c0 = fill(group), c2 = fill(slab), c3 = fill(offset);
  Word c1 = fill(row) + Word{0, 1, 2, 3};
#endif
  for (int round = 0; round < 10; ++round) {
    Word high0{}, high1{};
    const Word low0 = multiply(c0, fill(0xD2511F53u), high0), low1 = multiply(c2, fill(0xCD9E8D57u), high1);
    c0 = mix(high1, c1, fill(key0));
    c2 = mix(high0, c3, fill(key1));
    c1 = low1;
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  const Word words[4] = {c0, c1, c2, c3};
  for (int r = 0; r < count; ++r) {
    const int half = first + r;
    const Word word = words[half / 2];
    float* out = dst + r * kLanes;
#if defined(__AVX512F__)
    const Word value = half % 2 ? _mm512_srli_epi32(word, 16) : _mm512_and_si512(word, fill(0xffff));
    _mm512_storeu_ps(out, _mm512_maskz_mov_ps(_mm512_cmpge_epu32_mask(value, fill(dropout.threshold)),
                                              _mm512_set1_ps(dropout.scale)));
#elif defined(__AVX2__)
    const Word value = half % 2 ? _mm256_srli_epi32(word, 16) : _mm256_and_si256(word, fill(0xffff));
    const Word dropped = _mm256_cmpgt_epi32(fill(dropout.threshold), value);
    _mm256_storeu_ps(out, _mm256_andnot_ps(_mm256_castsi256_ps(dropped), _mm256_set1_ps(dropout.scale)));
#else
    for (int i = 0; i < 4; ++i) {
      const uint32_t value = half % 2 ? word[i] >> 16 : word[i] & 0xffff;
      out[i] = value >= dropout.threshold ? dropout.scale : 0.f;
    }
#endif
  }
}

// Calls f(T{}) with the storage type of `dtype`.
template <typename F>
inline void with_storage_type(DType dtype, F&& f) {
  if (dtype == DType::kFloat32) {
    f(float{});
  } else if (dtype == DType::kBFloat16) {
    f(BF16{});
  } else {
    f(FP16{});
  }
}

}  // namespace
