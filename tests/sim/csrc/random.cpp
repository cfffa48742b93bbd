// Random numbers: a generator's state is its seed and an offset (the 16 bytes that DTensor expects of a device).
// Each operator draws from a CPU generator that is seeded from the two; the first one of a seed gives the numbers
// that the CPU gives for that seed.
#include "sim.h"

#include <ATen/CPUGeneratorImpl.h>

namespace sim {
namespace {
constexpr uint64_t kOffsetPerOperator = 4;
constexpr uint64_t kSpread = 0x9E3779B97F4A7C15ULL;  // the golden ratio: neighbouring offsets give distant seeds
constexpr int64_t kStateBytes = 16;

struct Generator final : c10::GeneratorImpl {
  explicit Generator(c10::DeviceIndex device)
      : GeneratorImpl(c10::Device(kDevice, device), c10::DispatchKeySet(kKey)) {}

  at::Generator next() {
    auto host = at::detail::createCPUGenerator(seed_ ^ (offset_ * kSpread));
    offset_ += kOffsetPerOperator;
    return host;
  }

  void set_current_seed(uint64_t seed) override {
    seed_ = seed;
    offset_ = 0;
  }
  uint64_t current_seed() const override { return seed_; }
  void set_offset(uint64_t offset) override { offset_ = offset; }
  uint64_t get_offset() const override { return offset_; }
  uint64_t seed() override {
    set_current_seed(c10::detail::getNonDeterministicRandom());
    return seed_;
  }
  void set_state(const c10::TensorImpl& state) override {
    TORCH_CHECK(
        state.numel() == kStateBytes && state.dtype() == c10::kByte, "neuron (simulated): a random state has ",
        kStateBytes, " bytes, not ", state.numel(), " of ", state.dtype());
    const auto* bytes = static_cast<const char*>(state.data());
    std::memcpy(&seed_, bytes, sizeof seed_);
    std::memcpy(&offset_, bytes + sizeof seed_, sizeof offset_);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    auto state = at::detail::empty_cpu({kStateBytes}, c10::kByte);
    auto* bytes = static_cast<char*>(state.mutable_data_ptr());
    std::memcpy(bytes, &seed_, sizeof seed_);
    std::memcpy(bytes + sizeof seed_, &offset_, sizeof offset_);
    return state.getIntrusivePtr();
  }
  Generator* clone_impl() const override {
    auto* copy = new Generator(device().index());
    copy->seed_ = seed_;
    copy->offset_ = offset_;
    return copy;
  }
  static c10::DeviceType device_type() { return kDevice; }

 private:
  uint64_t seed_ = c10::default_rng_seed_val, offset_ = 0;
};
}  // namespace

const at::Generator& default_generator(c10::DeviceIndex device) {
  static const std::vector<at::Generator> all = [] {
    std::vector<at::Generator> made;
    for (c10::DeviceIndex i = 0; i < device_count(); ++i) made.push_back(at::make_generator<Generator>(i));
    return made;
  }();
  return all.at(device_or_current(device));
}

at::Generator new_generator(c10::DeviceIndex device) {
  return at::make_generator<Generator>(device_or_current(device));
}

at::Generator next_host_generator(const at::Generator& generator) {
  return static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->next();
}

}  // namespace sim
