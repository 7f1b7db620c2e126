// Linear layers with what follows them, in one pass: act(x W^T + b) + residual, and LayerNorm of that.
//
// Products are of bfloat16, or of int8: each row of x is then rounded to 127 steps of its own. A block of rows stays in
// the cache from its rounding to its LayerNorm. With few rows, threads share the columns instead.
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

constexpr int64_t kBlock = 128;  // rows whose sums stay in the second-level cache
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

inline __m512 activate(__m512 x, Activation activation) {
  switch (activation) {
    case Activation::gelu: return gelu(x);
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


// The largest is found among the bits, whose order is that of numbers without a sign; NaN is above all.
template <class T>
void quantize_row(const T* x, int64_t inputs, int64_t padded, int8_t* to, float* scale) {
  __m512i largest = _mm512_setzero_si512();
  for (int64_t k = 0; k < inputs; k += kLanes)
    largest = _mm512_max_epu32(largest, _mm512_castps_si512(_mm512_abs_ps(load(x + k, first(inputs - k)))));
  const float most = std::bit_cast<float>(_mm512_reduce_max_epu32(largest));
  const float step = std::max(most, kLargest * std::numeric_limits<float>::min()) / kLargest;
  const __m512 inverse = _mm512_set1_ps(1 / step);
  *scale = step;
  for (int64_t k = 0; k < padded; k += kLanes) {
    __m512i steps = _mm512_cvtps_epi32(_mm512_mul_ps(load(x + k, first(inputs - k)), inverse));
    _mm_storeu_si128((__m128i*)(to + k), _mm512_cvtsepi32_epi8(steps));
  }
}

template <class Kind, class T>
struct Linear {
  const Arguments& of;
  const int64_t padded = up(of.inputs, kStep / sizeof(typename Kind::number));
  const int64_t steps = padded * sizeof(typename Kind::number) / kStep, panel = steps * kPanelStep;
  static constexpr bool is_int8 = std::is_same_v<Kind, Int8>;
  // bfloat16 is read where it lies, but for rows that end no tile or no step.
  const bool in_place = !is_int8 && std::is_same_v<T, bfloat16> && padded == of.inputs;

  const T* x(int64_t row) const { return (const T*)of.x + row * of.stride; }

  void prepare(int64_t begin, int64_t end, typename Kind::number* to, float* scales) const {
    for (int64_t row = begin; row < end; row++, to += padded) {
      if (row >= of.rows) {
        std::memset((void*)to, 0, padded * sizeof(*to));
        if constexpr (is_int8) *scales++ = 0;
      } else if constexpr (is_int8) {
        quantize_row(x(row), of.inputs, padded, to, scales++);
      } else {
        for (int64_t k = 0; k < padded; k += kLanes)
          store(to + k, load(x(row) + k, first(of.inputs - k)), 0xffff);
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
      y = activate(y, of.activation);
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

  // Tiles of the rows from `begin` on and of the panels from `first` to `last`, two at a time. While one is multiplied,
  // that before it is finished, since the two take different parts of the processor.
  void multiply(const Tiles& tiles, int64_t begin, int64_t end, int64_t first_pair, int64_t last_pair,
                const typename Kind::number* prepared, const float* scales, float* sums) const {
    using sum = typename Kind::sum;
    alignas(64) sum products[2][kTile * kTile];
    struct { const sum* from; int64_t row, rows, column, done; } waiting = {};
    auto finish_to = [&](int64_t upto) {
      for (; waiting.done < upto; waiting.done++) {
        int64_t row = waiting.row + waiting.done;
        finish(waiting.from + waiting.done * kTile, row, waiting.column, scales ? scales[row - begin] : 1,
               sums ? sums + (row - begin) * of.outputs : nullptr);
      }
    };
    int turn = 0;
    for (int64_t pair = first_pair; pair < last_pair; pair++)
      for (int64_t row = begin; row < end; row += kTile, turn ^= 1) {
        const char* right = of.weight + 2 * pair * panel;
        bool direct = in_place && row + kTile <= of.rows;
        const void* left = direct ? (const void*)x(row) : prepared + (row - begin) * padded;
        int64_t stride = (direct ? of.stride : padded) * sizeof(*prepared);
        tiles.template multiply<Kind>(left, stride, right, panel, steps, products[turn], kTile,
                                      [&](int64_t k) { finish_to(waiting.rows * (k + 1) / steps); });
        finish_to(waiting.rows);
        waiting = {products[turn], row, std::min<int64_t>(kTile, of.rows - row), 2 * kLanes * pair, 0};
      }
    finish_to(waiting.rows);
  }

  void run() const {
    static thread_local Buffer<typename Kind::number> numbers;
    static thread_local Buffer<float> scale_buffer, sum_buffer;
    const int64_t pairs = up(of.outputs, kTile) / kTile, threads = at::get_num_threads();
    const bool norms = of.norm_weight != nullptr;
    if (of.rows >= kBlock * threads || threads == 1) {
      int64_t share = up(of.rows, threads) / threads, blocks = up(share, kBlock) / kBlock * threads;
      int64_t block = up(up(of.rows, blocks) / blocks, kTile);
      at::parallel_for(0, up(of.rows, block) / block, 1, [&](int64_t from, int64_t to) {
        Tiles tiles;
        for (int64_t each = from; each < to; each++) {
          int64_t begin = each * block, end = std::min(up(of.rows, kTile), begin + block);
          auto* prepared = numbers.get(block * padded);
          float* scales = is_int8 ? scale_buffer.get(block) : nullptr;
          float* sums = norms ? sum_buffer.get(block * of.outputs) : nullptr;
          if (!in_place) prepare(begin, end, prepared, scales);
          else if (end > of.rows) prepare(end - kTile, end, prepared + (end - kTile - begin) * padded, scales);
          multiply(tiles, begin, end, 0, pairs, prepared, scales, sums);
          if (norms)
            for (int64_t row = begin; row < std::min(end, of.rows); row++) norm(sums + (row - begin) * of.outputs, row);
        }
      });
      return;
    }
    const int64_t end = up(of.rows, kTile);
    auto* prepared = numbers.get(end * padded);
    float* scales = is_int8 ? scale_buffer.get(end) : nullptr;
    float* sums = norms ? sum_buffer.get(end * of.outputs) : nullptr;
    if (!in_place)
      at::parallel_for(0, end, 8, [&](int64_t from, int64_t to) {
        prepare(from, to, prepared + from * padded, scales ? scales + from : nullptr);
      });
    else if (end > of.rows) prepare(end - kTile, end, prepared + (end - kTile) * padded, scales);
    at::parallel_for(0, pairs, 1, [&](int64_t from, int64_t to) {
      Tiles tiles;
      multiply(tiles, 0, end, from, to, prepared, scales, sums);
    });
    if (norms)
      at::parallel_for(0, of.rows, 8, [&](int64_t from, int64_t to) {
        for (int64_t row = from; row < to; row++) norm(sums + row * of.outputs, row);
      });
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
  const bool is_int8 = weight.scalar_type() == at::kChar, is_float = x.scalar_type() == at::kFloat;
  TORCH_CHECK(is_float || x.scalar_type() == at::kBFloat16, "x is float32 or bfloat16.");
  TORCH_CHECK(weight.is_contiguous() && weight.dim() == 4 && (is_int8 || weight.scalar_type() == at::kBFloat16) && is_int8 == scales.has_value(),
              "The weight is packed, in int8 with scales or in bfloat16 without.");
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
  if (is_int8) is_float ? Linear<Int8, float>{of}.run() : Linear<Int8, bfloat16>{of}.run();
  else is_float ? Linear<Bf16, float>{of}.run() : Linear<Bf16, bfloat16>{of}.run();
  return result;
}

// What this processor has no instructions for is computed in plain PyTorch.
at::Tensor linear_or_equal(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& scales,
                           const std::optional<at::Tensor>& bias, c10::SymInt outputs, c10::string_view activation,
                           const std::optional<at::Tensor>& residual, const std::optional<at::Tensor>& norm_weight,
                           const std::optional<at::Tensor>& norm_bias, double eps) {
#ifdef __AVX512BF16__
  constexpr bool able = true;
#else
  const bool able = weight.scalar_type() == at::kChar;
#endif
  if (able)
    return linear(x, weight, scales, bias, outputs.expect_int(), activation, residual, norm_weight, norm_bias, eps);
  static const auto equal = c10::Dispatcher::singleton()
                                .findSchemaOrThrow("bert_evaluation::linear_in_plain_pytorch", "")
                                .typed<decltype(linear_or_equal)>();
  return equal.call(x, weight, scales, bias, outputs, activation, residual, norm_weight, norm_bias, eps);
}

}  // namespace

TORCH_LIBRARY_IMPL(bert_evaluation, CPU, m) { m.impl("linear", linear_or_equal); }

}  // namespace bert_evaluation
