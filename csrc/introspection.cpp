// fastattn._C answers questions about the compiled part: how it was built, which instruction set this processor runs,
// which random numbers dropout draws, and whether Python objects still hold what was read from them. `fastattn info`,
// `fastattn.explain` and the layers use it. It uses pybind11 and no torch header. The package works without it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "cpu/capability.h"
#include "philox.h"
#include "unchanged.h"

namespace {

namespace py = pybind11;

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["cplusplus"] = std::to_string(__cplusplus);
#include "build_info.inc"  // made by setup.py
  return info;
}

std::array<uint32_t, 4> philox(const std::array<uint32_t, 4>& counter, const std::array<uint32_t, 2>& key) {
  const fastattn::Philox4 out =
      fastattn::philox4x32_10({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
  return {out.word[0], out.word[1], out.word[2], out.word[3]};
}

std::string name_of(fastattn::CpuCapability capability) {
  return fastattn::capability_name(capability);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info,
        "What the libraries were built with and for: compiler, cplusplus, cxx, torch, nvcc, cuda_archs, cpu_variants.");
  m.def(
      "best_cpu_capability", [] { return name_of(fastattn::best_capability()); },
      "The best instruction set of this processor: default, avx2, avx512, avx512bf16 or amx.");
  m.def(
      "cpu_capability", [] { return name_of(fastattn::cpu_capability()); },
      "The instruction set of the CPU kernels in use, which FASTATTN_CPU_CAPABILITY may lower.");
  m.def("philox", &philox, py::arg("counter"), py::arg("key"),
        "The four words of Philox4x32-10 for a counter of four and a key of two 32-bit words.");
  // pybind11's own calls take several times as long
  static PyMethodDef methods[] = {
      {"unchanged", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&fastattn::unchanged)), METH_FASTCALL,
       fastattn::kUnchangedDoc},
      {nullptr, nullptr, 0, nullptr}};
  PyModule_AddFunctions(m.ptr(), methods);
}
