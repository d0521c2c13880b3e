// Which components have converged, how the rank budget falls now, which sites are done and which reopen,
// over all sites at once. The rules are stated in eva_kernels/convergence/README.md.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#include "allocation.h"

namespace eva {

// What is compared with tau, and so which array of evidence an update reads.
enum class Criterion {
  kComponent,  // |cosine| of each component to its predecessor
  kSubspace,   // squared overlap of each leading block with its predecessor
  kCaptured,   // relative gain of captured variance of each leading block
};

struct Decision {
  std::vector<int64_t> ranks, components_converged;  // (S)
  std::vector<uint8_t> done, reopened;               // (S) booleans
};

// Everything that changes from one update to the next.
struct TrackerState {
  std::vector<double> ratios;      // (S, columns) of each site's last refresh
  std::vector<uint8_t> streaks;    // (S, columns) refreshes in a row at which the leading block passed
  std::vector<int64_t> refreshes;  // (S)
  std::vector<int64_t> latched;    // (S) components converged while done, -1: not done
};

// Every method may be called from any thread.
class Tracker {
 public:
  // tau in [0, 1]. Throws std::invalid_argument where the demands cannot be met.
  Tracker(const Demands& demands, double tau, Criterion criterion);

  int64_t sites() const { return allocator_.sites(); }
  int64_t columns() const { return allocator_.columns(); }

  // evidence: (S, evidence_stride), ratios: (S, ratios_stride), updated: (S) or null for all. Of row i the
  // first upper()[i] entries are read, and none where updated[i] is false; evidence of a site's first
  // refresh is not read. Throws std::invalid_argument, and changes nothing, for a number that is not finite.
  Decision update(const double* evidence, int64_t evidence_stride, const double* ratios, int64_t ratios_stride,
                  const uint8_t* updated);
  Decision decision();  // as it stands, without new evidence

  TrackerState state();
  void restore(const TrackerState& state);  // sizes as state() gives them

 private:
  bool passes(double evidence, int64_t block) const;
  bool settled(int64_t site, int64_t rank) const;
  int64_t components_converged(int64_t site) const;
  Decision decide();

  std::mutex mutex_;
  Allocator allocator_;
  const double tau_;
  const Criterion criterion_;
  const uint8_t needed_;  // length of the streak after which a block counts as converged
  std::vector<int64_t> uniform_;
  TrackerState state_;
};

}  // namespace eva
