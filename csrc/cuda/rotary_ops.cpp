// fastattn::rotary_fwd and rotary_fwd_ for CUDA tensors.
#include "host.h"  // must be first: it enables the CUDA declarations of the other headers

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "rotary_call.h"

namespace {

using fastattn::RotaryArgs;
using fastattn::RotaryCall;
using torch::stable::Tensor;

void run(const RotaryArgs& args, const Tensor& q) {
  constexpr int64_t kMostTokens = (int64_t{1} << 31) - 1;
  STD_TORCH_CHECK(args.batch * args.seqlen <= kMostTokens, "rotary: at most ", kMostTokens, " tokens, got ",
                  args.batch * args.seqlen);
  STD_TORCH_CHECK(args.table_dtype == args.dtype || args.table_dtype == fastattn::DType::kFloat32,
                  "rotary: cos and sin must be float32 or of the dtype of q");
  fastattn::check_width(args.head_dim);
  if (args.batch * args.seqlen * (args.n_heads[0] + args.n_heads[1]) > 0) {
    fastattn::check_launch(fastattn::rotary_fwd_cuda(args, fastattn::current_stream(q)), "rotary_fwd");
  }
}

std::tuple<Tensor, Tensor> rotary_fwd(const Tensor& q, const std::optional<Tensor>& k, const Tensor& cos,
                                      const Tensor& sin, const std::optional<Tensor>& positions, int64_t offset,
                                      int64_t rotary_dim, bool interleaved, bool conjugate) {
  const fastattn::DeviceGuard guard(q.get_device_index());
  RotaryCall call(q, k, cos, sin, positions, offset, rotary_dim, interleaved, conjugate);
  std::tuple<Tensor, Tensor> outputs = call.make_outputs(q, k);
  run(call.args, q);
  return outputs;
}

void rotary_fwd_(Tensor q, std::optional<Tensor> k, const Tensor& cos, const Tensor& sin,
                 const std::optional<Tensor>& positions, int64_t offset, int64_t rotary_dim, bool interleaved,
                 bool conjugate) {
  const fastattn::DeviceGuard guard(q.get_device_index());
  RotaryCall call(q, k, cos, sin, positions, offset, rotary_dim, interleaved, conjugate);
  call.write_in_place(q, k);
  run(call.args, q);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("rotary_fwd.native", TORCH_BOX(&rotary_fwd));
  m.impl("rotary_fwd_native", TORCH_BOX(&rotary_fwd));
  m.impl("rotary_fwd_.native", TORCH_BOX(&rotary_fwd_));
}
