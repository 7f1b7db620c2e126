// A tile's products on AVX2: a few rows times 8 or 16 columns at a time, whose sums stay in registers.
#pragma once

namespace bert_evaluation {

// How a group of a row and of 16 columns is read and multiplied, in so many turns.
template <class Kind> struct Group;

// Of four numbers, first the even ones, then the odd ones; rows have them in this order.
template <> struct Group<Int8> {
  using Sums = __m256i;
  static constexpr int turns = 2;
  static __m256i row(const char* from, int turn) { return _mm256_set1_epi32(*(const int32_t*)(from + 4 * turn)); }
  static __m256i columns(const char* from, int turn) {
    const __m256i four = _mm256_loadu_si256((const __m256i*)from);
    return _mm256_srai_epi16(turn ? four : _mm256_slli_epi16(four, 8), 8);
  }
  static Sums add(Sums sums, __m256i row, __m256i columns) {
    sums = _mm256_add_epi32(sums, _mm256_madd_epi16(row, columns));
    asm("" : "+x"(sums));  // else GCC adds products to each other first, for which registers do not suffice
    return sums;
  }
  static void store(Sums one, Sums other, int32_t* to, bool more) {
    for (const Sums& sums : {one, other}) {
      const __m256i before = more ? _mm256_loadu_si256((const __m256i*)to) : _mm256_setzero_si256();
      _mm256_storeu_si256((__m256i*)to, _mm256_add_epi32(before, sums));
      to += 8;
    }
  }
};

// Of two numbers, first the even one, then the odd one, each widened to float32.
template <> struct Group<Bf16> {
  using Sums = __m256;
  static constexpr int turns = 2;
  static __m256 widened(__m256i two, int turn) {
    return _mm256_castsi256_ps(turn ? _mm256_and_si256(two, _mm256_set1_epi32(0xffff0000)) : _mm256_slli_epi32(two, 16));
  }
  static __m256 row(const char* from, int turn) { return widened(_mm256_set1_epi32(*(const int32_t*)from), turn); }
  static __m256 columns(const char* from, int turn) { return widened(_mm256_loadu_si256((const __m256i*)from), turn); }
  static Sums add(Sums sums, __m256 row, __m256 columns) { return _mm256_fmadd_ps(row, columns, sums); }
  static void store(Sums one, Sums other, float* to, bool more) {
    for (const Sums& sums : {one, other}) {
      _mm256_storeu_ps(to, _mm256_add_ps(more ? _mm256_loadu_ps(to) : _mm256_setzero_ps(), sums));
      to += 8;
    }
  }
};

template <> struct Group<Float32> {
  using Sums = __m256;
  static constexpr int turns = 1;
  static __m256 row(const char* from, int) { return _mm256_broadcast_ss((const float*)from); }
  static __m256 columns(const char* from, int) { return _mm256_loadu_ps((const float*)from); }
  static Sums add(Sums sums, __m256 row, __m256 columns) { return _mm256_fmadd_ps(row, columns, sums); }
  static void store(Sums one, Sums other, float* to, bool more) { Group<Bf16>::store(one, other, to, more); }
};

template <class Kind, int count>
inline void multiply_rows(const Factor& rows, const Factor& panels, int64_t start, int64_t end, typename Kind::sum* c, int64_t c_stride, bool more) {
  using Group = Group<Kind>;
  typename Group::Sums sums[count][2] = {};
  const int64_t stride = rows.stride, groups = panel_step<Kind> / kGroupBytes;
  for (int64_t k = start; k < end; k++) {
    const char *left = rows.at(k), *right = panels.at(k);
    for (int64_t group = 0; group < groups; group++, left += row_step<Kind> / groups, right += kGroupBytes) {
      _mm_prefetch(right + 1024, _MM_HINT_T0);
      for (int turn = 0; turn < Group::turns; turn++) {
        const auto one = Group::columns(right, turn), other = Group::columns(right + 32, turn);
#pragma GCC unroll 6
        for (int i = 0; i < count; i++) {
          const auto row = Group::row(left + i * stride, turn);
          sums[i][0] = Group::add(sums[i][0], row, one);
          sums[i][1] = Group::add(sums[i][1], row, other);
        }
        asm volatile("" : : : "memory");  // the next turn reads rows again: for keeping them there are no registers
      }
    }
  }
#pragma GCC unroll 6  // else GCC keeps all of them in memory
  for (int i = 0; i < count; i++) Group::store(sums[i][0], sums[i][1], c + i * c_stride, more);
}

// The first `count` rows of a tile.
template <class Kind, class Between>
inline void multiply_avx2(const Factor& rows, int64_t count, const Factor& panels, int64_t steps, typename Kind::sum* c,
                          int64_t c_stride, bool more, Between&& between) {
  constexpr int64_t most = 6, chunk = 12;  // rows whose sums fit into registers; steps whose columns stay in the cache
  constexpr auto multiply = []<size_t... i>(std::index_sequence<i...>) {
    return std::array{&multiply_rows<Kind, i + 1>...};
  }(std::make_index_sequence<most>());
  const int64_t groups = up(count, most) / most;
  for (int64_t start = 0; start < steps; start += chunk)
    for (int panel = 0; panel < 2; panel++) {
      const Factor columns{(const char*)panels.data + panel * panels.stride, 0, panels.step};
      for (int64_t group = 0; group < groups; group++) {
        const int64_t begin = count * group / groups, end = count * (group + 1) / groups;
        const Factor left{(const char*)rows.data + begin * rows.stride, rows.stride, rows.step};
        multiply[end - begin - 1](left, columns, start, std::min(steps, start + chunk),
                                  c + begin * c_stride + panel * kPanel, c_stride, more || start);
      }
    }
  between(steps - 1);
}

}  // namespace bert_evaluation
