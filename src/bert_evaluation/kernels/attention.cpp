// Attention in bfloat16 or float32 of sequences to themselves: softmax(scale Q K^T) V, each sequence and head apart.
//
// Keys and values of a head are packed once; then 32 queries at a time have all their scores in the cache, in float32,
// from the products to the softmax. No score is written to memory.
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

constexpr int64_t kManyBlocks = 3;

template <class T> struct Scratch {
  Buffer<T> keys, values, probabilities, queries;
  Buffer<float> scores;
  Buffer<Lanes> lanes;
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

// Which of a query's keys are seen, 16 at a time; and how many, tile by tile from the first one, need not be looked at.
struct Seen {
  Lanes* lanes;
  int64_t clear = 0;
  void find(const bool* mask, int64_t length) {
    for (int64_t key = 0; key < up(length, kTile); key += kLanes)
      lanes[key / kLanes] = load_lanes(mask ? mask + key : nullptr, length - key);
    const void* hidden = mask ? std::memchr(mask, false, length) : nullptr;
    clear = (hidden ? (const bool*)hidden - mask : length) / kTile * kTile;
  }
};

// Scores of one query to e^(score - largest), zeros where it sees nothing; returns one over their sum.
template <class T> float softmax(const float* scores, const Seen& seen, int64_t padded, float scale, T* to) {
  const Floats hidden = -std::numeric_limits<float>::infinity(), factor = scale * kLog2E;
  const auto each = [&](const auto& take) {
    for (int64_t key = 0; key < seen.clear; key += kTile)
      for (int i = 0; i < 2; i++) take(i, key + i * kLanes, [](Floats x, Floats) { return x; });
    for (int64_t key = seen.clear; key < padded; key += kTile)
      for (int i = 0; i < 2; i++)
        take(i, key + i * kLanes, [&](Floats x, Floats otherwise) { return choose(seen.lanes[key / kLanes + i], x, otherwise); });
  };
  Floats most[2] = {hidden, hidden}, totals[2];
  each([&](int i, int64_t key, const auto& if_seen) { most[i] = if_seen(max(most[i], load(scores + key) * factor), most[i]); });
  const float highest = largest(max(most[0], most[1]));
  const bool sees = highest != -std::numeric_limits<float>::infinity();  // also where it is NaN
  const Floats off = sees ? -highest : 0;
  each([&](int i, int64_t key, const auto& if_seen) {
    const Floats x = fma(load(scores + key), factor, off);
    Floats y;
    if constexpr (std::is_same_v<T, float>) y = exp2(x, kExact);
    else y = exp2(x, kNear);
    y = if_seen(y, 0.f);
    totals[i] = totals[i] + y;
    store(to + key, y);
  });
  return sees ? 1 / sum(totals[0] + totals[1]) : 0;
}

// Some queries have their scores multiplied, and others their values, while those between them are at their softmax: the
// tiles, which multiply, and the vector units take turns at the same queries, but not at the same time.
template <class T>
void attend_head(const Tiles& tiles, const Heads<T>& of, const Sequence& to, int64_t head, const T* keys, const T* values, Scratch<T>& scratch) {
  using Kind = Product<T>;
  const int64_t inner = up(of.width, kTile), length = up(to.length, kTile);  // a step has 32 numbers
  const int64_t key_steps = inner / kTile, value_steps = length / kTile, blocks = length / kTile;
  float* const scores = scratch.scores.get(2 * kTile * length);
  T* const probabilities = scratch.probabilities.get(2 * kTile * length);
  alignas(64) float tile[kTile * kTile];
  float shares[2][kTile];
  Seen seen{scratch.lanes.get(length / kLanes)};
  if (!to.mask_stride) seen.find(to.mask, to.length);
  const auto scores_of = [&](int64_t block) { return scores + block % 2 * kTile * length; };
  const auto probabilities_of = [&](int64_t block) { return probabilities + block % 2 * kTile * length; };
  const auto rows_of = [&](int64_t block) { return std::min<int64_t>(kTile, to.length - block * kTile); };

  const auto multiply_keys = [&](int64_t block, auto&& between) {
    const int64_t query = block * kTile, rows = rows_of(block);
    const T* left = of.query + (to.start + query) * of.query_stride + head * of.width;
    int64_t stride = of.query_stride;
    if (rows < kTile || inner != of.width) {
      T* copy = scratch.queries.get(kTile * inner);
      for (int64_t row = 0; row < kTile; row++)
        for (int64_t k = 0; k < inner; k += kLanes)
          store(copy + row * inner + k, row < rows ? load(left + row * stride + k, of.width - k) : 0.f);
      left = copy, stride = inner;
    }
    for (int64_t key = 0; key < length; key += kTile)
      tiles.multiply<Kind>({left, stride * (int64_t)sizeof(T), row_step<Kind>}, rows, {keys + key * inner, key_steps * panel_step<Kind>, panel_step<Kind>},
                           key_steps, scores_of(block) + key, length, false, between);
  };
  const auto soften = [&](int64_t block, int64_t row) {
    if (to.mask_stride) seen.find(to.mask + (block * kTile + row) * to.mask_stride, to.length);
    shares[block % 2][row] = softmax(scores_of(block) + row * length, seen, length, of.scale, probabilities_of(block) + row * length);
  };
  const auto multiply_values = [&](int64_t block, auto&& between) {
    const int64_t rows = rows_of(block);
    std::memset((void*)(probabilities_of(block) + rows * length), 0, (kTile - rows) * length * sizeof(T));
    for (int64_t column = 0; column < inner; column += kTile) {
      tiles.multiply<Kind>({probabilities_of(block), length * (int64_t)sizeof(T), row_step<Kind>}, rows,
                           {values + column * length, value_steps * panel_step<Kind>, panel_step<Kind>}, value_steps, tile, kTile, false, between);
      for (int64_t row = 0; row < rows; row++) {
        T* result = of.result + (to.start + block * kTile + row) * of.result_stride + head * of.width + column;
        for (int half = 0; half < 2; half++)
          store(result + half * kLanes, load(tile + row * kTile + half * kLanes) * shares[block % 2][row], of.width - column - half * kLanes);
      }
    }
  };

  const int64_t lag = std::is_same_v<T, bfloat16> && tiles.amx && blocks >= kManyBlocks ? 1 : 0;
  for (int64_t block = 0; block < blocks + 2 * lag; block++) {
    const bool has_keys = block < blocks, has_values = block >= 2 * lag;
    const int64_t softened = block - lag, rows = softened >= 0 && softened < blocks ? rows_of(softened) : 0;
    const float pace = lag * (float)rows / (has_keys * blocks * key_steps + has_values * inner / kTile * value_steps);
    int64_t turn = 0, row = 0;
    const auto soften_upto = [&](int64_t end) {
      for (; row < end; row++) soften(softened, row);
    };
    const auto between = [&](int64_t) { soften_upto((int64_t)(pace * ++turn)); };
    if (has_keys) multiply_keys(block, between);
    if (!lag) soften_upto(rows);
    if (has_values) multiply_values(block - 2 * lag, between);
    soften_upto(rows);
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
