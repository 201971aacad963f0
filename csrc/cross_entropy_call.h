#pragma once
// Converts the tensors of cross_entropy_fwd to CrossEntropyArgs, for the wrapper of any device.
#include "check.h"

namespace fastattn {

struct CrossEntropyCall {
  Tensor target, loss;
  CrossEntropyArgs args{};

  CrossEntropyCall(Tensor logits, const Tensor& target_in, const std::optional<Tensor>& dloss, int64_t ignore_index,
                   double label_smoothing, double z_loss, double softcap, bool need_grad)
      : target(target_in.is_contiguous() ? target_in : contiguous_copy(target_in)) {
    STD_TORCH_CHECK(logits.dim() == 2 && (logits.size(1) <= 1 || logits.stride(1) == 1),
                    "logits must have two dimensions and inner stride 1, got ", logits.dim(), " dimensions");
    const int64_t rows = logits.size(0);
    STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long && target.numel() == rows, "target must be int64 of ",
                    rows, " elements, got ", target.numel());
    STD_TORCH_CHECK(
        !dloss || (dloss->scalar_type() == ScalarType::Float && dloss->numel() == rows && dloss->is_contiguous()),
        "dloss must be contiguous float32 of ", rows, " elements");
    loss = empty_beside(logits, {rows}, ScalarType::Float);
    args.logits = logits.mutable_data_ptr();
    args.target = static_cast<const int64_t*>(data_of(target));
    args.dloss = static_cast<const float*>(data_or_null(dloss));
    args.loss = static_cast<float*>(loss.mutable_data_ptr());
    args.rows = rows;
    args.cols = logits.size(1);
    args.logits_stride = logits.stride(0);
    args.ignore_index = ignore_index;
    args.label_smoothing = static_cast<float>(label_smoothing);
    args.z_loss = static_cast<float>(z_loss);
    args.softcap = static_cast<float>(softcap);
    args.need_grad = need_grad;
    args.dtype = dtype_of(logits, "logits");
  }
};

}  // namespace fastattn
