// Sixteen float32 numbers in two registers of AVX2.
#pragma once
#include <immintrin.h>
#include <cstdint>
#include <cstring>
#include <utility>

namespace bert_evaluation {

struct Floats {
  __m256 low, high;
  Floats() : low(_mm256_setzero_ps()), high(low) {}
  Floats(float x) : low(_mm256_set1_ps(x)), high(low) {}
  Floats(__m256 low, __m256 high) : low(low), high(high) {}
};
struct Lanes {  // some of them: those of all bits set
  __m256 low, high;
};

inline Floats operator+(Floats x, Floats y) { return {_mm256_add_ps(x.low, y.low), _mm256_add_ps(x.high, y.high)}; }
inline Floats operator-(Floats x, Floats y) { return {_mm256_sub_ps(x.low, y.low), _mm256_sub_ps(x.high, y.high)}; }
inline Floats operator*(Floats x, Floats y) { return {_mm256_mul_ps(x.low, y.low), _mm256_mul_ps(x.high, y.high)}; }
inline Floats operator/(Floats x, Floats y) { return {_mm256_div_ps(x.low, y.low), _mm256_div_ps(x.high, y.high)}; }
inline Floats fma(Floats x, Floats y, Floats z) { return {_mm256_fmadd_ps(x.low, y.low, z.low), _mm256_fmadd_ps(x.high, y.high, z.high)}; }
// The second of them if one is NaN.
inline Floats max(Floats x, Floats y) { return {_mm256_max_ps(x.low, y.low), _mm256_max_ps(x.high, y.high)}; }
inline Floats min(Floats x, Floats y) { return {_mm256_min_ps(x.low, y.low), _mm256_min_ps(x.high, y.high)}; }
inline Floats abs(Floats x) {
  const __m256 sign = _mm256_set1_ps(-0.f);
  return {_mm256_andnot_ps(sign, x.low), _mm256_andnot_ps(sign, x.high)};
}
inline Floats round(Floats x) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.low, nearest), _mm256_round_ps(x.high, nearest)};
}
inline __m256 power_of_2(__m256 whole) {  // from -127, where it is 0, to 128, where it is infinite
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23));
}
inline Floats times_2_to_the(Floats x, Floats whole) {
  const Floats kept = min(128.f, max(-127.f, whole));
  return x * Floats{power_of_2(kept.low), power_of_2(kept.high)};
}
inline Lanes operator>(Floats x, Floats y) {
  return {_mm256_cmp_ps(x.low, y.low, _CMP_GT_OQ), _mm256_cmp_ps(x.high, y.high, _CMP_GT_OQ)};
}
inline Lanes not_less(Floats x, Floats y) {  // also NaN
  return {_mm256_cmp_ps(x.low, y.low, _CMP_NLT_UQ), _mm256_cmp_ps(x.high, y.high, _CMP_NLT_UQ)};
}
inline Floats choose(Lanes which, Floats x, Floats otherwise) {
  return {_mm256_blendv_ps(otherwise.low, x.low, which.low), _mm256_blendv_ps(otherwise.high, x.high, which.high)};
}

// Of the eight that are left when one half has been put to the other.
template <class Together> inline __m128 reduce(__m256 x, Together together) {
  __m128 four = together(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  four = together(four, _mm_movehl_ps(four, four));
  return together(four, _mm_movehdup_ps(four));
}
inline float sum(Floats x) {
  return _mm_cvtss_f32(reduce(_mm256_add_ps(x.low, x.high), [](__m128 a, __m128 b) { return _mm_add_ps(a, b); }));
}
inline float largest(Floats x) {
  return _mm_cvtss_f32(reduce(_mm256_max_ps(x.low, x.high), [](__m128 a, __m128 b) { return _mm_max_ps(a, b); }));
}
// By their bits, whose order is that of numbers without a sign.
inline __m256 max_bits(__m256 x, __m256 y) {
  return _mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(x), _mm256_castps_si256(y)));
}
inline Floats max_bits(Floats x, Floats y) { return {max_bits(x.low, y.low), max_bits(x.high, y.high)}; }
inline uint32_t largest_bits(Floats x) {
  return _mm_cvtsi128_si32(_mm_castps_si128(reduce(max_bits(x.low, x.high), [](__m128 a, __m128 b) {
    return _mm_castsi128_ps(_mm_max_epu32(_mm_castps_si128(a), _mm_castps_si128(b)));
  })));
}

// Rounded to nearest, ties to even, as torch rounds; in the upper halves.
inline __m256i rounded_bits(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}
inline __m256i in_order(__m256i quarters) { return _mm256_permute4x64_epi64(quarters, 0xd8); }  // after packing two
inline __m256i to_bfloat16(Floats x) {
  return in_order(_mm256_packus_epi32(_mm256_srli_epi32(rounded_bits(x.low), 16), _mm256_srli_epi32(rounded_bits(x.high), 16)));
}
inline __m256 widened(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }

inline Floats load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline Floats load(const bfloat16* from) {
  return {widened(_mm_loadu_si128((const __m128i*)from)), widened(_mm_loadu_si128((const __m128i*)(from + 8)))};
}
inline Floats load(const int32_t* from) {
  return {_mm256_cvtepi32_ps(_mm256_loadu_si256((const __m256i*)from)), _mm256_cvtepi32_ps(_mm256_loadu_si256((const __m256i*)(from + 8)))};
}
inline void store(float* to, Floats x) {
  _mm256_storeu_ps(to, x.low);
  _mm256_storeu_ps(to + 8, x.high);
}
inline void store(bfloat16* to, Floats x) { _mm256_storeu_si256((__m256i*)to, to_bfloat16(x)); }
// As the nearest whole numbers of 8 bits, in the order in which products read them: of four the first, third, second, last.
inline void store(int16_t* to, Floats x) {
  __m256i whole = in_order(_mm256_packs_epi32(_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high)));
  whole = _mm256_max_epi16(_mm256_min_epi16(whole, _mm256_set1_epi16(127)), _mm256_set1_epi16(-128));
  const __m128i order = _mm_set_epi8(15, 14, 11, 10, 13, 12, 9, 8, 7, 6, 3, 2, 5, 4, 1, 0);
  _mm256_storeu_si256((__m256i*)to, _mm256_shuffle_epi8(whole, _mm256_broadcastsi128_si256(order)));
}
inline void store_whole(int16_t* to, Floats a, Floats b, Floats c, Floats d) {
  store(to, a);
  store(to + kLanes, b);
  store(to + 2 * kLanes, c);
  store(to + 3 * kLanes, d);
}

// The first `lanes` of them; the others are zeros, or are left as they were. (AMD's masked stores are slow.)
template <class T> inline Floats load(const T* from, int64_t lanes) {
  if (lanes >= kLanes) return load(from);
  T some[kLanes] = {};
  if (lanes > 0) std::memcpy((void*)some, from, lanes * sizeof(T));
  return load(some);
}
template <class T> inline void store(T* to, Floats x, int64_t lanes) {
  if (lanes >= kLanes) return store(to, x);
  T some[kLanes];
  store(some, x);
  if (lanes > 0) std::memcpy((void*)to, some, lanes * sizeof(T));
}

// Pairs of them, one of each beside the other.
inline void store_pairs(bfloat16* to, Floats x, Floats y) {  // both hold numbers in bfloat16
  for (auto [one, other] : {std::pair(x.low, y.low), std::pair(x.high, y.high)}) {
    const __m256i left = _mm256_srli_epi32(_mm256_castps_si256(one), 16), right = _mm256_castps_si256(other);
    _mm256_storeu_si256((__m256i*)to, _mm256_blend_epi16(left, right, 0xaa));
    to += kLanes;
  }
}

inline Lanes first(int64_t lanes) {
  const __m256i order = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  const auto below = [&](int64_t limit) { return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32((int)limit), order)); };
  lanes = lanes < kLanes ? lanes : kLanes;
  return {below(lanes), below(lanes - 8)};
}

// Which of `lanes` are true; `from` is null if all are.
inline Lanes load_lanes(const bool* from, int64_t lanes) {
  if (!from) return first(lanes);
  int32_t found[kLanes];
  for (int i = 0; i < kLanes; i++) found[i] = i < lanes && from[i] ? -1 : 0;
  return {_mm256_loadu_ps((const float*)found), _mm256_loadu_ps((const float*)(found + 8))};
}

// The bits of the largest of them without its sign; NaN is above all.
template <class T> inline uint32_t largest_size(const T* x, int64_t size) {
  Floats most;
  for (int64_t k = 0; k < size; k += kLanes) most = max_bits(most, abs(load(x + k, size - k)));
  return largest_bits(most);
}

}  // namespace bert_evaluation
