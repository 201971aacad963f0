// Attention in bfloat16 with the tiles of AMX. Compiled for this instruction set only.
#include "attention_bwd.h"

namespace fastattn {

void attention_fwd_amx(const AttentionCpuArgs& args) {
  const Tiles tiles;
  forward<BF16, true>(args);
}

void attention_bwd_amx(const AttentionCpuArgs& args) {
  const Tiles tiles;
  backward<BF16, true>(args);
}

void attention_dq_amx(const AttentionCpuArgs& args) {
  const Tiles tiles;
  query_gradient<BF16, true>(args);
}

void attention_dbias_amx(const AttentionCpuArgs& args) {
  const Tiles tiles;
  bias_gradient<BF16, true>(args);
}

}  // namespace fastattn
