// The Nyström extraction of eva_kernels.streaming_svd.refresh: one statistic a thread.
#pragma once

#include <cstdint>
#include <vector>

namespace eva {

// Constants of eva_kernels.streaming_svd.refresh, where they are explained.
struct RefreshLimits {
  double jitter, alignment, symmetry, orthogonal, rank, growth, span_jitter;
  int power_steps;
};

// One statistic; all arrays dense and row-major. Its scatter is
// Q Λ Qᵀ + v vᵀ + the Nyström approximation from Ω and Y = image − u (uᵀ Ω).
struct RefreshTask {
  int64_t d, q;
  const float* sample;        // (d, q), Ω
  float* image;               // (d, q)
  const float* basis;         // (d, q), Q
  const double* eigenvalues;  // (q), Λ
  const float* means;         // (2, d), u and v
  bool summarises;            // whether the image is spent once all went well: it is then cleared
  float* new_basis;           // (d, q)
  float* rounded_basis;       // (d, q), the same rounded to bfloat16, or null
  double* new_eigenvalues;    // (q), descending
  double* cosines;            // (q), |cosine| of each new component to the one before
  double* overlaps;           // (q), ‖(QᵀQ′)₁..ᵢ‖²_F
};

// Tasks of one d and q. Sets solved[i] to 1 where task i went well, else to 0: something is not finite, ΩᵀY not
// positive definite or of lower rank than q, and the output is indeterminate. Results do not depend on `threads`.
using Refresh = void(const std::vector<RefreshTask>& tasks, const RefreshLimits& limits, uint8_t* solved, int threads);

// One pass of Cholesky QR over y (d, q), or its transpose, in double precision, rounded once; unit columns inside the
// q × q matrix. `out` may be y as it is. With R the Cholesky factor, kAgain says that a column of |R⁻¹| sums to more than
// `growth`: `out` then wants another pass. kNever: there is no factor, and nothing is written.
enum class Orthonormal { kDone, kAgain, kNever };
using CholeskyQr = Orthonormal(const float* y, bool transposed, int64_t d, int64_t q, float* out, double growth,
                               int threads);

}  // namespace eva
