#pragma once
// The steps of attention on a cache, for the wrappers that take them.
#include "head_tensors.h"

namespace fastattn {

// Attention of args.q, into args.out and args.lse. num_splits: the number of parts of the keys; 0: chosen by size.
void run_attention_decode(DecodeArgs& args, int64_t num_splits);

// Copies `seqlen` new rows of `size` bytes for each of `heads` heads into the cache `to`, after the valid keys. Strides
// count elements of `element_size` bytes.
struct AppendCall {
  HeadTensor from, to;
  int64_t heads, seqlen, size, element_size;
};
void append_rows(const AppendCall& call, const DecodeArgs& args);

}  // namespace fastattn
