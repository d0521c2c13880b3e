// Work for the threads of PyTorch.
#pragma once

#include <cstdint>
#include <functional>

namespace eva {

// Runs work(step, share) for all shares, one step after the other, on the threads of the GNU OpenMP runtime where the
// process has one. PyTorch brings one, whose idle threads spin for a while after its own work: threads of ours would
// compete with them for the cores. `work` may not throw.
void run_in_parallel(int64_t threads, int64_t steps, int64_t shares,
                     const std::function<void(int64_t step, int64_t share)>& work);

}  // namespace eva
