#pragma once
// The forward and backward of attention, for the wrappers that run it.
#include "api.h"

namespace fastattn {

// Computes args.out, and both parts of args.lse if there is memory for them.
void run_attention_fwd(AttentionCpuArgs& args);

// Computes args.dq, dk and dv. Also computes dsink_partial and dbias if args has them, except a dbias in a separate
// pass.
void run_attention_bwd(AttentionCpuArgs& args);

}  // namespace fastattn
