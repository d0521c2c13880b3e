#include "threads.h"

#include <dlfcn.h>

#include <thread>
#include <vector>

namespace eva {

void run_in_parallel(int64_t shares, const std::function<void(int64_t)>& work) {
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  using Query = int (*)();
  static const auto parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  static const auto thread_number = reinterpret_cast<Query>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
  static const auto team_size = reinterpret_cast<Query>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
  if (shares == 1) return work(0);
  if (parallel && thread_number && team_size) {
    struct Task {
      int64_t shares;
      const std::function<void(int64_t)>& work;
    } task{shares, work};
    const auto member = [](void* data) {
      const Task& task = *static_cast<Task*>(data);
      for (int64_t share = thread_number(); share < task.shares; share += team_size()) task.work(share);
    };
    return parallel(member, &task, static_cast<unsigned>(shares), 0);
  }
  std::vector<std::thread> others;
  for (int64_t share = 1; share < shares; ++share) others.emplace_back(work, share);
  work(0);
  for (std::thread& other : others) other.join();
}

}  // namespace eva
