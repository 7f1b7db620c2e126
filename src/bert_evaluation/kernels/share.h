// Work shared by torch's threads.
#pragma once
#include <ATen/Parallel.h>
#include <omp.h>
#include <algorithm>
#include <atomic>
#include <vector>
#include "tiles.h"

namespace bert_evaluation {

// Each thread has a range of tasks, the same part of all in every operator, so that rows stay in its core's cache. Who is
// done takes from the others' ranges: some sequences are longer, and some cores busier, than others.
template <class Each> void share(int64_t tasks, const Each& each) {
  const int64_t threads = std::min<int64_t>(tasks, at::get_num_threads());
  std::vector<std::atomic<int64_t>> next(threads);
  for (int64_t i = 0; i < threads; i++) next[i] = i * tasks / threads;
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t) {
    Tiles tiles;
    for (int64_t i = 0; i < threads; i++) {
      const int64_t whose = (first + i) % threads, end = (whose + 1) * tasks / threads;
      for (int64_t task; (task = next[whose]++) < end;) each(tiles, task);
    }
  });
}

// torch's threads at several things in turn, of which each does its part.
struct Team {
  const int64_t number, size;
  // This thread's part of some tasks.
  template <class Each> void split(int64_t tasks, const Each& each) const {
    const int64_t begin = number * tasks / size, end = (number + 1) * tasks / size;
    if (begin < end) each(begin, end);
  }
  // Until all have come so far.
  void wait() const {
#pragma omp barrier
  }
};

// To gather them takes longer than to wait for each other in between.
template <class Each> void together(const Each& each) {
#pragma omp parallel num_threads(at::get_num_threads()) if (!at::in_parallel_region())
  each(Team{omp_get_thread_num(), omp_get_num_threads()});
}

}  // namespace bert_evaluation
