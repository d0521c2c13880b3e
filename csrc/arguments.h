// What the Python face asks of addresses and sizes before anything is read or written through them. Errors are
// std::invalid_argument, which Python sees as ValueError, and name the argument.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace eva {

enum class Null { kRefused, kMeansNone };

// A null pointer only where that means none; else memory that an object of this alignment can begin at.
inline void require_address(const char* name, uintptr_t value, size_t alignment, Null null = Null::kRefused) {
  if (value == 0 && null == Null::kRefused)
    throw std::invalid_argument(std::string(name) + ": expected the address of an array, got null");
  if (value % alignment != 0)
    throw std::invalid_argument(std::string(name) + ": expected an address that is a multiple of " +
                                std::to_string(alignment) + ", got " + std::to_string(value));
}

template <typename T>
T* address(const char* name, uintptr_t value, Null null = Null::kRefused) {
  require_address(name, value, alignof(T), null);
  return reinterpret_cast<T*>(value);
}

inline void require_at_least(const char* name, int64_t value, int64_t least) {
  if (value < least)
    throw std::invalid_argument(std::string(name) + ": expected at least " + std::to_string(least) + ", got " +
                                std::to_string(value));
}

inline void require_below(const char* name, int64_t value, int64_t end) {
  if (value < 0 || value >= end)
    throw std::invalid_argument(std::string(name) + ": expected 0 or more and less than " + std::to_string(end) +
                                ", got " + std::to_string(value));
}

inline void require_equal(const char* name, int64_t size, int64_t expected) {
  if (size != expected)
    throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(expected) + " entries, got " +
                                std::to_string(size));
}

}  // namespace eva
