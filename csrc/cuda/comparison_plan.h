// How the comparison of all sites is cut into tasks and where its results lie; plain C++, for host and device.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "compare_bases_kernel.h"

namespace eva {

struct ComparisonPlan {
  std::vector<ComparedSite> sites;
  std::vector<int32_t> task_site;
  int32_t width = 0;

  // Throws std::invalid_argument for a shape that the kernel does not take.
  ComparisonPlan(const std::vector<int64_t>& rows, const std::vector<int64_t>& columns) {
    // Enough rows for a task to be worth its launch and its partial sums; where M has several tiles, as many
    // times more, so that the partial sums of a site stay of the size of a few of its rows.
    constexpr int64_t kRowsPerTask = 512;
    for (size_t s = 0; s < rows.size(); ++s) {
      if (rows[s] < 1 || columns[s] < 1 || columns[s] > kMaxColumns)
        throw std::invalid_argument("shapes: expected at least 1 row and 1 to " + std::to_string(kMaxColumns) +
                                    " columns, got (" + std::to_string(rows[s]) + ", " +
                                    std::to_string(columns[s]) + ") at site " + std::to_string(s));
      ComparedSite site{};
      site.rows = rows[s];
      site.columns = static_cast<int32_t>(columns[s]);
      site.tiles = (site.columns + kTile - 1) / kTile;
      site.rows_per_slice = kRowsPerTask * site.tiles * site.tiles;
      site.slices = static_cast<int32_t>((site.rows + site.rows_per_slice - 1) / site.rows_per_slice);
      site.first_task = static_cast<int32_t>(task_site.size());
      task_site.insert(task_site.end(), size_t(site.tiles) * site.tiles * site.slices, static_cast<int32_t>(s));
      width = std::max(width, site.columns);
      sites.push_back(site);
    }
  }

  // The results are one stretch of memory, so that one copy fetches them: three (sites, width) of float64,
  // then two (sites) of int32.
  size_t entries() const { return sites.size() * width; }
  size_t result_bytes() const { return entries() * 3 * sizeof(double) + sites.size() * 2 * sizeof(int32_t); }

  void place_results(void* memory, ComparisonArguments& args) const {
    args.width = width;
    args.cosines = static_cast<double*>(memory);
    args.overlaps = args.cosines + entries();
    args.norms = args.overlaps + entries();
    args.components_converged = reinterpret_cast<int32_t*>(args.norms + entries());
    args.subspace_converged = args.components_converged + sites.size();
  }
};

}  // namespace eva
