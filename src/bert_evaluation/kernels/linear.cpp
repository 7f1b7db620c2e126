// Linear layers with what follows them, in one pass: act(x W^T + b) + residual, and LayerNorm of that.
//
// Products are of bfloat16; of int8, where each row of x is rounded to 127 steps of its own; or of float32 as three
// bfloat16. A block of rows stays in the cache from its rounding to its LayerNorm. With few rows, threads share the
// columns instead.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>
#include <bit>
#include <cstring>
#include <limits>
#include <optional>
#include "tiles.h"

namespace bert_evaluation {
namespace {

constexpr int64_t kBlock = 128;  // rows whose numbers and sums stay in the second-level cache
// Of float32: rows for which so many bytes of panels, in so many steps, are split.
constexpr int64_t kSplitBlock = 512, kSplit = 1 << 20, kSplitSteps = 24;
constexpr int64_t kFew = 48;  // rows of float32 that are not worth it
constexpr float kLargest = 127;

enum class Activation { none, gelu, gelu_tanh, relu };

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

template <class T> inline __m512 activate(__m512 x, Activation activation) {
  switch (activation) {
    case Activation::gelu: return std::is_same_v<T, float> ? exact_gelu(x) : gelu(x);  // T is what is returned
    case Activation::gelu_tanh: {
      __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
      __m512 inner = _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x);
      __m512 power = exp2(_mm512_min_ps(_mm512_mul_ps(inner, _mm512_set1_ps(-1.59576912f * kLog2E)), _mm512_set1_ps(200.f)));
      return _mm512_div_ps(x, _mm512_add_ps(power, _mm512_set1_ps(1.f)));
    }
    case Activation::relu: return _mm512_max_ps(_mm512_setzero_ps(), x);  // the second of them if one is NaN
    default: return x;
  }
}


// What a step of a row is worth. The largest is found among the bits, whose order is that of numbers without a sign; NaN
// is above all.
template <class T> float step_of(const T* x, int64_t inputs) {
  __m512i largest = _mm512_setzero_si512();
  for (int64_t k = 0; k < inputs; k += kLanes)
    largest = _mm512_max_epu32(largest, _mm512_castps_si512(_mm512_abs_ps(load(x + k, first(inputs - k)))));
  return std::max(std::bit_cast<float>(_mm512_reduce_max_epu32(largest)), kLargest * std::numeric_limits<float>::min()) / kLargest;
}

template <class Kind, class T>
struct Linear {
  const Arguments& of;
  const int64_t padded = up(of.inputs, kStep / sizeof(typename Kind::number));
  const int64_t steps = padded * sizeof(typename Kind::number) / kStep, panel = steps * kPanelStep;
  const int64_t tile_bytes = steps * Kind::parts * kTile * kStep;  // of 32 rows
  static constexpr bool is_int8 = std::is_same_v<Kind, Int8>, is_float32 = std::is_same_v<Kind, Float32>;
  // bfloat16 is read where it lies, but for rows that end no tile or no step.
  const bool in_place = std::is_same_v<Kind, Bf16> && std::is_same_v<T, bfloat16> && padded == of.inputs;

  const T* x(int64_t row) const { return (const T*)of.x + row * of.stride; }

  // Rows as the products read them: for 32 of them, step after step, and in that part after part, 64 bytes of each. There
  // are zeros behind the last number and the last row.
  void prepare(int64_t begin, int64_t end, char* to, float* scales) const {
    constexpr int64_t numbers = kStep / sizeof(typename Kind::number), part = kTile * numbers;
    for (int64_t row = begin; row < end; row++) {
      const bool there = row < of.rows;
      const T* from = x(there ? row : 0);
      [[maybe_unused]] __m512 inverse;
      if constexpr (is_int8) {
        *scales = there ? step_of(from, of.inputs) : 1;
        inverse = _mm512_set1_ps(1 / *scales++);
      }
      auto* place = (typename Kind::number*)(to + (row / kTile - begin / kTile) * tile_bytes) + row % kTile * numbers;
      for (int64_t step = 0; step < steps; step++, place += Kind::parts * part)
        for (int64_t k = 0; k < numbers; k += kLanes) {
          __m512 y = load(from + step * numbers + k, there ? first(of.inputs - step * numbers - k) : 0);
          if constexpr (is_float32) split(y, place + k, part);
          else if constexpr (is_int8)
            _mm_storeu_si128((__m128i*)(place + k), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(y, inverse))));
          else store(place + k, y, 0xffff);
        }
    }
  }

  // One row of a tile of sums, from column `column` on, to where it belongs: `to` or, in float32, `sums`.
  void finish(const typename Kind::sum* from, int64_t row, int64_t column, float scale, float* sums) const {
    for (int half = 0; half < 2; half++, from += kLanes, column += kLanes) {
      __mmask16 mask = first(of.outputs - column);
      __m512 y;
      if constexpr (is_int8)
        y = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(from)),
                          _mm512_mul_ps(_mm512_set1_ps(scale), load(of.scales + column, mask)));
      else
        y = _mm512_load_ps(from);
      if (of.bias) y = _mm512_add_ps(y, load(of.bias + column, mask));
      y = activate<T>(y, of.activation);
      int64_t place = row * of.outputs + column;
      if (of.residual) y = _mm512_add_ps(y, load((const T*)of.residual + place, mask));
      if (sums) store(sums + column, y, mask);
      else store((T*)of.result + place, y, mask);
    }
  }

  // In two passes, each with four chains of sums, which do not wait for each other.
  void norm(const float* sums, int64_t row) const {
    constexpr int kChains = 4;
    __m512 totals[kChains] = {}, squares[kChains] = {};
    const int64_t size = of.outputs;
    for (int64_t k = 0; k < size; k += kChains * kLanes)
      for (int i = 0; i < kChains; i++)
        totals[i] = _mm512_add_ps(totals[i], load(sums + k + i * kLanes, first(size - k - i * kLanes)));
    __m512 mean = _mm512_set1_ps(sum(totals) / size);
    for (int64_t k = 0; k < size; k += kChains * kLanes)
      for (int i = 0; i < kChains; i++) {
        __mmask16 mask = first(size - k - i * kLanes);
        __m512 off = _mm512_maskz_sub_ps(mask, load(sums + k + i * kLanes, mask), mean);
        squares[i] = _mm512_fmadd_ps(off, off, squares[i]);
      }
    __m512 scale = _mm512_set1_ps(1 / std::sqrt(sum(squares) / size + of.eps));
    for (int64_t k = 0; k < size; k += kLanes) {
      __mmask16 mask = first(size - k);
      __m512 y = _mm512_mul_ps(_mm512_sub_ps(load(sums + k, mask), mean), scale);
      y = _mm512_mul_ps(y, load(of.norm_weight + k, mask));
      if (of.norm_bias) y = _mm512_add_ps(y, load(of.norm_bias + k, mask));
      store((T*)of.result + row * size + k, y, mask);
    }
  }

  static float sum(const __m512 (&of)[4]) {
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(of[0], of[1]), _mm512_add_ps(of[2], of[3])));
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
    const typename Kind::sum* from = nullptr;
    int64_t row = 0, rows = 0, column = 0, done = 0;
  };

  void finish(Waiting& tile, int64_t upto, const Block& block) const {
    for (; tile.done < upto; tile.done++) {
      const int64_t row = tile.row + tile.done, place = row - block.begin;
      finish(tile.from + tile.done * kTile, row, tile.column, block.scales ? block.scales[place] : 1,
             block.sums ? block.sums + place * of.outputs : nullptr);
    }
  }

  // `sums` (32 x 32) of a block's rows from `row` on and of a pair of panels, which lie at `right`, from step `start` on.
  void multiply(const Tiles& tiles, const Block& block, int64_t row, const Factor& right, int64_t start, int64_t end,
                typename Kind::sum* sums, Waiting& waiting) const {
    const bool direct = in_place && row + kTile <= of.rows;
    constexpr int64_t size = sizeof(T), part = kTile * kStep, step = Kind::parts * part;
    const Factor left = direct ? Factor{(const char*)x(row) + start * kStep, of.stride * size, kStep}
                               : Factor{block.rows + (row - block.begin) / kTile * tile_bytes + start * step, kStep, step, part};
    tiles.template multiply<Kind>(left, right, end - start, sums, kTile, start > 0, [&](int64_t k) {
      finish(waiting, waiting.rows * (k + 1) / (end - start), block);
    });
    finish(waiting, waiting.rows, block);
  }

  Waiting made(const typename Kind::sum* sums, int64_t row, int64_t pair) const {
    return {sums, row, std::min<int64_t>(kTile, of.rows - row), kTile * pair, 0};
  }

  // All tiles of a block's rows and of pairs of panels. The rows of a block stay in the cache, panels pass by.
  void multiply(const Tiles& tiles, const Block& block, int64_t first_pair, int64_t last_pair) const {
    alignas(64) typename Kind::sum sums[2][kTile * kTile];
    Waiting waiting;
    int turn = 0;
    for (int64_t pair = first_pair; pair < last_pair; pair++)
      for (int64_t row = block.begin; row < block.end; row += kTile, turn ^= 1) {
        multiply(tiles, block, row, {of.weight + 2 * pair * panel, panel, kPanelStep}, 0, steps, sums[turn], waiting);
        waiting = made(sums[turn], row, pair);
      }
    finish(waiting, waiting.rows, block);
  }

  // The same in float32. Here some steps of some panels, once split, stay in the cache, and rows pass by.
  void multiply_split(const Tiles& tiles, const Block& block, int64_t first_pair, int64_t last_pair) const {
    static thread_local Buffer<bfloat16> split_panels;
    static thread_local Buffer<float> sum_tiles;
    constexpr int64_t numbers = kPanelStep / sizeof(bfloat16), step = Kind::parts * kPanelStep;  // of a panel in a step
    const int64_t most = std::min(steps, kSplitSteps), group = std::max<int64_t>(1, kSplit / (2 * most * step));
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
            for (int64_t n = 0; n < numbers; n += kLanes)
              split(_mm512_loadu_ps(from + n), panels + i * size + k * Kind::parts * numbers + n, numbers);
          }
        int64_t number = 0;
        for (int64_t row = block.begin; row < block.end; row += kTile)
          for (int64_t i = 0; i < pairs; i++, number++) {
            // Sums that wait for more steps each have their place; two of those that do not take turns.
            float* tile = sums + (steps > most ? number : number % 2) * kTile * kTile;
            multiply(tiles, block, row, {panels + 2 * i * size, size * 2, step, kPanelStep}, start, end, tile, waiting);
            waiting = end == steps ? made(tile, row, pair + i) : Waiting{};
          }
      }
    }
    finish(waiting, waiting.rows, block);
  }

  // The same of a few rows.
  void multiply_few(const Block& block, int64_t first_pair, int64_t last_pair) const {
    alignas(64) float sums[kTile * kTile];
    const int64_t numbers = panel / sizeof(bfloat16);
    for (int64_t pair = first_pair; pair < last_pair; pair++)
      for (int64_t row = 0; row < of.rows; row += kTile) {
        Waiting tile = made(sums, row, pair);
        const float* panels = (const float*)of.weight + 2 * pair * numbers;
        int64_t i = 0;
        for (; i + 6 <= tile.rows; i += 6) multiply_float32<6>((const float*)x(row + i), of.stride, of.inputs, panels, numbers, sums + i * kTile);
        for (; i < tile.rows; i++) multiply_float32<1>((const float*)x(row + i), of.stride, of.inputs, panels, numbers, sums + i * kTile);
        finish(tile, tile.rows, block);
      }
  }

  void run() const {
    static thread_local Buffer<char> row_buffer;
    static thread_local Buffer<float> scale_buffer, sum_buffer;
    const int64_t pairs = up(of.outputs, kTile) / kTile, threads = at::get_num_threads();
    const bool norms = of.norm_weight != nullptr, few = is_float32 && of.rows <= kFew, prepares = !in_place && !few;
    auto room = [&](int64_t begin, int64_t end) {
      const int64_t rows = end - begin;
      return Block{begin, end, row_buffer.get(rows / kTile * tile_bytes), is_int8 ? scale_buffer.get(rows) : nullptr,
                   norms ? sum_buffer.get(rows * of.outputs) : nullptr};
    };
    auto prepare_rows = [&](const Block& block, int64_t from, int64_t to) {
      prepare(from, to, block.rows + (from - block.begin) / kTile * tile_bytes, block.scales + (from - block.begin));
    };
    auto multiply_all = [&](const Tiles& tiles, const Block& block, int64_t from, int64_t to) {
      if constexpr (is_float32) few ? multiply_few(block, from, to) : multiply_split(tiles, block, from, to);
      else multiply(tiles, block, from, to);
    };
    auto norm_rows = [&](const Block& block, int64_t from, int64_t to) {
      for (int64_t row = from; row < to; row++) norm(block.sums + (row - block.begin) * of.outputs, row);
    };
    const int64_t end = up(of.rows, kTile);
    if (of.rows >= kBlock * threads || threads == 1) {
      constexpr int64_t most = is_float32 ? kSplitBlock : kBlock;
      const int64_t share = up(of.rows, threads) / threads, blocks = up(share, most) / most * threads;
      const int64_t size = up(up(of.rows, blocks) / blocks, kTile);
      at::parallel_for(0, up(of.rows, size) / size, 1, [&](int64_t from, int64_t to) {
        Tiles tiles;
        for (int64_t each = from; each < to; each++) {
          const Block block = room(each * size, std::min(end, (each + 1) * size));
          if (prepares) prepare_rows(block, block.begin, block.end);
          else if (in_place && block.end > of.rows) prepare_rows(block, block.end - kTile, block.end);
          multiply_all(tiles, block, 0, pairs);
          if (norms) norm_rows(block, block.begin, std::min(block.end, of.rows));
        }
      });
      return;
    }
    const Block block = room(0, end);
    if (prepares) at::parallel_for(0, end, 8, [&](int64_t from, int64_t to) { prepare_rows(block, from, to); });
    else if (in_place && end > of.rows) prepare_rows(block, end - kTile, end);
    at::parallel_for(0, pairs, 1, [&](int64_t from, int64_t to) {
      Tiles tiles;
      multiply_all(tiles, block, from, to);
    });
    if (norms) at::parallel_for(0, of.rows, 8, [&](int64_t from, int64_t to) { norm_rows(block, from, to); });
  }
};

Activation named(c10::string_view name) {
  if (name == "none") return Activation::none;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "relu") return Activation::relu;
  TORCH_CHECK(false, "There is no activation '", name, "' here.");
}

const float* floats(const std::optional<at::Tensor>& tensor, int64_t size) {
  if (!tensor) return nullptr;
  TORCH_CHECK(tensor->scalar_type() == at::kFloat && tensor->numel() == size && tensor->is_contiguous(),
              "Scales, biases and weights of LayerNorm are float32, one number for each output.");
  return tensor->const_data_ptr<float>();
}

at::Tensor linear(const at::Tensor& given, const at::Tensor& weight, const std::optional<at::Tensor>& scales,
                  const std::optional<at::Tensor>& bias, int64_t outputs, c10::string_view activation,
                  const std::optional<at::Tensor>& residual, const std::optional<at::Tensor>& norm_weight,
                  const std::optional<at::Tensor>& norm_bias, double eps) {
  TORCH_CHECK(given.dim() > 0 && given.size(-1) > 0, "x is of shape (..., inputs), with one input at least.");
  // Rows may lie apart, as those of a part of something wider do; else they are copied.
  at::Tensor x = given.stride(-1) == 1 && (given.is_contiguous() || given.dim() == 2) ? given : given.contiguous();
  auto sizes = x.sizes().vec();
  Arguments of;
  of.inputs = sizes.back();
  of.rows = of.inputs ? x.numel() / of.inputs : 0;
  of.stride = x.dim() == 2 ? x.stride(0) : of.inputs;
  sizes.back() = of.outputs = outputs;
  at::Tensor result = at::empty(sizes, x.options()), added;
  if (residual) added = residual->contiguous();
  TORCH_CHECK(!residual || (added.sizes() == result.sizes() && added.scalar_type() == x.scalar_type()),
              "What is added has the shape and the type of the result.");
  of.x = x.const_data_ptr();
  of.weight = (const char*)weight.const_data_ptr();
  of.scales = floats(scales, outputs);
  of.bias = floats(bias, outputs);
  of.norm_weight = floats(norm_weight, outputs);
  of.norm_bias = floats(norm_bias, outputs);
  of.residual = residual ? added.const_data_ptr() : nullptr;
  of.result = result.data_ptr();
  of.activation = named(activation);
  of.eps = (float)eps;
  if (of.rows == 0) return result;
  const auto kind = weight.scalar_type();
  const bool is_int8 = kind == at::kChar, is_float = x.scalar_type() == at::kFloat;
  TORCH_CHECK(is_float || x.scalar_type() == at::kBFloat16, "x is float32 or bfloat16.");
  TORCH_CHECK(weight.is_contiguous() && weight.dim() == 4 && is_int8 == scales.has_value() &&
                  (is_int8 || kind == at::kBFloat16 || (kind == at::kFloat && is_float)),
              "The weight is packed, in int8 with scales or without in bfloat16 or, for x in it too, float32.");
#ifndef __AVX512BF16__
  TORCH_CHECK(is_int8, "This processor multiplies no bfloat16.");
#endif
#ifndef __AVX512VNNI__
  TORCH_CHECK(!is_int8, "This processor multiplies no int8.");
#endif
  const int64_t unit = is_int8 ? 64 : 32;
  TORCH_CHECK(weight.size(0) == up(outputs, 32) / 16 && weight.size(1) * weight.size(3) == up(of.inputs, unit) &&
                  weight.size(2) == 16 && weight.size(3) == (is_int8 ? 4 : 2),
              "The weight is packed for other sizes.");
  if (kind == at::kFloat) Linear<Float32, float>{of}.run();
  else if (is_int8) is_float ? Linear<Int8, float>{of}.run() : Linear<Int8, bfloat16>{of}.run();
  else is_float ? Linear<Bf16, float>{of}.run() : Linear<Bf16, bfloat16>{of}.run();
  return result;
}

// What this processor has no instructions for is computed in plain PyTorch, and so is x in float16.
at::Tensor linear_or_equal(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& scales,
                           const std::optional<at::Tensor>& bias, c10::SymInt outputs, c10::string_view activation,
                           const std::optional<at::Tensor>& residual, const std::optional<at::Tensor>& norm_weight,
                           const std::optional<at::Tensor>& norm_bias, double eps) {
#ifdef __AVX512BF16__
  constexpr bool able = true;
#else
  const bool able = weight.scalar_type() == at::kChar;
#endif
  if (able && x.scalar_type() != at::kHalf)
    return linear(x, weight, scales, bias, outputs.expect_int(), activation, residual, norm_weight, norm_bias, eps);
  static const auto equal = c10::Dispatcher::singleton()
                                .findSchemaOrThrow("bert_evaluation::linear_in_plain_pytorch", "")
                                .typed<decltype(linear_or_equal)>();
  return equal.call(x, weight, scales, bias, outputs, activation, residual, norm_weight, norm_bias, eps);
}

}  // namespace

TORCH_LIBRARY_IMPL(bert_evaluation, CompositeExplicitAutograd, m) { m.impl("uses_amx", amx_allowed); }
TORCH_LIBRARY_IMPL(bert_evaluation, CPU, m) { m.impl("linear", linear_or_equal); }

}  // namespace bert_evaluation
