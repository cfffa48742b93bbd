// What Python sees.
#include "sim.h"

#include <torch/csrc/utils/pybind.h>

namespace {
namespace py = pybind11;
using sim::records::Collective;

py::dict counts() {
  const auto seen = sim::records::counts();
  py::list collectives;
  for (const auto& one : seen.collectives)
    collectives.append(py::make_tuple(one.kind, one.reduction, one.dtype, py::tuple(py::cast(one.ranks)), one.numel));
  py::dict result;
  result["operators"] = seen.operators;
  result["fallbacks"] = seen.fallbacks;
  result["float64"] = seen.float64;
  result["transfers"] = seen.transfers;
  result["collectives"] = collectives;
  return result;
}

void set_listener(const py::object& listener) {
  if (listener.is_none()) {
    sim::records::set_listener(nullptr);
    return;
  }
  // Kept for good: the last copy may be dropped by a thread that does not hold the interpreter.
  auto* kept = new py::object(listener);
  sim::records::set_listener([kept](const std::string& what, const std::string& name) {
    py::gil_scoped_acquire held;
    (*kept)(what, name);
  });
}
}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  sim::register_hooks();
  module.def("device_count", [] { return int(sim::device_count()); });
  module.def("current_device", [] { return int(sim::current_device()); });
  module.def("set_device", [](int device) { sim::set_device(static_cast<c10::DeviceIndex>(device)); });
  module.def("default_generator", [](int device) {
    return sim::default_generator(static_cast<c10::DeviceIndex>(device));
  });
  module.def("wrap_gloo", &sim::wrap_gloo);
  module.def("counts", &counts);
  module.def("reset_counts", &sim::records::reset);
  module.def("set_unlowered", &sim::records::set_unlowered);
  module.def("set_listener", &set_listener);
}
