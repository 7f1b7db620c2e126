// Attention in bfloat16 or float32 of sequences to themselves: softmax(scale Q K^T) V, each sequence and head apart.
//
// Keys and values of a head are packed once. Scores of 32 queries and 32 keys, in float32, are softened as soon as they are
// multiplied; none is written to memory, nor further than the first-level cache.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ne.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>
#include <cstring>
#include <functional>
#include <limits>
#include <optional>
#include <vector>
#include "equal.h"
#include "share.h"
#include "tiles.h"

namespace bert_evaluation {
namespace {

// Where a sequence's rows are, and which of its keys a query sees.
struct Sequence {
  int64_t start, length;
  const bool* mask;       // of the first query; null: all
  int64_t mask_stride;    // from query to query
};

template <class T> using Product = std::conditional_t<std::is_same_v<T, float>, Float32, Bf16>;

template <class T> struct Scratch {
  Buffer<T> keys, values, probabilities, queries;
};

template <class T> struct Heads {
  const T *query, *key, *value;
  int64_t query_stride, key_stride, value_stride, width;  // strides: from token to token
  T* result;
  int64_t result_stride;
  float scale;
};

// Keys as columns: for 16 keys, group after group of their numbers.
template <class T> void pack_keys(const T* keys, int64_t stride, int64_t length, int64_t width, int64_t padded, T* to) {
  constexpr int64_t numbers = 4 / sizeof(T);
  const int64_t groups = width / numbers;
#ifdef BERT_EVALUATION_AVX512
  for (int64_t key = 0; key < up(length, kTile); key += kPanel)
    for (int64_t group = 0; group < padded / numbers; group += kLanes) {
      __m512i rows[kPanel];
      for (int64_t i = 0; i < kPanel; i++)
        rows[i] = _mm512_maskz_loadu_epi32(first(key + i < length ? groups - group : 0), keys + (key + i) * stride + numbers * group);
      transpose(rows);
      for (int64_t i = 0; i < kLanes; i++, to += numbers * kPanel) _mm512_storeu_si512(to, rows[i]);
    }
#else
  struct Group {
    T those[numbers];
  };
  for (int64_t key = 0; key < up(length, kTile); key += kPanel, to += kPanel * padded) {
    if (key + kPanel > length || padded > width) std::memset((void*)to, 0, kPanel * padded * sizeof(T));
    for (int64_t i = 0; i < std::min<int64_t>(kPanel, length - key); i++)
      for (int64_t group = 0; group < groups; group++)
        ((Group*)to)[group * kPanel + i] = ((const Group*)(keys + (key + i) * stride))[group];
  }
#endif
}

// Values as they are, for 16 columns row after row: in float32 each alone, in bfloat16 two numbers of a column side by side.
template <class T> void pack_values(const T* values, int64_t stride, int64_t length, int64_t width, int64_t padded, T* to) {
  constexpr int64_t rows = 4 / sizeof(T);
  for (int64_t column = 0; column < up(width, kTile); column += kPanel)
    for (int64_t row = 0; row < padded; row += rows, to += rows * kPanel) {
      auto numbers = [&](int64_t row) { return load(values + row * stride + column, row < length ? width - column : 0); };
      if constexpr (rows == 1) store(to, numbers(row));
      else store_pairs(to, numbers(row), numbers(row + 1));
    }
}

constexpr float kNone = -std::numeric_limits<float>::infinity(), kTooMuch = 0x1p64f;

// The softmax of up to 32 queries, keys after keys: e^(score - reference), and the sums of that. The reference only has to keep
// numbers in range, and bfloat16 has the range of float32. So it is the first score that a query sees; where others are out
// of range of that, the largest one.
template <class T>
struct Softmax {
  const Sequence& of;
  const int64_t query, rows, stride;
  const float factor;
  T* const result;
  float references[kTile], shares[kTile];
  bool in_range[kTile];
  Floats totals[kTile];

  Softmax(const Sequence& of, int64_t query, int64_t stride, float scale, T* result)
      : of(of), query(query), rows(std::min<int64_t>(kTile, of.length - query)), stride(stride), factor(scale * kLog2E), result(result) {
    std::fill_n(references, kTile, kNone);
    std::memset((void*)(result + rows * stride), 0, (kTile - rows) * stride * sizeof(T));
  }

  const bool* mask(int64_t row, int64_t key) const { return of.mask ? of.mask + (query + row) * of.mask_stride + key : nullptr; }
  Lanes seen(int64_t row, int64_t key) const { return load_lanes(mask(row, key), of.length - key); }

  // Scores of 32 keys from `key` on.
  void add(const float* scores, int64_t key) {
    const bool all = !of.mask && key + kTile <= of.length;
    Lanes both[2];
    for (int64_t row = 0; row < rows; row++, scores += kTile) {
      if (references[row] == kNone) references[row] = first_seen(scores, row, key);
      if (all) {
        add_row(scores, row, key, [](int, Floats y) { return y; });
        continue;
      }
      for (int i = 0; i < 2 && (row == 0 || of.mask_stride); i++) both[i] = seen(row, key + i * kLanes);
      add_row(scores, row, key, [&](int half, Floats y) { return choose(both[half], y, 0.f); });
    }
  }
  template <class Seen> void add_row(const float* scores, int64_t row, int64_t key, const Seen& if_seen) {
    const Floats off = references[row] == kNone ? 0 : -references[row], factor = this->factor;
    const auto softened = [&](int half) {
      const Floats x = fma(load(scores + half * kLanes), factor, off);
      if constexpr (std::is_same_v<T, float>) return if_seen(half, exp2(x));
      else return if_seen(half, near_exp2(x));
    };
    // Sums are of rounded numbers, so that where one key is all that matters, its share is one.
    totals[row] = store_and_add(result + row * stride + key, softened(0), softened(1), totals[row]);
  }
  float first_seen(const float* scores, int64_t row, int64_t key) const {
    const bool* seen = mask(row, key);
    for (int64_t i = 0; i < std::min<int64_t>(kTile, of.length - key); i++)
      if ((!seen || seen[i]) && scores[i] * factor != kNone) return scores[i] * factor;
    return kNone;
  }

  // Behind the last keys: what makes each row's sum 1, nothing where it sees nothing. Returns whether all were in range.
  bool finish() {
    bool all = true;
    for (int64_t row = 0; row < rows; row++) {
      const float total = sum(totals[row]);
      shares[row] = references[row] == kNone ? 0 : 1 / total;
      all &= in_range[row] = !(total > kTooMuch);
    }
    return all;
  }

  // To begin again, with the largest score as the reference of those that were not.
  void raise(const float* scores, int64_t key) {
    for (int64_t row = 0; row < rows; row++, scores += kTile) {
      totals[row] = 0;
      for (int i = 0; i < kTile && !in_range[row]; i += kLanes)
        references[row] = std::max(references[row], largest(choose(seen(row, key + i), load(scores + i) * factor, kNone)));
    }
  }
};

template <class T>
void attend_head(const Tiles& tiles, const Heads<T>& of, const Sequence& to, int64_t head, const T* keys, const T* values, Scratch<T>& scratch) {
  using Kind = Product<T>;
  const int64_t inner = up(of.width, kTile), length = up(to.length, kTile);  // a step has 32 numbers
  const int64_t key_steps = inner / kTile, value_steps = length / kTile;
  T* const probabilities = scratch.probabilities.get(kTile * length);
  alignas(64) float tile[kTile * kTile];
  for (int64_t query = 0; query < to.length; query += kTile) {
    Softmax<T> softmax(to, query, length, of.scale, probabilities);
    const int64_t rows = softmax.rows;
    const T* left = of.query + (to.start + query) * of.query_stride + head * of.width;
    int64_t stride = of.query_stride;
    if (rows < kTile || inner != of.width) {
      T* copy = scratch.queries.get(kTile * inner);
      for (int64_t row = 0; row < kTile; row++)
        for (int64_t k = 0; k < inner; k += kLanes)
          store(copy + row * inner + k, row < rows ? load(left + row * stride + k, of.width - k) : 0.f);
      left = copy, stride = inner;
    }
    const auto scores = [&](const auto& take) {
      tiles.multiply_all<Kind>({left, stride * (int64_t)sizeof(T), row_step<Kind>}, rows, {keys, key_steps * panel_step<Kind>, panel_step<Kind>},
                               key_steps, value_steps, [&](int64_t number, const float* made) { take(made, number * kTile); });
    };
    const auto add = [&](const float* made, int64_t key) { softmax.add(made, key); };
    scores(add);
    if (!softmax.finish()) {
      scores([&](const float* made, int64_t key) { softmax.raise(made, key); });
      scores(add);
      softmax.finish();
    }
    for (int64_t column = 0; column < inner; column += kTile) {
      tiles.multiply<Kind>({probabilities, length * (int64_t)sizeof(T), row_step<Kind>}, rows,
                           {values + column * length, value_steps * panel_step<Kind>, panel_step<Kind>}, value_steps, tile, kTile, false, [](int64_t) {});
      for (int64_t row = 0; row < rows; row++) {
        T* result = of.result + (to.start + query + row) * of.result_stride + head * of.width + column;
        for (int half = 0; half < 2; half++)
          store(result + half * kLanes, load(tile + row * kTile + half * kLanes) * softmax.shares[row], of.width - column - half * kLanes);
      }
    }
  }
}

template <class T>
void run(const Heads<T>& of, int64_t sequences, int64_t heads, const std::function<Sequence(int64_t, int64_t)>& sequence) {
  share(sequences * heads, [&](const Tiles& tiles, int64_t task) {
    static thread_local Scratch<T> scratch;
    const int64_t head = task % heads, inner = up(of.width, kTile);
    const Sequence to = sequence(task / heads, head);
    const int64_t length = up(to.length, kTile);
    T *keys = scratch.keys.get(length * inner), *values = scratch.values.get(length * inner);
    const int64_t key_place = to.start * of.key_stride + head * of.width, value_place = to.start * of.value_stride + head * of.width;
    pack_keys(of.key + key_place, of.key_stride, to.length, of.width, inner, keys);
    pack_values(of.value + value_place, of.value_stride, to.length, of.width, length, values);
    attend_head(tiles, of, to, head, keys, values, scratch);
  });
}

// From token to token; the stride of a dimension of size 1 says nothing.
int64_t token_stride(const at::Tensor& x) { return x.size(1) > 1 ? x.stride(1) : x.size(0) > 1 ? x.stride(0) : x.size(2); }

// Rows of a tensor (batch, length, width); copied only where they are not as far apart everywhere.
at::Tensor in_rows(const at::Tensor& x) {
  const bool even = x.size(0) == 1 || x.size(1) == 1 || x.stride(0) == x.size(1) * x.stride(1);
  return x.stride(2) == 1 && even ? x : x.contiguous();
}

void check(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, int64_t heads) {
  for (const auto& each : {query, key, value})
    TORCH_CHECK(each.dim() == 3 && each.scalar_type() == query.scalar_type() && each.sizes() == query.sizes() && heads > 0 &&
                    each.size(2) % (2 * heads) == 0,
                "Query, key and value are of one shape (batch, length, width) and one type, and a head's width is even.");
}

// Other types are computed in plain PyTorch.
bool takes(at::ScalarType type) { return type == at::kFloat || (type == at::kBFloat16 && kMultipliesBf16); }

template <class T>
at::Tensor attend_in(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, int64_t heads, double scale,
                     int64_t sequences, const std::function<Sequence(int64_t, int64_t)>& sequence) {
  at::Tensor result = at::empty(query.sizes(), query.options());
  if (result.numel() == 0) return result;
  const at::Tensor q = in_rows(query), k = in_rows(key), v = in_rows(value);
  run<T>({q.const_data_ptr<T>(), k.const_data_ptr<T>(), v.const_data_ptr<T>(), token_stride(q), token_stride(k), token_stride(v),
          query.size(2) / heads, result.data_ptr<T>(), query.size(2), (float)scale},
         sequences, heads, sequence);
  return result;
}

at::Tensor attend(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, int64_t heads, double scale,
                  int64_t sequences, const std::function<Sequence(int64_t, int64_t)>& sequence) {
  return (query.scalar_type() == at::kFloat ? attend_in<float> : attend_in<bfloat16>)(query, key, value, heads, scale, sequences, sequence);
}

at::Tensor attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                     const std::optional<at::Tensor>& mask, int64_t heads, double scale) {
  check(query, key, value, heads);
  if (!takes(query.scalar_type())) {
    static const auto equal = in_plain_pytorch<decltype(attention)>("attention");
    return equal.call(query, key, value, mask, heads, scale);
  }
  const int64_t batch = query.size(0), length = query.size(1);
  at::Tensor visible;
  if (mask) {
    visible = mask->expand({batch, heads, length, length});
    TORCH_CHECK(visible.scalar_type() == at::kBool, "The mask is boolean.");
    if (visible.stride(3) != 1) visible = visible.contiguous();
  }
  const bool* seen = mask ? visible.const_data_ptr<bool>() : nullptr;
  return attend(query, key, value, heads, scale, batch, [&](int64_t row, int64_t head) {
    return seen ? Sequence{row * length, length, seen + row * visible.stride(0) + head * visible.stride(1), visible.stride(2)}
                : Sequence{row * length, length, nullptr, 0};
  });
}

// The same of packed sequences, (1, tokens, width) in all: as many tokens of each as its row of `mask` has ones.
at::Tensor packed_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& mask,
                            int64_t heads, double scale) {
  check(query, key, value, heads);
  if (!takes(query.scalar_type())) {
    static const auto equal = in_plain_pytorch<decltype(packed_attention)>("packed_attention");
    return equal.call(query, key, value, mask, heads, scale);
  }
  TORCH_CHECK(mask.dim() == 2, "The mask is of shape (batch, length).");
  const at::Tensor lengths = mask.ne(0).sum(1);
  const int64_t* counts = lengths.const_data_ptr<int64_t>();
  std::vector<Sequence> sequences;
  int64_t start = 0;
  for (int64_t row = 0; row < lengths.size(0); row++) {
    if (counts[row]) sequences.push_back({start, counts[row], nullptr, 0});
    start += counts[row];
  }
  TORCH_CHECK(query.size(0) == 1 && query.size(1) == start, "There are as many tokens as the mask has ones.");
  return attend(query, key, value, heads, scale, (int64_t)sequences.size(), [&](int64_t row, int64_t) { return sequences[row]; });
}

}  // namespace

TORCH_LIBRARY_IMPL(bert_evaluation, CPU, m) {
  m.impl("attention", attention);
  m.impl("packed_attention", packed_attention);
}

}  // namespace bert_evaluation
