#pragma once
// The forward of attention, for the wrappers that run it.
#include "api.h"

namespace fastattn {

// Computes args.out, and both parts of args.lse if there is memory for them.
void run_attention_fwd(AttentionCpuArgs& args);

}  // namespace fastattn
