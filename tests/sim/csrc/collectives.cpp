// The process-group backend `neuron`: gloo on the CPU's view of the tensors. What is asynchronous in gloo is so here.
#include "sim.h"

#include <torch/csrc/distributed/c10d/PrefixStore.hpp>

namespace sim {
namespace {
using c10::intrusive_ptr;
using c10d::Work;
using Tensors = std::vector<at::Tensor>;
using TensorLists = std::vector<Tensors>;

Tensors host(const Tensors& tensors) {
  Tensors views;
  for (const auto& tensor : tensors) views.push_back(host_view(tensor));
  return views;
}
TensorLists host(const TensorLists& lists) {
  TensorLists views;
  for (const auto& tensors : lists) views.push_back(host(tensors));
  return views;
}
Tensors flat(const TensorLists& lists) {
  Tensors all;
  for (const auto& tensors : lists) all.insert(all.end(), tensors.begin(), tensors.end());
  return all;
}

// Waits for gloo's work once (some of them copy their result out at every wait), then divides where a mean was asked.
class DeviceWork final : public Work {
 public:
  DeviceWork(intrusive_ptr<Work> inner, Tensors outputs, int64_t divisor)
      : inner_(std::move(inner)), outputs_(std::move(outputs)), divisor_(divisor) {}

  bool isCompleted() override { return done_ || inner_->isCompleted(); }
  bool isSuccess() const override { return done_ || inner_->isSuccess(); }
  std::exception_ptr exception() const override { return inner_->exception(); }
  int sourceRank() const override { return inner_->sourceRank(); }
  Tensors result() override { return outputs_; }
  void synchronize() override { wait(kNoTimeout); }
  void abort() override { inner_->abort(); }
  bool wait(std::chrono::milliseconds timeout) override {
    std::lock_guard<std::mutex> held(once_);
    if (done_) return true;
    if (!inner_->wait(timeout)) return false;
    if (divisor_ > 1) divide();
    return done_ = true;
  }
  intrusive_ptr<c10::ivalue::Future> getFuture() override {
    wait(kNoTimeout);
    std::vector<c10::Device> devices;
    for (const auto& tensor : outputs_) devices.push_back(tensor.device());
    auto future =
        c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()), devices);
    future->markCompleted(c10::IValue(outputs_));
    return future;
  }

 private:
  void divide() {
    at::AutoDispatchBelowADInplaceOrView below;
    for (const auto& tensor : outputs_) {
      auto view = host_view(tensor);
      if (c10::isFloatingType(tensor.scalar_type())) {
        view.div_(divisor_);
      } else {
        view.div_(divisor_, "trunc");
      }
    }
  }

  intrusive_ptr<Work> inner_;
  Tensors outputs_;
  int64_t divisor_;
  std::mutex once_;
  std::atomic<bool> done_{false};
};

std::string reduction_name(const c10d::ReduceOp& op) {
  static const std::map<uint8_t, std::string> names = {
      {c10d::ReduceOp::SUM, "sum"}, {c10d::ReduceOp::AVG, "avg"},     {c10d::ReduceOp::PRODUCT, "product"},
      {c10d::ReduceOp::MIN, "min"}, {c10d::ReduceOp::MAX, "max"},     {c10d::ReduceOp::BAND, "band"},
      {c10d::ReduceOp::BOR, "bor"}, {c10d::ReduceOp::BXOR, "bxor"}};
  auto found = names.find(static_cast<uint8_t>(op.op_));
  return found == names.end() ? "other" : found->second;
}

class DeviceBackend final : public c10d::Backend {
 public:
  DeviceBackend(intrusive_ptr<c10d::Backend> gloo, std::vector<uint64_t> ranks)
      : Backend(gloo->getRank(), gloo->getSize()), gloo_(std::move(gloo)), ranks_(std::move(ranks)) {}

  const std::string getBackendName() const override { return "neuron"; }
  void setSequenceNumberForGroup() override { gloo_->setSequenceNumberForGroup(); }
  uint64_t getSequenceNumberForGroup() override { return gloo_->getSequenceNumberForGroup(); }
  void setTimeout(std::chrono::milliseconds timeout) override { gloo_->setTimeout(timeout); }
  void abort() override { gloo_->abort(); }
  void shutdown() override { gloo_->shutdown(); }
  bool supportsSplitting() const override { return true; }
  intrusive_ptr<Options> getBackendOptions() override { return gloo_->getBackendOptions(); }
  intrusive_ptr<Backend> split(
      const intrusive_ptr<c10d::Store>& store, const std::vector<int>& ranks,
      const intrusive_ptr<Options>& options) override {
    // The CPU's own gloo is split beside this one, over the same store.
    auto part = gloo_->split(c10::make_intrusive<c10d::PrefixStore>("neuron", store), ranks, options);
    if (!part) return part;
    std::vector<uint64_t> global;
    for (const auto rank : ranks) global.push_back(ranks_.at(rank));
    return wrap_gloo(std::move(part), std::move(global));
  }

  intrusive_ptr<Work> broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    auto views = host(tensors);
    note("broadcast", tensors);
    return work(gloo_->broadcast(views, options), tensors);
  }
  intrusive_ptr<Work> allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    auto views = host(tensors);
    return reduce_to("all_reduce", tensors, tensors, options, [&](auto& o) { return gloo_->allreduce(views, o); });
  }
  intrusive_ptr<Work> allreduce_coalesced(
      Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) override {
    auto views = host(tensors);
    return reduce_to("all_reduce", tensors, tensors, options, [&](auto& o) {
      return gloo_->allreduce_coalesced(views, o);
    });
  }
  intrusive_ptr<Work> reduce(Tensors& tensors, const c10d::ReduceOptions& options) override {
    auto views = host(tensors);
    return reduce_to("reduce", tensors, tensors, options, [&](auto& o) { return gloo_->reduce(views, o); });
  }
  intrusive_ptr<Work> allgather(
      TensorLists& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override {
    auto out = host(outputs);
    auto in = host(inputs);
    note("all_gather", inputs);
    return work(gloo_->allgather(out, in, options), flat(outputs));
  }
  intrusive_ptr<Work> _allgather_base(
      at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) override {
    auto out = host_view(output), in = host_view(input);
    note("all_gather", {input});
    return work(gloo_->_allgather_base(out, in, options), {output});
  }
  intrusive_ptr<Work> allgather_into_tensor_coalesced(
      Tensors& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override {
    auto out = host(outputs), in = host(inputs);
    note("all_gather", inputs);
    return work(gloo_->allgather_into_tensor_coalesced(out, in, options), outputs);
  }
  intrusive_ptr<Work> gather(TensorLists& outputs, Tensors& inputs, const c10d::GatherOptions& options) override {
    auto out = host(outputs);
    auto in = host(inputs);
    note("gather", inputs);
    return work(gloo_->gather(out, in, options), flat(outputs));
  }
  intrusive_ptr<Work> scatter(
      Tensors& outputs, TensorLists& inputs, const c10d::ScatterOptions& options) override {
    auto out = host(outputs);
    auto in = host(inputs);
    note("scatter", outputs);
    return work(gloo_->scatter(out, in, options), outputs);
  }
  intrusive_ptr<Work> reduce_scatter(
      Tensors& outputs, TensorLists& inputs, const c10d::ReduceScatterOptions& options) override {
    auto out = host(outputs);
    auto in = host(inputs);
    return reduce_to("reduce_scatter", outputs, outputs, options, [&](auto& o) {
      return gloo_->reduce_scatter(out, in, o);
    });
  }
  intrusive_ptr<Work> _reduce_scatter_base(
      at::Tensor& output, at::Tensor& input, const c10d::ReduceScatterOptions& options) override {
    auto out = host_view(output), in = host_view(input);
    return reduce_to("reduce_scatter", {output}, {output}, options, [&](auto& o) {
      return gloo_->_reduce_scatter_base(out, in, o);
    });
  }
  intrusive_ptr<Work> reduce_scatter_tensor_coalesced(
      Tensors& outputs, Tensors& inputs, const c10d::ReduceScatterOptions& options) override {
    auto out = host(outputs), in = host(inputs);
    return reduce_to("reduce_scatter", outputs, outputs, options, [&](auto& o) {
      return gloo_->reduce_scatter_tensor_coalesced(out, in, o);
    });
  }
  intrusive_ptr<Work> alltoall_base(
      at::Tensor& output, at::Tensor& input, std::vector<int64_t>& output_sizes, std::vector<int64_t>& input_sizes,
      const c10d::AllToAllOptions& options) override {
    auto out = host_view(output), in = host_view(input);
    note("all_to_all", {});  // the sizes may differ from rank to rank
    return work(gloo_->alltoall_base(out, in, output_sizes, input_sizes, options), {output});
  }
  intrusive_ptr<Work> alltoall(Tensors& outputs, Tensors& inputs, const c10d::AllToAllOptions& options) override {
    auto out = host(outputs), in = host(inputs);
    note("all_to_all", {});
    return work(gloo_->alltoall(out, in, options), outputs);
  }
  intrusive_ptr<Work> send(Tensors& tensors, int to, int tag) override {
    auto views = host(tensors);
    return work(gloo_->send(views, to, tag), tensors);
  }
  intrusive_ptr<Work> recv(Tensors& tensors, int from, int tag) override {
    auto views = host(tensors);
    return work(gloo_->recv(views, from, tag), tensors);
  }
  intrusive_ptr<Work> recvAnysource(Tensors& tensors, int tag) override {
    auto views = host(tensors);
    return work(gloo_->recvAnysource(views, tag), tensors);
  }
  intrusive_ptr<Work> barrier(const c10d::BarrierOptions& options) override {
    note("barrier", {});
    return work(gloo_->barrier(options), {});
  }

 private:
  // Gloo knows no mean: the sum, divided when it is waited for.
  template <class Options, class Call>
  intrusive_ptr<Work> reduce_to(
      const char* kind, const Tensors& counted, const Tensors& outputs, Options options, const Call& call) {
    note(kind, counted, reduction_name(options.reduceOp));
    const bool mean = options.reduceOp == c10d::ReduceOp::AVG;
    if (mean) options.reduceOp = c10d::ReduceOp::SUM;
    return work(call(options), outputs, mean ? getSize() : 1);
  }

  static intrusive_ptr<Work> work(intrusive_ptr<Work> inner, Tensors outputs, int64_t divisor = 1) {
    return c10::make_intrusive<DeviceWork>(std::move(inner), std::move(outputs), divisor);
  }

  void note(const char* kind, const Tensors& tensors, std::string reduction = "") const {
    int64_t numel = 0;
    for (const auto& tensor : tensors) numel += tensor.numel();
    const auto dtype = tensors.empty() ? "" : c10::toString(tensors.front().scalar_type());
    records::note_collective({kind, std::move(reduction), dtype, ranks_, numel});
  }

  intrusive_ptr<c10d::Backend> gloo_;
  std::vector<uint64_t> ranks_;
};
}  // namespace

c10::intrusive_ptr<c10d::Backend> wrap_gloo(
    c10::intrusive_ptr<c10d::Backend> gloo, std::vector<uint64_t> ranks) {
  return c10::make_intrusive<DeviceBackend>(std::move(gloo), std::move(ranks));
}

}  // namespace sim
