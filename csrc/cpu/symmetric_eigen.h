// Eigenpairs of small symmetric matrices in float64.
#pragma once

#include <cstdint>

namespace eva {

// Matrices (batch, n, n) are left as they are. `values` (batch, n) come descending, eigenvectors are the columns of
// `vectors` (batch, n, n). Sets solved[i] to 1 where matrix i went well, else to 0: something is not finite, or the
// iteration does not converge.
using SymmetricEigen = void(const double* matrices, int64_t batch, int64_t n, double* values, double* vectors,
                            uint8_t* solved, int threads);

// The same of the `count` largest eigenvalues alone, from the matrices' lower triangles; `values` (batch, count),
// eigenvectors are the rows of `vectors` (batch, count, n). solved[i] is 0 as well where what was found does not hold.
using LeadingEigen = void(const double* matrices, int64_t batch, int64_t n, int64_t count, double* values,
                          double* vectors, uint8_t* solved, int threads);

}  // namespace eva
