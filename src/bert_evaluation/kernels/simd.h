// Sixteen float32 numbers at a time: loads and stores in other types, and the functions that an encoder needs.
#pragma once
#include <immintrin.h>
#include <c10/util/BFloat16.h>
#include <cstdint>

namespace bert_evaluation {

using bfloat16 = c10::BFloat16;
constexpr int kLanes = 16;

inline __mmask16 first(int64_t lanes) { return lanes >= kLanes ? 0xffff : (__mmask16)((1u << (lanes > 0 ? lanes : 0)) - 1); }

inline __m512 load(const float* from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }
inline __m512 load(const bfloat16* from, __mmask16 mask) {
  __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

// Rounded to nearest, ties to even, as torch rounds.
inline __m256i to_bfloat16(__m512 x) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(x);
#else
  __m512i bits = _mm512_castps_si512(x);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16));
#endif
}

inline void store(float* to, __m512 x, __mmask16 mask) { _mm512_mask_storeu_ps(to, mask, x); }
inline void store(bfloat16* to, __m512 x, __mmask16 mask) { _mm256_mask_storeu_epi16(to, mask, to_bfloat16(x)); }

// 2^x, by a polynomial for it between -1/2 and 1/2; 0 for minus infinity and all below -126, NaN for NaN.
template <size_t terms> inline __m512 exp2(__m512 x, const float (&c)[terms]) {
  x = _mm512_max_ps(_mm512_set1_ps(-150.f), x);  // the second of them if one is NaN
  __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT), rest = _mm512_sub_ps(x, whole);
  __m512 y = _mm512_set1_ps(c[terms - 1]);
  for (int i = (int)terms - 2; i >= 0; i--) y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(c[i]));
  return _mm512_scalef_ps(y, whole);
}

// To 2e-7 of it; and to 4e-6, for what is rounded to bfloat16 afterwards.
constexpr float kExact[] = {1.f, 0.693147182f, 0.240226462f, 0.0555033982f, 0.00961834099f, 0.00133990263f, 0.000154344974f};
constexpr float kNear[] = {1.f, 0.693121016f, 0.240223497f, 0.0559219755f, 0.00966636837f};
inline __m512 exp2(__m512 x) { return exp2(x, kExact); }

constexpr float kLog2E = 1.44269504f;

// x Phi(x), to 6e-5: (Phi(x) - 1/2) / x is a polynomial of x^2 up to 4.5, fitted for the least largest error.
inline __m512 gelu(__m512 x) {
  constexpr float c[] = {0.39871272f, -0.06598486f, 0.009585335f, -0.001037631f, 8.143162e-05f,
                         -4.452333e-06f, 1.5913209e-07f, -3.3155862e-09f, 3.0375116e-11f};
  __m512 near = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-4.5f)), _mm512_set1_ps(4.5f));
  __m512 square = _mm512_mul_ps(near, near), y = _mm512_set1_ps(c[8]);
  for (int i = 7; i >= 0; i--) y = _mm512_fmadd_ps(y, square, _mm512_set1_ps(c[i]));
  __mmask16 counts = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-4.5f), _CMP_NLT_UQ);  // below, nothing is left; NaN counts
  return _mm512_maskz_mul_ps(counts, x, _mm512_fmadd_ps(near, y, _mm512_set1_ps(0.5f)));
}

// The same to 1e-7 of x, for float32: erf by Abramowitz and Stegun's formula 7.1.26.
inline __m512 exact_gelu(__m512 x) {
  constexpr float c[] = {0.254829592f, -0.284496736f, 1.421413741f, -1.453152027f, 1.061405429f};
  __m512 size = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.707106781f));
  __m512 t = _mm512_div_ps(_mm512_set1_ps(1.f), _mm512_fmadd_ps(size, _mm512_set1_ps(0.3275911f), _mm512_set1_ps(1.f)));
  __m512 y = _mm512_set1_ps(c[4]);
  for (int i = 3; i >= 0; i--) y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(c[i]));
  y = _mm512_mul_ps(_mm512_mul_ps(y, t), exp2(_mm512_mul_ps(_mm512_mul_ps(size, size), _mm512_set1_ps(-kLog2E))));
  // y = erfc(|x| / sqrt 2): half of it is what is missing from 1 above 0, and what there is below.
  y = _mm512_mul_ps(y, _mm512_set1_ps(0.5f));
  __mmask16 positive = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ);
  return _mm512_mul_ps(x, _mm512_mask_sub_ps(y, positive, _mm512_set1_ps(1.f), y));
}

}  // namespace bert_evaluation
