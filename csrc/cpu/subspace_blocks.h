// The subspace product in blocks of features and chunks of rows, whatever a form multiplies them with.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "memory.h"
#include "parallel.h"
#include "rows.h"
#include "subspace.h"

namespace eva {

constexpr int64_t kProjectedSize = 2 << 20;  // elements of all blocks' P for a chunk: memory that a call leaves behind
constexpr int64_t kThreadFeatures = 64;      // fewer for each are not worth a second thread

// Threads share the features, not the rows: each then adds to its own part of Y, and to it alone.
template <typename Block>
void accumulate_in_blocks(const SubspaceTask& task, int max_threads) {
  if (task.n == 0 || task.d == 0) return;
  const int64_t features = task.n < kThreadRows ? 0 : task.d / kThreadFeatures;
  const int64_t threads = std::clamp<int64_t>(features, 1, std::max(max_threads, 1));
  const int64_t width =
      round_up(divide_up(task.d, threads * divide_up(task.d, threads * Block::kBlockFeatures)), Block::kLanes);
  const int64_t shares = divide_up(task.d, width);
  const int64_t least_chunks =
      std::max({divide_up(task.n * width, Block::kChunkSize), divide_up(task.n, Block::kChunkRows),
                divide_up(task.n * task.q * shares, kProjectedSize)});
  const int64_t chunk_rows = round_up(divide_up(task.n, least_chunks), Block::kSliceRows);
  const int64_t chunks = divide_up(task.n, chunk_rows);
  const Array<typename Block::Projected> projected(Block::projected_size(chunk_rows, task.q));
  std::vector<std::unique_ptr<Block>> blocks;  // memory is taken here, where an error can be reported
  for (int64_t begin = 0; begin < task.d; begin += width)
    blocks.push_back(std::make_unique<Block>(task, begin, std::min(begin + width, task.d), chunk_rows));

  const auto rows = [&](int64_t chunk) { return Rows{chunk * chunk_rows, std::min((chunk + 1) * chunk_rows, task.n)}; };
  // Two steps a chunk: project it, after what is left to do of the one before, and settle the projection.
  run_in_parallel(std::min(threads, shares), 2 * chunks + 1, shares, [&](int64_t step, int64_t share) {
    const int64_t chunk = step / 2;
    if (step % 2 == 1) {
      constexpr int64_t kMultiple = Block::kRowMultiple;
      const int64_t units = rows(chunk).padded(kMultiple) / kMultiple;
      const Rows own{units * share / shares * kMultiple, units * (share + 1) / shares * kMultiple};
      return Block::settle(blocks, own, projected.get());
    }
    if (step == 0)
      blocks[share]->prepare();
    else
      blocks[share]->accumulate(rows(chunk - 1), projected.get());
    if (chunk < chunks) blocks[share]->project(rows(chunk));
  });
  for (const auto& block : blocks) *task.square_sum += task.sign * block->square_sum();
}

}  // namespace eva
