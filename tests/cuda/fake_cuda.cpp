// Lets autograd's engine believe in one CUDA device that is not there.
//
// The engine asks for streams (a device guard answers) and whether the device has a context (the CUDA
// hooks answer, of which one function is exchanged).
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstdint>
#include <cstring>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

const Device kDevice(DeviceType::CUDA, 0);
const Stream kStream(Stream::DEFAULT, kDevice);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  Device getDevice() const override { return kDevice; }
  Device exchangeDevice(Device) const override { return kDevice; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const noexcept override { return kStream; }
  Stream getDefaultStream(Device) const override { return kStream; }
  Stream getNewStream(Device, int = 0) const override { return kStream; }
  Stream exchangeStream(Stream) const noexcept override { return kStream; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

bool has_context(const void*, DeviceIndex) { return true; }

} // namespace

extern "C" void install_fake_cuda() {
  static Guard guard;
  c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)].store(&guard);

  // A pointer to a virtual function is its place in the table (Itanium C++ ABI; on 64-bit ARM the
  // lowest bit stands elsewhere and is 0 here).
  auto ask = &at::AcceleratorHooksInterface::hasPrimaryContext;
  uintptr_t offset = 0;
  std::memcpy(&offset, &ask, sizeof(offset));
  const size_t slot = (offset & ~uintptr_t{1}) / sizeof(void*);
  constexpr size_t kBefore = 2, kSlots = 128; // two entries stand before the table's first function
  static void* table[kBefore + kSlots];
  auto* hooks = reinterpret_cast<void***>(
      const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks()));
  if (*hooks != table + kBefore) {
    std::memcpy(table, *hooks - kBefore, sizeof(table));
    table[kBefore + slot] = reinterpret_cast<void*>(&has_context);
    *hooks = table + kBefore;
  }
}
