// Compares the bases of all sites with their predecessors in one launch. Compiled by nvcc for the device and
// by any C++17 compiler for the host, where threads stand in for CUDA's and a barrier for __syncthreads().
//
// Site s has bases Q, Q' of shape (rows, columns), unit column stride. With M = Qᵀ Q':
//   cosine_i  = |M_ii| / (‖q_i‖ ‖q'_i‖), 0 where a column is 0
//   overlap_i = ‖M_1..i,1..i‖²_F
// Work is cut into tasks, one thread block each: a tile of kTile × kTile entries of M over one slice of the
// rows. A task leaves its partial sums in memory; the block that arrives last at its site adds them up, in
// the order of the slices, so that a rerun gives the same bits.
// Precision: products and sums within a slice in float32, between slices and above in float64.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define EVA_DEVICE __device__ __forceinline__
#else
#define EVA_DEVICE inline
#endif

namespace eva {

constexpr int kTile = 32;
constexpr int kRowsAtOnce = 32;  // rows of both tiles in shared memory
constexpr int kPerThread = 4;    // each thread sums kPerThread × kPerThread entries of the tile
constexpr int kThreadsAcross = kTile / kPerThread;
constexpr int kThreads = kThreadsAcross * kThreadsAcross;
constexpr int kMaxColumns = 512;  // what the shared memory of the tiles holds in the last step

static_assert(kThreads == 2 * kTile, "a diagonal tile sums one squared column of either basis per thread");

struct BasisPair {
  const float* previous;
  const float* current;
  int64_t previous_stride, current_stride;  // between rows, in floats
};

struct ComparedSite {
  int64_t rows, rows_per_slice;
  int32_t columns, tiles, slices;  // tiles: along one side of M
  int32_t first_task;
  EVA_DEVICE int32_t tasks() const { return tiles * tiles * slices; }
};

struct Partial {
  float product[kTile][kTile];
  float squares[2][kTile];  // of the columns of Q and Q'; written by diagonal tiles only
};

struct ComparisonArguments {
  const BasisPair* pairs;         // (sites)
  const ComparedSite* sites;      // (sites)
  const int32_t* task_site;       // (tasks)
  Partial* partials;              // (tasks)
  uint32_t* arrived;              // (sites) zero between launches
  double tau;
  int32_t width;                  // columns of the results; entries beyond a site's own are 0
  double* cosines;                // (sites, width)
  double* overlaps;               // (sites, width)
  double* norms;                  // (sites, width) of the columns of Q'
  int32_t* components_converged;  // (sites) length of the leading run of cosines ≥ tau
  int32_t* subspace_converged;    // (sites) largest i with overlap_i / i ≥ tau
};

struct RowTiles {
  float previous[kRowsAtOnce][kTile];
  float current[kRowsAtOnce][kTile];
};

struct ColumnResults {
  double cosines[kMaxColumns];
  double overlaps[kMaxColumns];
};

struct ComparisonShared {
  union {
    RowTiles rows;
    ColumnResults columns;
  };
  bool last;
};

// Block: index(), thread(), sync() as in CUDA; arrive(counter) counts this block in, with acquire and release
// semantics, and returns how many had arrived before.
template <class Block>
EVA_DEVICE void compare_bases_block(const Block& cuda, ComparisonShared& shared, const ComparisonArguments& args) {
  const int32_t s = args.task_site[cuda.index()];
  const ComparedSite site = args.sites[s];
  const BasisPair pair = args.pairs[s];
  const int32_t task = cuda.index() - site.first_task, tile = task / site.slices;
  const int32_t left = tile / site.tiles * kTile, right = tile % site.tiles * kTile;
  const int64_t first_row = task % site.slices * site.rows_per_slice;
  const int64_t end_row = first_row + site.rows_per_slice < site.rows ? first_row + site.rows_per_slice : site.rows;
  const int thread = cuda.thread();
  const int across = thread % kThreadsAcross * kPerThread, down = thread / kThreadsAcross * kPerThread;

  float sums[kPerThread][kPerThread] = {};
  float squares = 0.0f;
  for (int64_t row = first_row; row < end_row; row += kRowsAtOnce) {
    for (int e = thread; e < kRowsAtOnce * kTile; e += kThreads) {
      const int r = e / kTile, c = e % kTile;
      const bool inside = row + r < end_row;
      shared.rows.previous[r][c] =
          inside && left + c < site.columns ? pair.previous[(row + r) * pair.previous_stride + left + c] : 0.0f;
      shared.rows.current[r][c] =
          inside && right + c < site.columns ? pair.current[(row + r) * pair.current_stride + right + c] : 0.0f;
    }
    cuda.sync();
    for (int r = 0; r < kRowsAtOnce; ++r)
      for (int i = 0; i < kPerThread; ++i)
        for (int j = 0; j < kPerThread; ++j)
          sums[i][j] += shared.rows.previous[r][down + i] * shared.rows.current[r][across + j];
    if (left == right) {
      const auto& columns = thread < kTile ? shared.rows.previous : shared.rows.current;
      for (int r = 0; r < kRowsAtOnce; ++r) squares += columns[r][thread % kTile] * columns[r][thread % kTile];
    }
    cuda.sync();
  }

  Partial& partial = args.partials[cuda.index()];
  for (int i = 0; i < kPerThread; ++i)
    for (int j = 0; j < kPerThread; ++j) partial.product[down + i][across + j] = sums[i][j];
  if (left == right) partial.squares[thread / kTile][thread % kTile] = squares;
  cuda.sync();
  if (thread == 0) shared.last = cuda.arrive(args.arrived + s) + 1 == static_cast<uint32_t>(site.tasks());
  cuda.sync();
  if (!shared.last) return;

  const Partial* partials = args.partials + site.first_task;
  auto first_of = [&](int i, int j) { return partials + (i / kTile * site.tiles + j / kTile) * site.slices; };
  auto product = [&](int i, int j) {
    double total = 0.0;
    for (int32_t p = 0; p < site.slices; ++p) total += first_of(i, j)[p].product[i % kTile][j % kTile];
    return total;
  };
  for (int i = thread; i < site.columns; i += kThreads) {
    double squares_of[2] = {0.0, 0.0};
    for (int which = 0; which < 2; ++which)
      for (int32_t p = 0; p < site.slices; ++p) squares_of[which] += first_of(i, i)[p].squares[which][i % kTile];
    const double norms = sqrt(squares_of[0]) * sqrt(squares_of[1]), diagonal = product(i, i);
    double shell = diagonal * diagonal;  // what overlap_i adds to overlap_{i-1}
    for (int j = 0; j < i; ++j) {
      const double above = product(j, i), beside = product(i, j);
      shell += above * above + beside * beside;
    }
    shared.columns.cosines[i] = norms > 0.0 ? fabs(diagonal) / norms : 0.0;
    shared.columns.overlaps[i] = shell;
    args.norms[int64_t{s} * args.width + i] = sqrt(squares_of[1]);
  }
  cuda.sync();
  if (thread == 0) {
    double overlap = 0.0;
    int32_t components = 0, subspace = 0;
    for (int i = 0; i < site.columns; ++i) {
      overlap += shared.columns.overlaps[i];
      shared.columns.overlaps[i] = overlap;
      if (components == i && shared.columns.cosines[i] >= args.tau) components = i + 1;
      if (overlap / (i + 1) >= args.tau) subspace = i + 1;
    }
    args.components_converged[s] = components;
    args.subspace_converged[s] = subspace;
    args.arrived[s] = 0;
  }
  cuda.sync();
  for (int i = thread; i < args.width; i += kThreads) {
    const int64_t at = int64_t{s} * args.width + i;
    args.cosines[at] = i < site.columns ? shared.columns.cosines[i] : 0.0;
    args.overlaps[at] = i < site.columns ? shared.columns.overlaps[i] : 0.0;
    if (i >= site.columns) args.norms[at] = 0.0;
  }
}

}  // namespace eva
