#pragma once
// Replaces csrc/cuda/sm90/wgmma.cuh. Operands are read through the descriptors as the PTX ISA defines them, without the
// index functions of the kernels. Results arrive at the wait; until then the accumulators hold NaN. A change to shared
// memory, to an operand in registers or to an accumulator between the instruction and the wait is an error.
#include "cuda/sm90/fragment.cuh"
#include "cuda/sm90/shared.cuh"

namespace emulated {

constexpr int kK = 16;

struct Product {
  int group;
  float* d;
  int accumulators;
  bool accumulates, a_in_registers, mn_major;  // mn_major: of the operands in shared memory
  uint64_t desc_a, desc_b;
  float a[2][kK];           // the two rows of the thread
  const uint32_t* operand;  // A in registers, of this thread
  uint32_t bits[4];         // and what they held when the product was issued
  std::vector<float> value;
};

// Per thread: products in flight and their accumulators.
struct InFlight {
  bool fenced = false;
  int groups = 0;  // committed so far
  std::vector<Product> products;
  struct Held {
    float* d;
    std::vector<float> value;
  };
  std::vector<Held> held;
};
static InFlight in_flight[1024];

struct Descriptor {
  uint32_t start, leading, stride, width;  // width: bytes of a row of a swizzle atom

  explicit Descriptor(uint64_t bits)
      : start((bits & 0x3fff) << 4),
        leading((bits >> 16 & 0x3fff) << 4),
        stride((bits >> 32 & 0x3fff) << 4),
        width(bits >> 62 == 1 ? 128 : 64) {
    if ((bits >> 62 != 1 && bits >> 62 != 2) || (bits >> 49 & 7) != 0) {
      fail("a matrix descriptor with another swizzle than 128 or 64 bytes, or a base offset");
    }
  }
  template <typename T>
  float element(uint32_t offset) const {
    return static_cast<float>(*shared_pointer<T>(swizzled(start + offset, width)));
  }
  template <typename T>
  float k_major(int mn, int k) const {
    return element<T>(mn / 8 * stride + mn % 8 * width + k * 2);
  }
  template <typename T>
  float mn_major(int mn, int k) const {
    const uint32_t cols = width / 2;
    return element<T>(mn / cols * leading + mn % cols * 2 + k / 8 * stride + k % 8 * width);
  }
};

template <typename T>
std::vector<float> multiply(const Product& product) {
  const int lane = current % 32, row = current % 128 / 32 * 16 + lane / 4;
  const Descriptor b(product.desc_b);
  if (product.mn_major && product.accumulators * 2 % (b.width / 2) != 0) {
    fail("a product that ends within a swizzle atom");
  }
  float a[2][kK];
  if (product.a_in_registers) {
    std::memcpy(a, product.a, sizeof(a));
  } else {
    const Descriptor from(product.desc_a);
    for (int k = 0; k < kK; ++k) {
      for (int r = 0; r < 2; ++r) {
        a[r][k] = product.mn_major ? from.mn_major<T>(row + 8 * r, k) : from.k_major<T>(row + 8 * r, k);
      }
    }
  }
  std::vector<float> value(product.accumulators);
  for (int i = 0; i < product.accumulators; i += 4) {
    for (int n = 0; n < 2; ++n) {
      const int col = i / 4 * 8 + lane % 4 * 2 + n;
      double sum[2] = {};
      for (int k = 0; k < kK; ++k) {
        const float element = product.mn_major ? b.mn_major<T>(col, k) : b.k_major<T>(col, k);
        sum[0] += static_cast<double>(a[0][k]) * element;
        sum[1] += static_cast<double>(a[1][k]) * element;
      }
      value[i + n] = static_cast<float>(sum[0]);
      value[i + 2 + n] = static_cast<float>(sum[1]);
    }
  }
  return value;
}

inline std::vector<float> (*multiplier)(const Product&);  // for the dtype of the running kernel

template <typename T>
void issue(float* d, Product product) {
  InFlight& mine = in_flight[current];
  if (!mine.fenced) {
    fail("a product without wgmma_begin");
  }
  multiplier = multiply<T>;
  product.group = mine.groups;
  product.d = d;
  product.value = multiply<T>(product);
  bool known = false;
  for (const auto& held : mine.held) {
    known = known || held.d == d;
  }
  if (!known) {
    mine.held.push_back({d, {d, d + product.accumulators}});
    std::fill(d, d + product.accumulators, NAN);
  }
  mine.products.push_back(std::move(product));
  products_in_flight[current] = mine.products.size();
}

inline void deliver(int groups_left) {
  InFlight& mine = in_flight[current];
  const int last = mine.groups - groups_left;  // groups below this one have ended
  size_t n = 0;
  for (; n < mine.products.size() && mine.products[n].group < last; ++n) {
    const Product& product = mine.products[n];
    if (product.a_in_registers && std::memcmp(product.operand, product.bits, sizeof(product.bits)) != 0) {
      fail("an operand in registers was written while a product read it");
    }
    const auto now = multiplier(product);
    if (std::memcmp(now.data(), product.value.data(), now.size() * sizeof(float)) != 0) {
      fail("shared memory changed while a product read it");
    }
    for (auto& held : mine.held) {
      if (held.d == product.d) {
        for (int i = 0; i < product.accumulators; ++i) {
          held.value[i] = (product.accumulates ? held.value[i] : 0.f) + now[i];
        }
      }
    }
  }
  mine.products.erase(mine.products.begin(), mine.products.begin() + n);
  products_in_flight[current] = mine.products.size();
  for (size_t h = mine.held.size(); h-- > 0;) {
    auto& held = mine.held[h];
    bool busy = false;
    for (const auto& product : mine.products) {
      busy = busy || product.d == held.d;
    }
    if (!busy) {
      for (size_t i = 0; i < held.value.size(); ++i) {
        if (!std::isnan(held.d[i])) {
          fail("an accumulator was written while a product ran");
        }
        held.d[i] = held.value[i];
      }
      mine.held.erase(mine.held.begin() + h);
    }
  }
}

}  // namespace emulated

namespace fastattn::sm90 {

inline void wgmma_begin() {
  emulated::in_flight[emulated::current].fenced = true;
}
inline void wgmma_commit() {
  ++emulated::in_flight[emulated::current].groups;
}
template <int kGroups>
void wgmma_wait() {
  emulated::wait(emulated::State::kWaitsForWarp);
  emulated::in_flight[emulated::current].fenced = false;  // the following code may access registers
  emulated::deliver(kGroups);
}

template <typename T, bool kMnMajor = false, int kAccumulators>
void wgmma_ss(float (&d)[kAccumulators], uint64_t desc_a, uint64_t desc_b, bool accumulates) {
  emulated::wait(emulated::State::kWaitsForWarp);
  emulated::issue<T>(d, {0, nullptr, kAccumulators, accumulates, false, kMnMajor, desc_a, desc_b, {}, nullptr, {}, {}});
}

template <typename T, int kAccumulators>
void wgmma_rs(float (&d)[kAccumulators], const uint32_t (&a)[4], uint64_t desc_b) {
  static uint32_t operand[1024][4];
  const size_t thread = emulated::current, quad = thread / 4 * 4;
  std::memcpy(operand[thread], a, sizeof(operand[thread]));
  emulated::wait(emulated::State::kWaitsForWarp);
  emulated::Product product{0, nullptr, kAccumulators, true, true, true, 0, desc_b, {}, a, {}, {}};
  std::memcpy(product.bits, a, sizeof(product.bits));
  for (int k = 0; k < emulated::kK; ++k) {  // registers 0, 1: columns 0 to 7 of both rows; 2, 3: columns 8 to 15
    for (int r = 0; r < 2; ++r) {
      T pair[2];
      std::memcpy(pair, &operand[quad + k % 8 / 2][k / 8 * 2 + r], sizeof(pair));
      product.a[r][k] = static_cast<float>(pair[k % 2]);
    }
  }
  emulated::wait(emulated::State::kWaitsForWarp);
  emulated::issue<T>(d, product);
}

}  // namespace fastattn::sm90
