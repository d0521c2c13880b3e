// Comparison of the bases of all sites on a CUDA device. No CUDA header is needed to use it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace eva {

struct ComparisonResult {
  std::vector<double> cosines, overlaps, norms;                   // (sites, width)
  std::vector<int32_t> components_converged, subspace_converged;  // (sites)
};

// Holds the device memory for bases of fixed shapes; not thread-safe. Errors of CUDA are std::runtime_error.
class BasisComparison {
 public:
  // rows, columns: (sites) shapes of the bases, at most 512 columns. device: CUDA's number of it.
  BasisComparison(const std::vector<int64_t>& rows, const std::vector<int64_t>& columns, double tau, int device);
  ~BasisComparison();

  // Enqueues the comparison and the copy of its result on `stream` and returns. previous, current: (sites)
  // device addresses of float32 matrices; strides between rows, in floats. What they point to must stay
  // until the work on the stream is done.
  void launch(const std::vector<uint64_t>& previous, const std::vector<int64_t>& previous_strides,
              const std::vector<uint64_t>& current, const std::vector<int64_t>& current_strides, uint64_t stream);
  bool ready() const;         // whether result() would return at once
  ComparisonResult result();  // waits for the last launch, not for later work on its stream
  int64_t sites() const;
  int64_t width() const;

 private:
  struct Resources;
  std::unique_ptr<Resources> resources_;
};

// Number of usable CUDA devices; where there is none, `why` says what CUDA says.
int cuda_device_count(std::string* why);
// CUDA's version numbers, major * 1000 + minor * 10; the driver's is 0 where there is none.
int cuda_runtime_version();
int cuda_driver_version();

}  // namespace eva
