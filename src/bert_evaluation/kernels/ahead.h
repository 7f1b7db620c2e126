// What will be read next, on its way to the second-level cache.
#pragma once
#include <unistd.h>
#include <algorithm>
#include "tiles.h"

namespace bert_evaluation {

inline int64_t second_level_cache() {
  static const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  return bytes;
}

// Two panels, which are `apart`, some lines at a time: from the last cache they come too slowly to wait for.
struct Ahead {
  const char *from = nullptr, *end = nullptr;
  int64_t apart = 0, lines = 0;
  // All of that, spread over so many times.
  Ahead(const char* data, int64_t bytes, int64_t apart, int64_t times)
      : from(data), end(data + bytes), apart(apart), lines(up(bytes, 64 * times) / (64 * times)) {}
  Ahead() = default;
  void fetch() {
    for (const char* upto = std::min(end, from + 64 * lines); from < upto; from += 64) {
      __builtin_prefetch(from, 0, 2);
      __builtin_prefetch(from + apart, 0, 2);
    }
  }
};

}  // namespace bert_evaluation
