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
      _tile_loadd(6, right, kGroupBytes);
      _tile_loadd(7, right + panels.stride, kGroupBytes);
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

}  // namespace bert_evaluation
