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
      const char *left = rows.at(k) + row * rows.stride, *right = panels.at(k);
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
    if constexpr (is_int8)
      for (int i = 0; i < kRows; i++)  // what the 128 have added: 128 times the sum of the row
        for (auto& each : sums[i]) each = _mm512_sub_epi32(each, _mm512_set1_epi32(_mm512_reduce_add_epi32(totals[i])));
    for (int i = 0; i < kRows; i++)
      for (int j = 0; j < 2; j++) _mm512_storeu_si512(c + (row + i) * c_stride + 16 * j, sums[i][j]);
  }
  for (int64_t k = 0; k < steps; k++) between(k);
}

// Some rows of float32 times two or four panels.
template <int count, int panels>
inline void multiply_rows(const Factor& rows, const Factor& right, int64_t steps, float* c, int64_t c_stride, bool more) {
  __m512 sums[count][panels] = {};
  for (int64_t k = 0; k < steps; k++) {
    const char* from = right.at(k);
    const float* left[count];
    for (int i = 0; i < count; i++) {
      left[i] = (const float*)(rows.at(k) + i * rows.stride);
      asm("" : "+r"(left[i]));  // else GCC reads their distances from memory for each number
    }
    for (int64_t n = 0; n < Float32::step; n++, from += kGroupBytes) {
      __m512 columns[panels];
#pragma GCC unroll 4
      for (int j = 0; j < panels; j++) columns[j] = _mm512_loadu_ps(from + j * right.stride);
#pragma GCC unroll 12
      for (int i = 0; i < count; i++) {
        const __m512 row = _mm512_set1_ps(left[i][n]);
#pragma GCC unroll 4
        for (int j = 0; j < panels; j++) sums[i][j] = _mm512_fmadd_ps(row, columns[j], sums[i][j]);
      }
    }
  }
  for (int i = 0; i < count; i++)
    for (int j = 0; j < panels; j++) {
      float* to = c + i * c_stride + j * kPanel;
      _mm512_storeu_ps(to, more ? _mm512_add_ps(_mm512_loadu_ps(to), sums[i][j]) : sums[i][j]);
    }
}

template <int panels, class Between>
inline void multiply_float32(const Factor& rows, int64_t count, const Factor& right, int64_t steps, float* c, int64_t c_stride,
                             bool more, Between&& between) {
  constexpr int64_t most = 24 / panels;  // rows whose sums fit into registers
  const int64_t passes = up(count, most) / most;
  const auto multiply = [&]<size_t... i>(int64_t row, int64_t size, std::index_sequence<i...>) {
    const Factor left{(const char*)rows.data + row * rows.stride, rows.stride, rows.step};
    ((size == i + 1 ? multiply_rows<i + 1, panels>(left, right, steps, c + row * c_stride, c_stride, more) : void()), ...);
  };
  for (int64_t pass = 0, turn = 0; pass < passes; pass++) {
    const int64_t row = count * pass / passes;
    multiply(row, count * (pass + 1) / passes - row, std::make_index_sequence<most>());
    // Spread over all passes, so that what is fetched comes while they multiply.
    for (; turn < steps * (pass + 1) / passes; turn++) between(turn);
  }
}

}  // namespace bert_evaluation
