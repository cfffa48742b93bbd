// A simulated `neuron` device: PrivateUse1 tensors in host memory, every operator run by the CPU's kernel on the
// same memory. For tests only.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace sim {

constexpr auto kDevice = c10::DeviceType::PrivateUse1;
constexpr auto kKey = c10::DispatchKey::PrivateUse1;

// ---- devices (device.cpp) ------------------------------------------------------------------------------
c10::DeviceIndex device_count();
c10::DeviceIndex current_device();  // of this thread
void set_device(c10::DeviceIndex index);
inline c10::DeviceIndex device_or_current(c10::DeviceIndex index) {
  return index < 0 ? current_device() : index;
}
void register_hooks();

// ---- memory (memory.cpp): a storage on the device owns a storage of the CPU -----------------------------
c10::DeviceAllocator* device_allocator();
at::HostAllocator* pinned_allocator();
bool is_pinned(const void* address);
c10::Storage new_host_storage(size_t nbytes);
c10::Storage to_device_storage(c10::Storage host, c10::DeviceIndex device);  // takes the memory over
c10::Storage host_twin(const c10::Storage& storage);                         // borrows it, and keeps it alive
void replace_memory(const c10::Storage& storage, c10::Storage host);
void resize_storage(const c10::Storage& storage, size_t nbytes);

// ---- random numbers (random.cpp) -------------------------------------------------------------------------
const at::Generator& default_generator(c10::DeviceIndex device);
at::Generator new_generator(c10::DeviceIndex device);
at::Generator next_host_generator(const at::Generator& generator);  // for one operator; moves `generator` on

// ---- operators (fallback.cpp, kernels.cpp) ---------------------------------------------------------------
at::Tensor with_storage(const at::Tensor& like, c10::Storage storage, c10::DispatchKey key);
at::Tensor host_view(const at::Tensor& tensor);  // the same memory as a tensor of the CPU; CPU tensors as they are
void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack);

// ---- collectives (collectives.cpp) -----------------------------------------------------------------------
c10::intrusive_ptr<c10d::Backend> wrap_gloo(c10::intrusive_ptr<c10d::Backend> gloo, std::vector<uint64_t> ranks);

// ---- what happened (records.cpp) -------------------------------------------------------------------------
namespace records {
struct Collective {
  std::string kind, reduction, dtype;
  std::vector<uint64_t> ranks;
  int64_t numel;
};
struct Counts {
  std::map<std::string, int64_t> operators;   // by name
  std::map<std::string, int64_t> fallbacks;   // of those without a lowering
  std::map<std::string, int64_t> float64;     // of those that computed in 64-bit floating point
  std::map<std::string, int64_t> transfers;   // "to host", "to device", "scalar", "shape"
  std::vector<Collective> collectives;        // in this process's order
};
using Listener = std::function<void(const std::string& what, const std::string& name)>;

void set_unlowered(std::vector<std::string> names);
void set_listener(Listener listener);  // called after each fallback and each transfer to the host
void note_operator(const std::string& name, bool float64);
void note_transfer(const std::string& what, const std::string& name);
void note_collective(Collective collective);
Counts counts();
void reset();
}  // namespace records

}  // namespace sim
