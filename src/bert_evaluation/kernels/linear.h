// Linear layers with what follows them, in one pass: act(x W^T + b) + residual, and LayerNorm of that.
//
// Products are of bfloat16; of int8, where each row of x is rounded to 127 steps of its own; or of float32, on AMX in three
// slices of 8 bits. A block of rows stays in the cache from its rounding to its LayerNorm. With few rows, threads share
// the columns instead.
#pragma once
#include <ATen/Parallel.h>
#include <bit>
#include <cstring>
#include <limits>
#include "ahead.h"
#include "endings.h"
#include "share.h"
#include "tiles.h"

namespace bert_evaluation {

constexpr int64_t kBlock = 128;  // rows whose numbers and sums stay in the second-level cache, or twice as many,
// and so many steps of them; and so many pairs of panels that are multiplied at once. In float32 on AVX-512 it is these
// panels that stay, in the first-level cache.
#ifdef BERT_EVALUATION_AVX512
template <class Kind> constexpr int64_t kSteps = std::is_same_v<Kind, Float32> ? 4 : 1 << 20;
template <class Kind> constexpr int64_t kPairs = std::is_same_v<Kind, Float32> ? 2 : 1;
constexpr bool kFetchesAhead = true;
#else
template <class Kind> constexpr int64_t kSteps = 24;
template <class Kind> constexpr int64_t kPairs = 1;
constexpr bool kFetchesAhead = false;  // on AVX2 it gained nothing
#endif
constexpr int64_t kSums = 1 << 18;  // bytes of sums that wait for more steps
constexpr float kLargest = 127, kSlice = 256;  // steps from 0; and into how many the next slice divides one

struct Arguments {
  int64_t rows, inputs, outputs, stride;  // stride: of x, in numbers
  const void* x;
  const char* weight;
  const float *scales, *bias, *norm_weight, *norm_bias;
  const void* residual = nullptr;
  int64_t added = -1;  // of a chain: what is the residual: -1 none, 0 what is given, else the result of the first, second...
  void* result;
  Activation activation;
  float eps;
};

// Memory of a thread's own for a block.
struct Room {
  Buffer<char> rows;
  Buffer<float> scales, sums;
};

// What a step of a row is worth. NaN is above all.
template <class T> float step_of(const T* x, int64_t inputs) {
  return std::max(std::bit_cast<float>(largest_size(x, inputs)), kLargest * std::numeric_limits<float>::min()) / kLargest;
}

template <class Kind, class T>
struct Linear {
  using left = typename Kind::left;
  using sum = typename Kind::sum;
  static constexpr bool is_sliced = std::is_same_v<Kind, Sliced>, is_scaled = is_sliced || std::is_same_v<Kind, Int8>;
  static constexpr int64_t slice = kTile * row_step<Kind>, row_bytes = Kind::slices * slice;  // of 32 rows in a step
  static constexpr int64_t panel_bytes = Kind::slices * panel_step<Kind>, sums_apart = kTile * kTile;
  const Arguments& of;
  const int64_t steps = up(of.inputs, Kind::step) / Kind::step, panel = steps * panel_bytes, tile_bytes = steps * row_bytes;
  const int64_t pairs = up(of.outputs, kTile) / kTile;  // of panels
  // Rows are read where they lie if they are what is multiplied, but for those that end no tile or no step.
  const bool in_place = std::is_same_v<T, left> && of.inputs % Kind::step == 0;

  const T* x(int64_t row) const { return (const T*)of.x + row * of.stride; }

  // Rows as the products read them: for 32 of them, step after step, and in that slice after slice. There are zeros behind
  // the last number and the last row.
  void prepare(int64_t begin, int64_t end, char* to, float* scales) const {
    for (int64_t row = begin; row < end; row++) {
      const bool there = row < of.rows;
      const T* from = x(there ? row : 0);
      Floats inverse = 1.f;
      if constexpr (is_scaled) {
        *scales = there ? step_of(from, of.inputs) : 1;
        inverse = 1 / *scales++;
      }
      auto* place = (left*)(to + (row / kTile - begin / kTile) * tile_bytes + row % kTile * row_step<Kind>);
      for (int64_t k = 0; k < steps * Kind::step; k += Kind::step, place += row_bytes / sizeof(left)) {
        const int64_t there_are = there ? of.inputs - k : 0;
        const auto number = [&](int i) { return load(from + k + i * kLanes, there_are - i * kLanes) * inverse; };
        if constexpr (is_sliced) {
          const float finest = kSlice * kSlice;
          store_slices(place, slice, number(0) * finest, number(1) * finest, number(2) * finest, number(3) * finest);
        } else if constexpr (is_scaled) {
          store_whole(place, number(0), number(1), number(2), number(3));
        } else {
          for (int i = 0; i < Kind::step / kLanes; i++) store(place + i * kLanes, load(from + k + i * kLanes, there_are - i * kLanes));
        }
      }
    }
  }

  // Rows that are prepared, from `begin` to `end`; with scales for whole numbers, and room for sums before a LayerNorm.
  struct Block {
    int64_t begin, end;
    char* rows;
    float *scales, *sums;
  };

  // A tile of sums whose rows have not all been finished. That is done while the next one is multiplied, since the two
  // take different parts of the processor.
  struct Waiting {
    const sum* from = nullptr;
    int64_t row = 0, rows = 0, column = 0, columns = 0, done = 0;
  };

  // Some more rows of it, to where they belong: the result or, in float32, the sums before a LayerNorm. What is the same for
  // all is read first: the compiler does not know that none of it is what is written here.
  void finish(Waiting& tile, int64_t upto, const Block& block) const {
    if (tile.done >= upto) return;
    const Activation activation = of.activation;
    float* const sums = block.sums;
    const float* const row_scales = block.scales;
    const int64_t outputs = of.outputs, begin = block.begin;
    const auto* residual = (const T*)of.residual;
    auto* result = (T*)of.result;
    for (int64_t at = 0; at < tile.columns; at += kLanes) {
      const int64_t column = tile.column + at, lanes = outputs - column;
      const Floats bias = of.bias ? load(of.bias + column, lanes) : 0.f, scale = is_scaled ? load(of.scales + column, lanes) : 1.f;
      for (int64_t i = tile.done; i < upto; i++) {
        const sum* from = tile.from + i * tile.columns + at;
        const int64_t row = tile.row + i, inside = row - begin, place = row * outputs + column;
        Floats y = load(from + (Kind::sums - 1) * sums_apart);
        for (int k = Kind::sums - 2; k >= 0; k--) y = fma(y, 1 / kSlice, load(from + k * sums_apart));
        if constexpr (is_scaled) y = fma(y, scale * row_scales[inside], bias);
        else y = y + bias;
        y = activate<T>(y, activation);
        if (residual) y = y + load(residual + place, lanes);
        if (sums) store(sums + inside * outputs + column, y, lanes);
        else store(result + place, y, lanes);
      }
    }
    tile.done = upto;
  }

  // `sums` (32 x 32, or more) of a block's rows from `row` on and of pairs of panels from `pair` on, from step `start` on.
  // `between` is called after each turn, of which a step has as many as a product has sums.
  template <int64_t pairs = 1, class Between>
  void multiply(const Tiles& tiles, const Block& block, int64_t row, int64_t pair, int64_t start, int64_t end, sum* sums,
                Waiting& waiting, const Between& between) const {
    const Factor right{of.weight + 2 * pair * panel + start * panel_bytes, panel, panel_bytes, panel_step<Kind>};
    const bool direct = in_place && row + kTile <= of.rows;
    const char* prepared = block.rows + (row - block.begin) / kTile * tile_bytes;
    const Factor rows = direct ? Factor{(const char*)x(row) + start * row_step<Kind>, of.stride * (int64_t)sizeof(T), row_step<Kind>}
                               : Factor{prepared + start * row_bytes, row_step<Kind>, row_bytes, slice};
    const float pace = (float)kTile / ((end - start) * Kind::sums);
    int64_t fetched = row;
    tiles.template multiply<Kind, 2 * pairs>(rows, std::min<int64_t>(kTile, of.rows - row), right, end - start, sums, pairs * kTile, start > 0, [&](int64_t turn) {
      between(turn);
      const int64_t upto = pace * (turn + 1);
      finish(waiting, std::min(waiting.rows, upto), block);
      // What these sums will be written to is on its way until they are.
      for (; !block.sums && fetched < std::min(of.rows, row + upto); fetched++)
        for (int64_t i = 0; i < kTile * pairs; i += 64 / sizeof(T))
          __builtin_prefetch((T*)of.result + fetched * of.outputs + kTile * pair + i, 1);
    });
    finish(waiting, waiting.rows, block);
  }

  Waiting made(const sum* sums, int64_t row, int64_t pair, int64_t pairs = 1) const {
    return {sums, row, std::min<int64_t>(kTile, of.rows - row), kTile * pair, kTile * pairs, 0};
  }

  // All tiles of a block's rows and of pairs of panels. The rows of a block stay in the cache, panels pass by; so many
  // steps at a time that both fit, and so many pairs that the sums that wait for more steps do.
  void multiply(const Tiles& tiles, const Block& block, int64_t first_pair, int64_t last_pair) const {
    static thread_local Buffer<sum> sum_tiles;
    const int64_t most = std::min(steps, kSteps<Kind>), rows = (block.end - block.begin) / kTile, all = last_pair - first_pair;
    const bool wait = steps > most;
    constexpr int64_t tile_size = sums_apart * kPairs<Kind> * Kind::sums;
    const int64_t fit = kSums / (rows * tile_size * (int64_t)sizeof(sum)) * kPairs<Kind>;
    const int64_t group = wait ? std::min(all, std::max(fit, kPairs<Kind>)) : all;
    const int64_t places = wait ? std::max<int64_t>(2, up(group, kPairs<Kind>) / kPairs<Kind> * rows) : 2;  // two that do not wait take turns
    sum* sums = sum_tiles.get(places * tile_size);
    Waiting waiting;
    const bool panels_stay = !kFetchesAhead || 2 * panel * all <= second_level_cache() * 3 / 4;
    for (int64_t begin = first_pair; begin < last_pair; begin += group) {
      const int64_t behind = std::min(last_pair, begin + group);
      if (wait) finish(waiting, waiting.rows, block);  // before its memory is used again
      for (int64_t start = 0; start < steps; start += most) {
        const int64_t end = std::min(steps, start + most);
        const bool more = end < steps;
        int64_t number = 0;
        for (int64_t pair = begin; pair < behind; pair += kPairs<Kind>) {
          const bool last = pair + kPairs<Kind> >= behind;
          const int64_t next = !last ? pair + kPairs<Kind> : more ? begin : behind < last_pair ? behind : first_pair;
          const int64_t then = !last ? start : more ? end : 0;
          const int64_t bytes = panels_stay ? 0 : std::min(most, steps - then) * panel_bytes;
          Ahead ahead(of.weight + 2 * panel * next + then * panel_bytes, bytes, 2 * std::min(kPairs<Kind>, last_pair - next), panel,
                      rows * (end - start) * Kind::sums);
          for (int64_t row = block.begin; row < block.end; row += kTile, number++) {
            sum* tile = sums + number % places * tile_size;
            const auto fetch = [&](int64_t) { ahead.fetch(); };
            const int64_t pairs = std::min(kPairs<Kind>, behind - pair);
            if (pairs == kPairs<Kind>) multiply<kPairs<Kind>>(tiles, block, row, pair, start, end, tile, waiting, fetch);
            else multiply(tiles, block, row, pair, start, end, tile, waiting, fetch);
            waiting = more ? Waiting{} : made(tile, row, pair, pairs);
          }
        }
      }
    }
    finish(waiting, waiting.rows, block);
  }

  // Bytes of a row that stay in the cache while it is at work.
  int64_t bytes_of_row() const { return tile_bytes / kTile + (of.norm_weight ? of.outputs * (int64_t)sizeof(float) : 0); }

  Block block(int64_t begin, int64_t end, Room& room) const {
    const int64_t rows = end - begin;
    return {begin, end, room.rows.get(rows / kTile * tile_bytes), is_scaled ? room.scales.get(rows) : nullptr,
            of.norm_weight ? room.sums.get(rows * of.outputs) : nullptr};
  }

  // All of a block, on one thread.
  void compute(const Tiles& tiles, const Block& block) const {
    if (!in_place) prepare_rows(block, block.begin, block.end);
    else if (block.end > of.rows) prepare_rows(block, block.end - kTile, block.end);
    multiply(tiles, block, 0, pairs);
    if (block.sums) norm_rows(block, block.begin, std::min(block.end, of.rows));
  }

  // A block of all rows, on several threads, each of which has its part of the columns.
  void compute(const Team& team, const Block& block) const {
    if (!in_place) team.split(block.end, [&](int64_t from, int64_t to) { prepare_rows(block, from, to); });
    else if (block.end > of.rows && team.number == 0) prepare_rows(block, block.end - kTile, block.end);
    team.wait();
    team.split(pairs, [&](int64_t from, int64_t to) { multiply(Tiles(), block, from, to); });
    if (!block.sums) return;
    team.wait();
    team.split(of.rows, [&](int64_t from, int64_t to) { norm_rows(block, from, to); });
  }

  void prepare_rows(const Block& block, int64_t from, int64_t to) const {
    prepare(from, to, block.rows + (from - block.begin) / kTile * tile_bytes, block.scales + (from - block.begin));
  }
  void norm_rows(const Block& block, int64_t from, int64_t to) const {
    for (int64_t row = from; row < to; row++)
      norm(block.sums + (row - block.begin) * of.outputs, of.outputs, of.norm_weight, of.norm_bias, of.eps, (T*)of.result + row * of.outputs);
  }
};

}  // namespace bert_evaluation
