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

// Some panels, which are `apart`, some lines at a time: from the last cache they come too slowly to wait for.
struct Ahead {
  const char *from, *end;
  int64_t panels, apart, lines;
  // So many bytes of each, spread over so many times.
  Ahead(const char* data, int64_t bytes, int64_t panels, int64_t apart, int64_t times)
      : from(data), end(data + bytes), panels(panels), apart(apart), lines(up(bytes, 64 * times) / (64 * times)) {}
  void fetch() {
    for (const char* upto = std::min(end, from + 64 * lines); from < upto; from += 64)
      for (int64_t i = 0; i < panels; i++) __builtin_prefetch(from + i * apart, 0, 2);
  }
};

}  // namespace bert_evaluation
