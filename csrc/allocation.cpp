#include "allocation.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <numeric>
#include <stdexcept>
#include <string>

namespace eva {
namespace {

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::string text;
  ((text += parts), ...);
  throw std::invalid_argument(text);
}

std::string str(int64_t value) { return std::to_string(value); }

int64_t sum(const std::vector<int64_t>& values) {
  return std::accumulate(values.begin(), values.end(), int64_t{0});
}

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
int64_t round_down(int64_t value, int64_t multiple) { return value / multiple * multiple; }

// An integer that orders as the (finite, never -0) double does: bisection over it ends at an exact value.
uint64_t order_key(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  constexpr uint64_t kSign = uint64_t{1} << 63;
  return bits & kSign ? ~bits : bits | kSign;
}

}  // namespace

void require_finite(const char* name, int64_t site, const double* row, int64_t count) {
  for (int64_t j = 0; j < count; ++j)
    if (!std::isfinite(row[j]))
      refuse(name, ": expected finite numbers, got ", std::isnan(row[j]) ? "nan" : row[j] > 0 ? "inf" : "-inf",
             " at site ", str(site), ", component ", str(j));
}

Allocator::Allocator(const Demands& demands) {
  const int64_t n = static_cast<int64_t>(demands.candidates.size());
  std::vector<int64_t> candidates = demands.candidates;
  if (!demands.groups.empty()) {
    std::vector<int64_t> most(n, 0);
    for (int64_t i = 0; i < n; ++i)
      most[demands.groups[i]] = std::max(most[demands.groups[i]], candidates[i]);
    for (int64_t i = 0; i < n; ++i) candidates[i] = most[demands.groups[i]];
  }
  if (demands.max_rank && demands.min_rank > *demands.max_rank)
    refuse("max_rank: expected at least min_rank ", str(demands.min_rank), ", got ", str(*demands.max_rank));

  lower_.resize(n);
  upper_.resize(n);
  std::vector<int64_t> multiple(n);
  bool restricted = demands.max_rank.has_value();
  for (int64_t i = 0; i < n; ++i) {
    const int64_t m = std::lcm(demands.rank_multiple, demands.divisors.empty() ? 1 : demands.divisors[i]);
    multiple[i] = m;
    restricted |= m > 1;
    lower_[i] = round_up(demands.min_rank, m);
    upper_[i] = candidates[i] == 0 ? 0 : std::max(m, round_down(candidates[i], m));
    if (demands.max_rank && upper_[i] > 0) {
      upper_[i] = std::min(upper_[i], round_down(*demands.max_rank, m));
      if (upper_[i] == 0)
        refuse("max_rank: expected at least one block of ", str(m), " components at site ", str(i), ", got ",
               str(*demands.max_rank));
    }
    if (lower_[i] > upper_[i])
      refuse("min_rank: expected at most the ", str(upper_[i]), " components that site ", str(i),
             " may take, got ", str(demands.min_rank), " (", str(lower_[i]), " in steps of ", str(m), ")");
    columns_ = std::max(columns_, upper_[i]);
  }

  const int64_t least = sum(lower_), most = sum(upper_), free = demands.budget - least;
  if (free < 0)
    refuse("budget: expected at least the ", str(least), " components that min_rank ", str(demands.min_rank),
           " gives to ", str(n), " sites, got ", str(demands.budget));

  std::map<int64_t, BlockClass> by_multiple;
  unit_ = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (lower_[i] == upper_[i]) continue;
    const int64_t m = multiple[i];
    BlockClass& blocks = by_multiple.try_emplace(m, BlockClass{m, {}, {}, {0}, {}}).first->second;
    blocks.sites.push_back(i);
    blocks.first_block.push_back(lower_[i] / m);
    blocks.start.push_back(blocks.start.back() + (upper_[i] - lower_[i]) / m);
    unit_ = std::gcd(unit_, m);
  }
  unit_ = std::max<int64_t>(unit_, 1);
  free_units_ = free / unit_;
  if (free_units_ * unit_ > most - least) {
    if (restricted)
      refuse("budget: expected at most the ", str(most), " components that max_rank, rank_multiple and divisors ",
             "leave to ", str(n), " sites, got ", str(demands.budget));
    free_units_ = (most - least) / unit_;
  }
  if (demands.budget > 0 && least == 0 && most > 0 && by_multiple.begin()->first > demands.budget)
    refuse("budget: expected at least one block of ", str(by_multiple.begin()->first), " components, got ",
           str(demands.budget));
  for (auto& [m, blocks] : by_multiple) {
    blocks.values.resize(blocks.size());
    classes_.push_back(std::move(blocks));
  }
}

void Allocator::fill_values(BlockClass& blocks, const double* ratios, int64_t stride) {
  const int64_t m = blocks.multiple;
  double* out = blocks.values.data();
  for (size_t s = 0; s < blocks.sites.size(); ++s) {
    const double* row = ratios + blocks.sites[s] * stride;
    double least = std::numeric_limits<double>::infinity();  // running minimum: noise must not make a row rise
    for (int64_t j = 0; j < lower_[blocks.sites[s]]; ++j) least = std::min(least, row[j]);
    row += lower_[blocks.sites[s]];
    for (int64_t b = blocks.start[s]; b < blocks.start[s + 1]; ++b) {
      double value = 0.0;
      for (int64_t j = 0; j < m; ++j) {
        least = std::min(least, *row++);
        value += least;
      }
      *out++ = value;
    }
  }
}

// Adds to `ranks` the `count` best blocks: higher value first, then lower block index, then lower site.
// Bisects for the value of the last block taken, then, among blocks of just that value, for its index.
void Allocator::take_best(const BlockClass& blocks, int64_t count, int64_t* ranks) {
  const size_t n = blocks.sites.size();
  auto add = [&](size_t s, int64_t taken) { ranks[blocks.sites[s]] += taken * blocks.multiple; };
  // Invariant: at_least_low_ (at_least_high_) counts each site's blocks whose key is >= low (>= high), and
  // their sums enclose `count`.
  at_least_low_.resize(n);
  at_least_high_.assign(n, 0);
  middle_.resize(n);
  uint64_t low = std::numeric_limits<uint64_t>::max(), high = 0;
  for (size_t s = 0; s < n; ++s) {
    at_least_low_[s] = blocks.start[s + 1] - blocks.start[s];
    low = std::min(low, order_key(blocks.values[blocks.start[s + 1] - 1]));
    high = std::max(high, order_key(blocks.values[blocks.start[s]]) + 1);
  }
  int64_t total_low = blocks.size();
  while (high - low > 1 && total_low > count) {
    const uint64_t key = low + (high - low) / 2;
    int64_t total = 0;
    for (size_t s = 0; s < n; ++s) {
      const double* row = blocks.values.data() + blocks.start[s];
      const double* end = std::partition_point(row + at_least_high_[s], row + at_least_low_[s],
                                               [key](double v) { return order_key(v) >= key; });
      middle_[s] = end - row;
      total += middle_[s];
    }
    if (total >= count) {
      low = key;
      total_low = total;
      at_least_low_.swap(middle_);
    } else {
      high = key;
      at_least_high_.swap(middle_);
    }
  }
  if (total_low == count) {
    for (size_t s = 0; s < n; ++s) add(s, at_least_low_[s]);
    return;
  }
  // All blocks in [at_least_high_, at_least_low_) are equal. Level b takes those with index below b.
  auto below = [&](size_t s, int64_t level) {
    return std::clamp(level - blocks.first_block[s], at_least_high_[s], at_least_low_[s]);
  };
  int64_t level = 0, beyond = 0;
  for (size_t s = 0; s < n; ++s) beyond = std::max(beyond, blocks.first_block[s] + at_least_low_[s]);
  while (beyond - level > 1) {
    const int64_t middle = level + (beyond - level) / 2;
    int64_t total = 0;
    for (size_t s = 0; s < n; ++s) total += below(s, middle);
    (total <= count ? level : beyond) = middle;
  }
  for (size_t s = 0; s < n; ++s) count -= below(s, level);
  for (size_t s = 0; s < n; ++s) {
    const int64_t extra = count > 0 && below(s, level + 1) > below(s, level) ? 1 : 0;
    add(s, below(s, level) + extra);
    count -= extra;
  }
}

// How many blocks each class gets where multiples differ. Greedy by value per component comes within a few
// blocks of an optimum (proximity theorem in the README), so a knapsack over those few blocks is exact.
std::vector<int64_t> Allocator::split_between_classes() {
  const size_t n = classes_.size();
  std::vector<std::vector<double>> sorted(n);
  for (size_t c = 0; c < n; ++c) {
    sorted[c] = classes_[c].values;
    std::sort(sorted[c].begin(), sorted[c].end(), [](double a, double b) { return a > b; });
  }
  std::vector<int64_t> weight(n), greedy(n, 0);
  for (size_t c = 0; c < n; ++c) weight[c] = classes_[c].multiple / unit_;
  int64_t used = 0;
  while (true) {
    size_t best = n;
    double best_density = 0.0;
    for (size_t c = 0; c < n; ++c) {
      if (greedy[c] == classes_[c].size()) continue;
      const double density = sorted[c][greedy[c]] / static_cast<double>(weight[c]);
      if (best == n || density > best_density) {
        best = c;
        best_density = density;
      }
    }
    if (best == n || used + weight[best] > free_units_) break;
    ++greedy[best];
    used += weight[best];
  }

  const int64_t window = 2 * weight.back();
  std::vector<int64_t> first(n), last(n);
  int64_t base = 0;
  for (size_t c = 0; c < n; ++c) {
    first[c] = std::max<int64_t>(0, greedy[c] - window);
    last[c] = std::min(classes_[c].size(), greedy[c] + window);
    base += weight[c] * first[c];
  }
  // value[u]: best gain over the greedy choice with u units above `base`; choice[c][u]: blocks of class c.
  const int64_t room = free_units_ - base;
  constexpr double kUnreachable = -std::numeric_limits<double>::infinity();
  std::vector<double> value(room + 1, kUnreachable), next;
  value[0] = 0.0;
  std::vector<std::vector<int64_t>> choice(n, std::vector<int64_t>(room + 1, 0));
  for (size_t c = 0; c < n; ++c) {
    std::vector<double> gain(last[c] - first[c] + 1, 0.0);  // summed outwards from the greedy choice
    for (int64_t t = greedy[c]; t < last[c]; ++t) gain[t + 1 - first[c]] = gain[t - first[c]] + sorted[c][t];
    for (int64_t t = greedy[c]; t > first[c]; --t) gain[t - 1 - first[c]] = gain[t - first[c]] - sorted[c][t - 1];
    next.assign(room + 1, kUnreachable);
    for (int64_t t = first[c]; t <= last[c]; ++t) {
      const int64_t step = weight[c] * (t - first[c]);
      for (int64_t u = step; u <= room; ++u) {
        if (value[u - step] == kUnreachable) continue;
        const double candidate = value[u - step] + gain[t - first[c]];
        if (candidate > next[u]) {
          next[u] = candidate;
          choice[c][u] = t;
        }
      }
    }
    value.swap(next);
  }
  int64_t units = room;
  while (value[units] == kUnreachable) --units;
  std::vector<int64_t> counts(n);
  for (size_t c = n; c-- > 0;) {
    counts[c] = choice[c][units];
    units -= weight[c] * (counts[c] - first[c]);
  }
  return counts;
}

void Allocator::allocate(const double* ratios, int64_t stride, int64_t* ranks) {
  for (int64_t i = 0; i < sites(); ++i) require_finite("ratios", i, ratios + i * stride, upper_[i]);
  std::copy(lower_.begin(), lower_.end(), ranks);
  for (BlockClass& blocks : classes_) fill_values(blocks, ratios, stride);
  if (classes_.size() == 1) {
    take_best(classes_[0], free_units_, ranks);
  } else if (classes_.size() > 1) {
    const std::vector<int64_t> counts = split_between_classes();
    for (size_t c = 0; c < classes_.size(); ++c) take_best(classes_[c], counts[c], ranks);
  }
}

}  // namespace eva
