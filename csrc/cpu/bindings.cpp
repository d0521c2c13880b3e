// Tensors arrive as addresses: the Python functions that call these have checked their shapes, types and strides.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "refresh.h"
#include "sketch.h"
#include "subspace.h"
#include "symmetric_eigen.h"

namespace py = pybind11;

namespace {

template <typename T>
T* address(uintptr_t value) {
  return reinterpret_cast<T*>(value);
}

void subspace(uintptr_t x, bool is_float32, int64_t n, int64_t d, int64_t row_stride, uintptr_t mask, uintptr_t shift,
                   uintptr_t basis, int64_t q, float sign, uintptr_t product, uintptr_t column_sum,
                   uintptr_t square_sum, int threads) {
  const eva::SubspaceTask task{address<void>(x),        is_float32, n, d, row_stride, address<uint8_t>(mask),
                               address<float>(shift),   address<float>(basis), q, sign,
                               address<float>(product), address<double>(column_sum), address<double>(square_sum)};
  py::gil_scoped_release unlocked;
  eva::subspace_accumulate(task, threads);
}

using Addresses = std::vector<uintptr_t>;

void refresh(int64_t d, int64_t q, const Addresses& samples, const Addresses& images, const Addresses& bases,
             uintptr_t eigenvalues, uintptr_t means, bool summarises, const Addresses& new_bases,
             const Addresses& rounded_bases, uintptr_t new_eigenvalues, uintptr_t cosines, uintptr_t overlaps,
             uintptr_t solved, double jitter, double alignment, double orthogonal, double rank, double growth,
             double span_jitter, int power_steps, int threads) {
  std::vector<eva::RefreshTask> tasks;
  for (int64_t i = 0; i < static_cast<int64_t>(samples.size()); ++i)
    tasks.push_back({d, q, address<float>(samples[i]), address<float>(images[i]), address<float>(bases[i]),
                     address<double>(eigenvalues) + i * q, address<float>(means) + i * 2 * d, summarises,
                     address<float>(new_bases[i]), rounded_bases.empty() ? nullptr : address<float>(rounded_bases[i]),
                     address<double>(new_eigenvalues) + i * q, address<double>(cosines) + i * q,
                     address<double>(overlaps) + i * q});
  py::gil_scoped_release unlocked;
  const eva::RefreshLimits limits{jitter, alignment, orthogonal, rank, growth, span_jitter, power_steps};
  eva::refresh(tasks, limits, address<uint8_t>(solved), threads);
}

// Whether `out` was written, and whether that is all.
std::pair<bool, bool> cholesky_qr(uintptr_t y, int64_t d, int64_t q, uintptr_t out, double growth, int threads) {
  py::gil_scoped_release unlocked;
  const eva::Orthonormal became =
      eva::cholesky_qr(address<float>(y), d, q, address<float>(out), growth, threads);
  return {became != eva::Orthonormal::kNever, became == eva::Orthonormal::kDone};
}

void symmetric_eigen(uintptr_t matrices, int64_t batch, int64_t n, uintptr_t values, uintptr_t vectors,
                     uintptr_t solved, int threads) {
  py::gil_scoped_release unlocked;
  eva::symmetric_eigen_of_all(address<double>(matrices), batch, n, address<double>(values), address<double>(vectors),
                              address<uint8_t>(solved), threads);
}

void sketch(uintptr_t x, bool is_float32, int64_t n, int64_t d, int64_t row_stride, uintptr_t mask, uintptr_t signs,
            int64_t chunk_rows, int64_t before, int64_t column, int64_t q, uintptr_t sums, uintptr_t tally,
            uintptr_t total, int threads) {
  const eva::SketchTask task{address<void>(x), is_float32, n, d, row_stride, address<uint8_t>(mask),
                             address<float>(signs), chunk_rows, before, column, q,
                             address<float>(sums), address<float>(tally), address<double>(total)};
  py::gil_scoped_release unlocked;
  eva::sketch_add(task, threads);
}

}  // namespace

void bind_cpu(py::module_& module) {
  using namespace pybind11::literals;
  module.def("has_bf16_subspace", &eva::has_bf16_subspace);
  module.def("subspace", &subspace, "x"_a, "is_float32"_a, "n"_a, "d"_a, "row_stride"_a, "mask"_a, "shift"_a, "basis"_a,
             "q"_a, "sign"_a, "product"_a, "column_sum"_a, "square_sum"_a, "threads"_a);
  module.def("has_refresh", &eva::has_refresh);
  module.def("refresh", &refresh, "d"_a, "q"_a, "samples"_a, "images"_a, "bases"_a, "eigenvalues"_a, "means"_a,
             "summarises"_a, "new_bases"_a, "rounded_bases"_a, "new_eigenvalues"_a, "cosines"_a, "overlaps"_a,
             "solved"_a, "jitter"_a, "alignment"_a, "orthogonal"_a, "rank"_a, "growth"_a, "span_jitter"_a,
             "power_steps"_a, "threads"_a);
  module.def("cholesky_qr", &cholesky_qr, "y"_a, "d"_a, "q"_a, "out"_a, "growth"_a, "threads"_a);
  module.def("symmetric_eigen", &symmetric_eigen, "matrices"_a, "batch"_a, "n"_a, "values"_a, "vectors"_a, "solved"_a,
             "threads"_a);
  module.def("sketch", &sketch, "x"_a, "is_float32"_a, "n"_a, "d"_a, "row_stride"_a, "mask"_a, "signs"_a,
             "chunk_rows"_a, "before"_a, "column"_a, "q"_a, "sums"_a, "tally"_a, "total"_a, "threads"_a);
}
