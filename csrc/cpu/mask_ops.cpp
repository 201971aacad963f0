// fastattn::is_causal_mask for CPU tensors. It reads the mask once and stops at the first difference. So it costs
// little compared with an attention that would otherwise read the mask.
#include <torch/csrc/stable/library.h>

#include <atomic>

#include "host.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A mask of unsigned words. seen() returns 0 if the word shows the position, and hidden() returns 0 if it hides the
// position.
template <typename Word, Word kMinusInf>
struct FloatMask {
  using Type = Word;
  static Word seen(Word x) { return static_cast<Word>(x << 1); }  // 0 for 0 of either sign
  static Word hidden(Word x) { return static_cast<Word>(x ^ kMinusInf); }
};

struct BoolMask {
  using Type = uint8_t;
  static uint8_t seen(uint8_t x) { return x; }
  static uint8_t hidden(uint8_t x) { return x == 0; }
};

template <typename Word, typename Wrong>
bool all_right(const Word* p, int64_t count, int64_t step, Wrong wrong) {
  constexpr int64_t kBlock = 1024;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min(count, begin + kBlock);
    Word found = 0;
    if (step == 1) {
      for (int64_t i = begin; i < end; ++i) {
        found = static_cast<Word>(found | wrong(p[i]));
      }
    } else {
      for (int64_t i = begin; i < end; ++i) {
        found = static_cast<Word>(found | wrong(p[i * step]));
      }
    }
    if (found) {
      return false;
    }
  }
  return true;
}

template <typename Mask>
bool is_causal(const Tensor& mask) {
  using Word = typename Mask::Type;
  const Word* data = static_cast<const Word*>(fastattn::data_of(mask));
  const int64_t size = mask.size(0);
  // A transposed mask is read along its columns, so that the reads follow the memory order.
  const bool transposed = mask.stride(0) < mask.stride(1);
  const int64_t outer = mask.stride(transposed ? 1 : 0);
  const int64_t inner = mask.stride(transposed ? 0 : 1);
  const auto line = [&](int64_t i) {
    const Word* p = data + i * outer;
    if (transposed) {  // column i: the rows from i on see it
      return all_right(p, i, inner, Mask::hidden) && all_right(p + i * inner, size - i, inner, Mask::seen);
    }
    return all_right(p, i + 1, inner, Mask::seen) && all_right(p + (i + 1) * inner, size - i - 1, inner, Mask::hidden);
  };
  // Most masks that are not causal differ in the first or last line.
  std::atomic<bool> causal{size == 0 || (line(0) && line(size - 1))};
  if (causal) {
    fastattn::for_pieces(size, size, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end && causal.load(std::memory_order_relaxed); ++i) {
        if (!line(i)) {
          causal.store(false, std::memory_order_relaxed);
        }
      }
    });
  }
  return causal;
}

bool is_causal_mask(const Tensor& mask) {
  STD_TORCH_CHECK(mask.dim() == 2 && mask.size(0) == mask.size(1), "is_causal_mask: mask must be (size, size), got ",
                  mask.dim(), " dimensions and ", mask.numel(), " elements");
  switch (mask.scalar_type()) {
    case ScalarType::Bool:
      return is_causal<BoolMask>(mask);
    case ScalarType::Half:
      return is_causal<FloatMask<uint16_t, 0xfc00>>(mask);
    case ScalarType::BFloat16:
      return is_causal<FloatMask<uint16_t, 0xff80>>(mask);
    case ScalarType::Float:
      return is_causal<FloatMask<uint32_t, 0xff800000>>(mask);
    case ScalarType::Double:
      return is_causal<FloatMask<uint64_t, 0xfff0000000000000>>(mask);
    default:
      return false;  // not a mask dtype
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("is_causal_mask", TORCH_BOX(&is_causal_mask));
}
