// The count sketch, for the form that includes this.
#pragma once

#include <algorithm>
#include <vector>

#include "float32_products.h"
#include "memory.h"
#include "parallel.h"
#include "sketch.h"

namespace eva::EVA_FORM {

constexpr int64_t kFetchedRows = 16;       // rows that are fetched at a time
constexpr int64_t kSketchFeatures = 64;  // fewer for each are not worth a second thread

// The features begin … end of all rows. `chunk_sum` is (d).
template <typename X>
EVA_TARGET void add_to_sketch(const SketchTask& task, int64_t begin, int64_t end, float* __restrict chunk_sum) {
  const auto finish_chunk = [&] {
    for (int64_t j = begin; j < end; ++j) task.total[j] += chunk_sum[j];
    std::fill(chunk_sum + begin, chunk_sum + end, 0.0f);
  };
  int64_t column = task.column, left = task.chunk_rows - task.before;
  for (int64_t row = 0; row < task.n; ++row) {
    for (int64_t i = row; row % kFetchedRows == 0 && i < std::min(row + kFetchedRows, task.n); ++i)
      fetch(static_cast<const X*>(task.x) + i * task.row_stride + begin, (end - begin) * sizeof(X));
    if (left == 0) {
      finish_chunk();
      column = 0, left = task.chunk_rows;
    }
    if (!task.mask || task.mask[row]) {
      const X* x = static_cast<const X*>(task.x) + row * task.row_stride;
      float* __restrict sum = task.sums + column * task.d;
      const float sign = task.signs[row];
      if (begin == 0) task.tally[column] += sign;
      for (int64_t j = begin; j < end; ++j) {
        const float value = widen(x[j]);
        sum[j] += sign * value;
        chunk_sum[j] += value;
      }
    }
    column = column + 1 == task.q ? 0 : column + 1;
    --left;
  }
  finish_chunk();
}

inline void sketch_add(const SketchTask& task, int threads) {
  std::vector<float> chunk_sum(task.d);
  const int64_t shares = std::clamp<int64_t>(task.d / kSketchFeatures, 1, std::max(threads, 1));
  run_in_parallel(shares, 1, shares, [&](int64_t, int64_t share) {
    const int64_t begin = task.d * share / shares, end = task.d * (share + 1) / shares;
    task.is_float32 ? add_to_sketch<float>(task, begin, end, chunk_sum.data())
                    : add_to_sketch<uint16_t>(task, begin, end, chunk_sum.data());
  });
}

}  // namespace eva::EVA_FORM
