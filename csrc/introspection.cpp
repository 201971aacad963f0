// fastattn._C: what was built, which CPU kernels run, and the random stream that dropout uses, for tests to compare
// against. pybind11 only, no torch header. The package works without this module.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "cpu/capability.h"
#include "philox.h"

namespace {

std::map<std::string, std::string> build_info() {
  return {{"compiler", __VERSION__}, {"cplusplus", std::to_string(__cplusplus)}};
}

std::vector<uint32_t> philox(uint64_t seed, uint64_t subsequence, uint64_t offset) {
  const fastattn::Philox4 counter = {{
      static_cast<uint32_t>(offset),
      static_cast<uint32_t>(offset >> 32),
      static_cast<uint32_t>(subsequence),
      static_cast<uint32_t>(subsequence >> 32),
  }};
  const fastattn::Philox4 out =
      fastattn::philox4x32_10(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  return {out.word, out.word + 4};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info, "Compiler and language level of the native part.");
  m.def(
      "cpu_capability", [] { return std::string(fastattn::capability_name(fastattn::cpu_capability())); },
      "The instruction set of the CPU kernels in use: default, avx2 or avx512.");
  m.def("philox", &philox, pybind11::arg("seed"), pybind11::arg("subsequence"), pybind11::arg("offset"),
        "The four 32-bit words of Philox4x32-10 for this seed and position.");
}
