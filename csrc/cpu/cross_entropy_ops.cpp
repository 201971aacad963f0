// fastattn::cross_entropy_fwd for CPU tensors: the pass of linear_cross_entropy between its products.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>

#include "dispatch.h"
#include "host.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor cross_entropy_fwd(Tensor logits, const Tensor& target, const std::optional<Tensor>& dloss, int64_t ignore_index,
                         double label_smoothing, double z_loss, double softcap, bool need_grad) {
  STD_TORCH_CHECK(logits.dim() == 2 && (logits.size(1) <= 1 || logits.stride(1) == 1),
                  "logits must have two dimensions and inner stride 1, got ", logits.dim(), " dimensions");
  const int64_t rows = logits.size(0);
  STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long && target.numel() == rows && target.is_contiguous(),
                  "target must be contiguous int64 of ", rows, " elements, got ", target.numel());
  STD_TORCH_CHECK(
      !dloss || (dloss->scalar_type() == ScalarType::Float && dloss->numel() == rows && dloss->is_contiguous()),
      "dloss must be contiguous float32 of ", rows, " elements");
  const Tensor loss = fastattn::empty_cpu({rows}, ScalarType::Float);
  fastattn::CrossEntropyArgs args{};
  args.logits = logits.mutable_data_ptr();
  args.target = static_cast<const int64_t*>(target.const_data_ptr());
  args.dloss = static_cast<const float*>(fastattn::data_or_null(dloss));
  args.loss = static_cast<float*>(loss.mutable_data_ptr());
  args.rows = rows;
  args.cols = logits.size(1);
  args.logits_stride = logits.stride(0);
  args.ignore_index = ignore_index;
  args.label_smoothing = static_cast<float>(label_smoothing);
  args.z_loss = static_cast<float>(z_loss);
  args.softcap = static_cast<float>(softcap);
  args.need_grad = need_grad;
  args.dtype = fastattn::dtype_of(logits, "logits");
  const auto fn = FASTATTN_SELECT_CPU(cross_entropy_fwd);
  // a row has a loss even where it has no columns
  fastattn::for_pieces(rows, std::max<int64_t>(1, args.cols),
                       [&](int64_t begin, int64_t end) { fn(args, begin, end); });
  return loss;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("cross_entropy_fwd.native", TORCH_BOX(&cross_entropy_fwd));
}
