// Memory: a storage of the device owns an ordinary storage of the CPU, so that either view of it outlives the other.
#include "sim.h"

#include <c10/core/CPUAllocator.h>

#include <array>
#include <atomic>
#include <mutex>

namespace sim {
namespace {
constexpr size_t kMostDevices = 64;
std::array<std::atomic<int64_t>, kMostDevices> in_use, peak;

struct Block {
  c10::Storage host;
  int64_t nbytes;
  c10::DeviceIndex device;
};

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  in_use[block->device] -= block->nbytes;
  delete block;
}

c10::DataPtr own(c10::Storage host, c10::DeviceIndex device) {
  const auto nbytes = static_cast<int64_t>(host.nbytes());
  const auto now = in_use[device] += nbytes;
  auto most = peak[device].load();
  while (now > most && !peak[device].compare_exchange_weak(most, now)) {
  }
  void* address = host.mutable_data();
  return {address, new Block{std::move(host), nbytes, device}, &free_block, c10::Device(kDevice, device)};
}

struct DeviceMemory final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t nbytes) override { return own(new_host_storage(nbytes), current_device()); }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t nbytes) const override { std::memcpy(to, from, nbytes); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    c10::CachingDeviceAllocator::DeviceStats stats;
    for (auto* figures : {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes}) {
      (*figures)[0].current = in_use[device];
      (*figures)[0].peak = peak[device];
    }
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex device) override { peak[device] = in_use[device].load(); }
} device_memory;

// Pinned memory is ordinary memory whose address is remembered.
std::mutex pinned_guard;
std::map<const void*, size_t> pinned;

void unpin(void* address) {
  {
    std::lock_guard<std::mutex> held(pinned_guard);
    pinned.erase(address);
  }
  std::free(address);
}

struct PinnedMemory final : at::HostAllocator {
  c10::DataPtr allocate(size_t nbytes) override {
    const auto size = std::max<size_t>(nbytes, 1);
    void* address = std::malloc(size);
    TORCH_CHECK(address, "neuron (simulated): out of memory for ", nbytes, " pinned bytes");
    std::lock_guard<std::mutex> held(pinned_guard);
    pinned[address] = size;
    return {address, address, &unpin, c10::Device(c10::kCPU)};
  }
  void copy_data(void* to, const void* from, size_t nbytes) const override { std::memcpy(to, from, nbytes); }
  bool record_event(void*, void*, c10::Stream) override { return true; }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
} pinned_memory;

c10::Storage make_storage(size_t nbytes, c10::DataPtr data, c10::Allocator* allocator) {
  return c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), nbytes, std::move(data), allocator, /*resizable=*/true);
}
}  // namespace

c10::DeviceAllocator* device_allocator() { return &device_memory; }
at::HostAllocator* pinned_allocator() { return &pinned_memory; }

bool is_pinned(const void* address) {
  std::lock_guard<std::mutex> held(pinned_guard);
  auto after = pinned.upper_bound(address);
  if (after == pinned.begin()) return false;
  const auto& [start, size] = *--after;
  return static_cast<const char*>(address) < static_cast<const char*>(start) + size;
}

c10::Storage new_host_storage(size_t nbytes) {
  auto* allocator = c10::GetCPUAllocator();
  return make_storage(nbytes, allocator->allocate(nbytes), allocator);
}

c10::Storage to_device_storage(c10::Storage host, c10::DeviceIndex device) {
  const auto nbytes = host.nbytes();
  return make_storage(nbytes, own(std::move(host), device), &device_memory);
}

c10::Storage host_twin(const c10::Storage& storage) {
  c10::DataPtr borrowed(
      storage.mutable_data(), new c10::Storage(storage),
      [](void* context) { delete static_cast<c10::Storage*>(context); }, c10::Device(c10::kCPU));
  return make_storage(storage.nbytes(), std::move(borrowed), c10::GetCPUAllocator());
}

void replace_memory(const c10::Storage& storage, c10::Storage host) {
  auto* impl = storage.unsafeGetStorageImpl();
  const auto nbytes = host.nbytes();
  impl->set_data_ptr_noswap(own(std::move(host), storage.device().index()));
  impl->set_nbytes(nbytes);
}

void resize_storage(const c10::Storage& storage, size_t nbytes) {
  auto host = new_host_storage(nbytes);
  if (const auto kept = std::min(nbytes, storage.nbytes())) std::memcpy(host.mutable_data(), storage.data(), kept);
  replace_memory(storage, std::move(host));
}

}  // namespace sim
