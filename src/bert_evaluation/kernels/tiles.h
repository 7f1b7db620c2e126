// Products of matrices in tiles of 32 x 32, on AMX where there is it, else on AVX-512.
//
// The left matrix is in rows, its inner size padded to whole steps of 64 bytes. The right one is packed: panels of 16
// columns, each of them [inner / group][16][group], where a group is what 32 bits hold (2 bfloat16, 4 int8).
#pragma once
#include <sys/syscall.h>
#include <unistd.h>
#include <cstdlib>
#include <cstring>
#include "simd.h"

namespace bert_evaluation {

constexpr int kTile = 32, kStep = 64, kRowBytes = 64, kPanelStep = 1024;

inline int64_t up(int64_t number, int64_t unit) { return (number + unit - 1) / unit * unit; }

// Memory of a thread's own, which stays for its next call.
template <class T> struct Buffer {
  T* data = nullptr;
  int64_t size = 0;
  T* get(int64_t wanted) {
    if (wanted > size) {
      std::free(data);
      data = (T*)std::aligned_alloc(64, up(wanted * sizeof(T), 64));
      size = wanted;
    }
    return data;
  }
  ~Buffer() { std::free(data); }
};

// Kinds of products: how many parts each factor has, and which are multiplied: the left one's with the right one's.
struct Bf16 {
  using number = bfloat16;
  using sum = float;
  static constexpr int parts = 1, terms[][2] = {{0, 0}};
};
struct Int8 {
  using number = int8_t;
  using sum = int32_t;
  static constexpr int parts = 1, terms[][2] = {{0, 0}};
};
// float32 as three bfloat16: the second is what the first leaves out, the third what both do, and they hold all 24 bits.
// Six products of such parts are as near as one in float32; the other three are below its last bit.
struct Float32 {
  using number = bfloat16;
  using sum = float;
  static constexpr int parts = 3, terms[][2] = {{2, 0}, {0, 2}, {1, 1}, {1, 0}, {0, 1}, {0, 0}};
};

// `part`: how many numbers apart the parts go.
inline void split(__m512 x, bfloat16* to, int64_t part) {
  for (int i = 0; i < Float32::parts; i++) {
    __m256i rounded = to_bfloat16(x);
    _mm256_storeu_si256((__m256i*)(to + i * part), rounded);
    x = _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16)));
  }
}

// One side of a product: where it begins, and how far apart its rows (or panels), its steps and its parts are, in bytes.
struct Factor {
  const void* data;
  int64_t stride, step, part = 0;
  const char* at(int64_t k, int i) const { return (const char*)data + k * step + i * part; }
};

// Whether the system lets this process use AMX; it has to be asked for once. BERT_EVALUATION_AMX=0 does without.
inline bool amx_allowed() {
#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
  static const bool allowed = [] {
    const char* wish = std::getenv("BERT_EVALUATION_AMX");
    return !(wish && wish[0] == '0') && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  }();
  return allowed;
#else
  return false;
#endif
}

#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
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
  for (int64_t k = 0; k < steps; k++) {
    for (const auto& term : Kind::terms) {
      const char *left = rows.at(k, term[0]), *right = panels.at(k, term[1]);
      _tile_loadd(4, left, rows.stride);
      _tile_loadd(6, right, kRowBytes);
      _tile_loadd(7, right + panels.stride, kRowBytes);
      DOT(0, 4, 6);
      DOT(1, 4, 7);
      _tile_loadd(5, left + 16 * rows.stride, rows.stride);
      DOT(2, 5, 6);
      DOT(3, 5, 7);
    }
    between(k);
  }
  _tile_stored(0, c, 4 * c_stride);
  _tile_stored(1, c + 16, 4 * c_stride);
  _tile_stored(2, c + 16 * c_stride, 4 * c_stride);
  _tile_stored(3, c + 16 * c_stride + 16, 4 * c_stride);
}
#undef DOT
#endif

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
inline void multiply_avx512(const Factor& rows, const Factor& panels, int64_t steps, typename Kind::sum* c,
                            int64_t c_stride, bool more, Between&& between) {
  constexpr int kRows = 8;
  constexpr bool is_int8 = std::is_same_v<Kind, Int8>;
  const __m512i flip = _mm512_set1_epi8((char)0x80);
  for (int row = 0; row < kTile; row += kRows) {
    __m512i sums[kRows][2] = {};
    if (more)
      for (int i = 0; i < kRows; i++)
        for (int j = 0; j < 2; j++) sums[i][j] = _mm512_loadu_si512(c + (row + i) * c_stride + 16 * j);
    __m512i totals[kRows] = {};
    for (int64_t k = 0; k < steps; k++) {
      for (const auto& term : Kind::terms) {
        const char *left = rows.at(k, term[0]) + row * rows.stride, *right = panels.at(k, term[1]);
        for (int group = 0; group < 16; group++, left += 4, right += kRowBytes) {
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
            totals[i] = dot_avx512<Kind>(totals[i], _mm512_loadu_si512(left - kStep + i * rows.stride), flip);
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

// The same in float32 itself, for a few rows as they lie: there it would take longer to split the panels than to multiply.
// A panel has two numbers of each column side by side, so sums are of even and of odd numbers, until the end.
template <int rows> inline void multiply_float32(const float* x, int64_t stride, int64_t inputs, const float* panels, int64_t panel, float* c) {
  __m512 sums[rows][4] = {};
  for (int64_t k = 0; k < inputs; k += 2, panels += 2 * kLanes) {
    __m512 columns[4];
    for (int j = 0; j < 4; j++) columns[j] = _mm512_loadu_ps(panels + j / 2 * panel + j % 2 * kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++) {
      double both;
      if (k + 1 < inputs) {
        both = *(const double*)(x + i * stride + k);
      } else {
        const float last[2] = {x[i * stride + k], 0};
        std::memcpy(&both, last, sizeof(both));
      }
      const __m512 two = _mm512_castpd_ps(_mm512_set1_pd(both));
      for (int j = 0; j < 4; j++) sums[i][j] = _mm512_fmadd_ps(two, columns[j], sums[i][j]);
    }
  }
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < 4; j += 2)
      _mm512_storeu_ps(c + i * kTile + j / 2 * kLanes, _mm512_add_ps(_mm512_permutex2var_ps(sums[i][j], even, sums[i][j + 1]),
                                                                     _mm512_permutex2var_ps(sums[i][j], odd, sums[i][j + 1])));
}

// While one lives, its thread can multiply.
struct Tiles {
  const bool amx = amx_allowed();
  Tiles() {
#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
    if (!amx) return;
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
    asm volatile("" : : "r"(&config) : "memory");  // GCC takes the configuration for 8 bytes only
    _tile_loadconfig(&config);
#endif
  }
  ~Tiles() {
#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
    if (amx) _tile_release();
#endif
  }
  Tiles(const Tiles&) = delete;

  // c (32 x 32) = 32 rows times two panels, or as much `more`; `between` is called once after each step.
  template <class Kind, class Between>
  void multiply(const Factor& rows, const Factor& panels, int64_t steps, typename Kind::sum* c, int64_t c_stride, bool more,
                Between&& between) const {
#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
    if (amx) return multiply_amx<Kind>(rows, panels, steps, c, c_stride, more, between);
#endif
    multiply_avx512<Kind>(rows, panels, steps, c, c_stride, more, between);
  }
};

}  // namespace bert_evaluation
