// A count sketch of rows, and their sum: every row is added, with its sign, to one of q sums.
#pragma once

#include <cstdint>

namespace eva {

// The rows, and where they go; all arrays dense and row-major. Rows come in chunks, the first of which has `before` rows
// that are not among these. Row i of a chunk goes to sum i mod q, or, in the first chunk, to (column + i) mod q.
struct SketchTask {
  const void* x;           // (n, d) bfloat16 or float32, rows `row_stride` elements apart
  bool is_float32;
  int64_t n, d, row_stride;
  const uint8_t* mask;     // (n) 0 or 1, or null: all rows
  const float* signs;      // (n)
  int64_t chunk_rows, before, column;
  int64_t q;
  float* sums;             // (q, d), added to
  float* tally;            // (q): Σ of the signs, added to
  double* total;           // (d): Σ of the rows, added to chunk by chunk
};

// Entries are added to in the order of the rows, whatever the number of threads.
using SketchAdd = void(const SketchTask& task, int threads);

}  // namespace eva
