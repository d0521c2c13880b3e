// Eigenpairs of a small symmetric matrix in float64, for the form that includes this.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "dense.h"
#include "memory.h"
#include "parallel.h"
#include "symmetric_eigen.h"

namespace eva::EVA_FORM {

constexpr int64_t kStepsPerValue = 60;
// What is left of a column has to be above it in squares to be reflected: twice its inverse is then a number. The largest
// entry is 1, so that entries below 1e-146 are given up.
constexpr double kVanishing = std::numeric_limits<double>::min() / std::numeric_limits<double>::epsilon();

inline int64_t aligned_below(int64_t index) { return index / kLanes<double> * kLanes<double>; }

// out = Σ_i x(i) · row i, for the rows and columns from `first` on of a symmetric matrix, so its product with x.
EVA_TARGET inline void multiply_symmetric(const double* matrix, int64_t stride, int64_t n, int64_t first, const double* x,
                                   double* out) {
  using R = Register<double>;
  for (int64_t j = first / (2 * kLanes<double>) * (2 * kLanes<double>); j < stride; j += 2 * kLanes<double>) {
    R::Type low = R::zero(), high = R::zero();
    for (int64_t i = first; i < n; ++i) {
      const R::Type factor = R::all(x[i]);
      low = R::fma(factor, R::load(matrix + i * stride + j), low);
      high = R::fma(factor, R::load(matrix + i * stride + j + kLanes<double>), high);
    }
    R::store(out + j, low);
    R::store(out + j + kLanes<double>, high);
  }
}

// Householder reflections I − β v vᵀ from both sides bring the matrix to the tridiagonal (diagonal, beside). Row k of
// the matrix then holds v of the reflection that cleared it, in the columns from k + 1 on.
EVA_TARGET inline void tridiagonalize(double* matrix, int64_t n, int64_t stride, double* diagonal, double* beside,
                               double* beta, double* product) {
  for (int64_t k = 0; k < n; ++k) {
    double* v = matrix + k * stride;
    diagonal[k] = v[k];
    beta[k] = beside[k] = 0;
    if (k + 1 == n) break;
    const int64_t first = k + 1, start = aligned_below(first);
    const double head = v[first];
    std::fill(v + start, v + first + 1, 0.0);  // so that whole registers can be taken
    const double rest = dot(v, v, start, stride);
    beside[k] = head;
    if (!(rest > kVanishing)) continue;
    const double norm = std::sqrt(head * head + rest);
    beside[k] = head > 0 ? -norm : norm;
    v[first] = head - beside[k];
    beta[k] = 2 / (rest + v[first] * v[first]);
    multiply_symmetric(matrix, stride, n, first, v, product);
    std::fill(product + start, product + first, 0.0);
    // With p = β A v the matrix becomes A − v wᵀ − w vᵀ, w = p − ½ β (pᵀ v) v.
    const double half = -0.5 * beta[k] * (beta[k] * dot(product, v, start, stride));  // β² alone may overflow
    for (int64_t j = start; j < stride; ++j) product[j] = beta[k] * product[j] + half * v[j];
    for (int64_t i = first; i < n; ++i) {
      using R = Register<double>;
      const R::Type of_w = R::all(-v[i]), of_v = R::all(-product[i]);
      double* row = matrix + i * stride;
      for (int64_t j = start; j < stride; j += kLanes<double>)
        R::store(row + j, R::fma(of_w, R::load(product + j), R::fma(of_v, R::load(v + j), R::load(row + j))));
    }
  }
}

// rows = the transpose of the product of the reflections.
EVA_TARGET inline void gather_reflections(const double* matrix, int64_t n, int64_t stride, const double* beta, double* rows) {
  std::fill_n(rows, n * stride, 0.0);
  for (int64_t i = 0; i < n; ++i) rows[i * stride + i] = 1;
  for (int64_t k = n - 2; k >= 0; --k) {
    if (beta[k] == 0) continue;
    const double* v = matrix + k * stride;  // zero before k + 1 in its first register
    const int64_t start = aligned_below(k + 1);
    for (int64_t i = k + 1; i < n; ++i) {
      double* row = rows + i * stride;
      add_scaled(-beta[k] * dot(row, v, start, stride), v, row, start, stride);
    }
  }
}

// (upper, lower) becomes (c · upper − s · lower, s · upper + c · lower).
EVA_TARGET inline void rotate(double* upper, double* lower, int64_t stride, double cosine, double sine) {
  using R = Register<double>;
  const R::Type c = R::all(cosine), s = R::all(sine), minus_s = R::all(-sine);
  for (int64_t j = 0; j < stride; j += kLanes<double>) {
    const R::Type x = R::load(upper + j), y = R::load(lower + j);
    R::store(upper + j, R::fma(c, x, R::mul(minus_s, y)));
    R::store(lower + j, R::fma(s, x, R::mul(c, y)));
  }
}

// QL steps with Wilkinson's shift (Golub & Van Loan, Matrix Computations, 8.3) until the tridiagonal is diagonal up to
// rounding of the matrix it came from, whose largest entry is 1; their rotations are applied to the rows.
EVA_TARGET inline bool diagonalize(double* diagonal, double* beside, int64_t n, double* rows, int64_t stride) {
  constexpr double kEpsilon = std::numeric_limits<double>::epsilon();
  for (int64_t first = 0; first < n; ++first) {
    for (int64_t step = 0;; ++step) {
      int64_t last = first;
      while (last + 1 < n &&
             !(std::abs(beside[last]) <= kEpsilon * (std::abs(diagonal[last]) + std::abs(diagonal[last + 1]) + 1)))
        ++last;
      if (last == first) break;
      if (step == kStepsPerValue) return false;
      const double half_gap = (diagonal[first + 1] - diagonal[first]) / (2 * beside[first]);
      const double length = std::hypot(half_gap, 1.0);
      double bulge = diagonal[last] - diagonal[first] + beside[first] / (half_gap + std::copysign(length, half_gap));
      double cosine = 1, sine = 1, moved = 0;
      int64_t i = last - 1;
      for (; i >= first; --i) {
        const double across = sine * beside[i], along = cosine * beside[i];
        const double norm = std::sqrt(across * across + bulge * bulge);
        beside[i + 1] = norm;
        if (norm == 0) {  // it has come apart: the rest is a matrix of its own
          diagonal[i + 1] -= moved;
          beside[last] = 0;
          break;
        }
        const double inverse = 1 / norm;
        sine = across * inverse;
        cosine = bulge * inverse;
        const double shifted = diagonal[i + 1] - moved;
        const double turned = (diagonal[i] - shifted) * sine + 2 * cosine * along;
        moved = sine * turned;
        diagonal[i + 1] = shifted + moved;
        bulge = cosine * turned - along;
        // One step of this chain waits for the one before; rotating the rows fills the time.
        rotate(rows + i * stride, rows + (i + 1) * stride, stride, cosine, sine);
      }
      if (i >= first) continue;
      diagonal[first] -= moved;
      beside[first] = bulge;
      beside[last] = 0;
    }
  }
  return true;
}

// Destroys `matrix`, (n, stride) row-major, rows padded with zeros. `values` (n) come descending, row i of `vectors`
// (n, stride) is the unit eigenvector of values[i]. `scratch` holds (n + 4) · stride doubles. False where something is
// not finite or the iteration does not converge.
inline bool symmetric_eigen(double* matrix, int64_t n, int64_t stride, double* values, double* vectors, double* scratch) {
  double *rows = scratch, *diagonal = rows + n * stride;
  double *beside = diagonal + stride, *beta = beside + stride, *product = beta + stride;
  double largest = 0;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) {
      if (!std::isfinite(matrix[i * stride + j])) return false;
      largest = std::max(largest, std::abs(matrix[i * stride + j]));
    }
  const double unit = largest > 0 ? largest : 1;  // squares of entries neither overflow nor vanish
  for (int64_t i = 0; i < n * stride; ++i) matrix[i] /= unit;
  tridiagonalize(matrix, n, stride, diagonal, beside, beta, product);
  gather_reflections(matrix, n, stride, beta, rows);
  if (!diagonalize(diagonal, beside, n, rows, stride)) return false;
  if (!std::all_of(diagonal, diagonal + n, [](double value) { return std::isfinite(value); })) return false;
  int64_t* order = reinterpret_cast<int64_t*>(beta);
  std::iota(order, order + n, 0);
  std::sort(order, order + n, [&](int64_t a, int64_t b) { return diagonal[a] > diagonal[b]; });
  for (int64_t i = 0; i < n; ++i) {
    values[i] = unit * diagonal[order[i]];
    std::copy_n(rows + order[i] * stride, stride, vectors + i * stride);
  }
  return true;
}

inline void symmetric_eigen_of_all(const double* matrices, int64_t batch, int64_t n, double* values, double* vectors,
                            uint8_t* solved, int threads) {
  const int64_t stride = padded(n), square = n * stride, shares = std::clamp<int64_t>(batch, 1, std::max(threads, 1));
  std::vector<Array<double>> memory;
  for (int64_t share = 0; share < shares; ++share) memory.emplace_back(3 * square + 4 * stride);
  run_in_parallel(shares, 1, shares, [&](int64_t, int64_t share) {
    double *matrix = memory[share].get(), *rows = matrix + square, *scratch = rows + square;
    for (int64_t b = share; b < batch; b += shares) {
      std::fill_n(matrix, square, 0.0);
      for (int64_t i = 0; i < n; ++i) std::copy_n(matrices + (b * n + i) * n, n, matrix + i * stride);
      solved[b] = symmetric_eigen(matrix, n, stride, values + b * n, rows, scratch);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t k = 0; k < n; ++k) vectors[(b * n + k) * n + i] = rows[i * stride + k];
    }
  });
}

}  // namespace eva::EVA_FORM
