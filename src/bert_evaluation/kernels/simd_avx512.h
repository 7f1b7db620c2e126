// Sixteen float32 numbers in one register of AVX-512.
#pragma once
#include <immintrin.h>
#include <bit>
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

// The first `lanes` of them; the others are zeros, or are left as they were. Most often it is all, which needs no mask.
inline Floats load(const float* from, int64_t lanes = kLanes) {
  return lanes >= kLanes ? _mm512_loadu_ps(from) : _mm512_maskz_loadu_ps(first(lanes), from);
}
inline Floats load(const bfloat16* from, int64_t lanes = kLanes) {
  return widened(lanes >= kLanes ? _mm256_loadu_si256((const __m256i*)from) : _mm256_maskz_loadu_epi16(first(lanes), from));
}
inline Floats load(const int32_t* from) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(from)); }
inline void store(float* to, Floats x, int64_t lanes = kLanes) {
  if (lanes >= kLanes) _mm512_storeu_ps(to, x.all);
  else _mm512_mask_storeu_ps(to, first(lanes), x.all);
}
inline void store(bfloat16* to, Floats x, int64_t lanes = kLanes) {
  if (lanes >= kLanes) _mm256_storeu_si256((__m256i*)to, to_bfloat16(x));
  else _mm256_mask_storeu_epi16(to, first(lanes), to_bfloat16(x));
}
// 2^x to 2e-4 of it, for what is rounded to bfloat16 afterwards; 2^-126 for all below -126, 2^127 above 127, NaN for NaN. x is
// a whole number of sixteenths, whose power a table has but for the exponent, and a rest.
struct Sixteenths {
  alignas(64) int32_t powers[16];  // without what the number's place, shifted to the exponent, adds to their bits
  constexpr Sixteenths() : powers() {
    double power = 1;
    for (int i = 0; i < 16; i++, power *= 1.0442737824274138) powers[i] = std::bit_cast<int32_t>((float)power) - (i << 19);
  }
};
inline Floats near_exp2(Floats x) {
  static constexpr Sixteenths table;
  const Floats shift = 0x1.8p19f;  // beside it, a float has sixteenths, and they are its last bits
  x = min(127.f, max(-126.f, x));  // the second of them if one is NaN
  const Floats shifted = x + shift, rest = x - (shifted - shift);
  const __m512i sixteenths = _mm512_castps_si512(shifted.all);
  const __m512i fraction = _mm512_permutexvar_epi32(sixteenths, _mm512_load_si512(table.powers));
  const Floats power = _mm512_castsi512_ps(_mm512_add_epi32(fraction, _mm512_slli_epi32(sixteenths, 19)));
  return fma(power, rest * 0.693147182f, power);
}

#ifdef __AVX512BF16__
inline Floats store_and_add(bfloat16* to, Floats x, Floats y, Floats total) {
  const __m512bh both = _mm512_cvtne2ps_pbh(y.all, x.all);
  _mm512_storeu_si512(to, (__m512i)both);
  return _mm512_dpbf16_ps(total.all, both, (__m512bh)_mm512_set1_epi16(0x3f80));  // times one
}
#endif

// Of each four, which lie in each other's places, all that belong together side by side.
inline __m512i in_order(__m512i fours) {
  return _mm512_permutexvar_epi32(_mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0), fours);
}
// As the nearest whole numbers, one behind the other.
inline void store_whole(int8_t* to, Floats a, Floats b, Floats c, Floats d) {
  const __m512i ab = _mm512_packs_epi32(_mm512_cvtps_epi32(a.all), _mm512_cvtps_epi32(b.all));
  const __m512i cd = _mm512_packs_epi32(_mm512_cvtps_epi32(c.all), _mm512_cvtps_epi32(d.all));
  _mm512_storeu_si512(to, in_order(_mm512_packs_epi16(ab, cd)));
}

// The bits of the largest of them without its sign. Their order is that of the numbers; NaN is above all.
inline uint32_t largest_size(const float* x, int64_t size) {
  __m512i most = _mm512_setzero_si512();
  for (int64_t k = 0; k < size; k += kLanes) most = _mm512_max_epu32(most, _mm512_castps_si512(abs(load(x + k, size - k)).all));
  return _mm512_reduce_max_epu32(most);
}
inline uint32_t largest_size(const bfloat16* x, int64_t size) {
  const __m512i sizes = _mm512_set1_epi16(0x7fff);
  __m512i most = _mm512_setzero_si512();
  for (int64_t k = 0; k < size; k += 2 * kLanes) {
    const __mmask32 there = size - k >= 2 * kLanes ? ~0u : (1u << (size - k)) - 1;
    most = _mm512_max_epu16(most, _mm512_and_si512(sizes, _mm512_maskz_loadu_epi16(there, x + k)));
  }
  const __m512i high = _mm512_srli_epi32(most, 16), low = _mm512_and_si512(most, _mm512_set1_epi32(0xffff));
  return (uint32_t)_mm512_reduce_max_epu32(_mm512_max_epu32(high, low)) << 16;
}

// Pairs of them, one of each beside the other.
inline void store_pairs(bfloat16* to, Floats x, Floats y) {  // both hold numbers in bfloat16
  _mm512_storeu_si512(to, _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(x.all), 16),
                                          _mm512_and_si512(_mm512_castps_si512(y.all), _mm512_set1_epi32(0xffff0000))));
}

// Sixteen rows of 32 bits to sixteen columns of them.
inline void transpose(__m512i (&rows)[16]) {
  __m512i pairs[16], fours[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {  // in each 128 bits: column 2 j and the next one, of four rows
      fours[i + 2 * j] = _mm512_unpacklo_epi64(pairs[i + j], pairs[i + j + 2]);
      fours[i + 2 * j + 1] = _mm512_unpackhi_epi64(pairs[i + j], pairs[i + j + 2]);
    }
  for (int j = 0; j < 4; j++) {
    const __m512i a = _mm512_shuffle_i32x4(fours[j], fours[j + 4], 0x88), b = _mm512_shuffle_i32x4(fours[j], fours[j + 4], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(fours[j + 8], fours[j + 12], 0x88), d = _mm512_shuffle_i32x4(fours[j + 8], fours[j + 12], 0xdd);
    rows[j] = _mm512_shuffle_i32x4(a, c, 0x88);
    rows[j + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
    rows[j + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
    rows[j + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
}

// Which of `lanes` are true; `from` is null if all are.
inline Lanes load_lanes(const bool* from, int64_t lanes) {
  if (!from) return first(lanes);
  const __m128i bytes = _mm_maskz_loadu_epi8(first(lanes), from);
  return _mm_test_epi8_mask(bytes, bytes);
}

}  // namespace bert_evaluation
