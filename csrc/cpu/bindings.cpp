// Tensors arrive as addresses: eva_kernels.subspace has checked their shapes, types and strides.
#include <pybind11/pybind11.h>

#include "sketch.h"
#include "subspace.h"

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
  module.def("sketch", &sketch, "x"_a, "is_float32"_a, "n"_a, "d"_a, "row_stride"_a, "mask"_a, "signs"_a,
             "chunk_rows"_a, "before"_a, "column"_a, "q"_a, "sums"_a, "tally"_a, "total"_a, "threads"_a);
}
