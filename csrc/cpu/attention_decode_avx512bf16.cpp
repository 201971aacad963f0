// Attention on a cache in bfloat16 with the dot products of AVX512-BF16. Compiled for this instruction set only.
#include "attention_decode.h"

namespace fastattn {

void attention_decode_avx512bf16(const DecodeArgs& args) {
  decode<BF16, true>(args);
}

}  // namespace fastattn
