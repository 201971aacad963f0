// Attention in bfloat16 with the dot products of AVX512-BF16. Compiled for this instruction set only.
#include "attention_bwd.h"

namespace fastattn {

void attention_fwd_avx512bf16(const AttentionCpuArgs& args) {
  forward<BF16, true>(args);
}

void attention_bwd_avx512bf16(const AttentionCpuArgs& args) {
  backward<BF16, true>(args);
}

void attention_dq_avx512bf16(const AttentionCpuArgs& args) {
  query_gradient<BF16, true>(args);
}

void attention_dbias_avx512bf16(const AttentionCpuArgs& args) {
  bias_gradient<BF16, true>(args);
}

}  // namespace fastattn
