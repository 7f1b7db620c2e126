// What a linear layer ends with: an activation, and LayerNorm.
#pragma once
#include <c10/util/Exception.h>
#include <cmath>
#include <type_traits>
#include "simd.h"

namespace bert_evaluation {

enum class Activation { none, gelu, gelu_tanh, relu };

inline Activation named(c10::string_view name) {
  if (name == "none") return Activation::none;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "relu") return Activation::relu;
  TORCH_CHECK(false, "There is no activation '", name, "' here.");
}

// As near as T, which is what is returned, can tell.
template <class T> inline Floats activate(Floats x, Activation activation) {
  switch (activation) {
    case Activation::gelu: return std::is_same_v<T, float> ? exact_gelu(x) : gelu(x);
    case Activation::gelu_tanh: return gelu_tanh(x);
    case Activation::relu: return max(0.f, x);  // the second of them if one is NaN
    default: return x;
  }
}

// LayerNorm of a row, in two passes, each with four chains of sums, which do not wait for each other. It is compiled once, not
// into each of its callers: the compiler might round differently in each, as it makes one step of a product and a sum.
template <class T> [[gnu::noinline]] void norm(const float* x, int64_t size, const float* weight, const float* bias, float eps, T* to) {
  constexpr int kChains = 4;
  auto total = [](const Floats (&of)[kChains]) { return sum((of[0] + of[1]) + (of[2] + of[3])); };
  Floats totals[kChains], squares[kChains];
  for (int64_t k = 0; k < size; k += kChains * kLanes)
    for (int i = 0; i < kChains; i++) totals[i] = totals[i] + load(x + k + i * kLanes, size - k - i * kLanes);
  const Floats mean = total(totals) / size;
  for (int64_t k = 0; k < size; k += kChains * kLanes)
    for (int i = 0; i < kChains; i++) {
      const int64_t left = size - k - i * kLanes;
      Floats off = load(x + k + i * kLanes, left) - mean;
      if (left < kLanes) off = choose(first(left), off, 0.f);
      squares[i] = fma(off, off, squares[i]);
    }
  const Floats scale = 1 / std::sqrt(total(squares) / size + eps);
  for (int64_t k = 0; k < size; k += kLanes) {
    Floats y = (load(x + k, size - k) - mean) * scale * load(weight + k, size - k);
    if (bias) y = y + load(bias + k, size - k);
    store(to + k, y, size - k);
  }
}

}  // namespace bert_evaluation
