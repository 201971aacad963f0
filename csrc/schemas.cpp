// The schemas of all ops. They form a separate library, to which the op libraries link. So the ops are defined once and
// before their kernels, whichever library is loaded first.
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
