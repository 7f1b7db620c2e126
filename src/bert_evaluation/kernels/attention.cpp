// Attention in bfloat16 of sequences to themselves: softmax(scale Q K^T) V, each sequence and head apart.
//
// Keys and values of a head are packed once; then 32 queries at a time have all their scores in the cache, in float32,
// from the products to the softmax. No score is written to memory.
#include <ATen/Parallel.h>
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
#include "tiles.h"

namespace bert_evaluation {
namespace {

// Where a sequence's rows are, and which of its keys a query sees.
struct Sequence {
  int64_t start, length;
  const bool* mask;       // of the first query; null: all
  int64_t mask_stride;    // from query to query
};

struct Scratch {
  Buffer<bfloat16> keys, values, probabilities, queries;
  Buffer<float> scores;
  Buffer<__mmask16> seen;
};

struct Heads {
  const bfloat16 *query, *key, *value;
  int64_t query_stride, key_stride, value_stride, width;  // strides: from token to token
  bfloat16* result;
  int64_t result_stride;
  float scale;
};

// Keys as columns: for 16 keys, pair after pair of their numbers.
void pack_keys(const bfloat16* keys, int64_t stride, int64_t length, int64_t width, int64_t padded, bfloat16* to) {
  const int64_t pairs = padded / 2;
  for (int64_t key = 0; key < up(length, kTile); key += kLanes, to += kLanes * padded) {
    __mmask16 there = first(length - key);
    __m512i places = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                        _mm512_set1_epi32((int)(stride * sizeof(bfloat16))));
    for (int64_t pair = 0; pair < pairs; pair++) {
      __mmask16 mask = 2 * pair < width ? there : 0;
      __m512i column = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), mask, places, keys + key * stride + 2 * pair, 1);
      _mm512_storeu_si512(to + pair * 2 * kLanes, column);
    }
  }
}

// Values as they are, rows in pairs: for 16 columns, row after row of two values' numbers.
void pack_values(const bfloat16* values, int64_t stride, int64_t length, int64_t width, int64_t padded, bfloat16* to) {
  for (int64_t column = 0; column < up(width, kTile); column += kLanes)
    for (int64_t row = 0; row < padded; row += 2, to += 2 * kLanes) {
      __mmask16 mask = first(width - column);
      __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(row < length ? mask : 0, values + row * stride + column));
      __m512i odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(row + 1 < length ? mask : 0, values + (row + 1) * stride + column));
      _mm512_storeu_si512(to, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
}

// Which of a query's keys are seen, 16 at a time.
void find_seen(const bool* mask, int64_t length, __mmask16* to) {
  for (int64_t key = 0; key < up(length, kTile); key += kLanes) {
    __mmask16 there = first(length - key);
    if (mask) {
      __m128i bytes = _mm_maskz_loadu_epi8(there, mask + key);
      there = _mm_test_epi8_mask(bytes, bytes);
    }
    *to++ = there;
  }
}

// Scores of one query to e^(score - largest) in bfloat16, zeros where it sees nothing; returns one over their sum.
float softmax(const float* scores, const __mmask16* seen, int64_t padded, float scale, bfloat16* to) {
  const __m512 hidden = _mm512_set1_ps(-std::numeric_limits<float>::infinity()), factor = _mm512_set1_ps(scale * kLog2E);
  __m512 largest[2] = {hidden, hidden};
  for (int64_t key = 0; key < padded; key += kTile)
    for (int i = 0; i < 2; i++) {
      __m512 score = _mm512_mul_ps(_mm512_loadu_ps(scores + key + i * kLanes), factor);
      largest[i] = _mm512_mask_max_ps(largest[i], seen[key / kLanes + i], largest[i], score);
    }
  const float most = _mm512_reduce_max_ps(_mm512_max_ps(largest[0], largest[1]));
  const bool sees = most != -std::numeric_limits<float>::infinity();  // also where it is NaN
  __m512 off = _mm512_set1_ps(sees ? -most : 0), totals[2] = {};
  for (int64_t key = 0; key < padded; key += kTile)
    for (int i = 0; i < 2; i++) {
      __m512 y = exp2(_mm512_fmadd_ps(_mm512_loadu_ps(scores + key + i * kLanes), factor, off), kNear);
      y = _mm512_maskz_mov_ps(seen[key / kLanes + i], y);
      totals[i] = _mm512_add_ps(totals[i], y);
      store(to + key + i * kLanes, y, 0xffff);
    }
  return sees ? 1 / _mm512_reduce_add_ps(_mm512_add_ps(totals[0], totals[1])) : 0;
}

void attend(const Tiles& tiles, const Heads& of, const Sequence& to, int64_t head, int64_t first_query, int64_t last_query,
            const bfloat16* keys, const bfloat16* values, Scratch& scratch) {
  const int64_t inner = up(of.width, kTile), length = up(to.length, kTile);  // a step has 32 bfloat16
  const int64_t key_steps = inner / kTile, value_steps = length / kTile;
  float* scores = scratch.scores.get(kTile * (length + kTile));
  bfloat16* probabilities = scratch.probabilities.get(kTile * length);
  alignas(64) float tile[kTile * kTile];
  float shares[kTile];
  __mmask16* seen = scratch.seen.get(length / kLanes);
  if (!to.mask_stride) find_seen(to.mask, to.length, seen);
  auto nothing = [](int64_t) {};
  for (int64_t query = first_query; query < last_query; query += kTile) {
    const int64_t rows = std::min<int64_t>(kTile, last_query - query);
    const bfloat16* left = of.query + (to.start + query) * of.query_stride + head * of.width;
    int64_t stride = of.query_stride;
    if (rows < kTile || inner != of.width) {
      bfloat16* copy = scratch.queries.get(kTile * inner);
      for (int64_t row = 0; row < kTile; row++)
        for (int64_t k = 0; k < inner; k += kLanes)
          store(copy + row * inner + k, row < rows ? load(left + row * stride + k, first(of.width - k)) : _mm512_setzero_ps(), 0xffff);
      left = copy, stride = inner;
    }
    for (int64_t key = 0; key < length; key += kTile)
      tiles.multiply<Bf16>({left, 2 * stride, kStep}, {keys + key * inner, key_steps * kPanelStep, kPanelStep}, key_steps, scores + key, length, false, nothing);
    for (int64_t row = 0; row < kTile; row++) {
      if (row >= rows) {
        std::memset((void*)(probabilities + row * length), 0, 2 * length);
        continue;
      }
      if (to.mask_stride) find_seen(to.mask + (query + row) * to.mask_stride, to.length, seen);
      shares[row] = softmax(scores + row * length, seen, length, of.scale, probabilities + row * length);
    }
    for (int64_t column = 0; column < inner; column += kTile) {
      tiles.multiply<Bf16>({probabilities, 2 * length, kStep}, {values + column * length, value_steps * kPanelStep, kPanelStep}, value_steps, tile,
                           kTile, false, nothing);
      for (int64_t row = 0; row < rows; row++) {
        bfloat16* result = of.result + (to.start + query + row) * of.result_stride + head * of.width + column;
        for (int half = 0; half < 2; half++)
          store(result + half * kLanes, _mm512_mul_ps(_mm512_load_ps(tile + row * kTile + half * kLanes), _mm512_set1_ps(shares[row])),
                first(of.width - column - half * kLanes));
      }
    }
  }
}

void run(const Heads& of, int64_t sequences, int64_t heads, const std::function<Sequence(int64_t, int64_t)>& sequence) {
  const int64_t tasks = sequences * heads;
  at::parallel_for(0, tasks, 1, [&](int64_t from, int64_t end) {
    static thread_local Scratch scratch;
    Tiles tiles;
    const int64_t inner = up(of.width, kTile);
    for (int64_t task = from; task < end; task++) {
      const int64_t head = task % heads;
      const Sequence to = sequence(task / heads, head);
      const int64_t length = up(to.length, kTile);
      bfloat16 *keys = scratch.keys.get(length * inner), *values = scratch.values.get(length * inner);
      const int64_t key_place = to.start * of.key_stride + head * of.width, value_place = to.start * of.value_stride + head * of.width;
      pack_keys(of.key + key_place, of.key_stride, to.length, of.width, inner, keys);
      pack_values(of.value + value_place, of.value_stride, to.length, of.width, length, values);
      attend(tiles, of, to, head, 0, to.length, keys, values, scratch);
    }
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
    TORCH_CHECK(each.dim() == 3 && each.scalar_type() == at::kBFloat16 && each.sizes() == query.sizes() && heads > 0 &&
                    each.size(2) % (2 * heads) == 0,
                "Query, key and value are of one shape (batch, length, width), in bfloat16, and a head's width is even.");
}

at::Tensor attend(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, int64_t heads, double scale,
                  int64_t sequences, const std::function<Sequence(int64_t, int64_t)>& sequence) {
  at::Tensor result = at::empty(query.sizes(), query.options());
  if (result.numel() == 0) return result;
  const at::Tensor q = in_rows(query), k = in_rows(key), v = in_rows(value);
  run({q.const_data_ptr<bfloat16>(), k.const_data_ptr<bfloat16>(), v.const_data_ptr<bfloat16>(), token_stride(q), token_stride(k),
       token_stride(v), query.size(2) / heads, result.data_ptr<bfloat16>(), query.size(2), (float)scale},
      sequences, heads, sequence);
  return result;
}

at::Tensor attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                     const std::optional<at::Tensor>& mask, int64_t heads, double scale) {
  check(query, key, value, heads);
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
  return attend(query, key, value, heads, scale, (int64_t)sequences.size(),
                [&](int64_t row, int64_t) { return sequences[row]; });
}

}  // namespace

#ifdef __AVX512BF16__
TORCH_LIBRARY_IMPL(bert_evaluation, CPU, m) {
  m.impl("attention", attention);
  m.impl("packed_attention", packed_attention);
}
#endif

}  // namespace bert_evaluation
