// Attention on the CPU for float32, float16 and bfloat16, summed in fp32. See attention_fwd.h and attention_bwd.h.
#include "attention_bwd.h"

namespace fastattn {

void FASTATTN_CPU_NAME(attention_fwd)(const AttentionCpuArgs& args) {
  switch (args.dtype) {
    case DType::kFloat32:
      return forward<float, false>(args);
    case DType::kBFloat16:
      return forward<BF16, false>(args);
    case DType::kFloat16:
      return forward<FP16, false>(args);
  }
}

void FASTATTN_CPU_NAME(attention_bwd)(const AttentionCpuArgs& args) {
  switch (args.dtype) {
    case DType::kFloat32:
      return backward<float, false>(args);
    case DType::kBFloat16:
      return backward<BF16, false>(args);
    case DType::kFloat16:
      return backward<FP16, false>(args);
  }
}

void FASTATTN_CPU_NAME(attention_dbias)(const AttentionCpuArgs& args) {
  switch (args.dtype) {
    case DType::kFloat32:
      return bias_gradient<float, false>(args);
    case DType::kBFloat16:
      return bias_gradient<BF16, false>(args);
    case DType::kFloat16:
      return bias_gradient<FP16, false>(args);
  }
}

void FASTATTN_CPU_NAME(attention_dq)(const AttentionCpuArgs& args) {
  return args.dtype == DType::kBFloat16 ? query_gradient<BF16, false>(args) : query_gradient<FP16, false>(args);
}

}  // namespace fastattn
