// Trackers and allocators as several threads use them, for the sanitizers: one tracker that all threads update,
// query, save and restore at once, and allocators over random demands with memory of just the size they may read.
#include <cstdio>
#include <numeric>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "tracker.h"

namespace {

using Random = std::mt19937_64;

int64_t uniform(Random& random, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}

std::vector<double> numbers(Random& random, size_t count) {
  std::vector<double> values(count);
  for (double& value : values) value = std::uniform_real_distribution<double>(0.0, 1.0)(random);
  return values;
}

bool shared_tracker() {
  constexpr int kSites = 40, kColumns = 24, kUpdates = 50, kThreads = 4;
  eva::Demands demands;
  demands.candidates.assign(kSites, kColumns);
  demands.budget = kSites * kColumns / 2;
  eva::Tracker tracker(demands, 0.5, eva::Criterion::kSubspace);
  std::vector<std::thread> threads;
  std::vector<int> wrong(kThreads, 0);
  for (int t = 0; t < kThreads; ++t)
    threads.emplace_back([&, t] {
      Random random(t);
      for (int u = 0; u < kUpdates; ++u) {
        const auto evidence = numbers(random, kSites * kColumns), ratios = numbers(random, kSites * kColumns);
        tracker.update(evidence.data(), kColumns, ratios.data(), kColumns, nullptr);
        const auto ranks = tracker.decision().ranks;
        wrong[t] += std::accumulate(ranks.begin(), ranks.end(), int64_t{0}) != demands.budget;
        tracker.restore(tracker.state());
      }
    });
  for (std::thread& thread : threads) thread.join();
  return std::accumulate(wrong.begin(), wrong.end(), 0) == 0;
}

bool random_demands() {
  Random random(1);
  int feasible = 0;
  for (int trial = 0; trial < 3000; ++trial) {
    const int64_t sites = uniform(random, 1, 12);
    eva::Demands demands;
    int64_t room = 0;
    for (int64_t i = 0; i < sites; ++i) {
      demands.candidates.push_back(uniform(random, 0, 20));
      demands.divisors.push_back(uniform(random, 1, 4));
      demands.groups.push_back(uniform(random, 0, sites - 1));
      room += demands.candidates.back();
    }
    demands.budget = uniform(random, 0, room);
    demands.min_rank = uniform(random, 0, 2);
    if (trial % 2) demands.max_rank = uniform(random, 1, 20);
    demands.rank_multiple = uniform(random, 1, 3);
    try {
      eva::Allocator allocator(demands);
      const auto ratios = numbers(random, sites * allocator.columns());
      std::vector<int64_t> ranks(sites);
      allocator.allocate(ratios.data(), allocator.columns(), ranks.data());
      ++feasible;
      if (std::accumulate(ranks.begin(), ranks.end(), int64_t{0}) > demands.budget) return false;
    } catch (const std::invalid_argument&) {
    }
  }
  return feasible > 500;
}

}  // namespace

int main() {
  if (shared_tracker() && random_demands()) return 0;
  std::fprintf(stderr, "a budget was not kept\n");
  return 1;
}
