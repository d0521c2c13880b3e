// A matrix of low rank added to another, for the form that includes this.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "dense.h"
#include "float32_products.h"
#include "low_rank.h"
#include "memory.h"
#include "parallel.h"
#include "rows.h"

namespace eva::EVA_FORM {

constexpr int64_t kAddedRows = 32, kAddedColumns = 192;  // of M that are held in float64 at a time

inline void narrow(float value, float& to) { to = value; }

inline void narrow(float value, uint16_t& to) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  to = static_cast<uint16_t>(value != value ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The columns first … first + width of some rows. `right` is R's, `right_stride` apart; `exact` has kAddedColumns.
template <typename T>
EVA_TARGET LowRankNorms add_to_block(const LowRankTask& task, Rows rows, int64_t first, int64_t width,
                                     const double* right, int64_t right_stride, double* exact) {
  const int64_t count = rows.end - rows.begin, whole = padded(width);
  T* __restrict matrix = static_cast<T*>(task.matrix) + rows.begin * task.n + first;
  LowRankNorms norms{0, 0};
  for (int64_t i = 0; i < count; ++i) {
    double* __restrict to = exact + i * kAddedColumns;
    for (int64_t j = 0; j < width; ++j) to[j] = widen(matrix[i * task.n + j]);
    std::fill(to + width, to + whole, 0.0);
    norms.matrix += dot(to, to, 0, whole);
  }
  multiply<double>({task.left + rows.begin * task.r, task.r, 1}, right, right_stride, exact, kAddedColumns, count, width,
                   task.r, true);
  for (int64_t i = 0; i < count; ++i) {
    double* __restrict lost = exact + i * kAddedColumns;
    T* __restrict row = matrix + i * task.n;
    float single[kAddedColumns];  // to bfloat16 by way of float32, as PyTorch does it
    for (int64_t j = 0; j < width; ++j) single[j] = static_cast<float>(lost[j]);
    for (int64_t j = 0; j < width; ++j) narrow(single[j], row[j]);
    for (int64_t j = 0; j < width; ++j) lost[j] -= widen(row[j]);
    std::fill(lost + width, lost + whole, 0.0);
    norms.rounding += dot(lost, lost, 0, whole);
  }
  return norms;
}

inline LowRankNorms add_low_rank(const LowRankTask& task, int threads) {
  const int64_t blocks = divide_up(task.m, kAddedRows), stride = padded(task.n);
  const int64_t shares = std::clamp<int64_t>(task.m / kThreadRows, 1, std::max(threads, 1));
  const Array<double> right(task.r * stride), exact(shares * kAddedRows * kAddedColumns);
  std::vector<LowRankNorms> of_blocks(blocks);
  for (int64_t k = 0; k < task.r; ++k)
    std::fill(std::copy_n(task.right + k * task.n, task.n, &right[k * stride]), &right[k * stride] + stride, 0.0);
  const auto add = task.is_float32 ? &add_to_block<float> : &add_to_block<uint16_t>;
  run_in_parallel(shares, 1, shares, [&](int64_t, int64_t share) {
    for (int64_t block = blocks * share / shares; block < blocks * (share + 1) / shares; ++block) {
      const Rows rows{block * kAddedRows, std::min((block + 1) * kAddedRows, task.m)};
      LowRankNorms sums{0, 0};
      for (int64_t j = 0; j < task.n; j += kAddedColumns) {
        const LowRankNorms of_it = add(task, rows, j, std::min(kAddedColumns, task.n - j), &right[j], stride,
                                       &exact[share * kAddedRows * kAddedColumns]);
        sums.matrix += of_it.matrix, sums.rounding += of_it.rounding;
      }
      of_blocks[block] = sums;
    }
  });
  LowRankNorms norms{0, 0};
  for (const LowRankNorms& of_it : of_blocks) norms.matrix += of_it.matrix, norms.rounding += of_it.rounding;
  return norms;
}

}  // namespace eva::EVA_FORM
