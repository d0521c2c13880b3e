#include "compare_bases.h"

#include <cuda_runtime.h>

#include <cstring>
#include <stdexcept>

#include "comparison_plan.h"

namespace eva {
namespace {

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(status));
}

struct DeviceBlock {
  __device__ int32_t index() const { return static_cast<int32_t>(blockIdx.x); }
  __device__ int thread() const { return static_cast<int>(threadIdx.x); }
  __device__ void sync() const { __syncthreads(); }
  // The barrier before it orders the block's writes before thread 0's fence, which is cumulative.
  __device__ uint32_t arrive(uint32_t* counter) const {
    __threadfence();
    const uint32_t before = atomicAdd(counter, 1u);
    __threadfence();
    return before;
  }
};

__global__ void __launch_bounds__(kThreads) _compare_bases_kernel(const ComparisonArguments args) {
  __shared__ ComparisonShared shared;
  compare_bases_block(DeviceBlock{}, shared, args);
}

// Makes a device current for a scope, as the caller's own choice must survive.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~OnDevice() { cudaSetDevice(before_); }

 private:
  int before_ = 0;
};

struct FreeDevice {
  void operator()(void* p) const { cudaFree(p); }
};
struct FreePinned {
  void operator()(void* p) const { cudaFreeHost(p); }
};
template <typename T>
using Device = std::unique_ptr<T[], FreeDevice>;
template <typename T>
using Pinned = std::unique_ptr<T[], FreePinned>;

template <typename T>
Device<T> on_device(size_t count) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, count * sizeof(T)), "cudaMalloc");
  return Device<T>(static_cast<T*>(memory));
}

template <typename T>
Device<T> on_device(const std::vector<T>& values) {
  Device<T> memory = on_device<T>(values.size());
  check(cudaMemcpy(memory.get(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  return memory;
}

template <typename T>
Pinned<T> pinned(size_t count) {
  void* memory = nullptr;
  check(cudaMallocHost(&memory, count * sizeof(T)), "cudaMallocHost");
  return Pinned<T>(static_cast<T*>(memory));
}

}  // namespace

struct BasisComparison::Resources {
  Resources(const std::vector<int64_t>& rows, const std::vector<int64_t>& columns, double tau, int device)
      : plan(rows, columns), device(device) {
    const OnDevice scope(device);
    const size_t n = plan.sites.size();
    sites = on_device(plan.sites);
    task_site = on_device(plan.task_site);
    pairs = on_device<BasisPair>(n);
    partials = on_device<Partial>(plan.task_site.size());
    arrived = on_device(std::vector<uint32_t>(n, 0));
    results = on_device<char>(plan.result_bytes());
    host_pairs = pinned<BasisPair>(n);
    host_results = pinned<char>(plan.result_bytes());
    check(cudaEventCreateWithFlags(&done, cudaEventDisableTiming), "cudaEventCreate");
    args.pairs = pairs.get();
    args.sites = sites.get();
    args.task_site = task_site.get();
    args.partials = partials.get();
    args.arrived = arrived.get();
    args.tau = tau;
    plan.place_results(results.get(), args);
  }

  ~Resources() {
    if (done) {
      cudaEventSynchronize(done);
      cudaEventDestroy(done);
    }
  }

  ComparisonPlan plan;
  int device;
  Device<ComparedSite> sites;
  Device<int32_t> task_site;
  Device<BasisPair> pairs;
  Device<Partial> partials;
  Device<uint32_t> arrived;
  Device<char> results;
  Pinned<BasisPair> host_pairs;
  Pinned<char> host_results;
  ComparisonArguments args{};
  cudaEvent_t done = nullptr;
  bool launched = false;
};

BasisComparison::BasisComparison(const std::vector<int64_t>& rows, const std::vector<int64_t>& columns, double tau,
                                 int device)
    : resources_(std::make_unique<Resources>(rows, columns, tau, device)) {}

BasisComparison::~BasisComparison() = default;

int64_t BasisComparison::sites() const { return static_cast<int64_t>(resources_->plan.sites.size()); }
int64_t BasisComparison::width() const { return resources_->plan.width; }

void BasisComparison::launch(const std::vector<uint64_t>& previous, const std::vector<int64_t>& previous_strides,
                             const std::vector<uint64_t>& current, const std::vector<int64_t>& current_strides,
                             uint64_t stream_handle) {
  Resources& r = *resources_;
  const OnDevice scope(r.device);
  const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
  const size_t n = r.plan.sites.size();
  // The pinned memory is about to be written again; a launch whose result was fetched has long left it.
  if (r.launched) check(cudaEventSynchronize(r.done), "cudaEventSynchronize");
  for (size_t s = 0; s < n; ++s)
    r.host_pairs[s] = {reinterpret_cast<const float*>(previous[s]), reinterpret_cast<const float*>(current[s]),
                       previous_strides[s], current_strides[s]};
  check(cudaMemcpyAsync(r.pairs.get(), r.host_pairs.get(), n * sizeof(BasisPair), cudaMemcpyHostToDevice, stream),
        "cudaMemcpyAsync");
  _compare_bases_kernel<<<static_cast<unsigned>(r.plan.task_site.size()), kThreads, 0, stream>>>(r.args);
  check(cudaGetLastError(), "launch");
  check(cudaMemcpyAsync(r.host_results.get(), r.results.get(), r.plan.result_bytes(), cudaMemcpyDeviceToHost, stream),
        "cudaMemcpyAsync");
  check(cudaEventRecord(r.done, stream), "cudaEventRecord");
  r.launched = true;
}

bool BasisComparison::ready() const {
  if (!resources_->launched) return false;
  const cudaError_t status = cudaEventQuery(resources_->done);
  if (status == cudaErrorNotReady) return false;
  check(status, "cudaEventQuery");
  return true;
}

ComparisonResult BasisComparison::result() {
  Resources& r = *resources_;
  if (!r.launched) throw std::runtime_error("result: expected a launch before it");
  check(cudaEventSynchronize(r.done), "cudaEventSynchronize");
  ComparisonArguments at{};
  r.plan.place_results(r.host_results.get(), at);
  const size_t entries = r.plan.entries(), n = r.plan.sites.size();
  return {{at.cosines, at.cosines + entries},
          {at.overlaps, at.overlaps + entries},
          {at.norms, at.norms + entries},
          {at.components_converged, at.components_converged + n},
          {at.subspace_converged, at.subspace_converged + n}};
}

int cuda_device_count(std::string* why) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess) return count;
  *why = cudaGetErrorString(status);
  cudaGetLastError();  // not an error of whoever calls CUDA next
  return 0;
}

int cuda_runtime_version() { return CUDART_VERSION; }

int cuda_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace eva
