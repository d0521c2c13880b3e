#include "tracker.h"

#include <algorithm>
#include <cmath>

namespace eva {
namespace {

const char* evidence_name(Criterion criterion) {
  switch (criterion) {
    case Criterion::kComponent: return "cosines";
    case Criterion::kSubspace: return "overlaps";
    default: return "gains";
  }
}

}  // namespace

Tracker::Tracker(const Demands& demands, double tau, Criterion criterion)
    : allocator_(demands),
      tau_(tau),
      criterion_(criterion),
      // One small gain can be luck of the batch, three in a row are not; tau = 0 asks for nothing at all.
      needed_(criterion == Criterion::kCaptured && tau > 0.0 ? 3 : 1),
      uniform_(allocator_.sites()) {
  const int64_t n = sites();
  // Equal ratios everywhere: the tie rule then fills the sites level by level.
  state_.ratios.assign(n * columns(), 1.0);
  allocator_.allocate(state_.ratios.data(), columns(), uniform_.data());
  state_.ratios.assign(n * columns(), 0.0);
  state_.streaks.assign(n * columns(), 0);
  state_.refreshes.assign(n, 0);
  state_.latched.assign(n, -1);
}

bool Tracker::passes(double evidence, int64_t block) const {
  switch (criterion_) {
    case Criterion::kComponent: return std::abs(evidence) >= tau_;
    case Criterion::kSubspace: return evidence / static_cast<double>(block) >= tau_;
    default: return evidence <= 1.0 - tau_;
  }
}

// A leading block of no components is the same at every refresh: a second one settles it.
bool Tracker::settled(int64_t site, int64_t rank) const {
  if (state_.refreshes[site] < 2) return false;
  return rank == 0 || state_.streaks[site * columns() + rank - 1] >= needed_;
}

int64_t Tracker::components_converged(int64_t site) const {
  int64_t rank = allocator_.upper()[site];
  while (rank > 0 && !settled(site, rank)) --rank;
  return rank;
}

Decision Tracker::update(const double* evidence, int64_t evidence_stride, const double* ratios,
                         int64_t ratios_stride, const uint8_t* updated) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::vector<int64_t>& upper = allocator_.upper();
  for (int64_t i = 0; i < sites(); ++i) {
    if (updated && !updated[i]) continue;
    require_finite("ratios", i, ratios + i * ratios_stride, upper[i]);
    if (state_.refreshes[i] > 0)
      require_finite(evidence_name(criterion_), i, evidence + i * evidence_stride, upper[i]);
  }
  for (int64_t i = 0; i < sites(); ++i) {
    if (updated && !updated[i]) continue;
    const double* row = evidence + i * evidence_stride;
    uint8_t* streak = state_.streaks.data() + i * columns();
    std::copy_n(ratios + i * ratios_stride, upper[i], state_.ratios.begin() + i * columns());
    if (state_.refreshes[i]++ == 0) continue;
    bool pass = true;
    for (int64_t j = 0; j < upper[i]; ++j) {
      // A block of components has converged when each of them has, a subspace on its own.
      pass = passes(row[j], j + 1) && (pass || criterion_ != Criterion::kComponent);
      streak[j] = pass ? std::min<uint8_t>(streak[j] + 1, needed_) : 0;
    }
  }
  return decide();
}

Decision Tracker::decision() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return decide();
}

Decision Tracker::decide() {
  const int64_t n = sites();
  Decision decision{uniform_, std::vector<int64_t>(n), std::vector<uint8_t>(n, 0), std::vector<uint8_t>(n, 0)};
  const auto& refreshes = state_.refreshes;
  const bool started = std::all_of(refreshes.begin(), refreshes.end(), [](int64_t r) { return r > 0; });
  if (started) allocator_.allocate(state_.ratios.data(), columns(), decision.ranks.data());
  for (int64_t i = 0; i < n; ++i) {
    int64_t& latched = state_.latched[i];
    const int64_t rank = decision.ranks[i], converged = components_converged(i);
    if (latched >= 0) {
      latched = std::max(latched, converged);
      decision.reopened[i] = rank > latched;
      if (rank > latched) latched = -1;
    } else if (started && settled(i, rank)) {
      latched = converged;
    }
    decision.done[i] = latched >= 0;
    decision.components_converged[i] = std::max(latched, converged);
  }
  return decision;
}

TrackerState Tracker::state() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return state_;
}

void Tracker::restore(const TrackerState& state) {
  const std::lock_guard<std::mutex> lock(mutex_);
  state_ = state;
}

}  // namespace eva
