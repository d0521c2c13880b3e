// Ranges of rows, and how they are rounded.
#pragma once

#include <cstdint>

namespace eva {

constexpr int64_t kThreadRows = 64;  // fewer are not worth a second thread

constexpr int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

constexpr int64_t round_up(int64_t value, int64_t multiple) { return divide_up(value, multiple) * multiple; }

struct Rows {
  int64_t begin, end;
  int64_t padded(int64_t multiple) const { return round_up(end - begin, multiple); }
};

}  // namespace eva
