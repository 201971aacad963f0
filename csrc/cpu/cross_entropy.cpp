// Softmax cross-entropy over the columns of each row of logits x. The gradient replaces the logits.
//
//   s = softcap * tanh(x / softcap), or x;  lse = log(sum_j exp(s_j));  p = exp(s - lse)
//   loss = lse - (1 - smoothing) * s_target - smoothing * mean(s) + z_loss * lse^2
//   ds = dloss * ((1 + 2 * z_loss * lse) * p - (1 - smoothing) * onehot(target) - smoothing / cols)
//   dx = ds * (1 - (s / softcap)^2)
//
// A call owns rows. The first pass reads a row in blocks that fit into the L1 cache. For each block it computes the
// maximum and then the sum of exponentials; the sum so far is rescaled if the maximum grows. The second pass writes the
// gradient. Differences to the maximum and to s_target are taken before anything is summed, so large logits keep their
// digits. Ignored rows are not read. Registers hold fp32.
// Reference: Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018.
#include <cfloat>
#include <cmath>
#include <cstring>

#include "api.h"
#include "rows.h"

namespace fastattn {
namespace {

constexpr int64_t kBlock = 1024;  // columns

template <bool kSoftcap>
struct Cap {
  float softcap;

  Vec operator()(Vec x) const { return kSoftcap ? Vec::fill(softcap) * tanh(x * Vec::fill(1.f / softcap)) : x; }
  float operator()(float x) const { return (*this)(Vec::fill(x)).max(); }
  // Multiplies ds by the slope of the softcap at the capped value s.
  Vec slope(Vec ds, Vec s) const {
    const Vec t = s * Vec::fill(1.f / softcap);
    return kSoftcap ? ds * fnma(t, t, Vec::fill(1.f)) : ds;
  }
};

template <typename T>
inline float max_columns(const T* x, int64_t cols) {
  float most = -FLT_MAX;  // not -inf, because -inf - -inf is NaN
  int64_t i = 0;
  if (cols >= 4 * Vec::kSize) {
    Vec chain[4];
    for (int c = 0; c < 4; ++c) {
      chain[c] = Vec::fill(-FLT_MAX);
    }
    for (; i + 4 * Vec::kSize <= cols; i += 4 * Vec::kSize) {
      for (int c = 0; c < 4; ++c) {
        chain[c] = max(Vec::load(x + i + c * Vec::kSize), chain[c]);
      }
    }
    most = max(max(chain[0], chain[1]), max(chain[2], chain[3])).max();
  }
  for (; i < cols; ++i) {
    const float value = to_float(x[i]);
    most = value > most ? value : most;
  }
  return most;
}

template <typename T, bool kSoftcap>
void cross_entropy_row(const CrossEntropyArgs& args, int64_t row) {
  const int64_t cols = args.cols, target = args.target[row];
  T* x = static_cast<T*>(args.logits) + row * args.logits_stride;
  if (target == args.ignore_index) {
    args.loss[row] = 0.f;
    if (args.need_grad) {
      std::memset(x, 0, cols * sizeof(T));
    }
    return;
  }
  const bool valid = target >= 0 && target < cols;
  const Cap<kSoftcap> cap{args.softcap};
  const float s_target = valid ? cap(to_float(x[target])) : NAN;

  float most = -FLT_MAX;
  // sum_j exp(s_j - most) and sum_j (s_j - s_target), in fp64 because they may have many terms
  double sum_of_blocks = 0, above_target = 0;
  for (int64_t first = 0; first < cols; first += kBlock) {
    const T* block = x + first;
    const int64_t n = cols - first < kBlock ? cols - first : kBlock;
    const float block_most = cap(max_columns(block, n));
    if (block_most > most) {
      sum_of_blocks *= std::exp(most - block_most);
      most = block_most;
    }
    const auto sums = sum_block<2>(0, n, [&](int64_t i, auto lanes, Vec* total) {
      const Vec s = cap(load(block + i, lanes));
      total[0] = total[0] + zero_rest(exp(s - Vec::fill(most)), lanes);
      total[1] = total[1] + zero_rest(s - Vec::fill(s_target), lanes);
    });
    sum_of_blocks += sums.value[0];
    above_target += sums.value[1];
  }
  const float sum = static_cast<float>(sum_of_blocks);

  const float log_sum = std::log(sum), lse = most + log_sum;
  const float size = static_cast<float>(cols), smoothing = args.label_smoothing;
  float loss = (most - s_target) + log_sum;
  if (smoothing > 0.f) {
    loss -= smoothing * static_cast<float>(above_target / size);
  }
  args.loss[row] = loss + args.z_loss * lse * lse;
  if (!args.need_grad) {
    return;
  }

  const float dloss = !valid ? NAN : args.dloss ? args.dloss[row] : 1.f;
  const Vec of_exp = Vec::fill(dloss * (1.f + 2.f * args.z_loss * lse) / sum),
            even = Vec::fill(dloss * smoothing / size);
  const auto softmax_part = [&](Vec s) { return exp(s - Vec::fill(most)) * of_exp - even; };
  const Vec at_target = Vec::fill(s_target);
  const Vec dx_target = cap.slope(softmax_part(at_target) - Vec::fill(dloss * (1.f - smoothing)), at_target);
  for_columns(cols, [&](int64_t i, auto lanes) {
    const Vec s = cap(load(x + i, lanes));
    store(cap.slope(softmax_part(s), s), x + i, lanes);
  });
  if (valid) {
    x[target] = from_float<T>(dx_target.max());
  }
}

}  // namespace

void FASTATTN_CPU_NAME(cross_entropy_fwd)(const CrossEntropyArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    const auto run = args.softcap > 0.f ? cross_entropy_row<T, true> : cross_entropy_row<T, false>;
    for (int64_t row = begin; row < end; ++row) {
      run(args, row);
    }
  });
}

}  // namespace fastattn
