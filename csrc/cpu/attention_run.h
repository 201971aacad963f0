#pragma once
// The forward and backward of attention, for the wrappers that run it.
#include "api.h"

namespace fastattn {

// Computes args.out, and both parts of args.lse if there is memory for them.
void run_attention_fwd(AttentionCpuArgs& args);

// Computes args.dq, dk and dv, and what args says about dbias and dsink_partial, but not a dbias in a pass of its own.
void run_attention_bwd(AttentionCpuArgs& args);

}  // namespace fastattn
