// Products of rows rounded to bfloat16, for the forms that multiply such: what they are converted to, and in which order.
// What multiplies is a class, `Product`:
//   kRows, kFeatures    multiples that rows and features are padded to
//   Product()           in each thread, before it multiplies
//   project             out = left · right, of rows as pairs of features and the basis as such pairs
//   settle              lays P out for `accumulate`, as it likes
//   accumulate          Y += sign · Zᵀ P, of rows as pairs of rows
//   turned_size, turn   what multiply_columns needs beside pairs of rows: how much, and making it
//   multiply_columns    out = left · right, of columns of rows as pairs of rows
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // both are said of GCC's own intrinsics, wrongly
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "gram.h"
#include "memory.h"
#include "parallel.h"
#include "subspace_blocks.h"
#include "thin.h"

#define EVA_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

namespace eva::bfloat16 {

constexpr int64_t kLanes = 16;  // float32 in a register
constexpr int64_t kWide = 6;    // registers, or tiles, of sums beside each other

inline __mmask16 first_lanes(int64_t count) {
  return count >= kLanes ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

EVA_BF16 inline __m512 load(const float* from, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, from); }

EVA_BF16 inline __m512 load(const uint16_t* from, __mmask16 lanes) {
  const __m256i raw = _mm256_maskz_loadu_epi16(lanes, from);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

// Two registers rounded to bfloat16, one in each half.
EVA_BF16 inline __m512i halves(__m512 low, __m512 high) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

// The same as pairs of one of each.
EVA_BF16 inline __m512i pairs(__m512i halves) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                         23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, halves);
}

// `count` rows of a matrix, of q columns, rounded and as pairs of rows: (padded / 2, padded q), beyond the matrix zeros.
EVA_BF16 inline void pair_rows(const float* from, int64_t count, int64_t q, uint32_t* to, int64_t padded,
                               int64_t padded_q) {
  for (int64_t j = 0; j < padded; j += 2)
    for (int64_t c = 0; c < padded_q; c += kLanes) {
      const __mmask16 lanes = first_lanes(q - c);
      const __m512 even = j < count ? load(from + j * q + c, lanes) : _mm512_setzero_ps();
      const __m512 odd = j + 1 < count ? load(from + (j + 1) * q + c, lanes) : _mm512_setzero_ps();
      _mm512_storeu_si512(to + j / 2 * padded_q + c, pairs(halves(even, odd)));
    }
}

inline int registers(int64_t c, int64_t q) { return static_cast<int>(std::min(kWide, (q - c) / kLanes)); }

// A block of features, and what is done with it for one chunk of rows after the other. Widths are padded with zeros:
// features to a register, components likewise.
template <typename Product>
class Block {
 public:
  using Projected = uint32_t;                       // pairs of rows
  static constexpr int64_t kLanes = bfloat16::kLanes;
  static constexpr int64_t kRowMultiple = Product::kRows;
  static constexpr int64_t kSliceRows = 64;         // rows multiplied while what they are converted to is at hand
  static constexpr int64_t kBlockFeatures = 768;    // features whose parts of Q and Y stay in the L2 cache
  static constexpr int64_t kChunkSize = 320 << 10;  // elements of a block of so many rows that they stay there too
  static constexpr int64_t kChunkRows = 256;        // nor more rows than this are held converted

  // Elements of P for so many rows.
  static int64_t projected_size(int64_t rows, int64_t q) { return rows / 2 * round_up(q, kLanes); }

  Block(const SubspaceTask& task, int64_t begin, int64_t end, int64_t chunk_rows)
      : task_(task), begin_(begin), width_(end - begin), chunk_pairs_(chunk_rows / 2), d_(round_up(width_, Product::kFeatures)), q_(round_up(task.q, kLanes)),
        basis_(d_ / 2 * q_), shift_(d_), rows_(kSliceRows * d_ / 2), columns_(chunk_rows / 2 * d_),
        projected_(chunk_rows * q_), slice_sum_(d_) {}

  EVA_BF16 void prepare() {
    std::fill_n(std::copy_n(task_.shift + begin_, width_, shift_.get()), d_ - width_, 0.0f);
    fetch(task_.basis + begin_ * task_.q, width_ * task_.q * sizeof(float));
    pair_rows(task_.basis + begin_ * task_.q, width_, task_.q, basis_.get(), d_, q_);
  }

  // The block's part of P = Z Q for a chunk.
  EVA_BF16 void project(Rows chunk) {
    const Product product;
    for (int64_t start = chunk.begin; start < chunk.end; start += kSliceRows) {
      const Rows slice{start, std::min(start + kSliceRows, chunk.end)};
      uint32_t* columns = &columns_[(start - chunk.begin) / 2 * d_];
      if (task_.is_float32)
        convert(static_cast<const float*>(task_.x), slice, columns);
      else
        convert(static_cast<const uint16_t*>(task_.x), slice, columns);
      product.project(rows_.get(), slice.padded(kRowMultiple), basis_.get(), d_ / 2, q_,
                      &projected_[(start - chunk.begin) * q_]);
    }
  }

  // The rows' part of the sum of all blocks' P for a chunk, as pairs of rows.
  EVA_BF16 static void settle(const std::vector<std::unique_ptr<Block>>& blocks, Rows rows, uint32_t* projected) {
    const int64_t q = blocks[0]->q_;
    for (int64_t r = rows.begin; r < rows.end; r += kRowMultiple)
      for (int64_t c = 0; c < q; c += kLanes) {
        __m512i both[kRowMultiple / 2];
        for (int64_t i = 0; i < kRowMultiple / 2; ++i) {
          __m512 even = _mm512_setzero_ps(), odd = even;
          for (const auto& block : blocks) {
            const float* from = &block->projected_[(r + 2 * i) * q + c];
            even = _mm512_add_ps(even, _mm512_loadu_ps(from));
            odd = _mm512_add_ps(odd, _mm512_loadu_ps(from + q));
          }
          both[i] = pairs(halves(even, odd));
        }
        Product::settle(both, projected, r / 2, blocks[0]->chunk_pairs_, c, q);
      }
  }

  // Y += sign · Zᵀ P for the chunk that was projected.
  EVA_BF16 void accumulate(Rows chunk, const uint32_t* projected) {
    Product().accumulate(columns_.get(), d_, width_, chunk.padded(kRowMultiple) / 2, projected, chunk_pairs_, q_,
                         task_.product + begin_ * task_.q, task_.q, task_.sign);
  }

  double square_sum() const { return square_sum_; }

 private:
  // z = x − s of two rows at a time, as rows of pairs of features and as pairs of rows; zeros in the place of rows that
  // are masked or beyond the end.
  template <typename X>
  EVA_BF16 void convert(const X* x, Rows slice, uint32_t* columns) {
    for (int64_t row = slice.begin; row < slice.end; ++row)
      fetch(x + row * task_.row_stride + begin_, width_ * sizeof(X));
    // Held here, since after every store the compiler would have to read them from *this again.
    const int64_t d = d_, width = width_;
    const float* shift = shift_.get();
    float* sum = slice_sum_.get();
    std::fill_n(sum, d, 0.0f);
    __m512 squares[] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t r = 0; r < slice.padded(kRowMultiple); r += 2) {
      const X* from[2];
      __mmask16 counts[2];
      for (int64_t i = 0; i < 2; ++i) {
        const int64_t row = slice.begin + r + i;
        counts[i] = row < slice.end && (!task_.mask || task_.mask[row]) ? 0xffff : 0;
        from[i] = x + (counts[i] ? row * task_.row_stride + begin_ : 0);
      }
      uint16_t* first = reinterpret_cast<uint16_t*>(rows_.get()) + r * d;
      uint32_t* both = columns + r / 2 * d;
      for (int64_t j = 0; j < d; j += kLanes) {
        const __mmask16 inside = first_lanes(width - j);
        const __m512 center = _mm512_loadu_ps(shift + j);
        __m512 z[2];
        for (int64_t i = 0; i < 2; ++i) {
          const __mmask16 lanes = counts[i] & inside;
          z[i] = _mm512_maskz_sub_ps(lanes, load(from[i] + j, lanes), center);
          squares[i] = _mm512_fmadd_ps(z[i], z[i], squares[i]);
        }
        const __m512i rounded = halves(z[0], z[1]);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(first + j), _mm512_castsi512_si256(rounded));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(first + d + j), _mm512_extracti64x4_epi64(rounded, 1));
        _mm512_storeu_si512(both + j, pairs(rounded));
        _mm512_storeu_ps(sum + j, _mm512_add_ps(_mm512_loadu_ps(sum + j), _mm512_add_ps(z[0], z[1])));
      }
    }
    square_sum_ += _mm512_reduce_add_ps(_mm512_add_ps(squares[0], squares[1]));
    for (int64_t j = 0; j < width; ++j) task_.column_sum[begin_ + j] += task_.sign * sum[j];
  }

  const SubspaceTask& task_;
  const int64_t begin_, width_, chunk_pairs_, d_, q_;
  const Array<uint32_t> basis_;  // (d / 2, q) pairs of features
  const Array<float> shift_;
  const Array<uint32_t> rows_;     // (slice, d / 2) pairs of features
  const Array<uint32_t> columns_;  // (chunk / 2, d) pairs of rows
  const Array<float> projected_;   // (chunk, q)
  const Array<float> slice_sum_;
  double square_sum_ = 0;
};

// X as it is, in pairs of rows, and products of its columns, from which the shift is taken out afterwards: with c = Σ z
// and n rows, Σ z zᵀ = Σ x xᵀ − s (c + n s)ᵀ − c sᵀ. Products of bfloat16 are exact in float32.
template <typename Product>
class Triangle {
 public:
  static constexpr int64_t kChunkRows = 256;

  explicit Triangle(const GramTask& task)
      : task_(task), d_(round_up(task.d, kLanes)), pairs_(round_up(std::min(task.n, kChunkRows), Product::kRows) / 2),
        columns_(pairs_ * d_), turned_(Product::turned_size(d_, pairs_)), sum_(d_), of_rows_(d_),
        squares_(divide_up(task.d, kPanel)) {
    std::fill_n(squares_.get(), divide_up(task.d, kPanel), 0.0);
  }

  EVA_BF16 void convert(Rows rows, int64_t first, int64_t width) {
    const uint16_t* x = static_cast<const uint16_t*>(task_.x) + first;
    const float* shift = task_.shift + first;
    for (int64_t row = rows.begin; row < rows.end; ++row) fetch(x + row * task_.row_stride, width * sizeof(uint16_t));
    __m512 sum[kPanel / kLanes], squares[kPanel / kLanes];
    std::fill_n(sum, kPanel / kLanes, _mm512_setzero_ps());
    std::fill_n(squares, kPanel / kLanes, _mm512_setzero_ps());
    int64_t counted = 0;
    for (int64_t r = 0; r < rows.padded(Product::kRows); r += 2) {
      const uint16_t* from[2];
      bool counts[2];
      for (int64_t i = 0; i < 2; ++i) {
        const int64_t row = rows.begin + r + i;
        counts[i] = row < rows.end && (!task_.mask || task_.mask[row]);
        from[i] = x + (counts[i] ? row * task_.row_stride : 0);
        counted += counts[i];
      }
      for (int64_t j = 0; j < round_up(width, kLanes); j += kLanes) {
        const __mmask16 inside = first_lanes(width - j);
        const __m512 center = _mm512_maskz_loadu_ps(inside, shift + j);
        __m512i both[2];
        for (int64_t i = 0; i < 2; ++i) {
          const __mmask16 lanes = counts[i] ? inside : static_cast<__mmask16>(0);
          both[i] = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from[i] + j));
          const __m512 value = _mm512_castsi512_ps(_mm512_slli_epi32(both[i], 16));
          const __m512 z = _mm512_maskz_sub_ps(lanes, value, center);
          sum[j / kLanes] = _mm512_add_ps(sum[j / kLanes], z);
          squares[j / kLanes] = _mm512_fmadd_ps(z, z, squares[j / kLanes]);
        }
        _mm512_storeu_si512(&columns_[r / 2 * d_ + first + j], _mm512_or_si512(both[0], _mm512_slli_epi32(both[1], 16)));
      }
    }
    for (const __m512& lanes : squares) squares_[first / kPanel] += _mm512_reduce_add_ps(lanes);
    for (int64_t j = 0; j < round_up(width, kLanes); j += kLanes) _mm512_storeu_ps(&sum_[first + j], sum[j / kLanes]);
    for (int64_t j = 0; j < width; ++j) {
      task_.column_sum[first + j] += task_.sign * sum_[first + j];
      of_rows_[first + j] = sum_[first + j] + static_cast<float>(counted) * shift[j];
    }
    Product::turn(columns_.get(), d_, first, round_up(width, kLanes), turned_.get(), pairs_);
  }

  EVA_BF16 void multiply_panel(Rows rows, int64_t first, int64_t width) {
    alignas(64) float part[kPanel * kColumns];
    const Product product;
    const int64_t pairs = rows.padded(Product::kRows) / 2;
    const float* shift = task_.shift;
    for (int64_t left = 0; left < first + width; left += kColumns) {
      const int64_t columns = std::min(kColumns, first + width - left);
      product.multiply_columns(columns_.get(), d_, turned_.get(), pairs_, pairs, first, width, left,
                               static_cast<int>(divide_up(columns, kLanes)), part);
      for (int64_t i = 0; i < width; ++i) {
        float* to = task_.gram + (first + i) * task_.d + left;
        const __m512 own_shift = _mm512_set1_ps(shift[first + i]), own_sum = _mm512_set1_ps(sum_[first + i]);
        const int64_t end = std::min(columns, first + i + 1 - left);
        for (int64_t j = 0; j < end; j += kLanes) {
          const __mmask16 lanes = first_lanes(end - j);
          __m512 sum = _mm512_load_ps(part + i * kColumns + j);
          sum = _mm512_fnmadd_ps(own_shift, load(&of_rows_[left + j], lanes), sum);
          sum = _mm512_fnmadd_ps(own_sum, load(shift + left + j, lanes), sum);
          _mm512_mask_storeu_ps(to + j, lanes, _mm512_fmadd_ps(_mm512_set1_ps(task_.sign), sum, load(to + j, lanes)));
        }
      }
    }
  }

  void finish() {
    for (int64_t panel = 0; panel < divide_up(task_.d, kPanel); ++panel)
      *task_.square_sum += task_.sign * squares_[panel];
  }

 private:
  const GramTask& task_;
  const int64_t d_, pairs_;
  const Array<uint32_t> columns_;       // (pairs, d)
  const Array<uint32_t> turned_;        // as Product likes
  const Array<float> sum_, of_rows_;    // (d): of a chunk's z, and of its x
  const Array<double> squares_;         // (panels)
};

// The features begin … begin + width of rows in bfloat16 as they are, pairs of features; zeros in the place of rows that
// are masked or beyond the end, and of features.
EVA_BF16 inline void copy_rows(const ThinTask& task, Rows rows, int64_t begin, int64_t width, int64_t count,
                               uint32_t* to) {
  const uint16_t* x = task.x + begin;
  for (int64_t r = 0; r < count; ++r, to += width / 2) {
    const int64_t row = rows.begin + r;
    const bool counts = row < rows.end && task.counts(row);
    const uint16_t* from = x + (counts ? row * task.row_stride : 0);
    for (int64_t j = 0; j < width; j += kLanes) {
      const __mmask16 lanes = counts ? first_lanes(task.d - begin - j) : static_cast<__mmask16>(0);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + j / 2), _mm256_maskz_loadu_epi16(lanes, from + j));
    }
  }
}

// The same, as pairs of rows: (count / 2, padded).
EVA_BF16 inline void pair_columns(const ThinTask& task, Rows rows, int64_t begin, int64_t width, int64_t padded,
                                  int64_t count, uint32_t* to) {
  const uint16_t* x = task.x + begin;
  for (int64_t row = rows.begin; row < rows.end; ++row) fetch(x + row * task.row_stride, width * sizeof(uint16_t));
  for (int64_t r = 0; r < count; r += 2, to += padded) {
    const uint16_t* from[2];
    bool counts[2];
    for (int64_t i = 0; i < 2; ++i) {
      const int64_t row = rows.begin + r + i;
      counts[i] = row < rows.end && task.counts(row);
      from[i] = x + (counts[i] ? row * task.row_stride : 0);
    }
    for (int64_t j = 0; j < padded; j += kLanes) {
      const __mmask16 inside = first_lanes(width - j), none = 0;
      const __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(counts[0] ? inside : none, from[0] + j));
      const __m512i odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(counts[1] ? inside : none, from[1] + j));
      _mm512_storeu_si512(to + j, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
  }
}

// Rows of the factor as two bfloat16 each, the second what the first lacks, in pairs of rows as Product likes.
template <typename Product>
EVA_BF16 void split_factor(const ThinTask& task, Rows rows, int64_t count, int64_t q, int64_t stride, uint32_t* high,
                           uint32_t* low) {
  for (int64_t r = 0; r < count; r += Product::kRows)
    for (int64_t c = 0; c < q; c += kLanes) {
      __m512i first[Product::kRows / 2], second[Product::kRows / 2];
      for (int64_t i = 0; i < Product::kRows / 2; ++i) {
        __m512 value[2], rest[2];
        for (int64_t k = 0; k < 2; ++k) {
          const int64_t row = rows.begin + r + 2 * i + k;
          const bool counts = row < rows.end && task.counts(row);
          const __mmask16 lanes = counts ? first_lanes(task.q - c) : static_cast<__mmask16>(0);
          value[k] = load(task.factor + (counts ? row * task.q : 0) + c, lanes);
        }
        const __m512i rounded = halves(value[0], value[1]);
        const __m256i parts[2] = {_mm512_castsi512_si256(rounded), _mm512_extracti64x4_epi64(rounded, 1)};
        for (int64_t k = 0; k < 2; ++k)
          rest[k] = _mm512_sub_ps(
              value[k], _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(parts[k]), 16)));
        first[i] = pairs(rounded);
        second[i] = pairs(halves(rest[0], rest[1]));
      }
      Product::settle(first, high, r / 2, stride, c, q);
      Product::settle(second, low, r / 2, stride, c, q);
    }
}

// X F of rows in bfloat16, with F rounded to it: threads share the rows.
template <typename Product>
void project_rows(const ThinTask& task, int max_threads) {
  constexpr int64_t kRows = 64, kFeatures = 1024;  // of the rows that are copied at a time
  static_assert(kRows % Product::kRows == 0 && kFeatures % Product::kFeatures == 0);
  const int64_t d = round_up(task.d, Product::kFeatures), q = round_up(task.q, kLanes);
  const int64_t shares = shares_of(task, divide_up(task.n, kRows), max_threads);
  struct Buffers {
    explicit Buffers(int64_t q) : rows(kRows * kFeatures / 2), sums(kRows * q), part(kRows * q) {}
    Array<uint32_t> rows;     // (rows, features / 2) pairs of features
    Array<float> sums, part;  // (rows, q)
  };
  const Array<uint32_t> basis(d / 2 * q);
  std::vector<Buffers> buffers;  // memory is taken here, where an error can be reported
  for (int64_t share = 0; share < shares; ++share) buffers.emplace_back(q);
  run_in_parallel(shares, 2, shares, [&](int64_t step, int64_t share) {
    if (step == 0)
      return share_out(d, 2, shares, share, d, [&](int64_t begin, int64_t end) {
        pair_rows(task.factor + begin * task.q, task.d - begin, task.q, &basis[begin / 2 * q], end - begin, q);
      });
    const Buffers& own = buffers[share];
    const Product product;
    share_out(task.n, kRows, shares, share, kRows, [&](int64_t begin, int64_t end) {
      const int64_t count = Rows{begin, end}.padded(Product::kRows);
      for (int64_t j = 0; j < d; j += kFeatures) {
        const int64_t width = std::min(kFeatures, d - j);
        copy_rows(task, {begin, end}, j, width, count, own.rows.get());
        product.project(own.rows.get(), count, &basis[j / 2 * q], width / 2, q, (j ? own.part : own.sums).get());
        for (int64_t i = 0; j && i < count * q; ++i) own.sums[i] += own.part[i];
      }
      for (int64_t row = begin; row < end; ++row)
        std::copy_n(&own.sums[(row - begin) * q], task.q, task.product + row * task.q);
    });
  });
}

// product += Xᵀ F of rows in bfloat16, with F as two such, which add up to it but for 2⁻¹⁷: threads share the features.
template <typename Product>
void add_outer(const ThinTask& task, int max_threads) {
  constexpr int64_t kRows = 256, kFeatures = 256;  // of the rows that are paired at a time
  static_assert(kRows % Product::kRows == 0 && kFeatures % Product::kFeatures == 0);
  const int64_t q = round_up(task.q, kLanes);
  const int64_t shares = shares_of(task, task.d / kFewFeatures, max_threads);
  struct Buffers {
    explicit Buffers(int64_t q) : columns(kRows / 2 * kFeatures), high(kRows / 2 * q), low(kRows / 2 * q) {}
    Array<uint32_t> columns;    // (rows / 2, features) pairs of rows
    Array<uint32_t> high, low;  // (rows / 2, q) pairs of rows, as Product likes
  };
  std::vector<Buffers> buffers;
  for (int64_t share = 0; share < shares; ++share) buffers.emplace_back(q);
  run_in_parallel(shares, 1, shares, [&](int64_t, int64_t share) {
    const Buffers& own = buffers[share];
    const Product product;
    share_out(task.d, kLanes, shares, share, kFeatures, [&](int64_t begin, int64_t end) {
      const int64_t width = round_up(end - begin, Product::kFeatures);
      for (int64_t row = 0; row < task.n; row += kRows) {
        const Rows rows{row, std::min(row + kRows, task.n)};
        const int64_t count = rows.padded(Product::kRows);
        pair_columns(task, rows, begin, end - begin, width, count, own.columns.get());
        split_factor<Product>(task, rows, count, q, kRows / 2, own.high.get(), own.low.get());
        for (const uint32_t* factor : {own.high.get(), own.low.get()})
          product.accumulate(own.columns.get(), width, end - begin, count / 2, factor, kRows / 2, q,
                             task.product + begin * task.q, task.q, 1);
      }
    });
  });
}

}  // namespace eva::bfloat16
