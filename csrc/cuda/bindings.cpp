// The Python face of the CUDA part. Arrays are checked by eva_kernels._memory, shapes by eva_kernels.convergence; what can
// be seen of an address by itself is asked here again.
#include "../arguments.h"
#include "../arrays.h"
#include "compare_bases.h"

namespace {

// Addresses of float32 matrices, one for each site, and what their rows are apart.
void require_matrices(const std::string& name, const std::vector<uint64_t>& addresses,
                      const std::vector<int64_t>& strides, int64_t sites) {
  eva::require_equal(name.c_str(), addresses.size(), sites);
  eva::require_equal((name + "_strides").c_str(), strides.size(), sites);
  for (const uint64_t address : addresses) eva::require_address(name.c_str(), address, alignof(float));
  for (const int64_t stride : strides) eva::require_at_least((name + "_strides").c_str(), stride, 0);
}

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
             const auto r = to_vector(rows), c = to_vector(columns);
             eva::require_at_least("rows", r.size(), 1);
             eva::require_equal("columns", c.size(), r.size());
             for (const int64_t size : r) eva::require_at_least("rows", size, 1);
             for (const int64_t size : c) eva::require_at_least("columns", size, 1);
             return std::make_unique<eva::BasisComparison>(r, c, tau, device);
           }),
           "rows"_a, "columns"_a, "tau"_a, "device"_a)
      .def(
          "launch",
          [](eva::BasisComparison& comparison, const Array<uint64_t>& previous, const Array<int64_t>& previous_strides,
             const Array<uint64_t>& current, const Array<int64_t>& current_strides, uint64_t stream) {
            const auto p = to_vector(previous), c = to_vector(current);
            const auto ps = to_vector(previous_strides), cs = to_vector(current_strides);
            require_matrices("previous", p, ps, comparison.sites());
            require_matrices("current", c, cs, comparison.sites());
            py::gil_scoped_release unlocked;
            comparison.launch(p, ps, c, cs, stream);
          },
          "previous"_a, "previous_strides"_a, "current"_a, "current_strides"_a, "stream"_a)
      .def("ready", &eva::BasisComparison::ready)
      .def("result", &result);
}
