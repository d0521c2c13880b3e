// The other half of a symmetric matrix.
#pragma once

#include <algorithm>
#include <cstdint>

namespace eva {

// Copies what is below the diagonal of a dense matrix (d, d) to above it, in blocks that are read and written in whole
// cache lines.
inline void mirror_triangle(float* matrix, int64_t d) {
  constexpr int64_t kBlock = 32;
  for (int64_t top = 0; top < d; top += kBlock)
    for (int64_t left = 0; left <= top; left += kBlock)
      for (int64_t j = left; j < std::min(left + kBlock, d); ++j)
        for (int64_t i = std::max(top, j + 1); i < std::min(top + kBlock, d); ++i) matrix[j * d + i] = matrix[i * d + j];
}

}  // namespace eva
