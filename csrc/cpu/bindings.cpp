// Tensors arrive as addresses: eva_kernels._memory has checked their shapes, types and strides. What can be seen of an
// address by itself is asked here again.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../arguments.h"
#include "forms.h"
#include "mirror.h"

namespace py = pybind11;

namespace {

using eva::address;
using eva::Null;
using eva::require_at_least;
using eva::require_below;
using eva::require_equal;

// Rows that may be none at all, in float32 or bfloat16.
const void* rows(uintptr_t x, bool is_float32, int64_t n, int64_t row_stride) {
  require_at_least("n", n, 0);
  require_at_least("row_stride", row_stride, 0);
  const Null null = n == 0 ? Null::kMeansNone : Null::kRefused;
  return is_float32 ? static_cast<const void*>(address<float>("x", x, null)) : address<uint16_t>("x", x, null);
}

void require_sizes(int64_t d, int64_t q, int threads) {
  require_at_least("d", d, 1);
  require_at_least("q", q, 1);
  require_at_least("threads", threads, 1);
}

void subspace(uintptr_t x, bool is_float32, int64_t n, int64_t d, int64_t row_stride, uintptr_t mask, uintptr_t shift,
              uintptr_t basis, int64_t q, float sign, uintptr_t product, uintptr_t column_sum, uintptr_t square_sum,
              int threads) {
  require_sizes(d, q, threads);
  const eva::SubspaceTask task{rows(x, is_float32, n, row_stride), is_float32, n, d, row_stride,
                               address<uint8_t>("mask", mask, Null::kMeansNone),
                               address<float>("shift", shift), address<float>("basis", basis), q, sign,
                               address<float>("product", product), address<double>("column_sum", column_sum),
                               address<double>("square_sum", square_sum)};
  const eva::Code& run = eva::code();
  py::gil_scoped_release unlocked;
  run.subspace(task, threads);
}

// X F, or where `outer` Xᵀ F is added.
void thin(uintptr_t x, int64_t n, int64_t d, int64_t row_stride, uintptr_t mask, uintptr_t factor, int64_t q,
          uintptr_t product, bool outer, int threads) {
  require_sizes(d, q, threads);
  const Null null = n == 0 ? Null::kMeansNone : Null::kRefused;
  const eva::ThinTask task{static_cast<const uint16_t*>(rows(x, false, n, row_stride)), n, d, row_stride,
                           address<uint8_t>("mask", mask, Null::kMeansNone),
                           address<float>("factor", factor, outer ? null : Null::kRefused), q,
                           address<float>("product", product, outer ? Null::kRefused : null)};
  const eva::Code& run = eva::code();
  py::gil_scoped_release unlocked;
  (outer ? run.outer : run.project)(task, threads);
}

void gram(uintptr_t x, bool is_float32, int64_t n, int64_t d, int64_t row_stride, uintptr_t mask, uintptr_t shift,
          float sign, uintptr_t gram, uintptr_t column_sum, uintptr_t square_sum, int threads) {
  require_sizes(d, 1, threads);
  const eva::GramTask task{rows(x, is_float32, n, row_stride), is_float32, n, d, row_stride,
                           address<uint8_t>("mask", mask, Null::kMeansNone), address<float>("shift", shift), sign,
                           address<float>("gram", gram), address<double>("column_sum", column_sum),
                           address<double>("square_sum", square_sum)};
  const eva::Code& run = eva::code();
  py::gil_scoped_release unlocked;
  run.gram(task, threads);
}

// The squared norms of the matrix as it was and of what is rounded off.
std::pair<double, double> low_rank(uintptr_t matrix, bool is_float32, int64_t m, int64_t n, uintptr_t left, int64_t r,
                                   uintptr_t right, int threads) {
  require_at_least("m", m, 1);
  require_at_least("n", n, 1);
  require_at_least("r", r, 1);
  require_at_least("threads", threads, 1);
  const eva::LowRankTask task{is_float32 ? static_cast<void*>(address<float>("matrix", matrix))
                                         : address<uint16_t>("matrix", matrix),
                              is_float32, m, n, r, address<double>("left", left), address<double>("right", right)};
  const eva::Code& run = eva::code();
  py::gil_scoped_release unlocked;
  const eva::LowRankNorms norms = run.low_rank(task, threads);
  return {norms.matrix, norms.rounding};
}

void mirror(uintptr_t matrix, int64_t d) {
  require_at_least("d", d, 1);
  float* entries = address<float>("matrix", matrix);
  py::gil_scoped_release unlocked;
  eva::mirror_triangle(entries, d);
}

using Addresses = std::vector<uintptr_t>;

void refresh(int64_t d, int64_t q, const Addresses& samples, const Addresses& images, const Addresses& bases,
             uintptr_t eigenvalues, uintptr_t means, bool summarises, const Addresses& new_bases,
             const Addresses& rounded_bases, uintptr_t new_eigenvalues, uintptr_t cosines, uintptr_t overlaps,
             uintptr_t solved, double jitter, double alignment, double symmetry, double orthogonal, double rank,
             double growth, double span_jitter, int power_steps, int threads) {
  require_sizes(d, q, threads);
  require_at_least("d", d, q);
  require_at_least("power_steps", power_steps, 0);
  const int64_t count = static_cast<int64_t>(samples.size());
  require_at_least("samples", count, 1);
  require_equal("images", images.size(), count);
  require_equal("bases", bases.size(), count);
  require_equal("new_bases", new_bases.size(), count);
  require_equal("rounded_bases", rounded_bases.size(), summarises ? count : 0);
  double* past = address<double>("eigenvalues", eigenvalues);
  float* mean = address<float>("means", means);
  double* values = address<double>("new_eigenvalues", new_eigenvalues);
  double* cosine = address<double>("cosines", cosines);
  double* overlap = address<double>("overlaps", overlaps);
  uint8_t* flags = address<uint8_t>("solved", solved);
  std::vector<eva::RefreshTask> tasks;
  for (int64_t i = 0; i < count; ++i)
    tasks.push_back({d, q, address<float>("samples", samples[i]), address<float>("images", images[i]),
                     address<float>("bases", bases[i]), past + i * q, mean + i * 2 * d, summarises,
                     address<float>("new_bases", new_bases[i]),
                     summarises ? address<float>("rounded_bases", rounded_bases[i]) : nullptr, values + i * q,
                     cosine + i * q, overlap + i * q});
  const eva::Code& run = eva::code();
  py::gil_scoped_release unlocked;
  const eva::RefreshLimits limits{jitter, alignment, symmetry, orthogonal, rank, growth, span_jitter, power_steps};
  run.refresh(tasks, limits, flags, threads);
}

// Whether `out` was written, and whether that is all.
std::pair<bool, bool> cholesky_qr(uintptr_t y, bool transposed, int64_t d, int64_t q, uintptr_t out, double growth,
                                  int threads) {
  require_sizes(d, q, threads);
  require_at_least("d", d, q);
  const float* from = address<float>("y", y);
  float* to = address<float>("out", out);
  const eva::Code& run = eva::code();
  py::gil_scoped_release unlocked;
  const eva::Orthonormal became = run.cholesky_qr(from, transposed, d, q, to, growth, threads);
  return {became != eva::Orthonormal::kNever, became == eva::Orthonormal::kDone};
}

void symmetric_eigen(uintptr_t matrices, int64_t batch, int64_t n, uintptr_t values, uintptr_t vectors,
                     uintptr_t solved, int threads) {
  require_at_least("batch", batch, 1);
  require_at_least("n", n, 1);
  require_at_least("threads", threads, 1);
  const double* from = address<double>("matrices", matrices);
  double* to_values = address<double>("values", values);
  double* to_vectors = address<double>("vectors", vectors);
  uint8_t* flags = address<uint8_t>("solved", solved);
  const eva::Code& run = eva::code();
  py::gil_scoped_release unlocked;
  run.symmetric_eigen(from, batch, n, to_values, to_vectors, flags, threads);
}

void leading_eigen(uintptr_t matrices, int64_t batch, int64_t n, int64_t count, uintptr_t values, uintptr_t vectors,
                   uintptr_t solved, int threads) {
  require_at_least("batch", batch, 1);
  require_at_least("n", n, 1);
  require_at_least("count", count, 1);
  require_below("count", count, n + 1);
  require_at_least("threads", threads, 1);
  const double* from = address<double>("matrices", matrices);
  double* to_values = address<double>("values", values);
  double* to_vectors = address<double>("vectors", vectors);
  uint8_t* flags = address<uint8_t>("solved", solved);
  const eva::Code& run = eva::code();
  py::gil_scoped_release unlocked;
  run.leading_eigen(from, batch, n, count, to_values, to_vectors, flags, threads);
}

void sketch(uintptr_t x, bool is_float32, int64_t n, int64_t d, int64_t row_stride, uintptr_t mask, uintptr_t signs,
            int64_t chunk_rows, int64_t before, int64_t column, int64_t q, uintptr_t sums, uintptr_t tally,
            uintptr_t total, int threads) {
  require_sizes(d, q, threads);
  require_at_least("chunk_rows", chunk_rows, 1);
  require_below("before", before, chunk_rows);
  require_below("column", column, q);
  const Null null = n == 0 ? Null::kMeansNone : Null::kRefused;
  const eva::SketchTask task{rows(x, is_float32, n, row_stride), is_float32, n, d, row_stride,
                             address<uint8_t>("mask", mask, Null::kMeansNone), address<float>("signs", signs, null),
                             chunk_rows, before, column, q, address<float>("sums", sums),
                             address<float>("tally", tally), address<double>("total", total)};
  const eva::Code& run = eva::code();
  py::gil_scoped_release unlocked;
  run.sketch(task, threads);
}

}  // namespace

void bind_cpu(py::module_& module) {
  using namespace pybind11::literals;
  module.def(
      "greatest_cpu_form",
      [](uint32_t leaf_1_ecx, uint32_t leaf_7_ebx, uint32_t leaf_7_edx, uint32_t leaf_7_1_eax, uint64_t system,
         bool has_full_tiles) {
        return eva::greatest_form({leaf_1_ecx, leaf_7_ebx, leaf_7_edx, leaf_7_1_eax, system, has_full_tiles});
      },
      "leaf_1_ecx"_a, "leaf_7_ebx"_a, "leaf_7_edx"_a, "leaf_7_1_eax"_a, "system"_a, "has_full_tiles"_a);
  module.def("built_cpu_forms", &eva::built_forms);
  module.def("cpu_forms", &eva::forms);
  module.def("choose_cpu_form", &eva::choose_form, "form"_a, "emulated"_a = false);
  module.def("cpu_form", &eva::chosen_form);
  module.def("subspace", &subspace, "x"_a, "is_float32"_a, "n"_a, "d"_a, "row_stride"_a, "mask"_a, "shift"_a, "basis"_a,
             "q"_a, "sign"_a, "product"_a, "column_sum"_a, "square_sum"_a, "threads"_a);
  module.def("gram", &gram, "x"_a, "is_float32"_a, "n"_a, "d"_a, "row_stride"_a, "mask"_a, "shift"_a, "sign"_a, "gram"_a,
             "column_sum"_a, "square_sum"_a, "threads"_a);
  module.def("thin", &thin, "x"_a, "n"_a, "d"_a, "row_stride"_a, "mask"_a, "factor"_a, "q"_a, "product"_a, "outer"_a,
             "threads"_a);
  module.def("low_rank", &low_rank, "matrix"_a, "is_float32"_a, "m"_a, "n"_a, "left"_a, "r"_a, "right"_a, "threads"_a);
  module.def("mirror", &mirror, "matrix"_a, "d"_a);
  module.def("refresh", &refresh, "d"_a, "q"_a, "samples"_a, "images"_a, "bases"_a, "eigenvalues"_a, "means"_a,
             "summarises"_a, "new_bases"_a, "rounded_bases"_a, "new_eigenvalues"_a, "cosines"_a, "overlaps"_a,
             "solved"_a, "jitter"_a, "alignment"_a, "symmetry"_a, "orthogonal"_a, "rank"_a, "growth"_a, "span_jitter"_a,
             "power_steps"_a, "threads"_a);
  module.def("cholesky_qr", &cholesky_qr, "y"_a, "transposed"_a, "d"_a, "q"_a, "out"_a, "growth"_a, "threads"_a);
  module.def("symmetric_eigen", &symmetric_eigen, "matrices"_a, "batch"_a, "n"_a, "values"_a, "vectors"_a, "solved"_a,
             "threads"_a);
  module.def("leading_eigen", &leading_eigen, "matrices"_a, "batch"_a, "n"_a, "count"_a, "values"_a, "vectors"_a,
             "solved"_a, "threads"_a);
  module.def("sketch", &sketch, "x"_a, "is_float32"_a, "n"_a, "d"_a, "row_stride"_a, "mask"_a, "signs"_a,
             "chunk_rows"_a, "before"_a, "column"_a, "q"_a, "sums"_a, "tally"_a, "total"_a, "threads"_a);
}
