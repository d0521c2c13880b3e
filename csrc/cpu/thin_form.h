// Products of rows with few columns in float32, for the form that includes this.
#pragma once

#include <algorithm>
#include <vector>

#include "float32_products.h"
#include "memory.h"
#include "parallel.h"
#include "thin.h"

namespace eva::EVA_FORM {

constexpr int64_t kThinRows = 96, kThinFeatures = 256;  // of the rows that are held in float32 at a time

// The features begin … begin + width of rows, as rows of z; zeros in the place of masked ones.
EVA_TARGET inline void widen_rows(const ThinTask& task, Rows rows, int64_t begin, int64_t width, float* z,
                                  int64_t stride) {
  for (int64_t row = rows.begin; row < rows.end; ++row, z += stride) {
    float* __restrict to = z;
    const uint16_t* __restrict from = task.x + row * task.row_stride + begin;
    if (!task.counts(row))
      std::fill_n(to, width, 0.0f);
    else
      for (int64_t j = 0; j < width; ++j) to[j] = widen(from[j]);
  }
}

// Rows of the factor, padded by zeros.
inline void pad_row(const ThinTask& task, int64_t row, float* to) {
  std::fill(std::copy_n(task.factor + row * task.q, task.q, to), to + padded(task.q), 0.0f);
}

// What one thread works in.
struct ThinBuffers {
  explicit ThinBuffers(int64_t q) : z(kThinRows * apart(kThinFeatures)), factor(kThinRows * q), part(kThinFeatures * q) {}
  Array<float> z;       // (rows, apart(features))
  Array<float> factor;  // (rows, q)
  Array<float> part;    // (rows or features, q)
};

// product = X F: threads share the rows.
inline void project_rows(const ThinTask& task, int max_threads) {
  const int64_t q = padded(task.q), stride = apart(kThinFeatures);
  const int64_t shares = shares_of(task, divide_up(task.n, kThinRows), max_threads);
  const Array<float> basis(task.d * q);
  std::vector<ThinBuffers> buffers;  // memory is taken here, where an error can be reported
  for (int64_t share = 0; share < shares; ++share) buffers.emplace_back(q);
  run_in_parallel(shares, 2, shares, [&](int64_t step, int64_t share) {
    if (step == 0) {
      for (int64_t j = task.d * share / shares; j < task.d * (share + 1) / shares; ++j) pad_row(task, j, &basis[j * q]);
      return;
    }
    float *z = buffers[share].z.get(), *part = buffers[share].part.get();
    share_out(task.n, kThinRows, shares, share, kThinRows, [&](int64_t begin, int64_t end) {
      for (int64_t j = 0; j < task.d; j += kThinFeatures) {
        const int64_t width = std::min(kThinFeatures, task.d - j);
        widen_rows(task, {begin, end}, j, width, z, stride);
        multiply<float>({z, stride, 1}, &basis[j * q], q, part, q, end - begin, task.q, width, j > 0);
      }
      for (int64_t row = begin; row < end; ++row) std::copy_n(part + (row - begin) * q, task.q, task.product + row * task.q);
    });
  });
}

// product += Xᵀ F: threads share the features, so that each adds to its own part of the product.
inline void add_outer(const ThinTask& task, int max_threads) {
  if (task.n == 0) return;
  const int64_t q = padded(task.q), stride = apart(kThinFeatures);
  const int64_t shares = shares_of(task, task.d / kFewFeatures, max_threads);
  std::vector<ThinBuffers> buffers;
  for (int64_t share = 0; share < shares; ++share) buffers.emplace_back(q);
  run_in_parallel(shares, 1, shares, [&](int64_t, int64_t share) {
    float *z = buffers[share].z.get(), *factor = buffers[share].factor.get(), *part = buffers[share].part.get();
    share_out(task.d, 16, shares, share, kThinFeatures, [&](int64_t begin, int64_t end) {
      const int64_t width = end - begin;
      for (int64_t row = 0; row < task.n; row += kThinRows) {
        const Rows rows{row, std::min(row + kThinRows, task.n)};
        widen_rows(task, rows, begin, width, z, stride);
        for (int64_t i = row; i < rows.end; ++i)
          task.counts(i) ? pad_row(task, i, factor + (i - row) * q) : void(std::fill_n(factor + (i - row) * q, q, 0.0f));
        multiply<float>({z, 1, stride}, factor, q, part, q, width, task.q, rows.end - row, row > 0);
      }
      for (int64_t j = 0; j < width; ++j) {
        float* __restrict to = task.product + (begin + j) * task.q;
        const float* __restrict from = part + j * q;
        for (int64_t c = 0; c < task.q; ++c) to[c] += from[c];
      }
    });
  });
}

}  // namespace eva::EVA_FORM
