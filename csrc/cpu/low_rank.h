// A matrix of low rank added to another, in place.
#pragma once

#include <cstdint>

namespace eva {

// What is added to, and what; all arrays dense and row-major.
struct LowRankTask {
  void* matrix;         // M: (m, n) float32 or bfloat16
  bool is_float32;
  int64_t m, n, r;
  const double* left;   // L: (m, r)
  const double* right;  // R: (r, n)
};

struct LowRankNorms {
  double matrix, rounding;  // squared: of M as it was, and of what M's type rounds off M + L R
};

// M becomes M + L R, of which each entry is summed in float64 and rounded once, to the nearest. No bit depends on
// `threads`.
using LowRankAdd = LowRankNorms(const LowRankTask& task, int threads);

}  // namespace eva
