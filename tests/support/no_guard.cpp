// Lets a PyTorch without CUDA trace with fake tensors on "cuda": views ask for a guard of their device.
#include <c10/core/impl/DeviceGuardImplInterface.h>

C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
