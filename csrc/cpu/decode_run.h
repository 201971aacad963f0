#pragma once
// The steps of attention on a cache, for the wrappers that run them.
#include "head_tensors.h"

namespace fastattn {

// Computes attention for args.q and writes args.out and args.lse. num_splits is the number of splits of the keys; if it
// is 0, the function chooses the number from the sizes.
void run_attention_decode(DecodeArgs& args, int64_t num_splits);

// Copies `seqlen` new rows of `size` bytes for each of `heads` heads into the cache `to`, after the valid keys. Strides
// count elements of `element_size` bytes.
struct AppendCall {
  HeadTensor from, to;
  int64_t heads, seqlen, size, element_size;
};
void append_rows(const AppendCall& call, const DecodeArgs& args);

}  // namespace fastattn
