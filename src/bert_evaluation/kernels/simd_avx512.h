// Sixteen float32 numbers in one register of AVX-512.
#pragma once
#include <immintrin.h>
#include <cstdint>

namespace bert_evaluation {

struct Floats {
  __m512 all;
  Floats() : all(_mm512_setzero_ps()) {}
  Floats(float x) : all(_mm512_set1_ps(x)) {}
  Floats(__m512 x) : all(x) {}
};
using Lanes = __mmask16;  // some of them

inline Lanes first(int64_t lanes) { return lanes >= kLanes ? 0xffff : (Lanes)((1u << (lanes > 0 ? lanes : 0)) - 1); }

inline Floats operator+(Floats x, Floats y) { return _mm512_add_ps(x.all, y.all); }
inline Floats operator-(Floats x, Floats y) { return _mm512_sub_ps(x.all, y.all); }
inline Floats operator*(Floats x, Floats y) { return _mm512_mul_ps(x.all, y.all); }
inline Floats operator/(Floats x, Floats y) { return _mm512_div_ps(x.all, y.all); }
inline Floats fma(Floats x, Floats y, Floats z) { return _mm512_fmadd_ps(x.all, y.all, z.all); }
// The second of them if one is NaN.
inline Floats max(Floats x, Floats y) { return _mm512_max_ps(x.all, y.all); }
inline Floats min(Floats x, Floats y) { return _mm512_min_ps(x.all, y.all); }
inline Floats abs(Floats x) { return _mm512_abs_ps(x.all); }
inline Floats round(Floats x) { return _mm512_roundscale_ps(x.all, _MM_FROUND_TO_NEAREST_INT); }
inline Floats times_2_to_the(Floats x, Floats whole) { return _mm512_scalef_ps(x.all, whole.all); }
inline Lanes operator>(Floats x, Floats y) { return _mm512_cmp_ps_mask(x.all, y.all, _CMP_GT_OQ); }
inline Lanes not_less(Floats x, Floats y) { return _mm512_cmp_ps_mask(x.all, y.all, _CMP_NLT_UQ); }  // also NaN
inline Floats choose(Lanes which, Floats x, Floats otherwise) { return _mm512_mask_mov_ps(otherwise.all, which, x.all); }
inline float sum(Floats x) { return _mm512_reduce_add_ps(x.all); }
inline float largest(Floats x) { return _mm512_reduce_max_ps(x.all); }
// By their bits, whose order is that of numbers without a sign; NaN is above all.
inline Floats max_bits(Floats x, Floats y) {
  return _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(x.all), _mm512_castps_si512(y.all)));
}
inline uint32_t largest_bits(Floats x) { return _mm512_reduce_max_epu32(_mm512_castps_si512(x.all)); }

// Rounded to nearest, ties to even, as torch rounds.
inline __m256i to_bfloat16(Floats x) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(x.all);
#else
  __m512i bits = _mm512_castps_si512(x.all);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16));
#endif
}
inline Floats widened(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

// The first `lanes` of them; the others are zeros, or are left as they were.
inline Floats load(const float* from, int64_t lanes = kLanes) { return _mm512_maskz_loadu_ps(first(lanes), from); }
inline Floats load(const bfloat16* from, int64_t lanes = kLanes) { return widened(_mm256_maskz_loadu_epi16(first(lanes), from)); }
inline Floats load(const int32_t* from) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(from)); }
inline void store(float* to, Floats x, int64_t lanes = kLanes) { _mm512_mask_storeu_ps(to, first(lanes), x.all); }
inline void store(bfloat16* to, Floats x, int64_t lanes = kLanes) { _mm256_mask_storeu_epi16(to, first(lanes), to_bfloat16(x)); }
// As the nearest whole numbers.
inline void store(int8_t* to, Floats x) { _mm_storeu_si128((__m128i*)to, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x.all))); }

// Pairs of them, one of each beside the other.
inline void store_pairs(float* to, Floats x, Floats y) {
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_storeu_ps(to, _mm512_permutex2var_ps(x.all, low, y.all));
  _mm512_storeu_ps(to + kLanes, _mm512_permutex2var_ps(x.all, _mm512_add_epi32(low, _mm512_set1_epi32(8)), y.all));
}
inline void store_pairs(bfloat16* to, Floats x, Floats y) {  // both hold numbers in bfloat16
  _mm512_storeu_si512(to, _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(x.all), 16),
                                          _mm512_and_si512(_mm512_castps_si512(y.all), _mm512_set1_epi32(0xffff0000))));
}

// Which of `lanes` are true; `from` is null if all are.
inline Lanes load_lanes(const bool* from, int64_t lanes) {
  if (!from) return first(lanes);
  const __m128i bytes = _mm_maskz_loadu_epi8(first(lanes), from);
  return _mm_test_epi8_mask(bytes, bytes);
}

}  // namespace bert_evaluation
