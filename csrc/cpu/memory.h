// Memory that a kernel's call leaves to the next of its thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace eva {

// Taken from the system anew it would come in pages that have to be cleared first, which takes longer than the
// products of a narrow input. What is taken in one thread has to be given back in it. Throws std::bad_alloc.
void* take_memory(size_t size);
void give_memory(void* data, size_t size);

#ifdef EVA_FILL_MEMORY
extern int fill_memory;  // a test's: the byte that memory holds when it is taken
#endif

// Reads memory once in its own order. That is the order that a processor foresees: data that no cache holds then comes
// two to three times as fast as in the order in which it is wanted.
inline void fetch(const void* data, int64_t size) {
  const volatile char* bytes = static_cast<const volatile char*>(data);
  for (int64_t at = 0; at < size; at += 64) static_cast<void>(bytes[at]);
}

// An array whose registers never straddle two cache lines. Its content is indeterminate. It ends in the thread it began.
template <typename T>
class Array {
 public:
  explicit Array(int64_t size) : size_(size * sizeof(T)), data_(static_cast<T*>(take_memory(size_))) {}
  Array(Array&& other) noexcept : size_(other.size_), data_(std::exchange(other.data_, nullptr)) {}
  ~Array() {
    if (data_) give_memory(data_, size_);
  }
  T* get() const { return data_; }
  T& operator[](int64_t index) const { return data_[index]; }

 private:
  size_t size_;
  T* data_;
};

}  // namespace eva
