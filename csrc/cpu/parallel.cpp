#include "parallel.h"

#include <dlfcn.h>

#include <thread>
#include <vector>

namespace eva {

void run_in_parallel(int64_t threads, int64_t steps, int64_t shares,
                     const std::function<void(int64_t, int64_t)>& work) {
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  using Query = int (*)();
  using Barrier = void (*)();
  static const auto parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  static const auto barrier = reinterpret_cast<Barrier>(dlsym(RTLD_DEFAULT, "GOMP_barrier"));
  static const auto thread_number = reinterpret_cast<Query>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
  static const auto team_size = reinterpret_cast<Query>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
  if (threads > 1 && parallel && barrier && thread_number && team_size) {
    struct Task {
      int64_t steps, shares;
      const std::function<void(int64_t, int64_t)>& work;
    } task{steps, shares, work};
    const auto member = [](void* data) {
      const Task& task = *static_cast<Task*>(data);
      for (int64_t step = 0; step < task.steps; ++step) {
        if (step > 0) barrier();
        for (int64_t share = thread_number(); share < task.shares; share += team_size()) task.work(step, share);
      }
    };
    return parallel(member, &task, static_cast<unsigned>(threads), 0);
  }
  for (int64_t step = 0; step < steps; ++step) {
    const auto member = [&](int64_t thread) {
      for (int64_t share = thread; share < shares; share += threads) work(step, share);
    };
    std::vector<std::thread> others;
    for (int64_t thread = 1; thread < threads; ++thread) others.emplace_back(member, thread);
    member(0);
    for (std::thread& other : others) other.join();
  }
}

}  // namespace eva
