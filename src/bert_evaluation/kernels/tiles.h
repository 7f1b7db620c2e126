// Products of matrices in tiles of 32 x 32, on AMX where there is it, else on AVX-512 or AVX2.
//
// The left matrix is in rows, its inner size padded to whole steps. The right one is packed: panels of 16 columns, each
// of them [inner / group][16][group], where a group is what 32 bits hold: 4 int8, 2 bfloat16 or a float32.
#pragma once
#include <sys/syscall.h>
#include <unistd.h>
#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>
#include "simd.h"

#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
#define BERT_EVALUATION_HAS_AMX
#endif

namespace bert_evaluation {

#if defined(BERT_EVALUATION_AVX512) && !defined(__AVX512BF16__)
constexpr bool kMultipliesBf16 = false;
#else
constexpr bool kMultipliesBf16 = true;  // AVX2 as float32
#endif

constexpr int kTile = 32, kPanel = 16, kGroupBytes = 64;  // the last: of 16 columns, in int8 and in bfloat16

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

// Kinds of products: the types of left and right numbers and of sums, how many numbers of a row and a column a step
// multiplies, and how many slices each factor and how many sums each product has.
struct Bf16 {
  using left = bfloat16;
  using right = bfloat16;
  using sum = float;
  static constexpr int step = 32, slices = 1, sums = 1;
};
struct Int8 {
#ifdef BERT_EVALUATION_AVX512
  using left = int8_t;
#else
  using left = int16_t;  // of 8 bits: products of int16 are the only ones of AVX2 whose sums do not overflow
#endif
  using right = int8_t;
  using sum = int32_t;
  static constexpr int step = 64, slices = 1, sums = 1;
};
struct Float32 {
  using left = float;
  using right = float;
  using sum = float;
  static constexpr int step = 32, slices = 1, sums = 1;
};
// float32 in fixed point of 24 bits, a row's or a column's largest number being the largest there is, in slices of 8. Their
// products are exact, and added to those that are worth as much; that of the two last slices is below the last bit.
struct Sliced {
  using left = int8_t;
  using right = int8_t;
  using sum = int32_t;
  static constexpr int step = 64, slices = 3, sums = 4;
};

// Bytes of a slice of a row's numbers, and of a panel's, that a step multiplies.
template <class Kind> constexpr int64_t row_step = Kind::step * sizeof(typename Kind::left);
template <class Kind> constexpr int64_t panel_step = kPanel * Kind::step * sizeof(typename Kind::right);

// One side of a product: where it begins, and how far apart its rows (or panels), its steps and its slices are, in bytes.
struct Factor {
  const void* data;
  int64_t stride, step, slice = 0;
  const char* at(int64_t k, int i = 0) const { return (const char*)data + k * step + i * slice; }
};

// Whether the system lets this process use AMX; it has to be asked for once. BERT_EVALUATION_AMX=0 does without.
inline bool amx_allowed() {
#ifdef BERT_EVALUATION_HAS_AMX
  static const bool allowed = [] {
    const char* wish = std::getenv("BERT_EVALUATION_AMX");
    return !(wish && wish[0] == '0') && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  }();
  return allowed;
#else
  return false;
#endif
}

}  // namespace bert_evaluation

#ifdef BERT_EVALUATION_HAS_AMX
#include "tiles_amx.h"
#endif
#ifdef BERT_EVALUATION_AVX512
#include "tiles_avx512.h"
#else
#include "tiles_avx2.h"
#endif

namespace bert_evaluation {

// While one lives, its thread can multiply.
struct Tiles {
  const bool amx = amx_allowed();
  Tiles() {
#ifdef BERT_EVALUATION_HAS_AMX
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
#ifdef BERT_EVALUATION_HAS_AMX
    if (amx) _tile_release();
#endif
  }
  Tiles(const Tiles&) = delete;

  // c (32 x 32) = the first `count` of 32 rows times two panels, or as much `more`; others may be anything. `between` is
  // called after each step with its number, or after the last one. Of four panels, c is 64 wide; of slices, it has four
  // such sums, one behind the other.
  template <class Kind, int size = 2, class Between>
  void multiply(const Factor& rows, int64_t count, const Factor& panels, int64_t steps, typename Kind::sum* c, int64_t c_stride,
                bool more, Between&& between) const {
#ifdef BERT_EVALUATION_AVX512
    if constexpr (std::is_same_v<Kind, Float32>) return multiply_float32<size>(rows, count, panels, steps, c, c_stride, more, between);
#ifdef BERT_EVALUATION_HAS_AMX
    else if constexpr (std::is_same_v<Kind, Sliced>) return multiply_sliced(rows, count, panels, steps, c, c_stride, more, between);
    else if (amx) return multiply_amx<Kind>(rows, panels, steps, c, c_stride, more, between);
#endif
    else return multiply_avx512<Kind>(rows, count, panels, steps, c, c_stride, more, between);
#else
    multiply_avx2<Kind>(rows, count, panels, steps, c, c_stride, more, between);
#endif
  }

  // 32 rows times many pairs of panels. `take` has each product (32 x 32), with its number, while the next one is multiplied.
  template <class Kind, class Take>
  void multiply_all(const Factor& rows, int64_t count, const Factor& panels, int64_t steps, int64_t pairs, const Take& take) const {
    alignas(64) typename Kind::sum products[2][kTile * kTile];
#ifdef BERT_EVALUATION_HAS_AMX
    const bool held = std::is_same_v<Kind, Bf16> && amx && steps <= 2;
    if (held) hold_rows(rows, steps);
#endif
    for (int64_t pair = 0; pair < pairs; pair++) {
      const Factor right{panels.at(0) + 2 * pair * panels.stride, panels.stride, panels.step};
#ifdef BERT_EVALUATION_HAS_AMX
      if (held) multiply_held(right, steps, products[pair % 2]);
      else
#endif
        multiply<Kind>(rows, count, right, steps, products[pair % 2], kTile, false, [](int64_t) {});
      if (pair) take(pair - 1, products[(pair - 1) % 2]);
    }
    take(pairs - 1, products[(pairs - 1) % 2]);
  }
};

}  // namespace bert_evaluation
