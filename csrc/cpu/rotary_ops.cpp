// fastattn::rotary_fwd and rotary_fwd_ for CPU tensors.
#include "rotary_call.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "dispatch.h"
#include "host.h"

namespace {

using fastattn::RotaryArgs;
using fastattn::RotaryCall;
using torch::stable::Tensor;

template <typename Int>
void check_positions(const RotaryArgs& args) {
  const Int* positions = static_cast<const Int*>(args.positions);
  const int64_t count = args.positions_batch ? args.batch * args.seqlen : args.seqlen;
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(positions[i] >= 0 && positions[i] < args.table_rows, "rotary: position ", positions[i],
                    " must lie within the ", args.table_rows, " rows of cos");
  }
}

void run(const RotaryArgs& args) {
  if (args.positions) {
    args.wide_positions ? check_positions<int64_t>(args) : check_positions<int32_t>(args);
  }
  const int64_t tokens = std::min(args.seqlen, fastattn::kRotaryTokens);
  const int64_t pieces = args.batch * ((args.seqlen + fastattn::kRotaryTokens - 1) / fastattn::kRotaryTokens);
  const auto kernel = FASTATTN_SELECT_CPU(rotary_fwd);
  fastattn::for_pieces(pieces, tokens * (args.n_heads[0] + args.n_heads[1]) * args.head_dim,
                       [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

std::tuple<Tensor, Tensor> rotary_fwd(const Tensor& q, const std::optional<Tensor>& k, const Tensor& cos,
                                      const Tensor& sin, const std::optional<Tensor>& positions, int64_t offset,
                                      int64_t rotary_dim, bool interleaved, bool conjugate) {
  RotaryCall call(q, k, cos, sin, positions, offset, rotary_dim, interleaved, conjugate);
  std::tuple<Tensor, Tensor> outputs = call.make_outputs(q, k);
  run(call.args);
  return outputs;
}

void rotary_fwd_(Tensor q, std::optional<Tensor> k, const Tensor& cos, const Tensor& sin,
                 const std::optional<Tensor>& positions, int64_t offset, int64_t rotary_dim, bool interleaved,
                 bool conjugate) {
  RotaryCall call(q, k, cos, sin, positions, offset, rotary_dim, interleaved, conjugate);
  call.write_in_place(q, k);
  run(call.args);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("rotary_fwd.native", TORCH_BOX(&rotary_fwd));
  m.impl("rotary_fwd_native", TORCH_BOX(&rotary_fwd));
  m.impl("rotary_fwd_.native", TORCH_BOX(&rotary_fwd_));
}
