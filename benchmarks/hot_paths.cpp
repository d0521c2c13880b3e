// The compiled hot paths on fixed numbers, one a run, for counting their instructions: hot_paths NAME [steps].
// Only what hot_path() does is to be counted, from outside; with "steps" the program counts itself, by running it
// instruction by instruction. Exits with 3 where this processor lacks the instructions, with 4 where it may not step.
#include <sys/personality.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/forms.h"
#include "tracker.h"

namespace {

constexpr int kUnsupported = 3, kMayNotStep = 4;

// SplitMix64: the same numbers with every standard library.
double uniform(uint64_t index) {
  uint64_t z = (index + 1) * 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

// Ratios of `sites` spectra that fall as 1 / i, each with a scale of its own; evidence close to one.
struct Numbers {
  Numbers(int64_t sites, int64_t columns) : sites(sites), columns(columns) {
    for (int64_t i = 0; i < sites; ++i)
      for (int64_t j = 0; j < columns; ++j) {
        ratios.push_back((0.5 + uniform(i)) / static_cast<double>((j + 1) * columns));
        evidence.push_back(1 - 0.01 * uniform(sites + i * columns + j));
      }
    demands.candidates.assign(sites, columns);
    demands.budget = sites * columns / 2;
  }

  int64_t sites, columns;
  std::vector<double> ratios, evidence;
  eva::Demands demands;
};

std::function<void()> allocation(int64_t sites, int64_t columns, bool divisors) {
  auto numbers = std::make_shared<Numbers>(sites, columns);
  if (divisors)
    for (int64_t i = 0; i < sites; ++i) numbers->demands.divisors.push_back(i % 2 + 1);
  auto allocator = std::make_shared<eva::Allocator>(numbers->demands);
  auto ranks = std::make_shared<std::vector<int64_t>>(sites);
  return [=] { allocator->allocate(numbers->ratios.data(), numbers->columns, ranks->data()); };
}

std::function<void()> step(int64_t sites, int64_t columns, eva::Criterion criterion) {
  auto numbers = std::make_shared<Numbers>(sites, columns);
  if (criterion == eva::Criterion::kSubspace)  // overlaps: running sums of squared cosines
    for (int64_t i = 0; i < sites; ++i)
      for (int64_t j = 1; j < columns; ++j) numbers->evidence[i * columns + j] += numbers->evidence[i * columns + j - 1];
  if (criterion == eva::Criterion::kCaptured)
    for (double& gain : numbers->evidence) gain = 1 - gain;
  auto tracker = std::make_shared<eva::Tracker>(numbers->demands, 0.99, criterion);
  const auto update = [=] {
    tracker->update(numbers->evidence.data(), columns, numbers->ratios.data(), columns, nullptr);
  };
  update();  // evidence counts from the second refresh on
  return update;
}

void choose(const char* form) {
  try {
    eva::choose_form(form);
  } catch (const std::invalid_argument&) {
    std::exit(kUnsupported);
  }
}

// Rows, and what they are folded into.
struct Rows {
  Rows(int64_t n, int64_t d, int64_t q, bool is_float32) : n(n), d(d), q(q), is_float32(is_float32) {
    for (int64_t i = 0; i < n * d; ++i) {
      wide.push_back(static_cast<float>(uniform(i) - 0.5));
      narrow.push_back(static_cast<uint16_t>(0x3f00 + (i * 37 % 128)));
    }
    for (int64_t i = 0; i < d * q; ++i) basis.push_back(static_cast<float>(uniform(i) - 0.5));
    shift.assign(d, 0.25f);
    product.assign(d * q, 0.0f);
    column_sum.assign(d, 0.0);
  }
  const void* x() const { return is_float32 ? static_cast<const void*>(wide.data()) : narrow.data(); }

  int64_t n, d, q;
  bool is_float32;
  std::vector<float> wide, shift, basis, product;
  std::vector<uint16_t> narrow;
  std::vector<double> column_sum;
  double square_sum = 0;
};

std::function<void()> product(const char* form, int64_t n, int64_t d, int64_t q, bool is_float32) {
  choose(form);
  auto rows = std::make_shared<Rows>(n, d, q, is_float32);
  const eva::SubspaceTask task{rows->x(), is_float32, n, d, d, nullptr, rows->shift.data(), rows->basis.data(), q, 1,
                               rows->product.data(), rows->column_sum.data(), &rows->square_sum};
  return [=, kept = rows] { eva::code().subspace(task, 1); };
}

std::function<void()> gram(const char* form, int64_t n, int64_t d, bool is_float32) {
  choose(form);
  auto rows = std::make_shared<Rows>(n, d, d, is_float32);
  const eva::GramTask task{rows->x(), is_float32, n, d, d, nullptr, rows->shift.data(), 1,
                           rows->product.data(), rows->column_sum.data(), &rows->square_sum};
  return [=, kept = rows] { eva::code().gram(task, 1); };
}

// X F, or where `outer` Xᵀ F is added.
std::function<void()> thin(const char* form, int64_t n, int64_t d, int64_t q, bool outer) {
  choose(form);
  auto rows = std::make_shared<Rows>(n, d, q, false);
  auto found = std::make_shared<std::vector<float>>((outer ? d : n) * q);
  const eva::ThinTask task{rows->narrow.data(), n, d, d, nullptr, rows->basis.data(), q, found->data()};
  return [=, kept = rows, to = found] { (outer ? eva::code().outer : eva::code().project)(task, 1); };
}

const std::map<std::string, std::function<std::function<void()>()>> kPaths = {
    {"allocation, 224 x 32", [] { return allocation(224, 32, false); }},
    {"allocation, 560 x 32", [] { return allocation(560, 32, false); }},
    {"allocation, divisors, 224 x 32", [] { return allocation(224, 32, true); }},
    {"step component, 300 x 256", [] { return step(300, 256, eva::Criterion::kComponent); }},
    {"step subspace, 300 x 256", [] { return step(300, 256, eva::Criterion::kSubspace); }},
    {"step captured, 300 x 256", [] { return step(300, 256, eva::Criterion::kCaptured); }},
    {"product bfloat16, avx512bf16, 64 x 128 x 96", [] { return product("avx512bf16", 64, 128, 96, false); }},
    {"product float32, avx512bf16, 64 x 128 x 96", [] { return product("avx512bf16", 64, 128, 96, true); }},
    {"product bfloat16, avx512, 64 x 128 x 96", [] { return product("avx512", 64, 128, 96, false); }},
    {"product float32, avx512, 64 x 128 x 96", [] { return product("avx512", 64, 128, 96, true); }},
    {"product bfloat16, avx2, 64 x 128 x 96", [] { return product("avx2", 64, 128, 96, false); }},
    {"product float32, avx2, 64 x 128 x 96", [] { return product("avx2", 64, 128, 96, true); }},
    {"product bfloat16, amx, 64 x 128 x 96", [] { return product("amx", 64, 128, 96, false); }},
    {"product float32, amx, 64 x 128 x 96", [] { return product("amx", 64, 128, 96, true); }},
    {"sketch X F, amx, 64 x 128 x 40", [] { return thin("amx", 64, 128, 40, false); }},
    {"sketch X^T F, amx, 64 x 128 x 40", [] { return thin("amx", 64, 128, 40, true); }},
    {"sketch X F, avx512bf16, 64 x 128 x 40", [] { return thin("avx512bf16", 64, 128, 40, false); }},
    {"sketch X^T F, avx512bf16, 64 x 128 x 40", [] { return thin("avx512bf16", 64, 128, 40, true); }},
    {"sketch X F, avx512, 64 x 128 x 40", [] { return thin("avx512", 64, 128, 40, false); }},
    {"sketch X^T F, avx512, 64 x 128 x 40", [] { return thin("avx512", 64, 128, 40, true); }},
    {"sketch X F, avx2, 64 x 128 x 40", [] { return thin("avx2", 64, 128, 40, false); }},
    {"sketch X^T F, avx2, 64 x 128 x 40", [] { return thin("avx2", 64, 128, 40, true); }},
    {"gram bfloat16, amx, 64 x 128", [] { return gram("amx", 64, 128, false); }},
    {"gram bfloat16, avx512bf16, 64 x 128", [] { return gram("avx512bf16", 64, 128, false); }},
    {"gram float32, avx512, 64 x 128", [] { return gram("avx512", 64, 128, true); }},
    {"gram bfloat16, avx2, 64 x 128", [] { return gram("avx2", 64, 128, false); }},
    {"gram float32, avx2, 64 x 128", [] { return gram("avx2", 64, 128, true); }},
};

}  // namespace

extern "C" __attribute__((noinline)) void hot_path(const std::function<void()>& call) { call(); }

namespace {

// A child stops itself before and after; in between it is let go one instruction at a time.
int count_steps(const std::function<void()>& call) {
  const pid_t child = fork();
  if (child == 0) {
    if (ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) != 0) _exit(kMayNotStep);
    std::raise(SIGSTOP);
    hot_path(call);
    std::raise(SIGSTOP);
    _exit(0);
  }
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) != child || !WIFSTOPPED(status)) return kMayNotStep;
  long long steps = 0;
  do {
    if (ptrace(PTRACE_SINGLESTEP, child, nullptr, nullptr) != 0 || waitpid(child, &status, 0) != child)
      return kMayNotStep;
    ++steps;
  } while (WIFSTOPPED(status) && WSTOPSIG(status) == SIGTRAP);
  kill(child, SIGKILL);
  waitpid(child, &status, 0);
  std::printf("%lld\n", steps);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    for (const auto& [name, make] : kPaths) std::puts(name.c_str());
    return 0;
  }
  const auto path = kPaths.find(argv[1]);
  if (path == kPaths.end()) return 2;
  // Addresses decide which way a copy takes; without their randomisation every run executes the same.
  if (argc > 2 && personality(0xffffffff) != -1 && !(personality(0xffffffff) & ADDR_NO_RANDOMIZE) &&
      personality(ADDR_NO_RANDOMIZE) != -1)
    execv("/proc/self/exe", argv);
  const std::function<void()> call = path->second();
  call();  // what happens once only is not of the path
  if (argc > 2) return count_steps(call);
  hot_path(call);
  return 0;
}
