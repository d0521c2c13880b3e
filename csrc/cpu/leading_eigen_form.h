// The leading eigenpairs of a small symmetric matrix in float64, for the form that includes this.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "dense.h"
#include "memory.h"
#include "parallel.h"
#include "symmetric_eigen.h"
#include "symmetric_eigen_form.h"

namespace eva::EVA_FORM {

constexpr int64_t kPoints = 24;      // that eigenvalues are counted below at a time: divisions wait for none of them
constexpr int64_t kHalvings = 54;    // of the interval that holds all eigenvalues: what is left is rounding
constexpr int64_t kSolves = 2;       // each brings a vector nearer by the distance to its shift over that to others
constexpr double kResidual = 1e-11;  // of the norm: larger ones, and it is not solved

// A symmetric tridiagonal matrix.
struct Tridiagonal {
  const double* diagonal;  // (n)
  const double* beside;    // (n), the last of them unused
  int64_t n;
  double norm;             // no eigenvalue is larger

  double times(const double* x, int64_t i) const {  // entry i of the product
    double sum = diagonal[i] * x[i];
    if (i > 0) sum += beside[i - 1] * x[i - 1];
    if (i + 1 < n) sum += beside[i] * x[i + 1];
    return sum;
  }
};

// How many eigenvalues are below each point: the signs of the pivots of T − x I (Golub & Van Loan, Matrix Computations,
// 8.4).
EVA_TARGET inline std::array<int64_t, kPoints> count_below(const Tridiagonal& matrix,
                                                           const std::array<double, kPoints>& points) {
  const double least = std::numeric_limits<double>::epsilon() * matrix.norm + std::numeric_limits<double>::min();
  std::array<int64_t, kPoints> below{};
  double pivot[kPoints];
  std::fill_n(pivot, kPoints, 1.0);
  for (int64_t i = 0; i < matrix.n; ++i) {
    const double along = matrix.diagonal[i], across = i > 0 ? matrix.beside[i - 1] * matrix.beside[i - 1] : 0;
    for (int64_t p = 0; p < kPoints; ++p) {
      const double next = along - points[p] - across / pivot[p];
      pivot[p] = std::abs(next) < least ? -least : next;
      below[p] += pivot[p] < 0;
    }
  }
  return below;
}

// The `count` largest eigenvalues, descending, to a rounding of the interval that holds all.
inline void bisect(const Tridiagonal& matrix, int64_t count, double* values) {
  for (int64_t first = 0; first < count; first += kPoints) {
    std::array<double, kPoints> low, high, middle;
    low.fill(-matrix.norm), high.fill(matrix.norm);
    for (int64_t step = 0; step < kHalvings; ++step) {
      for (int64_t p = 0; p < kPoints; ++p) middle[p] = 0.5 * (low[p] + high[p]);
      const std::array<int64_t, kPoints> below = count_below(matrix, middle);
      for (int64_t p = 0; p < kPoints; ++p) (below[p] >= matrix.n - first - p ? high : low)[p] = middle[p];
    }
    for (int64_t p = 0; p < std::min(kPoints, count - first); ++p) values[first + p] = 0.5 * (low[p] + high[p]);
  }
}

// T − shift I as a product of a lower triangle, rows exchanged, and an upper one of three diagonals; no pivot is zero.
class Factors {
 public:
  explicit Factors(int64_t n) : n_(n), steps_(n) {}

  void factor(const Tridiagonal& matrix, double shift) {
    const double least = std::numeric_limits<double>::epsilon() * matrix.norm;
    const auto away_from_zero = [&](double x) { return std::abs(x) < least ? std::copysign(least, x) : x; };
    double along = matrix.diagonal[0] - shift, across = n_ > 1 ? matrix.beside[0] : 0;
    for (int64_t i = 0; i + 1 < n_; ++i) {
      const double below = matrix.beside[i], next = matrix.diagonal[i + 1] - shift;
      const double beyond = i + 2 < n_ ? matrix.beside[i + 1] : 0;
      Step& step = steps_[i];
      step.exchanged = std::abs(below) > std::abs(along);
      if (step.exchanged) {
        step = {along / below, 1 / below, next, beyond, true};
        along = across - step.factor * next, across = -step.factor * beyond;
      } else {
        along = away_from_zero(along);
        step = {below / along, 1 / along, across, 0, false};
        along = next - step.factor * across, across = beyond;
      }
    }
    steps_[n_ - 1] = {0, 1 / away_from_zero(along), 0, 0, false};
  }

  void solve(double* x) const {
    for (int64_t i = 0; i + 1 < n_; ++i) {
      if (steps_[i].exchanged) std::swap(x[i], x[i + 1]);
      x[i + 1] -= steps_[i].factor * x[i];
    }
    double after = 0, beyond = 0;
    for (int64_t i = n_ - 1; i >= 0; --i) {
      x[i] = (x[i] - steps_[i].first * after - steps_[i].second * beyond) * steps_[i].inverse;
      beyond = after, after = x[i];
    }
  }

 private:
  struct Step {
    double factor, inverse, first, second;  // of the lower triangle; of the pivot; what stands right of it
    bool exchanged;
  };
  int64_t n_;
  std::vector<Step> steps_;
};

// Inverse iteration, each vector made orthogonal to those before, which are as many as may be near it. `vectors` are rows
// (count, stride). Shifts become Rayleigh quotients. False where one is no eigenvector in the end.
EVA_TARGET inline bool iterate(const Tridiagonal& matrix, int64_t count, double* values, double* vectors,
                               int64_t stride, Factors& factors) {
  uint64_t drawn = 1;
  for (int64_t k = 0; k < count; ++k) {
    double* x = vectors + k * stride;
    std::fill_n(x, stride, 0.0);
    for (int64_t i = 0; i < matrix.n; ++i) {
      drawn = drawn * 6364136223846793005u + 1442695040888963407u;  // Knuth's
      x[i] = static_cast<double>(drawn >> 11) * 0x1p-53 - 0.5;
    }
    factors.factor(matrix, values[k]);
    for (int64_t solve = 0; solve < kSolves; ++solve) {
      factors.solve(x);
      for (int64_t again = 0; again < 2; ++again) {
        const double length = std::sqrt(dot(x, x, 0, stride));
        if (!(length > 0) || !std::isfinite(length)) return false;
        for (int64_t j = 0; j < stride; ++j) x[j] /= length;
        for (int64_t before = 0; before < k; ++before) {
          const double* other = vectors + before * stride;
          add_scaled(-dot(x, other, 0, stride), other, x, 0, stride);
        }
      }
      const double length = std::sqrt(dot(x, x, 0, stride));
      if (!(length > 0.5)) return false;  // what the second time took was more than rounding
      for (int64_t j = 0; j < stride; ++j) x[j] /= length;
    }
    double value = 0, worst = 0;
    for (int64_t i = 0; i < matrix.n; ++i) value += x[i] * matrix.times(x, i);
    for (int64_t i = 0; i < matrix.n; ++i) worst = std::max(worst, std::abs(matrix.times(x, i) - value * x[i]));
    if (!(worst <= kResidual * matrix.norm)) return false;
    values[k] = value;
  }
  return true;
}

// Destroys `matrix`, (n, stride) row-major, rows padded with zeros. Row i of `vectors` (count, stride) is the unit
// eigenvector of values[i]. `scratch` holds 4 · stride doubles.
EVA_TARGET inline bool leading_eigen(double* matrix, int64_t n, int64_t stride, int64_t count, double* values,
                                     double* vectors, double* scratch, Factors& factors) {
  double *diagonal = scratch, *beside = diagonal + stride, *beta = beside + stride, *product = beta + stride;
  double largest = 0;
  for (int64_t i = 0; i < n * stride; ++i) {
    if (!std::isfinite(matrix[i])) return false;
    largest = std::max(largest, std::abs(matrix[i]));
  }
  const double unit = largest > 0 ? largest : 1;  // squares of entries neither overflow nor vanish
  for (int64_t i = 0; i < n * stride; ++i) matrix[i] /= unit;
  tridiagonalize(matrix, n, stride, diagonal, beside, beta, product);
  double norm = std::numeric_limits<double>::min();
  for (int64_t i = 0; i < n; ++i)
    norm = std::max(norm, std::abs(diagonal[i]) + std::abs(beside[i]) + (i > 0 ? std::abs(beside[i - 1]) : 0));
  const Tridiagonal tridiagonal{diagonal, beside, n, norm * (1 + 1e-14)};
  bisect(tridiagonal, count, values);
  if (!iterate(tridiagonal, count, values, vectors, stride, factors)) return false;
  for (int64_t i = 0; i < count; ++i) {
    double* row = vectors + i * stride;
    for (int64_t k = n - 2; k >= 0; --k)
      if (beta[k] != 0) {
        const double* v = matrix + k * stride;  // zero before k + 1 in its first register
        const int64_t start = aligned_below(k + 1);
        add_scaled(-beta[k] * dot(row, v, start, stride), v, row, start, stride);
      }
    values[i] *= unit;
  }
  return true;
}

inline void leading_eigen_of_all(const double* matrices, int64_t batch, int64_t n, int64_t count, double* values,
                                 double* vectors, uint8_t* solved, int threads) {
  const int64_t stride = padded(n), shares = std::clamp<int64_t>(batch, 1, std::max(threads, 1));
  std::vector<Array<double>> memory;
  std::vector<Factors> factors(shares, Factors(n));
  for (int64_t share = 0; share < shares; ++share) memory.emplace_back((n + count + 4) * stride);
  run_in_parallel(shares, 1, shares, [&](int64_t, int64_t share) {
    double *matrix = memory[share].get(), *rows = matrix + n * stride, *scratch = rows + count * stride;
    for (int64_t b = share; b < batch; b += shares) {
      const double* from = matrices + b * n * n;
      std::fill_n(matrix, n * stride, 0.0);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j <= i; ++j) matrix[i * stride + j] = matrix[j * stride + i] = from[i * n + j];
      solved[b] = leading_eigen(matrix, n, stride, count, values + b * count, rows, scratch, factors[share]);
      for (int64_t i = 0; i < count; ++i) std::copy_n(rows + i * stride, n, vectors + (b * count + i) * n);
    }
  });
}

}  // namespace eva::EVA_FORM
