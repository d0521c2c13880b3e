#include "memory.h"

#include <cstring>
#include <new>
#include <vector>

namespace eva {
namespace {

constexpr std::align_val_t kLine{64};

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
  std::vector<Block> blocks_;  // the longest unused first
  size_t held_ = 0;
};

thread_local Pool pool;

}  // namespace

#ifdef EVA_FILL_MEMORY
int fill_memory = 0;

void* take_memory(size_t size) { return std::memset(pool.take(size), fill_memory, size); }
#else
void* take_memory(size_t size) { return pool.take(size); }
#endif
void give_memory(void* data, size_t size) { pool.give(data, size); }

}  // namespace eva
