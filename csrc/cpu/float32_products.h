// Products of rows in float32, for the form that includes this.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "dense.h"
#include "gram.h"
#include "memory.h"
#include "subspace_blocks.h"

namespace eva::EVA_FORM {

inline float widen(float value) { return value; }

inline float widen(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

constexpr int64_t kSummedRows = 16;  // one after the other, before they are added to the rest

// The features begin … begin + width of the unmasked rows, less the shift, as rows of z; zeros in the place of masked
// rows, and beyond the width up to `padded`. Sums of the columns, in float32, are added to sum; returned are those of the
// squares, in float32 too: where a product of columns overflows, they do.
template <typename X, typename Task>
EVA_TARGET float shift_rows(const Task& task, Rows rows, int64_t begin, int64_t width, int64_t padded, float* z,
                             int64_t stride, float* __restrict sum) {
  const X* x = static_cast<const X*>(task.x);
  const float* __restrict shift = task.shift + begin;
  for (int64_t row = rows.begin; row < rows.end; ++row) fetch(x + row * task.row_stride + begin, width * sizeof(X));
  float squares = 0, of_some = 0;
  for (int64_t row = rows.begin; row < rows.end; ++row, z += stride) {
    if (row % kSummedRows == 0) squares += std::exchange(of_some, 0.0f);
    float* __restrict to = z;
    const bool counts = !task.mask || task.mask[row];
    std::fill(to + (counts ? width : 0), to + padded, 0.0f);
    if (!counts) continue;
    const X* __restrict from = x + row * task.row_stride + begin;
    for (int64_t j = 0; j < width; ++j) {
      to[j] = widen(from[j]) - shift[j];
      sum[j] += to[j];
    }
    of_some += dot<float>(to, to, 0, padded);
  }
  return squares + of_some;
}

// As many floats as a row of so many takes where rows one after the other are to begin in other sets of a cache.
constexpr int64_t apart(int64_t width) { return padded(width) / 16 % 2 ? padded(width) : padded(width) + 16; }

// A block of features, and what is done with it for one chunk of rows after the other.
class Block {
 public:
  using Projected = float;
  static constexpr int64_t kLanes = 16, kRowMultiple = 2;
  static constexpr int64_t kSliceRows = 32;  // a chunk is so many rows, or a multiple
  static constexpr int64_t kBlockFeatures = 256, kChunkRows = 96;  // Q, Y and Z are in an L2 cache of half a MiB
  static constexpr int64_t kChunkSize = kBlockFeatures * kChunkRows;

  static int64_t projected_size(int64_t rows, int64_t q) { return rows * padded(q); }

  Block(const SubspaceTask& task, int64_t begin, int64_t end, int64_t chunk_rows)
      : task_(task), begin_(begin), width_(end - begin), stride_(apart(width_)), q_(padded(task.q)),
        basis_(width_ * q_), z_(chunk_rows * stride_), projected_(chunk_rows * q_), part_(kPartFeatures * q_),
        sum_(width_) {}

  void prepare() {
    for (int64_t j = 0; j < width_; ++j)
      std::fill(std::copy_n(task_.basis + (begin_ + j) * task_.q, task_.q, &basis_[j * q_]), &basis_[(j + 1) * q_], 0.0f);
  }

  // The block's part of P = Z Q for a chunk, and of the totals.
  EVA_TARGET void project(Rows chunk) {
    const int64_t count = chunk.end - chunk.begin, even = chunk.padded(kRowMultiple);
    std::fill_n(sum_.get(), width_, 0.0f);
    const auto shift = task_.is_float32 ? &shift_rows<float, SubspaceTask> : &shift_rows<uint16_t, SubspaceTask>;
    square_sum_ += shift(task_, chunk, begin_, width_, stride_, z_.get(), stride_, sum_.get());
    std::fill_n(&z_[count * stride_], (even - count) * stride_, 0.0f);
    for (int64_t j = 0; j < width_; ++j) task_.column_sum[begin_ + j] += task_.sign * sum_[j];
    multiply<float>({z_.get(), stride_, 1}, basis_.get(), q_, projected_.get(), q_, even, task_.q, width_);
  }

  // The rows' part of the sum of all blocks' P for a chunk.
  EVA_TARGET static void settle(const std::vector<std::unique_ptr<Block>>& blocks, Rows rows, float* projected) {
    const int64_t q = blocks[0]->q_, begin = rows.begin * q, end = rows.end * q;
    std::copy(&blocks[0]->projected_[begin], &blocks[0]->projected_[end], projected + begin);
    for (size_t i = 1; i < blocks.size(); ++i) {
      const float* from = blocks[i]->projected_.get();
      for (int64_t j = begin; j < end; ++j) projected[j] += from[j];
    }
  }

  // Y += sign · Zᵀ P for the chunk that was projected: summed up over the chunk, and then added.
  EVA_TARGET void accumulate(Rows chunk, const float* projected) {
    for (int64_t j = 0; j < width_; j += kPartFeatures) {
      const int64_t count = std::min(kPartFeatures, width_ - j), q = task_.q;
      multiply<float>({&z_[j], 1, stride_}, projected, q_, part_.get(), q_, count, q, chunk.end - chunk.begin);
      for (int64_t i = 0; i < count; ++i) {
        float* __restrict to = task_.product + (begin_ + j + i) * q;
        const float* __restrict from = &part_[i * q_];
        for (int64_t c = 0; c < q; ++c) to[c] += task_.sign * from[c];
      }
    }
  }

  double square_sum() const { return square_sum_; }

 private:
  static constexpr int64_t kPartFeatures = 32;

  const SubspaceTask& task_;
  const int64_t begin_, width_, stride_, q_;
  const Array<float> basis_;      // (width, q)
  const Array<float> z_;          // (chunk, stride)
  const Array<float> projected_;  // (chunk, q)
  const Array<float> part_;       // (32, q)
  const Array<float> sum_;        // (width)
  double square_sum_ = 0;
};

// Z, and products of its columns.
class Triangle {
 public:
  static constexpr int64_t kChunkRows = 256;

  explicit Triangle(const GramTask& task)
      : task_(task), stride_(apart(task.d)), z_(std::min(task.n, kChunkRows) * stride_),
        squares_(divide_up(task.d, kPanel)) {
    std::fill_n(squares_.get(), divide_up(task.d, kPanel), 0.0);
  }

  EVA_TARGET void convert(Rows rows, int64_t first, int64_t width) {
    float sum[kPanel] = {};
    const auto shift = task_.is_float32 ? &shift_rows<float, GramTask> : &shift_rows<uint16_t, GramTask>;
    squares_[first / kPanel] += shift(task_, rows, first, width, padded(width), &z_[first], stride_, sum);
    for (int64_t j = 0; j < width; ++j) task_.column_sum[first + j] += task_.sign * sum[j];
  }

  EVA_TARGET void multiply_panel(Rows rows, int64_t first, int64_t width) {
    alignas(64) float part[kPanel * kColumns];
    for (int64_t left = 0; left < first + width; left += kColumns) {
      const int64_t columns = std::min(kColumns, first + width - left);
      multiply<float>({&z_[first], 1, stride_}, &z_[left], stride_, part, kColumns, width, columns, rows.end - rows.begin);
      for (int64_t i = 0; i < width; ++i) {
        float* __restrict to = task_.gram + (first + i) * task_.d + left;
        const float* __restrict from = part + i * kColumns;
        for (int64_t j = 0; j < std::min(columns, first + i + 1 - left); ++j) to[j] += task_.sign * from[j];
      }
    }
  }

  void finish() {
    for (int64_t panel = 0; panel < divide_up(task_.d, kPanel); ++panel)
      *task_.square_sum += task_.sign * squares_[panel];
  }

 private:
  const GramTask& task_;
  const int64_t stride_;
  const Array<float> z_;         // (chunk, stride)
  const Array<double> squares_;  // (panels)
};

}  // namespace eva::EVA_FORM
