// Rank allocation under one budget (Explained Variance Adaptation, arXiv 2410.07170, step 4 of the method).
// The derivation and the proofs are in eva_kernels/allocation/README.md.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace eva {

// What is asked of an allocation over S sites. Values are in range when they arrive here (the Python edge
// checks types, shapes and signs); whether they can be met together is checked by Allocator.
struct Demands {
  std::vector<int64_t> candidates;  // (S)
  std::vector<int64_t> groups;      // (S) labels in [0, S), or empty: no site shares its input
  std::vector<int64_t> divisors;    // (S), or empty: all 1
  int64_t budget = 0;
  int64_t min_rank = 0;
  std::optional<int64_t> max_rank;
  int64_t rank_multiple = 1;
};

class Allocator {
 public:
  // Throws std::invalid_argument, with the numbers, where the demands cannot be met.
  explicit Allocator(const Demands& demands);

  int64_t sites() const { return static_cast<int64_t>(upper_.size()); }
  const std::vector<int64_t>& upper() const { return upper_; }  // (S) most components each site may take
  int64_t columns() const { return columns_; }                  // the largest of them

  // ratios: (S, stride) explained-variance ratios, of which row i's first upper()[i] are read.
  // ranks: (S) out. Throws std::invalid_argument for a ratio that is not finite. Not reentrant.
  void allocate(const double* ratios, int64_t stride, int64_t* ranks);

 private:
  // The free blocks of all sites with one multiple. A block is the `multiple` components by which a rank
  // grows at once; site sites[s] owns values[start[s] .. start[s + 1]), never increasing.
  struct BlockClass {
    int64_t multiple;
    std::vector<int64_t> sites;
    std::vector<int64_t> first_block;  // index, within its site, of the first block above the lower bound
    std::vector<int64_t> start;
    std::vector<double> values;
    int64_t size() const { return start.back(); }
  };

  void fill_values(BlockClass& blocks, const double* ratios, int64_t stride);
  void take_best(const BlockClass& blocks, int64_t count, int64_t* ranks);
  std::vector<int64_t> split_between_classes();

  std::vector<int64_t> lower_, upper_;
  std::vector<BlockClass> classes_;  // ascending multiples; sites without a free block are in none
  int64_t columns_ = 0;
  int64_t unit_ = 1;       // greatest common divisor of the multiples
  int64_t free_units_ = 0;  // what the budget leaves above the lower bounds, in units
  std::vector<int64_t> at_least_low_, at_least_high_, middle_;  // scratch of take_best
};

// Throws std::invalid_argument naming the argument, the site and the component of the first NaN or infinity.
void require_finite(const char* name, int64_t site, const double* row, int64_t count);

}  // namespace eva
