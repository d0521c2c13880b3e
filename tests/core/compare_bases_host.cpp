// Runs the device code of csrc/cuda/compare_bases_kernel.h on the host: every CUDA thread is a thread, several
// blocks run at once, and __syncthreads() is a barrier. Reads from stdin, writes to stdout, both raw:
//   in:  int64 sites, float64 tau, per site int64 rows, columns, previous_stride, current_stride, then the two
//        float32 matrices with their strides
//   out: the result memory of ComparisonPlan, after two launches on the same workspace that must agree
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#include "cuda/comparison_plan.h"

namespace {

constexpr int kBlocksAtOnce = 3;

class Barrier {
 public:
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const int phase = phase_;
    if (++waiting_ == eva::kThreads) {
      waiting_ = 0;
      ++phase_;
      changed_.notify_all();
    } else {
      changed_.wait(lock, [&] { return phase_ != phase; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int waiting_ = 0, phase_ = 0;
};

struct HostBlock {
  int32_t block;
  int lane;
  Barrier* barrier;
  int32_t index() const { return block; }
  int thread() const { return lane; }
  void sync() const {
#ifndef WITHOUT_BARRIERS
    barrier->wait();
#endif
  }
  uint32_t arrive(uint32_t* counter) const { return __atomic_fetch_add(counter, 1u, __ATOMIC_ACQ_REL); }
};

void launch(const eva::ComparisonArguments& args, int32_t blocks) {
  std::vector<std::thread> threads;
  std::vector<Barrier> barriers(kBlocksAtOnce);
  std::vector<eva::ComparisonShared> shared(kBlocksAtOnce);
  for (int slot = 0; slot < kBlocksAtOnce; ++slot)
    for (int lane = 0; lane < eva::kThreads; ++lane)
      threads.emplace_back([&, slot, lane] {
        for (int32_t block = slot; block < blocks; block += kBlocksAtOnce) {
          eva::compare_bases_block(HostBlock{block, lane, &barriers[slot]}, shared[slot], args);
          barriers[slot].wait();  // shared memory belongs to one block at a time
        }
      });
  for (std::thread& thread : threads) thread.join();
}

template <typename T>
std::vector<T> read(size_t count) {
  std::vector<T> values(count);
  if (std::fread(values.data(), sizeof(T), count, stdin) != count) std::abort();
  return values;
}

}  // namespace

int main() {
  const int64_t sites = read<int64_t>(1)[0];
  const double tau = read<double>(1)[0];
  std::vector<int64_t> rows, columns;
  std::vector<eva::BasisPair> pairs(sites);
  std::vector<std::vector<float>> matrices;
  for (eva::BasisPair& pair : pairs) {
    const std::vector<int64_t> shape = read<int64_t>(4);
    rows.push_back(shape[0]);
    columns.push_back(shape[1]);
    // Exactly what a matrix owns: the last row ends with its last column.
    matrices.push_back(read<float>((shape[0] - 1) * shape[2] + shape[1]));
    matrices.push_back(read<float>((shape[0] - 1) * shape[3] + shape[1]));
    pair = {matrices[matrices.size() - 2].data(), matrices.back().data(), shape[2], shape[3]};
  }
  const eva::ComparisonPlan plan(rows, columns);
  std::vector<eva::Partial> partials(plan.task_site.size());
  std::memset(partials.data(), 0xff, partials.size() * sizeof(eva::Partial));  // NaN where nothing is written
  std::vector<uint32_t> arrived(sites, 0);
  std::vector<double> memory[2];
  for (std::vector<double>& results : memory) {
    results.assign(plan.result_bytes() / sizeof(double) + 1, -1.0);
    eva::ComparisonArguments args{};
    args.pairs = pairs.data();
    args.sites = plan.sites.data();
    args.task_site = plan.task_site.data();
    args.partials = partials.data();
    args.arrived = arrived.data();
    args.tau = tau;
    plan.place_results(results.data(), args);
    launch(args, static_cast<int32_t>(plan.task_site.size()));
  }
  if (std::memcmp(memory[0].data(), memory[1].data(), plan.result_bytes()) != 0) {
    std::fprintf(stderr, "two launches differ\n");
    return 1;
  }
  std::fwrite(memory[0].data(), 1, plan.result_bytes(), stdout);
}
