// Every operator, boxed: tensors of the device become tensors of the CPU on the same memory, the CPU's kernel runs,
// and what it returns goes back: an argument as itself, a view of one as a view, fresh memory as fresh memory.
#include "sim.h"

#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <set>

namespace sim {
namespace {
using c10::IValue;
using torch::jit::Stack;

class Twins {
 public:
  std::optional<c10::DeviceIndex> device;
  bool host_tensor = false;  // one of the CPU, with dimensions, came along
  bool float64 = false;

  at::Tensor to_host(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_privateuseone()) {
      host_tensor |= tensor.is_cpu() && tensor.dim() > 0;
      return tensor;
    }
    TORCH_CHECK(
        !device || *device == tensor.device().index(),
        "Expected all tensors to be on the same device, but found at least two devices, neuron:", int(*device), " and ",
        tensor.device());
    device = tensor.device().index();
    float64 |= tensor.scalar_type() == at::kDouble || tensor.scalar_type() == at::kComplexDouble;
    auto twin = with_storage(tensor, host_of(tensor.storage()), c10::DispatchKey::CPU);
    tensors_.emplace(twin.unsafeGetTensorImpl(), tensor);
    return twin;
  }

  at::Tensor to_device(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cpu() || tensor.layout() != c10::kStrided) return tensor;
    auto argument = tensors_.find(tensor.unsafeGetTensorImpl());
    return argument != tensors_.end() ? argument->second : with_storage(tensor, device_of(tensor.storage()), kKey);
  }

  // A kernel may have resized, or set anew, the tensor that it wrote to.
  void follow(const at::Tensor& twin) {
    auto found = tensors_.find(twin.defined() ? twin.unsafeGetTensorImpl() : nullptr);
    if (found == tensors_.end()) return;
    auto& original = found->second;
    auto* impl = original.unsafeGetTensorImpl();
    const auto storage = device_of(twin.storage());
    if (storage.unsafeGetStorageImpl() != original.storage().unsafeGetStorageImpl()) {
      impl->set_storage_keep_dtype(storage);
    } else if (storage.data() != twin.storage().data()) {
      auto* grown = twin.storage().unsafeGetStorageImpl();
      const auto nbytes = grown->nbytes();
      replace_memory(
          storage, c10::make_intrusive<c10::StorageImpl>(
                       c10::StorageImpl::use_byte_size_t(), nbytes, grown->set_data_ptr(c10::DataPtr()), nullptr,
                       /*resizable=*/false));
    }
    if (original.sizes() != twin.sizes() || original.strides() != twin.strides() ||
        original.storage_offset() != twin.storage_offset()) {
      impl->set_sizes_and_strides(twin.sizes(), twin.strides(), twin.storage_offset());
    }
  }

 private:
  c10::Storage host_of(const c10::Storage& storage) {
    auto& twin = hosts_[storage.unsafeGetStorageImpl()];
    if (!twin) {
      twin = host_twin(storage);
      devices_[twin.unsafeGetStorageImpl()] = storage;
    }
    return twin;
  }
  c10::Storage device_of(const c10::Storage& storage) {
    auto& twin = devices_[storage.unsafeGetStorageImpl()];
    if (!twin) twin = to_device_storage(storage, *device);
    return twin;
  }

  std::unordered_map<c10::StorageImpl*, c10::Storage> hosts_, devices_;
  std::unordered_map<c10::TensorImpl*, at::Tensor> tensors_;  // the CPU's twin -> the original
};

template <class Map>
IValue map_tensors(const IValue& value, const Map& map) {
  if (value.isTensor()) return map(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> mapped;
    for (const at::Tensor& tensor : value.toTensorVector()) mapped.push_back(map(tensor));
    return mapped;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> mapped;
    for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector())
      mapped.push_back(tensor ? std::make_optional(map(*tensor)) : std::nullopt);
    return mapped;
  }
  return value;
}

// Convolution asks devices that are not PyTorch's own for two operators of their own; the CPU knows them otherwise.
c10::OperatorHandle host_operator(const c10::OperatorHandle& op, Stack* stack) {
  auto& dispatcher = c10::Dispatcher::singleton();
  const auto& name = op.schema().name();
  if (name == "aten::convolution_overrideable") return dispatcher.findSchemaOrThrow("aten::convolution", "");
  if (name == "aten::convolution_backward_overrideable") {
    constexpr int kArguments = 10, kAfterBias = 7;  // grad_output first; bias_sizes goes before the last seven
    const auto channels = (*stack)[stack->size() - kArguments].toTensor().size(1);
    stack->insert(stack->end() - kAfterBias, IValue(std::vector<int64_t>{channels}));
    return dispatcher.findSchemaOrThrow("aten::convolution_backward", "");
  }
  return op;
}

// PyTorch's own devices take an index from the CPU; everything else must be on one device.
bool takes_host_tensors(const std::string& name) {
  static const std::set<std::string> names = {
      "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"};
  return names.count(name) > 0 || name.rfind("aten::", 0) != 0;
}

void note_waits(const c10::OperatorHandle& op) {
  if (op.hasTag(at::Tag::data_dependent_output)) records::note_transfer("scalar", op.schema().name());
  if (op.hasTag(at::Tag::dynamic_output_shape)) records::note_transfer("shape", op.schema().name());
}

// Lends the device's next random numbers to the CPU's kernel: as an argument, or as the CPU's own for so long.
void call_with_random(
    const c10::OperatorHandle& op, Stack* stack, size_t first, c10::DeviceIndex device,
    const std::function<void()>& call) {
  auto host = next_host_generator(default_generator(device));
  const auto& arguments = op.schema().arguments();
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (arguments[i].name() == "generator" && (*stack)[first + i].isNone()) {
      (*stack)[first + i] = host;
      return call();
    }
  }
  auto own = at::detail::getDefaultCPUGenerator();
  const auto before = own.get_state();
  own.set_state(host.get_state());
  struct Restore {
    at::Generator generator;
    at::Tensor state;
    ~Restore() { generator.set_state(state); }
  } restore{own, before};
  call();
}
}  // namespace

at::Tensor with_storage(const at::Tensor& like, c10::Storage storage, c10::DispatchKey key) {
  auto made =
      at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  auto* impl = made.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  made._set_conj(like.is_conj());
  made._set_neg(like.is_neg());
  return made;
}

at::Tensor host_view(const at::Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_privateuseone()) return tensor;
  return with_storage(tensor, host_twin(tensor.storage()), c10::DispatchKey::CPU);
}

void run_on_host(const c10::OperatorHandle& op, Stack* stack) {
  const auto& schema = op.schema();
  const auto count = schema.arguments().size();
  const auto first = stack->size() - count;
  Twins twins;
  bool random = op.hasTag(at::Tag::nondeterministic_seeded);
  std::vector<IValue> arguments(stack->begin() + static_cast<std::ptrdiff_t>(first), stack->end());
  for (auto& value : arguments) {
    value = map_tensors(value, [&](const at::Tensor& tensor) { return twins.to_host(tensor); });
    if (value.isDevice() && value.toDevice().type() == kDevice) {
      twins.device = device_or_current(value.toDevice().index());
      value = c10::Device(c10::kCPU);
    }
    if (value.isGenerator() && value.toGenerator().device().type() == kDevice) {
      value = next_host_generator(value.toGenerator());
      random = false;
    }
  }
  const auto device = twins.device.value_or(current_device());
  TORCH_CHECK(
      !twins.host_tensor || takes_host_tensors(schema.name()),
      "Expected all tensors to be on the same device, but found at least two devices, neuron:", int(device),
      " and cpu! (", schema.name(), ")");
  twins.device = device;
  records::note_operator(schema.name(), twins.float64);
  note_waits(op);

  const auto given = arguments;
  std::move(arguments.begin(), arguments.end(), stack->begin() + static_cast<std::ptrdiff_t>(first));
  {
    at::AutoDispatchBelowADInplaceOrView below;
    const auto call = [&] {
      host_operator(op, stack).redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
    };
    if (random) {
      call_with_random(op, stack, first, device, call);
    } else {
      call();
    }
  }
  for (size_t i = 0; i < count; ++i) {
    const auto* alias = schema.arguments()[i].alias_info();
    if (alias && alias->isWrite()) {
      map_tensors(given[i], [&](const at::Tensor& twin) {
        twins.follow(twin);
        return twin;
      });
    }
  }
  for (auto i = stack->size() - schema.returns().size(); i < stack->size(); ++i)
    (*stack)[i] = map_tensors((*stack)[i], [&](const at::Tensor& tensor) { return twins.to_device(tensor); });
}

}  // namespace sim
