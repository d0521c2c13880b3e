// Y += sign · (X − s)ᵀ diag(m) ((X − s) Q) for rows in bfloat16 or float32.
#pragma once

#include <cstdint>

namespace eva {

// What the rows are folded into, and how; all arrays dense and row-major.
struct SubspaceTask {
  const void* x;             // (n, d) bfloat16 or float32, rows `row_stride` elements apart
  bool is_float32;
  int64_t n, d, row_stride;
  const uint8_t* mask;       // (n) 0 or 1, or null: all rows
  const float* shift;        // (d)
  const float* basis;        // (d, q)
  int64_t q;
  float sign;
  float* product;            // (d, q), added to
  double* column_sum;        // (d), added to
  double* square_sum;        // (), added to
};

// Products accumulate in float32, of what the form has instructions for: of x − s and Q in float32, or rounded to
// bfloat16. Totals are those of float32 x − s. The same result for the same number of threads.
using SubspaceAccumulate = void(const SubspaceTask& task, int threads);

}  // namespace eva
