// Products of rows in bfloat16 with few columns: X F, and Xᵀ F, which is added.
#pragma once

#include <algorithm>
#include <cstdint>

#include "rows.h"

namespace eva {

// What is multiplied, and where it goes; all arrays dense and row-major.
struct ThinTask {
  const uint16_t* x;         // (n, d) bfloat16, rows `row_stride` elements apart
  int64_t n, d, row_stride;
  const uint8_t* mask;       // (n) 0 or 1, or null: all rows
  const float* factor;       // F: (d, q), or where Xᵀ F is added (n, q)
  int64_t q;
  float* product;            // (n, q), or (d, q)

  bool counts(int64_t row) const { return !mask || mask[row]; }
};

// Masked rows are zeros, as are for Xᵀ F those of the factor. Products accumulate in float32, always in one order: no bit
// depends on `threads`. A form may multiply with what the factor is rounded to, for X F, or with two such that add up to it
// but for 2⁻¹⁷ of it, for Xᵀ F.
using ThinProduct = void(const ThinTask& task, int threads);

constexpr int64_t kFewFeatures = 64;  // fewer for each are not worth a second thread

// Ranges of what threads share: of `size`, each a multiple of `multiple` but the last.
template <typename Work>
void share_out(int64_t size, int64_t multiple, int64_t shares, int64_t share, int64_t at_once, const Work& work) {
  const int64_t units = divide_up(size, multiple);
  const int64_t end = std::min(units * (share + 1) / shares * multiple, size);
  for (int64_t begin = units * share / shares * multiple; begin < end; begin += at_once)
    work(begin, std::min(begin + at_once, end));
}

// How many threads share so many units, each of which is worth one.
inline int64_t shares_of(const ThinTask& task, int64_t units, int threads) {
  return task.n < kThreadRows ? 1 : std::clamp<int64_t>(units, 1, std::max(threads, 1));
}

}  // namespace eva
