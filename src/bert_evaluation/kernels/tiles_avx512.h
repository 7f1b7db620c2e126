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

// Some rows of float32 times two panels.
template <int count, class Between>
inline void multiply_rows(const Factor& rows, const Factor& panels, int64_t steps, float* c, int64_t c_stride, bool more,
                          Between&& between) {
  __m512 sums[count][2] = {};
  for (int64_t k = 0; k < steps; k++) {
    const char *left = rows.at(k, 0), *right = panels.at(k, 0);
    for (int64_t n = 0; n < Float32::step; n++, left += 4, right += kGroupBytes) {
      const __m512 one = _mm512_loadu_ps(right), other = _mm512_loadu_ps(right + panels.stride);
#pragma GCC unroll 12
      for (int i = 0; i < count; i++) {
        const __m512 row = _mm512_set1_ps(*(const float*)(left + i * rows.stride));
        sums[i][0] = _mm512_fmadd_ps(row, one, sums[i][0]);
        sums[i][1] = _mm512_fmadd_ps(row, other, sums[i][1]);
      }
    }
    between();
  }
  for (int i = 0; i < count; i++)
    for (int j = 0; j < 2; j++) {
      float* to = c + i * c_stride + j * kPanel;
      _mm512_storeu_ps(to, more ? _mm512_add_ps(_mm512_loadu_ps(to), sums[i][j]) : sums[i][j]);
    }
}

template <class Between>
inline void multiply_float32(const Factor& rows, int64_t count, const Factor& panels, int64_t steps, float* c, int64_t c_stride,
                             bool more, Between&& between) {
  constexpr int64_t most = 12;  // rows whose sums fit into registers
  const int64_t passes = up(count, most) / most;
  int64_t calls = 0;
  const auto spread = [&] {  // over all passes, so that what is fetched comes while they multiply
    if (++calls % passes == 0) between(calls / passes - 1);
  };
  const auto multiply = [&]<size_t... i>(int64_t row, int64_t size, std::index_sequence<i...>) {
    const Factor left{(const char*)rows.data + row * rows.stride, rows.stride, rows.step};
    ((size == i + 1 ? multiply_rows<i + 1>(left, panels, steps, c + row * c_stride, c_stride, more, spread) : void()), ...);
  };
  for (int64_t pass = 0; pass < passes; pass++) {
    const int64_t row = count * pass / passes;
    multiply(row, count * (pass + 1) / passes - row, std::make_index_sequence<most>());
  }
}

}  // namespace bert_evaluation
