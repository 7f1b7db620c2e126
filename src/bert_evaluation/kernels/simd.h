// Sixteen float32 numbers at a time: loads and stores in other types, and the functions that an encoder needs.
#pragma once
#include <c10/util/BFloat16.h>
#include <cstdint>

namespace bert_evaluation {

using bfloat16 = c10::BFloat16;
constexpr int kLanes = 16;

}  // namespace bert_evaluation

// AVX-512 without VNNI, as of the first processors that had it, gains little: there AVX2 is used.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define BERT_EVALUATION_AVX512
#include "simd_avx512.h"
#else
#include "simd_avx2.h"
#endif

namespace bert_evaluation {

// One behind the other; returns `total` and all that, as it is stored.
template <class T> inline Floats store_and_add(T* to, Floats x, Floats y, Floats total) {
  store(to, x);
  store(to + kLanes, y);
  return total + (load(to) + load(to + kLanes));
}

// 2^x, by a polynomial for it between -1/2 and 1/2; 0 for minus infinity and all below -126, NaN for NaN.
template <size_t terms> inline Floats exp2(Floats x, const float (&c)[terms]) {
  x = max(-150.f, x);  // the second of them if one is NaN
  const Floats whole = round(x), rest = x - whole;
  Floats y = c[terms - 1];
  for (int i = (int)terms - 2; i >= 0; i--) y = fma(y, rest, c[i]);
  return times_2_to_the(y, whole);
}

// To 2e-7 of it; and to 4e-6, for what is rounded to bfloat16 afterwards (on AVX-512 there is a faster way).
constexpr float kExact[] = {1.f, 0.693147182f, 0.240226462f, 0.0555033982f, 0.00961834099f, 0.00133990263f, 0.000154344974f};
constexpr float kNear[] = {1.f, 0.693121016f, 0.240223497f, 0.0559219755f, 0.00966636837f};
inline Floats exp2(Floats x) { return exp2(x, kExact); }
#ifndef BERT_EVALUATION_AVX512
inline Floats near_exp2(Floats x) { return exp2(x, kNear); }
#endif

constexpr float kLog2E = 1.44269504f;

// x Phi(x), to 6e-5: (Phi(x) - 1/2) / x is a polynomial of x^2 up to 4.5, fitted for the least largest error.
inline Floats gelu(Floats x) {
  constexpr float c[] = {0.39871272f, -0.06598486f, 0.009585335f, -0.001037631f, 8.143162e-05f,
                         -4.452333e-06f, 1.5913209e-07f, -3.3155862e-09f, 3.0375116e-11f};
  const Floats near = min(max(x, -4.5f), 4.5f), square = near * near;
  Floats y = c[8];
  for (int i = 7; i >= 0; i--) y = fma(y, square, c[i]);
  // Below -4.5 nothing is left; NaN stays.
  return choose(not_less(x, -4.5f), x * fma(near, y, 0.5f), 0.f);
}

// The same to 1e-7 of x, for float32: erf by Abramowitz and Stegun's formula 7.1.26.
inline Floats exact_gelu(Floats x) {
  constexpr float c[] = {0.254829592f, -0.284496736f, 1.421413741f, -1.453152027f, 1.061405429f};
  const Floats size = abs(x) * 0.707106781f, t = Floats(1.f) / fma(size, 0.3275911f, 1.f);
  Floats y = c[4];
  for (int i = 3; i >= 0; i--) y = fma(y, t, c[i]);
  // Numbers below the smallest normal one take a hundred times as long; they change nothing.
  y = y * t * exp2(max(-100.f, size * size * -kLog2E)) * 0.5f;
  // y = erfc(|x| / sqrt 2) / 2: what is missing from 1 above 0, and what there is below.
  return x * choose(x > 0.f, Floats(1.f) - y, y);
}

inline Floats gelu_tanh(Floats x) {
  const Floats inner = fma(x * x * x, 0.044715f, x);
  return x / (exp2(min(inner * (-1.59576912f * kLog2E), 200.f)) + 1.f);
}

}  // namespace bert_evaluation
