#include "subspace.h"

#if defined(__x86_64__) && defined(__GNUC__) && (__GNUC__ >= 11 || defined(__clang__))

#include <dlfcn.h>
#include <immintrin.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#define EVA_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

namespace eva {
namespace {

constexpr int64_t kLanes = 16;      // float32 in a register
constexpr int64_t kBlockRows = 64;  // rows that are converted once and multiplied twice while they are in the L2 cache
constexpr int64_t kTall = 4;        // rows and registers of a tile of accumulators: 24 of the 32 registers
constexpr int64_t kWide = 6;
constexpr int64_t kThreadRows = 128;  // fewer rows than this are not worth a thread

// Memory that a call leaves to the next of its thread. Taken from the system anew it would come in pages that have to
// be cleared first, which takes longer than the products of a narrow input.
class Pool {
 public:
  ~Pool() {
    for (const Block& block : blocks_) ::operator delete(block.data, kLine);
  }

  void* take(size_t size) {
    for (auto block = blocks_.begin(); block != blocks_.end(); ++block)
      if (block->size == size) {  // inputs of one shape come again and again
        void* data = block->data;
        held_ -= size;
        blocks_.erase(block);
        return data;
      }
    return ::operator new(size, kLine);
  }

  void give(void* data, size_t size) {
    blocks_.push_back({data, size});
    for (held_ += size; held_ > kLimit; blocks_.erase(blocks_.begin())) {
      held_ -= blocks_.front().size;
      ::operator delete(blocks_.front().data, kLine);
    }
  }

 private:
  struct Block {
    void* data;
    size_t size;
  };
  static constexpr size_t kLimit = size_t{16} << 20;
  static constexpr std::align_val_t kLine{64};
  std::vector<Block> blocks_;  // the longest unused first
  size_t held_ = 0;
};

thread_local Pool pool;

// An array whose registers never straddle two cache lines. Its content is indeterminate. It ends in the thread it began.
template <typename T>
class Array {
 public:
  explicit Array(int64_t size) : size_(size * sizeof(T)), data_(static_cast<T*>(pool.take(size_))) {}
  Array(Array&& other) noexcept : size_(other.size_), data_(std::exchange(other.data_, nullptr)) {}
  ~Array() {
    if (data_) pool.give(data_, size_);
  }
  T* get() const { return data_; }
  T& operator[](int64_t index) const { return data_[index]; }

 private:
  size_t size_;
  T* data_;
};

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

EVA_BF16 inline __m512i pairs(__m256bh low, __m256bh high) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(low)),
                         _mm512_slli_epi32(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(high)), 16));
}

EVA_BF16 inline __m512 dot(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

// out(i, c) = Σ_k left(k, i) · right(k, c), where each element is a pair of bfloat16 and the product of two
// pairs is their dot product. `left` is addressed left[k * step_k + i * step_i]; a tile is kTall × Wide registers.
template <int Wide>
EVA_BF16 inline void tile(const uint32_t* left, int64_t step_k, int64_t step_i, const uint32_t* right,
                          int64_t right_stride, int64_t depth, __m512 (&out)[kTall][kWide]) {
  __m512 sum[kTall][Wide];  // of the function's own, so that it stays in registers
  for (int64_t i = 0; i < kTall; ++i)
    for (int v = 0; v < Wide; ++v) sum[i][v] = _mm512_setzero_ps();
  for (int64_t k = 0; k < depth; ++k) {
    __m512i column[Wide];
    for (int v = 0; v < Wide; ++v) column[v] = _mm512_loadu_si512(right + k * right_stride + v * kLanes);
    for (int64_t i = 0; i < kTall; ++i) {
      const __m512i row = _mm512_set1_epi32(static_cast<int>(left[k * step_k + i * step_i]));
      for (int v = 0; v < Wide; ++v) sum[i][v] = dot(sum[i][v], row, column[v]);
    }
  }
  for (int64_t i = 0; i < kTall; ++i)
    for (int v = 0; v < Wide; ++v) out[i][v] = sum[i][v];
}

using Tile = void (*)(const uint32_t*, int64_t, int64_t, const uint32_t*, int64_t, int64_t, __m512 (&)[kTall][kWide]);
constexpr Tile kTiles[] = {nullptr, tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};

// One thread's rows. Widths are padded with zeros: features to a register, components likewise.
class Worker {
 public:
  Worker(const SubspaceTask& task, const Array<uint32_t>& basis, const Array<float>& shift)
      : task_(task), basis_(basis), shift_(shift), d_(round_up(task.d, kLanes)), q_(round_up(task.q, kLanes)),
        rows_(kBlockRows * d_ / 2), columns_(kBlockRows / 2 * d_), projected_(kBlockRows / 2 * q_),
        product_(d_ * q_), block_sum_(d_), column_sum_(d_) {}

  EVA_BF16 void run(int64_t begin, int64_t end) {
    std::fill_n(product_.get(), d_ * q_, 0.0f);
    std::fill_n(column_sum_.get(), d_, 0.0);
    for (int64_t start = begin; start < end; start += kBlockRows) {
      convert(start, std::min(end, start + kBlockRows));
      project();
      accumulate();
    }
  }

  void add_features_to_task(int64_t begin, int64_t end) const {
    for (int64_t j = begin; j < end; ++j) {
      for (int64_t c = 0; c < task_.q; ++c) task_.product[j * task_.q + c] += task_.sign * product_[j * q_ + c];
      task_.column_sum[j] += task_.sign * column_sum_[j];
    }
  }

  double square_sum() const { return square_sum_; }

 private:
  // z = x − s of two rows at a time, as rows of pairs of features and as pairs of rows.
  EVA_BF16 void convert(int64_t start, int64_t end) {
    std::fill_n(block_sum_.get(), d_, 0.0f);
    __m512 squares = _mm512_setzero_ps();
    for (int64_t r = 0; r < kBlockRows; r += 2) {
      uint16_t* first = reinterpret_cast<uint16_t*>(rows_.get()) + r * d_;
      for (int64_t j = 0; j < d_; j += kLanes) {
        const __m512 a = shifted(start + r, end, j), b = shifted(start + r + 1, end, j);
        const __m512 sum = _mm512_add_ps(_mm512_loadu_ps(&block_sum_[j]), _mm512_add_ps(a, b));
        _mm512_storeu_ps(&block_sum_[j], sum);
        squares = _mm512_fmadd_ps(a, a, _mm512_fmadd_ps(b, b, squares));
        const __m256bh low = _mm512_cvtneps_pbh(a), high = _mm512_cvtneps_pbh(b);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(first + j), reinterpret_cast<__m256i>(low));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(first + d_ + j), reinterpret_cast<__m256i>(high));
        _mm512_storeu_si512(&columns_[r / 2 * d_ + j], pairs(low, high));
      }
    }
    square_sum_ += _mm512_reduce_add_ps(squares);
    for (int64_t j = 0; j < d_; ++j) column_sum_[j] += block_sum_[j];
  }

  // Sixteen features of a row; zeros beyond its end, beyond the last row, and where the row is masked.
  EVA_BF16 __m512 shifted(int64_t row, int64_t end, int64_t j) const {
    if (row >= end || (task_.mask && !task_.mask[row])) return _mm512_setzero_ps();
    const int64_t left = task_.d - j;
    const __mmask16 lanes = left >= kLanes ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
    const int64_t offset = row * task_.row_stride + j;
    __m512 value;
    if (task_.is_float32) {
      value = _mm512_maskz_loadu_ps(lanes, static_cast<const float*>(task_.x) + offset);
    } else {
      const __m256i raw = _mm256_maskz_loadu_epi16(lanes, static_cast<const uint16_t*>(task_.x) + offset);
      value = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
    }
    return _mm512_maskz_sub_ps(lanes, value, _mm512_loadu_ps(&shift_[j]));
  }

  // P = Z Q, kept as pairs of rows.
  EVA_BF16 void project() {
    __m512 sum[kTall][kWide];
    for (int64_t c = 0; c < q_; c += kWide * kLanes) {
      const int wide = static_cast<int>(std::min(kWide, (q_ - c) / kLanes));
      for (int64_t r = 0; r < kBlockRows; r += kTall) {
        kTiles[wide](&rows_[r * d_ / 2], 1, d_ / 2, &basis_[c], q_, d_ / 2, sum);
        for (int64_t i = 0; i < kTall; i += 2)
          for (int v = 0; v < wide; ++v)
            _mm512_storeu_si512(&projected_[(r + i) / 2 * q_ + c + v * kLanes],
                                pairs(_mm512_cvtneps_pbh(sum[i][v]), _mm512_cvtneps_pbh(sum[i + 1][v])));
      }
    }
  }

  // Y += Zᵀ P.
  EVA_BF16 void accumulate() {
    __m512 sum[kTall][kWide];
    for (int64_t c = 0; c < q_; c += kWide * kLanes) {
      const int wide = static_cast<int>(std::min(kWide, (q_ - c) / kLanes));
      for (int64_t j = 0; j < d_; j += kTall) {
        kTiles[wide](&columns_[j], d_, 1, &projected_[c], q_, kBlockRows / 2, sum);
        for (int64_t i = 0; i < kTall; ++i)
          for (int v = 0; v < wide; ++v) {
            float* to = &product_[(j + i) * q_ + c + v * kLanes];
            _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sum[i][v]));
          }
      }
    }
  }

  const SubspaceTask& task_;
  const Array<uint32_t>& basis_;  // (d / 2, q) pairs of features
  const Array<float>& shift_;     // (d)
  const int64_t d_, q_;
  const Array<uint32_t> rows_;       // (rows, d / 2) pairs of features
  const Array<uint32_t> columns_;    // (rows / 2, d) pairs of rows
  const Array<uint32_t> projected_;  // (rows / 2, q) pairs of rows
  const Array<float> product_, block_sum_;
  const Array<double> column_sum_;
  double square_sum_ = 0;
};

EVA_BF16 Array<uint32_t> packed_basis(const SubspaceTask& task) {
  const int64_t d = round_up(task.d, kLanes), q = round_up(task.q, kLanes);
  Array<uint32_t> packed(d / 2 * q);
  std::fill_n(packed.get(), d / 2 * q, 0u);
  for (int64_t j = 0; j < task.d; j += 2)
    for (int64_t c = 0; c < task.q; c += kLanes) {
      const __mmask16 lanes = task.q - c >= kLanes ? 0xffff : static_cast<__mmask16>((1u << (task.q - c)) - 1);
      const float* from = task.basis + j * task.q + c;
      const __m512 even = _mm512_maskz_loadu_ps(lanes, from);
      const __m512 odd = j + 1 < task.d ? _mm512_maskz_loadu_ps(lanes, from + task.q) : _mm512_setzero_ps();
      _mm512_storeu_si512(&packed[j / 2 * q + c], pairs(_mm512_cvtneps_pbh(even), _mm512_cvtneps_pbh(odd)));
    }
  return packed;
}

// Runs work(0) … work(shares − 1), on the threads of the GNU OpenMP runtime where the process has one. PyTorch brings
// one, whose idle threads spin for a while after its own work: threads of ours would compete with them for the cores.
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

}  // namespace

bool has_bf16_subspace() {
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

void subspace_accumulate(const SubspaceTask& task, int threads) {
  const Array<uint32_t> basis = packed_basis(task);
  const Array<float> shift(round_up(task.d, kLanes));
  std::fill_n(std::copy_n(task.shift, task.d, shift.get()), round_up(task.d, kLanes) - task.d, 0.0f);
  const int64_t shares = std::clamp<int64_t>(task.n / kThreadRows, 1, std::max(threads, 1));
  std::vector<std::unique_ptr<Worker>> workers;  // memory is taken here, where an error can be reported
  for (int64_t share = 0; share < shares; ++share) workers.push_back(std::make_unique<Worker>(task, basis, shift));
  const auto bound = [&](int64_t share) { return share == shares ? task.n : task.n * share / shares / 2 * 2; };
  run_in_parallel(shares, [&](int64_t share) { workers[share]->run(bound(share), bound(share + 1)); });
  // Every entry is added to in the order of the shares, whichever thread does it.
  run_in_parallel(shares, [&](int64_t share) {
    for (const auto& worker : workers)
      worker->add_features_to_task(task.d * share / shares, task.d * (share + 1) / shares);
  });
  for (const auto& worker : workers) *task.square_sum += task.sign * worker->square_sum();
}

}  // namespace eva

#else

#include <stdexcept>

namespace eva {

bool has_bf16_subspace() { return false; }

void subspace_accumulate(const SubspaceTask&, int) {
  throw std::logic_error("the bfloat16 subspace product is not part of this build");
}

}  // namespace eva

#endif
