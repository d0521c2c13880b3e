// Eigenpairs of a small symmetric matrix in float64, for AVX-512.
#pragma once

#include <cstdint>

namespace eva {

// Destroys `matrix`, (n, stride) row-major, rows padded with zeros. `values` (n) come descending, row i of `vectors`
// (n, stride) is the unit eigenvector of values[i]. `scratch` holds (n + 4) · stride doubles. False where something is
// not finite or the iteration does not converge.
bool symmetric_eigen(double* matrix, int64_t n, int64_t stride, double* values, double* vectors, double* scratch);

// Many of them: matrices (batch, n, n) are left as they are, eigenvectors are the columns of `vectors` (batch, n, n).
// Sets solved[i] to 1 where matrix i went well, else to 0. Requires has_refresh().
void symmetric_eigen_of_all(const double* matrices, int64_t batch, int64_t n, double* values, double* vectors,
                            uint8_t* solved, int threads);

}  // namespace eva
