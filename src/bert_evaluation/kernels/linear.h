// Linear layers with what follows them, in one pass: act(x W^T + b) + residual, and LayerNorm of that.
//
// Products are of bfloat16; of int8, where each row of x is rounded to 127 steps of its own; or of float32, on AMX as
// three bfloat16. A block of rows stays in the cache from its rounding to its LayerNorm. With few rows, threads share the
// columns instead.
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
// Of float32: rows for which so many bytes of panels, in so many steps, are split.
constexpr int64_t kSplitBlock = 512, kSplit = 1 << 20, kSplitSteps = 24;
constexpr int64_t kFew = 32;  // rows that are multiplied in float32 itself: panels would be split for one tile of them
constexpr int64_t kAlone = 1 << 12;  // numbers that are rounded, or normalised, before another thread has begun
constexpr float kLargest = 127;

struct Arguments {
  int64_t rows, inputs, outputs, stride;  // stride: of x, in numbers
  const void* x;
  const char* weight;
  const float *scales, *bias, *norm_weight, *norm_bias;
  const void* residual;
  void* result;
  Activation activation;
  float eps;
};

// What a step of a row is worth. NaN is above all.
template <class T> float step_of(const T* x, int64_t inputs) {
  return std::max(std::bit_cast<float>(largest_size(x, inputs)), kLargest * std::numeric_limits<float>::min()) / kLargest;
}

template <class Kind, class T>
struct Linear {
  using left = typename Kind::left;
  using sum = typename Kind::sum;
  static constexpr bool is_int8 = std::is_same_v<Kind, Int8>, is_split = std::is_same_v<Kind, SplitFloat32>;
  static constexpr int64_t part = kTile * row_step<Kind>;  // bytes of 32 rows in a step
  const Arguments& of;
  const int64_t steps = up(of.inputs, Kind::step) / Kind::step, panel = steps * panel_step<Kind>;
  const int64_t tile_bytes = steps * Kind::parts * part;
  // Rows are read where they lie if they are what is multiplied, but for those that end no tile or no step.
  const bool in_place = std::is_same_v<T, left> && of.inputs % Kind::step == 0;

  const T* x(int64_t row) const { return (const T*)of.x + row * of.stride; }

  // Rows as the products read them: for 32 of them, step after step, and in that part after part. There are zeros behind
  // the last number and the last row.
  void prepare(int64_t begin, int64_t end, char* to, float* scales) const {
    for (int64_t row = begin; row < end; row++) {
      const bool there = row < of.rows;
      const T* from = x(there ? row : 0);
      Floats inverse = 1.f;
      if constexpr (is_int8) {
        *scales = there ? step_of(from, of.inputs) : 1;
        inverse = 1 / *scales++;
      }
      auto* place = (left*)(to + (row / kTile - begin / kTile) * tile_bytes + row % kTile * row_step<Kind>);
      for (int64_t k = 0; k < steps * Kind::step; k += Kind::step, place += Kind::parts * part / sizeof(left)) {
        const int64_t there_are = there ? of.inputs - k : 0;
        if constexpr (is_int8) {
          store_whole(place, load(from + k, there_are) * inverse, load(from + k + kLanes, there_are - kLanes) * inverse,
                      load(from + k + 2 * kLanes, there_are - 2 * kLanes) * inverse,
                      load(from + k + 3 * kLanes, there_are - 3 * kLanes) * inverse);
        } else {
          for (int64_t n = 0; n < Kind::step; n += kLanes) {
            const Floats y = load(from + k + n, there_are - n);
            if constexpr (is_split) split(y, place + n, part / sizeof(left));
            else store(place + n, y);
          }
        }
      }
    }
  }

  // One row of a tile of sums, to where it belongs: the result or, in float32, `sums`.
  void finish(const sum* from, int64_t row, int64_t column, int64_t end, float scale, float* sums) const {
    for (; column < end; from += kLanes, column += kLanes) {
      const int64_t lanes = of.outputs - column, place = row * of.outputs + column;
      Floats y = load(from);
      if constexpr (is_int8) y = y * (load(of.scales + column, lanes) * scale);
      if (of.bias) y = y + load(of.bias + column, lanes);
      y = activate<T>(y, of.activation);
      if (of.residual) y = y + load((const T*)of.residual + place, lanes);
      if (sums) store(sums + column, y, lanes);
      else store((T*)of.result + place, y, lanes);
    }
  }

  // Rows that are prepared, from `begin` to `end`; with scales for int8, and room for sums before a LayerNorm.
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

  void finish(Waiting& tile, int64_t upto, const Block& block) const {
    for (; tile.done < upto; tile.done++) {
      const int64_t row = tile.row + tile.done, place = row - block.begin;
      finish(tile.from + tile.done * tile.columns, row, tile.column, tile.column + tile.columns, block.scales ? block.scales[place] : 1,
             block.sums ? block.sums + place * of.outputs : nullptr);
    }
  }

  // `sums` (32 x 32, or more) of a block's rows from `row` on and of pairs of panels, which lie at `right`, from step `start`
  // on. `between` is called after each turn, of which a step has as many as a product has terms.
  template <int64_t pairs = 1, class Between>
  void multiply(const Tiles& tiles, const Block& block, int64_t row, const Factor& right, int64_t start, int64_t end, sum* sums,
                Waiting& waiting, const Between& between) const {
    const bool direct = in_place && row + kTile <= of.rows;
    const char* prepared = block.rows + (row - block.begin) / kTile * tile_bytes;
    const Factor rows = direct ? Factor{(const char*)x(row) + start * row_step<Kind>, of.stride * (int64_t)sizeof(T), row_step<Kind>}
                               : Factor{prepared + start * Kind::parts * part, row_step<Kind>, Kind::parts * part, part};
    const float pace = (float)waiting.rows / ((end - start) * std::size(Kind::terms));
    tiles.template multiply<Kind, 2 * pairs>(rows, std::min<int64_t>(kTile, of.rows - row), right, end - start, sums, pairs * kTile, start > 0, [&](int64_t turn) {
      between(turn);
      finish(waiting, (int64_t)(pace * (turn + 1)), block);
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
    constexpr int64_t tile_size = kTile * kTile * kPairs<Kind>;
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
          const int64_t bytes = panels_stay ? 0 : std::min(most, steps - then) * panel_step<Kind>;
          Ahead ahead(of.weight + 2 * panel * next + then * panel_step<Kind>, bytes, 2 * std::min(kPairs<Kind>, last_pair - next), panel, rows * (end - start));
          const Factor right{of.weight + 2 * pair * panel + start * panel_step<Kind>, panel, panel_step<Kind>};
          for (int64_t row = block.begin; row < block.end; row += kTile, number++) {
            sum* tile = sums + number % places * tile_size;
            const auto fetch = [&](int64_t) { ahead.fetch(); };
            const int64_t pairs = std::min(kPairs<Kind>, behind - pair);
            if (pairs == kPairs<Kind>) multiply<kPairs<Kind>>(tiles, block, row, right, start, end, tile, waiting, fetch);
            else multiply(tiles, block, row, right, start, end, tile, waiting, fetch);
            waiting = more ? Waiting{} : made(tile, row, pair, pairs);
          }
        }
      }
    }
    finish(waiting, waiting.rows, block);
  }

  // The same of what is split. Here some steps of some panels, once split, stay in the cache, and rows pass by.
  void multiply_split(const Tiles& tiles, const Block& block, int64_t first_pair, int64_t last_pair) const {
    static thread_local Buffer<bfloat16> split_panels;
    static thread_local Buffer<float> sum_tiles;
    constexpr int64_t numbers = kPanel * Kind::step, step = Kind::parts * panel_step<Kind>;  // of a panel in a step
    // Beside few rows there is room for the next panels, which come while these are multiplied; and they matter more.
    const bool few = block.end - block.begin <= kBlock;
    const int64_t most = std::min(steps, kSplitSteps), group = std::max<int64_t>(1, (few ? kSplit / 4 : kSplit) / (2 * most * step));
    bfloat16* panels = split_panels.get(2 * group * most * Kind::parts * numbers);
    float* sums = sum_tiles.get(std::max<int64_t>(2, steps > most ? (block.end - block.begin) / kTile * group : 0) * kTile * kTile);
    Waiting waiting;
    for (int64_t pair = first_pair; pair < last_pair; pair += group) {
      const int64_t pairs = std::min(group, last_pair - pair);
      finish(waiting, waiting.rows, block);  // before its memory is used again
      for (int64_t start = 0; start < steps; start += most) {
        const int64_t end = std::min(steps, start + most), size = (end - start) * Kind::parts * numbers;
        for (int64_t i = 0; i < 2 * pairs; i++)
          for (int64_t k = 0; k < end - start; k++) {
            const float* from = (const float*)of.weight + ((2 * pair + i) * steps + start + k) * numbers;
            for (int64_t n = 0; n < numbers; n += 2 * kPanel)
              split_pair(from + n, from + n + kPanel, panels + i * size + k * Kind::parts * numbers + n, numbers);
          }
        const bool more = end < steps;
        const int64_t next = more ? pair : pair + group, then = more ? end : 0, count = std::clamp<int64_t>(last_pair - next, 0, group);
        const int64_t bytes = few && count ? std::min(most, steps - then) * numbers * sizeof(float) : 0;
        Ahead ahead(of.weight + (2 * next * steps + then) * numbers * sizeof(float), bytes, 2 * count, steps * numbers * sizeof(float),
                    (block.end - block.begin) / kTile * pairs * (end - start) * std::size(Kind::terms));
        int64_t number = 0;
        for (int64_t row = block.begin; row < block.end; row += kTile)
          for (int64_t i = 0; i < pairs; i++, number++) {
            float* tile = sums + (steps > most ? number : number % 2) * kTile * kTile;
            multiply(tiles, block, row, {panels + 2 * i * size, size * 2, step, panel_step<Kind>}, start, end, tile, waiting, [&](int64_t) { ahead.fetch(); });
            waiting = more ? Waiting{} : made(tile, row, pair + i);
          }
      }
    }
    finish(waiting, waiting.rows, block);
  }

  void run() const {
    static thread_local Buffer<char> row_buffer;
    static thread_local Buffer<float> scale_buffer, sum_buffer;
    const int64_t pairs = up(of.outputs, kTile) / kTile, threads = at::get_num_threads();
    const bool norms = of.norm_weight != nullptr;
    auto room = [&](int64_t begin, int64_t end) {
      const int64_t rows = end - begin;
      return Block{begin, end, row_buffer.get(rows / kTile * tile_bytes), is_int8 ? scale_buffer.get(rows) : nullptr,
                   norms ? sum_buffer.get(rows * of.outputs) : nullptr};
    };
    auto prepare_rows = [&](const Block& block, int64_t from, int64_t to) {
      prepare(from, to, block.rows + (from - block.begin) / kTile * tile_bytes, block.scales + (from - block.begin));
    };
    auto multiply_all = [&](const Tiles& tiles, const Block& block, int64_t from, int64_t to) {
      if constexpr (is_split) multiply_split(tiles, block, from, to);
      else multiply(tiles, block, from, to);
    };
    auto norm_rows = [&](const Block& block, int64_t from, int64_t to) {
      for (int64_t row = from; row < to; row++)
        norm(block.sums + (row - block.begin) * of.outputs, of.outputs, of.norm_weight, of.norm_bias, of.eps, (T*)of.result + row * of.outputs);
    };
    const int64_t end = up(of.rows, kTile);
    if (of.rows >= kBlock * threads || threads == 1) {
      // Of larger blocks, fewer read the panels again.
      const int64_t bytes = tile_bytes / kTile + (norms ? of.outputs * (int64_t)sizeof(float) : 0);
      const bool may_double = 2 * kBlock * bytes <= second_level_cache() * 3 / 8;
      const int64_t most = is_split ? kSplitBlock : may_double ? 2 * kBlock : kBlock;
      const int64_t rows = up(of.rows, threads) / threads, blocks = up(rows, most) / most * threads;
      const int64_t size = up(up(of.rows, blocks) / blocks, kTile);
      share(up(of.rows, size) / size, [&](const Tiles& tiles, int64_t each) {
        const Block block = room(each * size, std::min(end, (each + 1) * size));
        if (!in_place) prepare_rows(block, block.begin, block.end);
        else if (block.end > of.rows) prepare_rows(block, block.end - kTile, block.end);
        multiply_all(tiles, block, 0, pairs);
        if (norms) norm_rows(block, block.begin, std::min(block.end, of.rows));
      });
      return;
    }
    const Block block = room(0, end);
    if (!in_place) at::parallel_for(0, end, up(kAlone, of.inputs) / of.inputs, [&](int64_t from, int64_t to) { prepare_rows(block, from, to); });
    else if (end > of.rows) prepare_rows(block, end - kTile, end);
    at::parallel_for(0, pairs, 1, [&](int64_t from, int64_t to) {
      Tiles tiles;
      multiply_all(tiles, block, from, to);
    });
    if (norms) at::parallel_for(0, of.rows, up(kAlone, of.outputs) / of.outputs, [&](int64_t from, int64_t to) { norm_rows(block, from, to); });
  }
};

}  // namespace bert_evaluation
