// The schemas of all ops, in a library of its own that the op libraries link to. Whichever of these is loaded first,
// the ops are defined once and before their kernels.
#include <torch/csrc/stable/library.h>

namespace {

constexpr const char* kDefinitions[] = {
#include "schemas.inc"  // made by setup.py from fastattn/ops/_schemas.py
};

}  // namespace

STABLE_TORCH_LIBRARY(fastattn, m) {
  for (const char* definition : kDefinitions) {
    m.def(definition);
  }
}
