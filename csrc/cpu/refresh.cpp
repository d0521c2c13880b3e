#include "refresh.h"

#include "dense.h"

#ifdef EVA_DENSE

#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>

#include "memory.h"
#include "symmetric_eigen.h"
#include "parallel.h"

namespace eva {
namespace {

// Upper triangular R with RᵀR = matrix, in its place; false where there is none. All loops here run over padded rows.
EVA_AVX512 bool cholesky(double* matrix, int64_t n, int64_t stride) {
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
EVA_AVX512 void invert_upper(const double* upper, int64_t n, int64_t stride, double* inverse) {
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
EVA_AVX512 void convert(const From* from, To* to, int64_t size) {
  for (int64_t j = 0; j < size; ++j) to[j] = static_cast<To>(from[j]);
}

EVA_AVX512 void round_to_bfloat16(const float* from, float* to, int64_t size) {
  for (int64_t j = 0; j < size; ++j) {
    uint32_t bits;
    std::memcpy(&bits, from + j, sizeof bits);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;  // to nearest, ties to even
    std::memcpy(to + j, &bits, sizeof bits);
  }
}

void copy_rows(const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows, int64_t width) {
  for (int64_t j = 0; j < rows; ++j)
    std::fill(std::copy_n(from + j * from_stride, width, to + j * to_stride), to + (j + 1) * to_stride, 0.0f);
}

// A thread's memory for statistics of one shape, and the steps of an extraction.
class Extractor {
 public:
  Extractor(int64_t d, int64_t q, const RefreshLimits& limits)
      : limits_(limits), d_(d), q_(q), stride_(padded(q)), tall_(d * stride_), square_(q * stride_),
        product_(tall_), sketch_(tall_), copy_(stride_ == q ? 0 : tall_),
        small_(std::max<int64_t>(q, 2) * stride_), core_(square_), first_(square_), second_(square_), third_(square_ + 4 * stride_), vectors_(square_), scale_(stride_),
        norms_(stride_) {}

  EVA_AVX512 bool run(const RefreshTask& task) {
    image(task);
    return root() && components(task);
  }

 private:
  // Y and ΩᵀY.
  EVA_AVX512 void image(const RefreshTask& task) {
    copy_rows(task.image, q_, product_.get(), stride_, d_, q_);
    if (task.basis) {
      inner(task.basis, q_, with_padding(task.sample));
      for (int64_t i = 0; i < q_; ++i)
        for (int64_t j = 0; j < stride_; ++j) small_[i * stride_ + j] *= static_cast<float>(task.eigenvalues[i]);
      multiply<float>({task.basis, q_, 1}, small_.get(), stride_, product_.get(), stride_, d_, q_, q_, true);
    }
    const float* sample = with_padding(task.sample);
    multiply<float>({task.directions, d_, 1}, sample, stride_, small_.get(), stride_, 2, q_, d_);
    for (int64_t t = 0; t < 2; ++t)
      for (int64_t j = 0; j < stride_; ++j) small_[t * stride_ + j] *= task.weights[t];
    multiply<float>({task.directions, 1, d_}, small_.get(), stride_, product_.get(), stride_, d_, q_, 2, true);
    inner(task.sample, q_, product_.get());
    convert(small_.get(), core_.get(), square_);
  }

  // The sketch B = Y D R⁻¹, with RᵀR = D ½(ΩᵀY + YᵀΩ) D + ε I and D its scale; D R⁻¹ is left in second_.
  EVA_AVX512 bool root() {
    double* norms = norms_.get();
    std::fill_n(norms, stride_, 0.0);
    for (int64_t j = 0; j < d_; ++j)
      for (int64_t c = 0; c < stride_; ++c) {
        const double entry = product_[j * stride_ + c];
        norms[c] += entry * entry;
      }
    for (int64_t c = 0; c < q_; ++c) {
      const double diagonal = std::max(core_[c * stride_ + c], limits_.alignment * std::sqrt(norms[c]));
      if (!std::isfinite(norms[c]) || !std::isfinite(core_[c * stride_ + c])) return false;
      scale_[c] = diagonal > 0 ? 1 / std::sqrt(diagonal) : 0;
    }
    std::fill_n(first_.get(), square_, 0.0);
    for (int64_t i = 0; i < q_; ++i) {
      for (int64_t j = 0; j < q_; ++j)
        first_[i * stride_ + j] = scale_[i] * scale_[j] * (core_[i * stride_ + j] + core_[j * stride_ + i]) / 2;
      first_[i * stride_ + i] += limits_.jitter;
    }
    if (!cholesky(first_.get(), q_, stride_)) return false;
    invert_upper(first_.get(), q_, stride_, second_.get());
    for (int64_t i = 0; i < q_; ++i)
      for (int64_t j = 0; j < stride_; ++j) second_[i * stride_ + j] *= scale_[i];
    convert(second_.get(), small_.get(), square_);
    multiply<float>({product_.get(), stride_, 1}, small_.get(), stride_, sketch_.get(), stride_, d_, q_, q_);
    return true;
  }

  // Eigenpairs of B Bᵀ through those of Bᵀ B, and how they stand to Ω.
  EVA_AVX512 bool components(const RefreshTask& task) {
    inner(sketch_.get(), stride_, sketch_.get());
    convert(small_.get(), first_.get(), square_);
    if (!symmetric_eigen(first_.get(), q_, stride_, task.new_eigenvalues, vectors_.get(), third_.get())) return false;
    const double largest = task.new_eigenvalues[0];
    if (!(task.new_eigenvalues[q_ - 1] > limits_.orthogonal * largest)) return false;
    std::fill_n(first_.get(), square_, 0.0);
    for (int64_t i = 0; i < q_; ++i) {  // turn(k, i) = vectors(i, k) / √λᵢ
      const double inverse = 1 / std::sqrt(task.new_eigenvalues[i]);
      for (int64_t k = 0; k < q_; ++k) first_[k * stride_ + i] = vectors_[i * stride_ + k] * inverse;
    }
    convert(first_.get(), small_.get(), square_);
    multiply<double>({second_.get(), stride_, 1}, first_.get(), stride_, third_.get(), stride_, q_, q_, q_);
    multiply<double>({core_.get(), stride_, 1}, third_.get(), stride_, first_.get(), stride_, q_, q_, q_);
    double overlap = 0;
    for (int64_t i = 0; i < q_; ++i) {
      const double* row = first_.get() + i * stride_;
      for (int64_t j = 0; j < i; ++j) {
        const double below = first_[j * stride_ + i];
        overlap += row[j] * row[j] + below * below;
      }
      overlap += row[i] * row[i];
      task.cosines[i] = std::min(std::abs(row[i]), 1.0);
      task.overlaps[i] = overlap;
    }
    float* to = stride_ == q_ ? task.new_basis : product_.get();
    multiply<float>({sketch_.get(), stride_, 1}, small_.get(), stride_, to, stride_, d_, q_, q_);
    if (stride_ != q_)
      for (int64_t j = 0; j < d_; ++j) std::copy_n(to + j * stride_, q_, task.new_basis + j * q_);
    if (task.basis) std::fill_n(task.image, d_ * q_, 0.0f);
    if (task.rounded_basis) round_to_bfloat16(task.new_basis, task.rounded_basis, d_ * q_);
    return true;
  }

  // small_ = leftᵀ · right.
  EVA_AVX512 void inner(const float* left, int64_t left_stride, const float* right) {
    multiply<float>({left, 1, left_stride}, right, stride_, small_.get(), stride_, q_, q_, d_);
  }

  const float* with_padding(const float* matrix) const {
    if (stride_ == q_) return matrix;
    copy_rows(matrix, q_, copy_.get(), stride_, d_, q_);
    return copy_.get();
  }

  const RefreshLimits& limits_;
  const int64_t d_, q_, stride_, tall_, square_;
  const Array<float> product_, sketch_, copy_, small_;  // (d, stride) three times, (at least q, stride)
  const Array<double> core_, first_, second_, third_, vectors_;  // (q, stride), the third with room to spare
  const Array<double> scale_, norms_;                            // (stride)
};

}  // namespace

bool has_refresh() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

void refresh(const std::vector<RefreshTask>& tasks, const RefreshLimits& limits, uint8_t* solved, int threads) {
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

bool cholesky_qr(const float* y, int64_t d, int64_t q, float* out, double* deviation, int threads) {
  const int64_t stride = padded(q), square = q * stride, shares = std::max(threads, 1);
  const bool is_padded = stride == q;
  const Array<float> copy(is_padded ? 0 : d * stride), result(is_padded ? 0 : d * stride), small(square);
  const Array<double> gram(square), inverse(square), scale(q);
  if (!is_padded) copy_rows(y, q, copy.get(), stride, d, q);
  const float* from = is_padded ? y : copy.get();
  float* to = is_padded ? out : result.get();
  const auto bound = [&](int64_t share, int64_t of) { return share == shares ? of : of * share / shares / 4 * 4; };
  run_in_parallel(shares, 1, shares, [&](int64_t, int64_t share) {  // rows of the Gram matrix, so that bits do not depend on the shares
    const int64_t begin = bound(share, q), end = bound(share + 1, q);
    multiply<float>({from + begin, 1, stride}, from, stride, small.get() + begin * stride, stride, end - begin, q, d);
  });
  for (int64_t i = 0; i < q; ++i) {
    const double norm = small[i * stride + i];
    scale[i] = norm > 0 ? 1 / std::sqrt(norm) : 1;
  }
  *deviation = 0;
  std::fill_n(gram.get(), square, 0.0);
  for (int64_t i = 0; i < q; ++i)
    for (int64_t j = 0; j < q; ++j) {
      const double cosine = scale[i] * small[i * stride + j] * scale[j];
      if (!std::isfinite(cosine)) return false;
      gram[i * stride + j] = cosine;
      *deviation = std::max(*deviation, std::abs(cosine - (i == j)));
    }
  if (!cholesky(gram.get(), q, stride)) return false;
  invert_upper(gram.get(), q, stride, inverse.get());
  for (int64_t i = 0; i < q; ++i)
    for (int64_t j = 0; j < stride; ++j) small[i * stride + j] = static_cast<float>(scale[i] * inverse[i * stride + j]);
  run_in_parallel(shares, 1, shares, [&](int64_t, int64_t share) {
    const int64_t begin = bound(share, d), end = bound(share + 1, d);
    multiply<float>({from + begin * stride, stride, 1}, small.get(), stride, to + begin * stride, stride, end - begin,
                    q, q);
  });
  if (!is_padded)
    for (int64_t j = 0; j < d; ++j) std::copy_n(to + j * stride, q, out + j * q);
  return true;
}

}  // namespace eva

#else

#include <stdexcept>

namespace eva {

bool has_refresh() { return false; }

void refresh(const std::vector<RefreshTask>&, const RefreshLimits&, uint8_t*, int) {
  throw std::logic_error("the compiled refresh is not part of this build");
}

bool cholesky_qr(const float*, int64_t, int64_t, float*, double*, int) {
  throw std::logic_error("the compiled Cholesky QR is not part of this build");
}

}  // namespace eva

#endif
