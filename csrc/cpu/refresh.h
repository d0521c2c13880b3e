// The Nyström extraction of eva_kernels.streaming_svd.refresh for AVX-512: one statistic a thread.
#pragma once

#include <cstdint>
#include <vector>

namespace eva {

// Whether this build has the extraction and this processor its instructions.
bool has_refresh();

// Constants of eva_kernels.streaming_svd.refresh, where they are explained.
struct RefreshLimits {
  double jitter, alignment, orthogonal;
};

// One statistic; all arrays dense and row-major. The scatter's product with the sample Ω is
// Y = image + Q Λ (Qᵀ Ω) + Σ_t weights(t) · directions(t) (directions(t)ᵀ Ω).
struct RefreshTask {
  int64_t d, q;
  const float* sample;         // (d, q), Ω
  float* image;                // (d, q); cleared where there is a basis of the past and all went well
  const float* basis;          // (d, q), Q, or null where the image holds all rows
  const double* eigenvalues;   // (q), Λ
  const float* directions;     // (2, d)
  const float* weights;        // (2)
  float* new_basis;            // (d, q)
  float* rounded_basis;        // (d, q), the same rounded to bfloat16, or null
  double* new_eigenvalues;     // (q), descending
  double* cosines;             // (q), |cosine| of each new component to the sample's
  double* overlaps;            // (q), ‖(Ωᵀ Q′)₁..ᵢ‖²_F
};

// Tasks of one d and q. Sets solved[i] to 1 where task i went well, else to 0: something is not finite, ΩᵀY not
// positive definite or the spectrum too steep, and the output is indeterminate. Requires has_refresh(). Results do not
// depend on `threads`.
void refresh(const std::vector<RefreshTask>& tasks, const RefreshLimits& limits, uint8_t* solved, int threads);

// One pass of Cholesky QR over y (d, q), unit columns inside the q × q matrix. Returns whether it could be done;
// `deviation` is the largest |cosine| between columns that there was. Requires has_refresh().
bool cholesky_qr(const float* y, int64_t d, int64_t q, float* out, double* deviation, int threads);

}  // namespace eva
