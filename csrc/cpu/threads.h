// Work shared out to threads.
#pragma once

#include <cstdint>
#include <functional>

namespace eva {

// Runs work(0) … work(shares − 1), on the threads of the GNU OpenMP runtime where the process has one. PyTorch brings
// one, whose idle threads spin for a while after its own work: threads of ours would compete with them for the cores.
// `work` must not throw.
void run_in_parallel(int64_t shares, const std::function<void(int64_t)>& work);

}  // namespace eva
