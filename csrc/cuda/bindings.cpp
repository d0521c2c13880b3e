// The Python face of the CUDA part; arguments are checked by eva_kernels.convergence.
#include "../arrays.h"
#include "compare_bases.h"

namespace {

py::dict result(eva::BasisComparison& comparison) {
  eva::ComparisonResult result;
  {
    py::gil_scoped_release unlocked;
    result = comparison.result();
  }
  const std::vector<py::ssize_t> shape{comparison.sites(), comparison.width()};
  py::dict arrays;
  arrays["cosines"] = to_array(result.cosines, shape);
  arrays["overlaps"] = to_array(result.overlaps, shape);
  arrays["norms"] = to_array(result.norms, shape);
  arrays["components_converged"] = to_array(result.components_converged);
  arrays["subspace_converged"] = to_array(result.subspace_converged);
  return arrays;
}

}  // namespace

void bind_cuda(py::module_& module) {
  using namespace pybind11::literals;
  module.def("cuda_devices", [] {
    std::string why;
    const int count = eva::cuda_device_count(&why);
    return py::make_tuple(count, why);
  });
  module.def("cuda_versions", [] { return py::make_tuple(eva::cuda_runtime_version(), eva::cuda_driver_version()); });
  py::class_<eva::BasisComparison>(module, "BasisComparison")
      .def(py::init([](const Array<int64_t>& rows, const Array<int64_t>& columns, double tau, int device) {
             return std::make_unique<eva::BasisComparison>(to_vector(rows), to_vector(columns), tau, device);
           }),
           "rows"_a, "columns"_a, "tau"_a, "device"_a)
      .def(
          "launch",
          [](eva::BasisComparison& comparison, const Array<uint64_t>& previous, const Array<int64_t>& previous_strides,
             const Array<uint64_t>& current, const Array<int64_t>& current_strides, uint64_t stream) {
            const auto p = to_vector(previous), c = to_vector(current);
            const auto ps = to_vector(previous_strides), cs = to_vector(current_strides);
            py::gil_scoped_release unlocked;
            comparison.launch(p, ps, c, cs, stream);
          },
          "previous"_a, "previous_strides"_a, "current"_a, "current_strides"_a, "stream"_a)
      .def("ready", &eva::BasisComparison::ready)
      .def("result", &result);
}
