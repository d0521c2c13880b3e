// Refreshes and Cholesky QR, for the form that includes this.
#pragma once

#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "dense.h"
#include "memory.h"
#include "parallel.h"
#include "refresh.h"
#include "symmetric_eigen_form.h"

namespace eva::EVA_FORM {

// Upper triangular R with RᵀR = matrix, in its place; false where there is none. All loops here run over padded rows.
EVA_TARGET inline bool cholesky(double* matrix, int64_t n, int64_t stride) {
  for (int64_t k = 0; k < n; ++k) {
    double* row = matrix + k * stride;
    if (!(row[k] > 0)) return false;
    const double inverse = 1 / std::sqrt(row[k]);
    const int64_t start = k / 8 * 8;
    for (int64_t j = start; j < stride; ++j) row[j] *= inverse;
    for (int64_t i = k + 1; i < n; ++i) add_scaled(-row[i], row, matrix + i * stride, i / 8 * 8, stride);
  }
  return true;
}

// The inverse of an upper triangular matrix, of which the other triangle is not read.
EVA_TARGET inline void invert_upper(const double* upper, int64_t n, int64_t stride, double* inverse) {
  std::fill_n(inverse, n * stride, 0.0);
  for (int64_t i = n - 1; i >= 0; --i) {
    const int64_t start = i / 8 * 8;
    double* row = inverse + i * stride;
    for (int64_t k = i + 1; k < n; ++k)
      add_scaled(-upper[i * stride + k], inverse + k * stride, row, k / 8 * 8, stride);
    row[i] += 1;
    for (int64_t j = start; j < stride; ++j) row[j] /= upper[i * stride + i];
  }
}

template <typename From, typename To>
EVA_TARGET void convert(const From* from, To* to, int64_t size) {
  for (int64_t j = 0; j < size; ++j) to[j] = static_cast<To>(from[j]);
}

EVA_TARGET inline void round_to_bfloat16(const float* from, float* to, int64_t size) {
  for (int64_t j = 0; j < size; ++j) {
    uint32_t bits;
    std::memcpy(&bits, from + j, sizeof bits);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;  // to nearest, ties to even
    std::memcpy(to + j, &bits, sizeof bits);
  }
}

inline void copy_rows(const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows, int64_t width) {
  for (int64_t j = 0; j < rows; ++j)
    std::fill(std::copy_n(from + j * from_stride, width, to + j * to_stride), to + (j + 1) * to_stride, 0.0f);
}

Orthonormal cholesky_qr(const float* y, bool transposed, int64_t d, int64_t q, float* out, double growth, int threads);

// A thread's memory for statistics of one shape, and the steps of an extraction. The scatter is A Aᵀ with the columns
// A = [Q √Λ, N, v]: the past, the Nyström approximation N Nᵀ of the rows since, and the difference of their means.
class Extractor {
 public:
  Extractor(int64_t d, int64_t q, const RefreshLimits& limits)
      : limits_(limits), d_(d), q_(q), stride_(padded(q)), tall_(d * stride_), square_(q * stride_),
        columns_(2 * q + 1), product_(tall_), nystrom_(tall_), copy_(stride_ == q ? 0 : tall_), difference_(d),
        small_(square_), beside_(stride_), across_(stride_), along_(square_), root_(square_), inverse_(square_),
        gram_(columns_ * padded(columns_)),
        span_(columns_ * stride_), image_(columns_ * stride_), turn_(columns_ * stride_), third_(square_ + 4 * stride_),
        vectors_(square_), scale_(stride_), norms_(stride_) {}

  EVA_TARGET bool run(const RefreshTask& task) {
    const auto is_zero = [](auto entry) { return entry == 0; };
    const float* difference = task.means + d_;
    if (!nystrom(task)) return false;
    if (std::all_of(task.eigenvalues, task.eigenvalues + q_, is_zero) &&
        std::all_of(difference, difference + d_, is_zero))
      return alone(task);
    gram(task);
    return span() && together(task);
  }

 private:
  // N = Y D R⁻¹ with Y = image − u (uᵀ Ω), RᵀR = D ½(ΩᵀY + YᵀΩ) D + ε I and D its scale.
  EVA_TARGET bool nystrom(const RefreshTask& task) {
    copy_rows(task.image, q_, product_.get(), stride_, d_, q_);
    const float* sample = with_padding(task.sample);
    multiply<float>({task.means, d_, 1}, sample, stride_, beside_.get(), stride_, 1, q_, d_);
    for (int64_t c = 0; c < stride_; ++c) beside_[c] = -beside_[c];
    multiply<float>({task.means, 1, d_}, beside_.get(), stride_, product_.get(), stride_, d_, q_, 1, true);
    inner(task.sample, q_, product_.get(), small_.get());
    double* norms = norms_.get();
    std::fill_n(norms, stride_, 0.0);
    for (int64_t j = 0; j < d_; ++j)
      for (int64_t c = 0; c < stride_; ++c) {
        const double entry = product_[j * stride_ + c];
        norms[c] += entry * entry;
      }
    for (int64_t c = 0; c < q_; ++c) {
      const double diagonal = small_[c * stride_ + c], least = limits_.alignment * std::sqrt(norms[c]);
      if (!std::isfinite(norms[c]) || !std::isfinite(diagonal)) return false;
      scale_[c] = std::max(diagonal, least) > 0 ? 1 / std::sqrt(std::max(diagonal, least)) : 0;
      if (diagonal <= least && is_rounding(c)) scale_[c] = 0;
    }
    std::fill_n(root_.get(), square_, 0.0);
    // A column whose row has more than a semidefinite matrix could have there is left out. The reciprocals of scales are
    // the diagonal's roots: of two columns the one with the greater scale is the smaller.
    double* kept = norms_.get();  // norms are done with
    std::copy_n(scale_.get(), q_, kept);
    for (int64_t i = 0; i < q_; ++i) {
      double largest = 0;
      for (int64_t j = 0; j < q_; ++j) {
        double& entry = root_[i * stride_ + j];
        entry = scale_[i] * scale_[j] * (static_cast<double>(small_[i * stride_ + j]) + small_[j * stride_ + i]) / 2;
        largest = std::max(largest, scale_[j] < scale_[i] ? std::abs(entry) : 0.0);
      }
      if (largest > 1 + limits_.symmetry) kept[i] = 0;
    }
    for (int64_t i = 0; i < q_; ++i) {
      for (int64_t j = 0; j < q_; ++j)
        if (kept[i] == 0 || kept[j] == 0) root_[i * stride_ + j] = 0;
      root_[i * stride_ + i] += limits_.jitter;
    }
    std::copy_n(kept, q_, scale_.get());
    if (!invert_root()) return false;
    convert(inverse_.get(), small_.get(), square_);
    multiply<float>({product_.get(), stride_, 1}, small_.get(), stride_, nystrom_.get(), stride_, d_, q_, q_);
    return true;
  }

  // Whether a column of ΩᵀY is too far from its row.
  EVA_TARGET bool is_rounding(int64_t c) const {
    double size = 0, skew = 0;
    for (int64_t i = 0; i < q_; ++i) {
      const double entry = small_[i * stride_ + c], other = entry - small_[c * stride_ + i];
      size += entry * entry;
      skew += other * other;
    }
    return skew > limits_.symmetry * limits_.symmetry * size;
  }

  // gram_ = AᵀA, with N = Q along_ + N⊥ and v = Q g + v⊥: what Q holds already is subtracted before anything is squared.
  // N⊥ and v⊥ take the places of N and v, g that of beside_.
  EVA_TARGET void gram(const RefreshTask& task) {
    inner(task.basis, q_, nystrom_.get(), small_.get());
    subtract(task.basis, nystrom_.get());
    convert(small_.get(), along_.get(), square_);
    const float* difference = task.means + d_;
    const float* basis = with_padding(task.basis);
    multiply<float>({difference, d_, 1}, basis, stride_, beside_.get(), stride_, 1, q_, d_);
    std::fill(beside_.get() + q_, beside_.get() + stride_, 0.0f);  // a product ends with its last register
    for (int64_t j = 0; j < d_; ++j) difference_[j] = difference[j] - dot(basis + j * stride_, beside_.get(), 0, stride_);
    squares(nystrom_.get(), small_.get());
    multiply<float>({difference_.get(), d_, 1}, nystrom_.get(), stride_, across_.get(), stride_, 1, q_, d_);
    multiply_symmetric<double>({along_.get(), 1, stride_}, along_.get(), stride_, root_.get(), stride_, q_, q_);
    const int64_t width = padded(columns_), last = columns_ - 1;
    std::fill_n(gram_.get(), columns_ * width, 0.0);
    double& corner = gram_[last * width + last];
    for (int64_t j = 0; j < d_; ++j) corner += static_cast<double>(difference_[j]) * difference_[j];
    for (int64_t i = 0; i < q_; ++i) {
      const double deviation = std::sqrt(task.eigenvalues[i]);
      double *past = gram_.get() + i * width, *since = gram_.get() + (q_ + i) * width;
      double beside = across_[i];
      for (int64_t j = 0; j < q_; ++j) {
        since[q_ + j] = root_[i * stride_ + j] + small_[i * stride_ + j];
        past[q_ + j] = gram_[(q_ + j) * width + i] = deviation * along_[i * stride_ + j];
        beside += along_[j * stride_ + i] * beside_[j];
      }
      past[i] = task.eigenvalues[i];
      past[last] = gram_[last * width + i] = deviation * beside_[i];
      since[last] = gram_[last * width + q_ + i] = beside;
      corner += static_cast<double>(beside_[i]) * beside_[i];
    }
  }

  // span_ = an orthonormal basis of about the leading right singular vectors of A, image_ = AᵀA times it: block power
  // steps from the sum of each column of Q √Λ and the one of N that goes on from it.
  EVA_TARGET bool span() {
    const int64_t width = padded(columns_);
    std::fill_n(image_.get(), columns_ * stride_, 0.0);
    for (int64_t i = 0; i < columns_; ++i)
      for (int64_t c = 0; c < q_; ++c) image_[i * stride_ + c] = gram_[i * width + c] + gram_[i * width + q_ + c];
    for (int step = 0; step < limits_.power_steps; ++step) {
      multiply_symmetric<double>({image_.get(), 1, stride_}, image_.get(), stride_, root_.get(), stride_, q_, columns_);
      for (int64_t c = 0; c < q_; ++c) {
        const double square = root_[c * stride_ + c];
        if (!std::isfinite(square)) return false;
        scale_[c] = square > 0 ? 1 / std::sqrt(square) : 0;
      }
      for (int64_t i = 0; i < q_; ++i) {
        for (int64_t j = 0; j < q_; ++j) root_[i * stride_ + j] = root_[i * stride_ + j] * scale_[i] * scale_[j];
        root_[i * stride_ + i] += limits_.span_jitter;
      }
      if (!invert_root()) return false;
      multiply<double>({image_.get(), stride_, 1}, inverse_.get(), stride_, span_.get(), stride_, columns_, q_, q_);
      multiply<double>({gram_.get(), width, 1}, span_.get(), stride_, image_.get(), stride_, columns_, q_, columns_);
    }
    return true;
  }

  // Eigenpairs of N Nᵀ, where there is no past.
  EVA_TARGET bool alone(const RefreshTask& task) {
    inner(task.basis, q_, nystrom_.get(), small_.get());
    convert(small_.get(), along_.get(), square_);
    squares(nystrom_.get(), small_.get());
    convert(small_.get(), root_.get(), square_);
    if (!eigenpairs(task)) return false;
    multiply<double>({along_.get(), stride_, 1}, inverse_.get(), stride_, turn_.get(), stride_, q_, q_, q_);
    compare(turn_.get(), task);
    convert(inverse_.get(), small_.get(), square_);
    multiply<float>({nystrom_.get(), stride_, 1}, small_.get(), stride_, target(task), stride_, d_, q_, q_);
    return settle(task);
  }

  // Eigenpairs of A Aᵀ within the span.
  EVA_TARGET bool together(const RefreshTask& task) {
    multiply_symmetric<double>({span_.get(), 1, stride_}, image_.get(), stride_, root_.get(), stride_, q_, columns_);
    if (!eigenpairs(task)) return false;
    // The components are A turn_ = Q held + N⊥ (turn_'s middle rows) + v⊥ (its last), held = Qᵀ A turn_.
    multiply<double>({span_.get(), stride_, 1}, inverse_.get(), stride_, turn_.get(), stride_, columns_, q_, q_);
    double *held = turn_.get(), *since = held + square_, *between = since + square_;
    for (int64_t i = 0; i < q_; ++i) {
      const double deviation = std::sqrt(task.eigenvalues[i]);
      for (int64_t c = 0; c < stride_; ++c) held[i * stride_ + c] *= deviation;
      add_scaled(beside_[i], between, held + i * stride_, 0, stride_);
    }
    multiply<double>({along_.get(), stride_, 1}, since, stride_, held, stride_, q_, q_, q_, true);
    compare(held, task);
    float* to = target(task);
    convert(held, small_.get(), square_);
    multiply<float>({task.basis, q_, 1}, small_.get(), stride_, to, stride_, d_, q_, q_);
    convert(since, small_.get(), square_);
    multiply<float>({nystrom_.get(), stride_, 1}, small_.get(), stride_, to, stride_, d_, q_, q_, true);
    convert(between, small_.get(), stride_);
    multiply<float>({difference_.get(), 1, d_}, small_.get(), stride_, to, stride_, d_, q_, 1, true);
    return settle(task);
  }

  // Those of root_: inverse_(k, i) = vectors_(i, k) / √λᵢ.
  bool eigenpairs(const RefreshTask& task) {
    if (!symmetric_eigen(root_.get(), q_, stride_, task.new_eigenvalues, vectors_.get(), third_.get())) return false;
    const double largest = task.new_eigenvalues[0], least = task.new_eigenvalues[q_ - 1];
    if (!(least > limits_.rank * largest)) return false;
    is_steep_ = least <= limits_.orthogonal * largest;
    std::fill_n(inverse_.get(), square_, 0.0);
    for (int64_t i = 0; i < q_; ++i) {
      const double inverse = 1 / std::sqrt(task.new_eigenvalues[i]);
      for (int64_t k = 0; k < q_; ++k) inverse_[k * stride_ + i] = vectors_[i * stride_ + k] * inverse;
    }
    return true;
  }

  // Where the new basis is worked out, with padded rows, and what is left to do once it is there.
  float* target(const RefreshTask& task) const { return stride_ == q_ ? task.new_basis : product_.get(); }

  bool settle(const RefreshTask& task) {
    if (stride_ != q_)
      for (int64_t j = 0; j < d_; ++j) std::copy_n(product_.get() + j * stride_, q_, task.new_basis + j * q_);
    if (is_steep_ && !straighten(task)) return false;
    if (task.summarises) std::fill_n(task.image, d_ * q_, 0.0f);
    if (task.rounded_basis) round_to_bfloat16(task.new_basis, task.rounded_basis, d_ * q_);
    return true;
  }

  // Makes the columns of the new basis orthonormal, where a steep spectrum has left them less so than they have to be.
  bool straighten(const RefreshTask& task) {
    Orthonormal became = Orthonormal::kAgain;
    for (int pass = 0; pass < 2 && became == Orthonormal::kAgain; ++pass) {
      try {
        became = cholesky_qr(task.new_basis, false, d_, q_, task.new_basis, limits_.growth, 1);
      } catch (const std::bad_alloc&) {  // which must not leave a thread of OpenMP's
        return false;
      }
    }
    if (became != Orthonormal::kDone) return false;
    inner(task.basis, q_, with_padding(task.new_basis), small_.get());
    convert(small_.get(), along_.get(), square_);
    compare(along_.get(), task);
    return true;
  }

  // Cosines and overlaps from cross = Qᵀ Q′.
  void compare(const double* cross, const RefreshTask& task) const {
    double overlap = 0;
    for (int64_t i = 0; i < q_; ++i) {
      const double* row = cross + i * stride_;
      for (int64_t j = 0; j < i; ++j) {
        const double below = cross[j * stride_ + i];
        overlap += row[j] * row[j] + below * below;
      }
      overlap += row[i] * row[i];
      task.cosines[i] = std::min(std::abs(row[i]), 1.0);
      task.overlaps[i] = overlap;
    }
  }

  // matrix −= basis · small_.
  EVA_TARGET void subtract(const float* basis, float* matrix) {
    for (int64_t i = 0; i < square_; ++i) small_[i] = -small_[i];
    multiply<float>({basis, q_, 1}, small_.get(), stride_, matrix, stride_, d_, q_, q_, true);
    for (int64_t i = 0; i < square_; ++i) small_[i] = -small_[i];
  }

  // inverse_ = D R⁻¹ with RᵀR = root_ and D the scale, which takes root_'s place.
  EVA_TARGET bool invert_root() {
    if (!cholesky(root_.get(), q_, stride_)) return false;
    invert_upper(root_.get(), q_, stride_, inverse_.get());
    for (int64_t i = 0; i < q_; ++i)
      for (int64_t j = 0; j < stride_; ++j) inverse_[i * stride_ + j] *= scale_[i];
    return true;
  }

  // to = matrixᵀ · matrix, (q, q).
  EVA_TARGET void squares(const float* matrix, float* to) {
    multiply_symmetric<float>({matrix, 1, stride_}, matrix, stride_, to, stride_, q_, d_);
  }

  // to = leftᵀ · right, (q, q).
  EVA_TARGET void inner(const float* left, int64_t left_stride, const float* right, float* to) {
    multiply<float>({left, 1, left_stride}, right, stride_, to, stride_, q_, q_, d_);
  }

  const float* with_padding(const float* matrix) const {
    if (stride_ == q_) return matrix;
    copy_rows(matrix, q_, copy_.get(), stride_, d_, q_);
    return copy_.get();
  }

  const RefreshLimits& limits_;
  const int64_t d_, q_, stride_, tall_, square_, columns_;
  const Array<float> product_, nystrom_, copy_;          // (d, stride)
  const Array<float> difference_;                        // (d)
  const Array<float> small_, beside_, across_;           // (q, stride); (stride)
  const Array<double> along_, root_, inverse_;           // (q, stride)
  const Array<double> gram_;                             // (columns, columns), padded
  const Array<double> span_, image_, turn_;              // (columns, stride)
  const Array<double> third_, vectors_, scale_, norms_;  // the eigensolver's; (stride)
  bool is_steep_ = false;                                // the spectrum that was found last
};

inline void refresh(const std::vector<RefreshTask>& tasks, const RefreshLimits& limits, uint8_t* solved, int threads) {
  const int64_t size = static_cast<int64_t>(tasks.size());
  if (!size) return;
  const int64_t shares = std::clamp<int64_t>(size, 1, std::max(threads, 1));
  std::vector<std::unique_ptr<Extractor>> extractors;  // memory is taken here, where an error can be reported
  for (int64_t share = 0; share < shares; ++share)
    extractors.push_back(std::make_unique<Extractor>(tasks[0].d, tasks[0].q, limits));
  std::atomic<int64_t> next{0};
  run_in_parallel(shares, 1, shares, [&](int64_t, int64_t share) {
    for (int64_t i = next++; i < size; i = next++) solved[i] = extractors[share]->run(tasks[i]);
  });
}

EVA_TARGET inline Orthonormal cholesky_qr(const float* y, bool transposed, int64_t d, int64_t q, float* out,
                                          double growth, int threads) {
  constexpr int64_t kRows = 32;  // worked out at a time, before they are rounded
  const int64_t stride = padded(q), shares = std::max(threads, 1);
  const Array<double> wide(d * stride), gram(q * stride), root(q * stride), scale(stride), rows(shares * kRows * stride);
  const auto bound = [&](int64_t share, int64_t of) { return share == shares ? of : of * share / shares / 8 * 8; };
  run_in_parallel(shares, 1, shares, [&](int64_t, int64_t share) {
    const int64_t begin = bound(share, d), end = bound(share + 1, d);
    if (!transposed)
      for (int64_t j = begin; j < end; ++j)
        std::fill(std::copy_n(y + j * q, q, wide.get() + j * stride), wide.get() + (j + 1) * stride, 0.0);
    else  // a few rows at a time, which stay in the first-level cache until their columns are read
      for (int64_t first = begin; first < end; first += 16)
        for (int64_t c = 0; c < stride; ++c)
          for (int64_t j = first; j < std::min(first + 16, end); ++j) wide[j * stride + c] = c < q ? y[c * d + j] : 0;
  });
  // Rows of the Gram matrix are shared out, not those of y, so that bits do not depend on the shares.
  run_in_parallel(shares, 1, shares, [&](int64_t, int64_t share) {
    const int64_t begin = bound(share, q), end = bound(share + 1, q);
    multiply<double, Part::kUpper>({wide.get() + begin, 1, stride}, wide.get() + begin, stride,
                                   gram.get() + begin * stride + begin, stride, end - begin, q - begin, d);
  });
  for (int64_t i = 0; i < q; ++i) {
    const double square = gram[i * stride + i];
    if (!std::isfinite(square)) return Orthonormal::kNever;
    scale[i] = square > 0 ? 1 / std::sqrt(square) : 1;
  }
  for (int64_t i = 0; i < q; ++i) {
    double* row = gram.get() + i * stride;
    for (int64_t j = i; j < q; ++j) row[j] *= scale[i] * scale[j];
    std::fill(row + q, row + stride, 0.0);
    std::fill(row, row + i, 0.0);
  }
  if (!cholesky(gram.get(), q, stride)) return Orthonormal::kNever;
  invert_upper(gram.get(), q, stride, root.get());
  double largest = 0;
  for (int64_t j = 0; j < q; ++j) {
    double sum = 0;
    for (int64_t i = 0; i <= j; ++i) sum += std::abs(root[i * stride + j]);
    largest = std::max(largest, sum);
  }
  if (!std::isfinite(largest)) return Orthonormal::kNever;
  for (int64_t i = 0; i < q; ++i)
    for (int64_t j = 0; j < stride; ++j) root[i * stride + j] *= scale[i];
  run_in_parallel(shares, 1, shares, [&](int64_t, int64_t share) {
    double* tile = rows.get() + share * kRows * stride;
    const int64_t end = bound(share + 1, d);
    for (int64_t j = bound(share, d); j < end; j += kRows) {
      const int64_t count = std::min(kRows, end - j);
      multiply<double>({wide.get() + j * stride, stride, 1}, root.get(), stride, tile, stride, count, q, q);
      for (int64_t i = 0; i < count; ++i) convert(tile + i * stride, out + (j + i) * q, q);
    }
  });
  return largest <= growth ? Orthonormal::kDone : Orthonormal::kAgain;
}

}  // namespace eva::EVA_FORM
