// The lower triangle of G += sign · (X − s)ᵀ diag(m) (X − s) for rows in bfloat16 or float32.
#pragma once

#include <algorithm>
#include <cstdint>

#include "parallel.h"
#include "rows.h"

namespace eva {

// What the rows are folded into, and how; all arrays dense and row-major.
struct GramTask {
  const void* x;             // (n, d) bfloat16 or float32, rows `row_stride` elements apart
  bool is_float32;
  int64_t n, d, row_stride;
  const uint8_t* mask;       // (n) 0 or 1, or null: all rows
  const float* shift;        // (d)
  float sign;
  float* gram;               // (d, d), what is not above the diagonal is added to
  double* column_sum;        // (d), added to
  double* square_sum;        // (), added to
};

// Products accumulate in float32: of x − s, or of x, from which s is then taken out (README of eva_kernels/gram). Totals
// are those of float32 x − s. No bit depends on `threads`.
using GramAccumulate = void(const GramTask& task, int threads);

constexpr int64_t kPanel = 32, kColumns = 96;  // rows of G that are worked out by one thread, and columns at a time

// Rows in chunks, each of which is converted and then multiplied, panel by panel of G. A `Triangle` holds what they are
// converted to, and knows how.
template <typename Triangle>
void accumulate_triangle(const GramTask& task, int max_threads) {
  if (task.n == 0 || task.d == 0) return;
  const int64_t panels = divide_up(task.d, kPanel), chunks = divide_up(task.n, Triangle::kChunkRows);
  const int64_t threads = task.n < kThreadRows ? 1 : std::clamp<int64_t>(panels / 2, 1, std::max(max_threads, 1));
  Triangle triangle(task);
  run_in_parallel(threads, 2 * chunks, panels, [&](int64_t step, int64_t panel) {
    const int64_t begin = step / 2 * Triangle::kChunkRows;
    const Rows rows{begin, std::min(begin + Triangle::kChunkRows, task.n)};
    const int64_t first = panel * kPanel, width = std::min(kPanel, task.d - first);
    step % 2 == 0 ? triangle.convert(rows, first, width) : triangle.multiply_panel(rows, first, width);
  });
  triangle.finish();
}

}  // namespace eva
