// Products of matrices in tiles of 32 x 32, on AMX where there is it, else on AVX-512.
//
// The left matrix is in rows, its inner size padded to whole steps of 64 bytes. The right one is packed: panels of 16
// columns, each of them [inner / group][16][group], where a group is what 32 bits hold (2 bfloat16, 4 int8).
#pragma once
#include <sys/syscall.h>
#include <unistd.h>
#include <cstdlib>
#include "simd.h"

namespace bert_evaluation {

constexpr int kTile = 32, kStep = 64, kRowBytes = 64, kPanelStep = 1024;

inline int64_t up(int64_t number, int64_t unit) { return (number + unit - 1) / unit * unit; }

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

struct Bf16 {
  using number = bfloat16;
  using sum = float;
  static constexpr int group = 2;
};
struct Int8 {
  using number = int8_t;
  using sum = int32_t;
  static constexpr int group = 4;
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
#define DOT(c, a, b) if constexpr (std::is_same_v<Kind, Bf16>) _tile_dpbf16ps(c, a, b); else _tile_dpbssd(c, a, b)

template <class Kind, class Between>
inline void multiply_amx(const char* a, int64_t stride, const char* b, int64_t panel, int64_t steps,
                         typename Kind::sum* c, int64_t c_stride, Between&& between) {
  asm volatile("" : : : "memory");  // what is loaded has been written: GCC does not know that tiles read memory
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const char* low = a + 16 * stride;
  for (int64_t k = 0; k < steps; k++) {
    _tile_loadd(4, a + k * kStep, stride);
    _tile_loadd(6, b + k * kPanelStep, kRowBytes);
    _tile_loadd(7, b + panel + k * kPanelStep, kRowBytes);
    DOT(0, 4, 6);
    DOT(1, 4, 7);
    _tile_loadd(5, low + k * kStep, stride);
    DOT(2, 5, 6);
    DOT(3, 5, 7);
    between(k);
  }
  _tile_stored(0, c, 4 * c_stride);
  _tile_stored(1, c + 16, 4 * c_stride);
  _tile_stored(2, c + 16 * c_stride, 4 * c_stride);
  _tile_stored(3, c + 16 * c_stride + 16, 4 * c_stride);
}
#undef DOT
#endif

// Eight rows of two panels at a time.
template <class Kind, class Between>
inline void multiply_avx512(const char* a, int64_t stride, const char* b, int64_t panel, int64_t steps,
                            typename Kind::sum* c, int64_t c_stride, Between&& between) {
  constexpr int kRows = 8;
  for (int row = 0; row < kTile; row += kRows) {
    __m512i sums[kRows][2] = {};
    const char* rows = a + row * stride;
    [[maybe_unused]] int32_t totals[kRows] = {};
    for (int64_t k = 0; k < steps * 16; k++) {
      __m512i right[2] = {_mm512_loadu_si512(b + k * kRowBytes), _mm512_loadu_si512(b + panel + k * kRowBytes)};
      if constexpr (std::is_same_v<Kind, Int8>)
        for (auto& each : right) each = _mm512_xor_si512(each, _mm512_set1_epi8((char)0x80));
#pragma GCC unroll 8
      for (int i = 0; i < kRows; i++) {
        __m512i left = _mm512_set1_epi32(*(const int32_t*)(rows + i * stride + 4 * k));
        for (int j = 0; j < 2; j++) {
          if constexpr (std::is_same_v<Kind, Bf16>) {
#ifdef __AVX512BF16__
            sums[i][j] = (__m512i)_mm512_dpbf16_ps((__m512)sums[i][j], (__m512bh)left, (__m512bh)right[j]);
#endif
          } else {
#ifdef __AVX512VNNI__
            // Columns as they are plus 128 have no sign, as the instruction wants.
            sums[i][j] = _mm512_dpbusd_epi32(sums[i][j], right[j], left);
#endif
          }
        }
      }
    }
    if constexpr (std::is_same_v<Kind, Int8>) {
#ifdef __AVX512VNNI__
      for (int i = 0; i < kRows; i++) {  // what the 128 have added: 128 times the sum of the row
        __m512i total = _mm512_setzero_si512();
        for (int64_t k = 0; k < steps; k++)
          total = _mm512_dpbusd_epi32(total, _mm512_set1_epi8((char)0x80), _mm512_loadu_si512(rows + i * stride + k * kStep));
        __m512i extra = _mm512_set1_epi32(_mm512_reduce_add_epi32(total));
        for (auto& each : sums[i]) each = _mm512_sub_epi32(each, extra);
      }
#endif
    }
    for (int i = 0; i < kRows; i++)
      for (int j = 0; j < 2; j++) _mm512_storeu_si512(c + (row + i) * c_stride + 16 * j, sums[i][j]);
  }
  for (int64_t k = 0; k < steps; k++) between(k);
}

// While one lives, its thread can multiply.
struct Tiles {
  const bool amx = amx_allowed();
  Tiles() {
#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
    if (amx) {
      struct alignas(64) { uint8_t palette = 1, start = 0, reserved[14] = {}; uint16_t bytes[16] = {}; uint8_t rows[16] = {}; } config;
      for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
      asm volatile("" : : "r"(&config) : "memory");  // GCC takes the configuration for 8 bytes only
      _tile_loadconfig(&config);
    }
#endif
  }
  ~Tiles() {
#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
    if (amx) _tile_release();
#endif
  }
  Tiles(const Tiles&) = delete;

  // c (32 x 32) = a (32 rows) times two panels; `between` is called once after each step.
  template <class Kind, class Between>
  void multiply(const void* a, int64_t stride, const void* b, int64_t panel, int64_t steps, typename Kind::sum* c,
                int64_t c_stride, Between&& between) const {
#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
    if (amx) return multiply_amx<Kind>((const char*)a, stride, (const char*)b, panel, steps, c, c_stride, between);
#endif
    multiply_avx512<Kind>((const char*)a, stride, (const char*)b, panel, steps, c, c_stride, between);
  }
};

}  // namespace bert_evaluation
