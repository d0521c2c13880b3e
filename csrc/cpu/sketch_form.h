// The count sketch, for the form that includes this.
#pragma once

#include <algorithm>

#include "float32_products.h"
#include "memory.h"
#include "parallel.h"
#include "rows.h"
#include "sketch.h"

namespace eva::EVA_FORM {

constexpr int64_t kSketchBlock = 4 * kLanes<float>;  // features whose sums stay in registers
constexpr int64_t kSketchFeatures = 64;             // fewer for each are not worth a second thread
constexpr int64_t kFetchedFeatures = 512;            // of a chunk's rows, fetched at a time: a second-level cache has them

// A range of features of the rows of one chunk, the first of which goes to sum `column`. All rows of a sum come one after
// the other, while it is in registers.
template <typename X>
EVA_TARGET void add_chunk(const SketchTask& task, Rows chunk, int64_t column, int64_t begin, int64_t width) {
  const X* x = static_cast<const X*>(task.x) + begin;
  float total[kSketchBlock] = {}, sum[kSketchBlock];
  const auto add = [&](int64_t features) {
    for (int64_t first = chunk.begin; first < std::min(chunk.begin + task.q, chunk.end); ++first) {
      float* kept = task.sums + column * task.d + begin;
      for (int64_t j = 0; j < features; ++j) sum[j] = kept[j];
      for (int64_t row = first; row < chunk.end; row += task.q) {
        if (task.mask && !task.mask[row]) continue;
        const X* from = x + row * task.row_stride;
        const float sign = task.signs[row];
        for (int64_t j = 0; j < features; ++j) {
          const float value = widen(from[j]);
          sum[j] += sign * value;
          total[j] += value;
        }
      }
      for (int64_t j = 0; j < features; ++j) kept[j] = sum[j];
      column = column + 1 == task.q ? 0 : column + 1;
    }
    for (int64_t j = 0; j < features; ++j) task.total[begin + j] += total[j];
  };
  width == kSketchBlock ? add(kSketchBlock) : add(width);
}

// The features begin … end of all rows.
template <typename X>
EVA_TARGET void add_to_sketch(const SketchTask& task, int64_t begin, int64_t end) {
  int64_t column = task.column;
  Rows chunk{0, std::min(task.chunk_rows - task.before, task.n)};
  for (; chunk.begin < task.n; chunk = {chunk.end, std::min(chunk.end + task.chunk_rows, task.n)}, column = 0) {
    for (int64_t first = begin; first < end; first += kFetchedFeatures) {
      const int64_t last = std::min(first + kFetchedFeatures, end);
      for (int64_t row = chunk.begin; row < chunk.end; ++row)
        fetch(static_cast<const X*>(task.x) + row * task.row_stride + first, (last - first) * sizeof(X));
      for (int64_t j = first; j < last; j += kSketchBlock)
        add_chunk<X>(task, chunk, column, j, std::min(kSketchBlock, last - j));
    }
    for (int64_t row = chunk.begin; begin == 0 && row < chunk.end; ++row)
      if (!task.mask || task.mask[row]) task.tally[(column + row - chunk.begin) % task.q] += task.signs[row];
  }
}

inline void sketch_add(const SketchTask& task, int threads) {
  const int64_t shares = std::clamp<int64_t>(task.d / kSketchFeatures, 1, std::max(threads, 1));
  const auto bound = [&](int64_t share) { return share == shares ? task.d : task.d * share / shares / 16 * 16; };
  run_in_parallel(shares, 1, shares, [&](int64_t, int64_t share) {
    (task.is_float32 ? add_to_sketch<float> : add_to_sketch<uint16_t>)(task, bound(share), bound(share + 1));
  });
}

}  // namespace eva::EVA_FORM
