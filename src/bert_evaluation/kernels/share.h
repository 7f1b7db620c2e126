// Work shared by torch's threads.
#pragma once
#include <ATen/Parallel.h>
#include <algorithm>
#include <atomic>
#include "tiles.h"

namespace bert_evaluation {

// Threads take tasks as they get to them: some sequences are longer, and some cores busier, than others.
template <class Each> void share(int64_t tasks, const Each& each) {
  std::atomic<int64_t> next = 0;
  at::parallel_for(0, std::min<int64_t>(tasks, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    Tiles tiles;
    for (int64_t task; (task = next++) < tasks;) each(tiles, task);
  });
}

}  // namespace bert_evaluation
