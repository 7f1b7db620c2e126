// A tile's products on AMX.
#pragma once

namespace bert_evaluation {

// `part`: how many numbers apart the parts go.
inline void split(Floats x, bfloat16* to, int64_t part) {
  for (int i = 0; i < SplitFloat32::parts; i++) {
    const __m256i rounded = to_bfloat16(x);
    _mm256_storeu_si256((__m256i*)(to + i * part), rounded);
    x = x - widened(rounded);
  }
}

// Rows of 16 columns, two of them in each number of 32 bits, as a panel of bfloat16 has them. Rounded to nearest, ties away
// from zero, in whole numbers: the conversion to bfloat16 and back takes longer.
inline void split_pair(const float* even, const float* odd, bfloat16* to, int64_t part) {
  const __m512i half = _mm512_set1_epi32(0x8000), high = _mm512_set1_epi32(0xffff0000);
  __m512i x = _mm512_loadu_si512(even), y = _mm512_loadu_si512(odd);
  for (int i = 0; i < SplitFloat32::parts; i++) {
    const bool last = i + 1 == SplitFloat32::parts;  // of which nothing is left out
    const __m512i a = last ? x : _mm512_add_epi32(x, half), b = last ? y : _mm512_and_si512(_mm512_add_epi32(y, half), high);
    _mm512_storeu_si512(to + i * part, _mm512_or_si512(_mm512_srli_epi32(a, 16), b));
    x = _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(_mm512_and_si512(a, high))));
    y = _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(y), _mm512_castsi512_ps(b)));
  }
}

// Tiles 0 to 3 are sums, 4 and 5 the upper and the lower rows, 6 and 7 the two panels. (GCC wants numbers for their names.)
#define DOT(sums, left, right)                                              \
  if constexpr (std::is_same_v<Kind, Int8>) _tile_dpbssd(sums, left, right); \
  else _tile_dpbf16ps(sums, left, right)

template <class Kind, class Between>
inline void multiply_amx(const Factor& rows, const Factor& panels, int64_t steps, typename Kind::sum* c, int64_t c_stride,
                         bool more, Between&& between) {
  asm volatile("" : : : "memory");  // what is loaded has been written: GCC does not know that tiles read memory
  if (more) {
    _tile_loadd(0, c, 4 * c_stride);
    _tile_loadd(1, c + 16, 4 * c_stride);
    _tile_loadd(2, c + 16 * c_stride, 4 * c_stride);
    _tile_loadd(3, c + 16 * c_stride + 16, 4 * c_stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  int64_t turn = 0;
  const auto multiply = [&]<size_t i>(int64_t k, std::integral_constant<size_t, i>) {
    constexpr auto& term = Kind::terms[i];
    constexpr auto& before = Kind::terms[i ? i - 1 : 0];
    const char *left = rows.at(k, term[0]), *right = panels.at(k, term[1]);
    if constexpr (!i || term[0] != before[0]) _tile_loadd(4, left, rows.stride);
    if constexpr (!i || term[1] != before[1]) {
      _tile_loadd(6, right, kGroupBytes);
      _tile_loadd(7, right + panels.stride, kGroupBytes);
    }
    DOT(0, 4, 6);
    DOT(1, 4, 7);
    if constexpr (!i || term[0] != before[0]) _tile_loadd(5, left + 16 * rows.stride, rows.stride);
    DOT(2, 5, 6);
    DOT(3, 5, 7);
    between(turn++);
  };
  for (int64_t k = 0; k < steps; k++)
    [&]<size_t... i>(std::index_sequence<i...>) {
      (multiply(k, std::integral_constant<size_t, i>()), ...);
    }(std::make_index_sequence<std::size(Kind::terms)>());
  _tile_stored(0, c, 4 * c_stride);
  _tile_stored(1, c + 16, 4 * c_stride);
  _tile_stored(2, c + 16 * c_stride, 4 * c_stride);
  _tile_stored(3, c + 16 * c_stride + 16, 4 * c_stride);
}
#undef DOT

}  // namespace bert_evaluation
