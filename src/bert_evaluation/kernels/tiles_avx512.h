// A tile's products on AVX-512, with VNNI in int8 and with BF16 in bfloat16.
#pragma once

namespace bert_evaluation {

// One more product of 16 columns' groups with a row's group, whose 32 bits stand in every lane.
template <class Kind> inline __m512i dot_avx512(__m512i sums, __m512i left, __m512i right) {
  if constexpr (std::is_same_v<Kind, Int8>) {
#ifdef __AVX512VNNI__
    return _mm512_dpbusd_epi32(sums, right, left);
#endif
  } else {
#ifdef __AVX512BF16__
    return (__m512i)_mm512_dpbf16_ps((__m512)sums, (__m512bh)left, (__m512bh)right);
#endif
  }
  return sums;
}

// Eight rows of two panels at a time.
template <class Kind, class Between>
inline void multiply_avx512(const Factor& rows, int64_t count, const Factor& panels, int64_t steps, typename Kind::sum* c,
                            int64_t c_stride, bool more, Between&& between) {
  constexpr int kRows = 8;
  constexpr bool is_int8 = std::is_same_v<Kind, Int8>;
  const __m512i flip = _mm512_set1_epi8((char)0x80);
  for (int64_t row = 0; row < count; row += kRows) {
    __m512i sums[kRows][2] = {};
    if (more)
      for (int i = 0; i < kRows; i++)
        for (int j = 0; j < 2; j++) sums[i][j] = _mm512_loadu_si512(c + (row + i) * c_stride + 16 * j);
    __m512i totals[kRows] = {};
    for (int64_t k = 0; k < steps; k++) {
      for (const auto& term : Kind::terms) {
        const char *left = rows.at(k, term[0]) + row * rows.stride, *right = panels.at(k, term[1]);
        for (int group = 0; group < 16; group++, left += 4, right += kGroupBytes) {
          __m512i columns[2] = {_mm512_loadu_si512(right), _mm512_loadu_si512(right + panels.stride)};
          if constexpr (is_int8)  // the instruction takes one factor without a sign: 128 is added
            for (auto& each : columns) each = _mm512_xor_si512(each, flip);
#pragma GCC unroll 8
          for (int i = 0; i < kRows; i++) {
            __m512i four = _mm512_set1_epi32(*(const int32_t*)(left + i * rows.stride));
            for (int j = 0; j < 2; j++) sums[i][j] = dot_avx512<Kind>(sums[i][j], four, columns[j]);
          }
        }
        if constexpr (is_int8)
          for (int i = 0; i < kRows; i++)
            totals[i] = dot_avx512<Kind>(totals[i], _mm512_loadu_si512(left - row_step<Kind> + i * rows.stride), flip);
      }
    }
    if constexpr (is_int8)
      for (int i = 0; i < kRows; i++)  // what the 128 have added: 128 times the sum of the row
        for (auto& each : sums[i]) each = _mm512_sub_epi32(each, _mm512_set1_epi32(_mm512_reduce_add_epi32(totals[i])));
    for (int i = 0; i < kRows; i++)
      for (int j = 0; j < 2; j++) _mm512_storeu_si512(c + (row + i) * c_stride + 16 * j, sums[i][j]);
  }
  for (int64_t k = 0; k < steps; k++) between(k);
}

// Some rows of float32. A panel has two numbers of each column side by side, so sums are of even and of odd numbers, until
// the end.
template <int count, class Between>
inline void multiply_rows(const Factor& rows, const Factor& panels, int64_t steps, float* c, int64_t c_stride, bool more,
                          Between&& between) {
  __m512 sums[count][4] = {};
  for (int64_t k = 0; k < steps; k++) {
    const char *left = rows.at(k, 0), *right = panels.at(k, 0);
    for (int64_t group = 0; group < Float32::step / 2; group++, left += 8, right += 128) {
      __m512 columns[4];
      for (int j = 0; j < 4; j++) columns[j] = _mm512_loadu_ps(right + j / 2 * panels.stride + j % 2 * 64);
#pragma GCC unroll 6
      for (int i = 0; i < count; i++) {
        const __m512 two = _mm512_castpd_ps(_mm512_set1_pd(*(const double*)(left + i * rows.stride)));
        for (int j = 0; j < 4; j++) sums[i][j] = _mm512_fmadd_ps(two, columns[j], sums[i][j]);
      }
    }
    between();
  }
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
  for (int i = 0; i < count; i++)
    for (int j = 0; j < 4; j += 2) {
      float* to = c + i * c_stride + j / 2 * kPanel;
      const __m512 both = _mm512_add_ps(_mm512_permutex2var_ps(sums[i][j], even, sums[i][j + 1]),
                                        _mm512_permutex2var_ps(sums[i][j], odd, sums[i][j + 1]));
      _mm512_storeu_ps(to, more ? _mm512_add_ps(_mm512_loadu_ps(to), both) : both);
    }
}

template <class Between>
inline void multiply_float32(const Factor& rows, int64_t count, const Factor& panels, int64_t steps, float* c, int64_t c_stride,
                             bool more, Between&& between) {
  const int64_t passes = count / 6 + count % 6 / 2 + count % 2;
  int64_t calls = 0, row = 0;
  const auto spread = [&] {  // over all passes, so that what is fetched comes while they multiply
    if (++calls % passes == 0) between(calls / passes - 1);
  };
  const auto pass = [&]<int size>(std::integral_constant<int, size>) {
    for (; row + size <= count; row += size)
      multiply_rows<size>(Factor{(const char*)rows.data + row * rows.stride, rows.stride, rows.step}, panels, steps,
                          c + row * c_stride, c_stride, more, spread);
  };
  pass(std::integral_constant<int, 6>{});
  pass(std::integral_constant<int, 2>{});
  pass(std::integral_constant<int, 1>{});
}

}  // namespace bert_evaluation
