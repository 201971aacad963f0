// Attention on a cache for float32, float16 and bfloat16, summed in fp32. See attention_decode.h.
#include "attention_decode.h"

namespace fastattn {

void FASTATTN_CPU_NAME(attention_decode)(const DecodeArgs& args) {
  switch (args.dtype) {
    case DType::kFloat32:
      return decode<float, false>(args);
    case DType::kBFloat16:
      return decode<BF16, false>(args);
    case DType::kFloat16:
      return decode<FP16, false>(args);
  }
}

}  // namespace fastattn
