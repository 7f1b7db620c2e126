// Linears in a row, each of what the one before has made: a block of rows goes through all of them while it is in the cache,
// so that what is in between is never written to memory.
#pragma once
#include <vector>
#include "linear.h"

namespace bert_evaluation {

template <class Kind, class T>
struct Chain {
  const std::vector<Arguments>& of;

  // One of them, for some rows, with the place of what is in between.
  Arguments part(size_t number, int64_t begin, int64_t rows, T* between) const {
    const auto made = [&](size_t which) {
      T* place = between;
      for (size_t i = 0; i < which; i++) place += rows * of[i].outputs;
      return place;
    };
    Arguments one = of[number];
    one.rows = rows;
    one.x = number ? made(number - 1) : (const T*)one.x + begin * one.stride;
    if (one.added > 0) one.residual = made(one.added - 1);
    else if (one.added == 0) one.residual = (const T*)one.residual + begin * one.outputs;
    one.result = number + 1 < of.size() ? made(number) : (T*)one.result + begin * one.outputs;
    return one;
  }

  void run() const {
    static thread_local Room rooms;
    static thread_local Buffer<T> buffer;
    const int64_t threads = at::get_num_threads(), all = of[0].rows;
    int64_t within = 0, bytes = 0;  // numbers of a row that are in between; and bytes of it that the cache has to hold
    for (const auto& each : of) {
      if (&each != &of.back()) within += each.outputs;
      bytes = std::max(bytes, Linear<Kind, T>{each}.bytes_of_row());
    }
    bytes += within * sizeof(T);
    const auto numbers = [&](const auto& each) {
      for (size_t number = 0; number < of.size(); number++) each(number);
    };
    if (all >= kBlock * threads || threads == 1) {
      // Of larger blocks, fewer read the panels again.
      const bool may_double = 2 * kBlock * bytes <= second_level_cache() * 3 / 8;
      const int64_t most = may_double ? 2 * kBlock : kBlock;
      const int64_t rows = up(all, threads) / threads, blocks = up(rows, most) / most * threads;
      const int64_t size = up(up(all, blocks) / blocks, kTile);
      share(up(all, size) / size, [&](const Tiles& tiles, int64_t each) {
        const int64_t begin = each * size, count = std::min(all - begin, size);
        T* between = buffer.get(count * within);
        numbers([&](size_t number) {
          const Arguments one = part(number, begin, count, between);
          const Linear<Kind, T> linear{one};
          linear.compute(tiles, linear.block(0, up(count, kTile), rooms));
        });
      });
      return;
    }
    T* between = buffer.get(all * within);
    Room& room = rooms;
    // Twice, since a larger room moves what was given out before.
    numbers([&](size_t number) { Linear<Kind, T>{part(number, 0, all, between)}.block(0, up(all, kTile), room); });
    together([&](const Team& team) {
      numbers([&](size_t number) {
        const Arguments one = part(number, 0, all, between);
        const Linear<Kind, T> linear{one};
        if (number) team.wait();
        linear.compute(team, linear.block(0, up(all, kTile), room));
      });
    });
  }
};

}  // namespace bert_evaluation
