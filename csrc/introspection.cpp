// fastattn._C: what was built, which CPU kernels run, and the random stream that dropout uses, for tests to compare
// against. pybind11 only, no torch header. The package works without this module.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <string>

#include "cpu/capability.h"
#include "philox.h"

namespace {

std::map<std::string, std::string> build_info() {
  return {{"compiler", __VERSION__}, {"cplusplus", std::to_string(__cplusplus)}};
}

std::array<uint32_t, 4> philox(const std::array<uint32_t, 4>& counter, const std::array<uint32_t, 2>& key) {
  const fastattn::Philox4 out =
      fastattn::philox4x32_10({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
  return {out.word[0], out.word[1], out.word[2], out.word[3]};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info, "Compiler and language level of the native part.");
  m.def(
      "cpu_capability", [] { return std::string(fastattn::capability_name(fastattn::cpu_capability())); },
      "The instruction set of the CPU kernels in use: default, avx2, avx512 or avx512bf16.");
  m.def("philox", &philox, pybind11::arg("counter"), pybind11::arg("key"),
        "The four words of Philox4x32-10 for a counter of four and a key of two 32-bit words.");
}
