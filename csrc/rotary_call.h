#pragma once
// Converts the tensors of a rotary op to RotaryArgs, for the wrappers of both devices.
#include <algorithm>
#include <array>
#include <optional>

#include "head_tensors.h"

namespace fastattn {

// The strides of a tensor as (batch, heads, tokens, head_dim). A packed tensor is a batch of one.
inline HeadTensor rotary_strides(const Tensor& t) {
  void* data = const_cast<void*>(data_of(t));
  return t.dim() == 4 ? HeadTensor{data, t.stride(0), t.stride(1), t.stride(2)}
                      : HeadTensor{data, 0, t.stride(1), t.stride(0)};
}

// Returns an uninitialised tensor with the shape and memory order of `like`, which is packed if it has three
// dimensions.
inline Tensor rotary_empty_like(const Tensor& like) {
  return like.dim() == 3 ? empty_beside(like, like.sizes(), like.scalar_type()) : empty_in_layout(like, like.size(3));
}

// The checked arguments of a call, without `out`. Owns the copies that some of them point to.
class RotaryCall {
 public:
  RotaryCall(const Tensor& q, const std::optional<Tensor>& k, const Tensor& cos, const Tensor& sin,
             const std::optional<Tensor>& positions, int64_t offset, int64_t rotary_dim, bool interleaved,
             bool conjugate) {
    const int64_t dims = q.dim();
    STD_TORCH_CHECK(dims == 3 || dims == 4, "rotary: q must have 3 or 4 dimensions, got ", dims);
    args.batch = dims == 4 ? q.size(0) : 1;
    args.seqlen = dims == 4 ? q.size(2) : q.size(0);
    args.head_dim = q.size(dims - 1);
    args.rotary_dim = rotary_dim;
    STD_TORCH_CHECK(rotary_dim > 0 && rotary_dim % 2 == 0 && rotary_dim <= args.head_dim,
                    "rotary: rotary_dim must be even, above 0 and at most ", args.head_dim, ", got ", rotary_dim);
    args.dtype = dtype_of(q, "q");
    add(0, q);
    if (k) {
      STD_TORCH_CHECK(k->dim() == dims && k->size(0) == q.size(0) && k->size(dims - 1) == args.head_dim &&
                          k->size(dims - 2) == (dims == 4 ? args.seqlen : k->size(1)),
                      "rotary: k must have the shape of q except for the number of heads, got ", k->numel(),
                      " elements in ", k->dim(), " dimensions");
      STD_TORCH_CHECK(k->scalar_type() == q.scalar_type() && k->device() == q.device(),
                      "rotary: k must have the dtype and device of q");
      add(1, *k);
    }
    set_tables(q, cos, sin, interleaved);
    args.offset = offset;
    if (positions) {
      set_positions(q, *positions);
    } else {
      STD_TORCH_CHECK(offset >= 0 && offset + args.seqlen <= args.table_rows, "rotary: positions ", offset, " to ",
                      offset + args.seqlen - 1, " must lie within the ", args.table_rows, " rows of cos");
    }
    args.interleaved = interleaved;
    args.conjugate = conjugate;
  }

  // Sets `out` to new tensors in the layout of q and k. Without k, the second one is empty.
  std::tuple<Tensor, Tensor> make_outputs(const Tensor& q, const std::optional<Tensor>& k) {
    const Tensor out_q = rotary_empty_like(q),
                 out_k = k ? rotary_empty_like(*k) : empty_beside(q, {0}, q.scalar_type());
    args.out[0] = rotary_strides(out_q);
    if (k) {
      args.out[1] = rotary_strides(out_k);
    }
    return {out_q, out_k};
  }

  // Sets `out` to q and k themselves.
  void write_in_place(const Tensor& q, const std::optional<Tensor>& k) {
    STD_TORCH_CHECK(args.x[0].data == data_of(q) && (!k || args.x[1].data == data_of(*k)),
                    "rotary: tensors rotated in place must have last stride 1");
    args.out[0] = args.x[0];
    args.out[1] = args.x[1];
  }

  RotaryArgs args{};

 private:
  void add(int which, const Tensor& t) {
    const int64_t last = t.dim() - 1;
    const bool inner_contiguous = t.numel() == 0 || t.stride(last) == 1;
    held_[which] = inner_contiguous ? t : contiguous_copy(t);
    args.x[which] = rotary_strides(held_[which]);
    args.n_heads[which] = t.size(1);
  }

  void set_tables(const Tensor& q, const Tensor& cos, const Tensor& sin, bool interleaved) {
    const int64_t dims = cos.dim();
    STD_TORCH_CHECK(dims == 2 || dims == 3, "rotary: cos must have 2 or 3 dimensions, got ", dims);
    STD_TORCH_CHECK(sin.dim() == dims && std::equal(cos.sizes().begin(), cos.sizes().end(), sin.sizes().begin()) &&
                        sin.scalar_type() == cos.scalar_type(),
                    "rotary: sin must have the shape and dtype of cos");
    STD_TORCH_CHECK(cos.device() == q.device() && sin.device() == q.device(),
                    "rotary: cos and sin must be on the device of q");
    STD_TORCH_CHECK(cos.size(dims - 1) >= args.rotary_dim / 2, "rotary: cos must have at least ", args.rotary_dim / 2,
                    " columns, got ", cos.size(dims - 1));
    STD_TORCH_CHECK(dims == 2 || ((cos.size(0) == 1 || cos.size(0) == args.batch) && cos.size(1) == args.seqlen),
                    "rotary: cos must have ", args.batch, " or 1 rows of ", args.seqlen, " tokens");
    const bool as_is = std::equal(cos.strides().begin(), cos.strides().end(), sin.strides().begin());
    held_[2] = as_is ? cos : contiguous_copy(cos);
    held_[3] = as_is ? sin : contiguous_copy(sin);
    args.cos = data_of(held_[2]);
    args.sin = data_of(held_[3]);
    args.table_rows = cos.size(dims - 2);
    args.table_row = held_[2].stride(dims - 2);
    args.table_batch = dims == 3 && cos.size(0) > 1 ? held_[2].stride(0) : 0;
    const int64_t column = held_[2].stride(dims - 1);
    const bool full = cos.size(dims - 1) == args.rotary_dim;  // a number for each channel, not for each pair
    args.table_step = full && interleaved ? 2 * column : column;
    args.table_second = !full ? 0 : interleaved ? column : args.rotary_dim / 2 * column;
    args.table_dtype = dtype_of(cos, "cos");
  }

  void set_positions(const Tensor& q, const Tensor& positions) {
    const int64_t dims = positions.dim();
    STD_TORCH_CHECK((dims == 1 || (dims == 2 && (positions.size(0) == 1 || positions.size(0) == args.batch))) &&
                        positions.size(dims - 1) == args.seqlen,
                    "rotary: positions must have ", args.batch, " or 1 rows of ", args.seqlen, ", got ",
                    positions.numel(), " elements");
    STD_TORCH_CHECK(positions.scalar_type() == ScalarType::Long || positions.scalar_type() == ScalarType::Int,
                    "rotary: positions must be int32 or int64, got ",
                    torch::headeronly::toString(positions.scalar_type()));
    STD_TORCH_CHECK(positions.device() == q.device(), "rotary: positions must be on the device of q");
    held_[4] = positions.is_contiguous() ? positions : contiguous_copy(positions);
    args.positions = data_of(held_[4]);
    args.positions_batch = dims == 2 && positions.size(0) > 1 ? args.seqlen : 0;
    args.wide_positions = positions.scalar_type() == ScalarType::Long;
  }

  std::array<Tensor, 5> held_;
};

}  // namespace fastattn
