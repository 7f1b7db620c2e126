// A tile's products on AMX.
#pragma once

namespace bert_evaluation {

// 64 numbers in fixed point, the highest slice first. With 128 added to each slice, none borrows from the next.
inline void store_slices(int8_t* to, int64_t apart, Floats a, Floats b, Floats c, Floats d) {
  const __m512i middle = _mm512_set1_epi32(0x808080);
  const __m512i alike = _mm512_broadcast_i32x4(_mm_setr_epi8(2, 6, 10, 14, 1, 5, 9, 13, 0, 4, 8, 12, 3, 7, 11, 15));
  const auto slices = [&](Floats x) {  // of four numbers side by side: their first slices, their second ones, their third ones
    const __m512i bytes = _mm512_xor_si512(_mm512_add_epi32(_mm512_cvtps_epi32(x.all), middle), middle);
    return _mm512_shuffle_epi8(bytes, alike);
  };
  const __m512i of[4] = {slices(a), slices(b), slices(c), slices(d)};
  const __m512i ab = _mm512_unpacklo_epi32(of[0], of[1]), cd = _mm512_unpacklo_epi32(of[2], of[3]);
  const __m512i last_ab = _mm512_unpackhi_epi32(of[0], of[1]), last_cd = _mm512_unpackhi_epi32(of[2], of[3]);
  const auto store = [&](int slice, __m512i x) { _mm512_storeu_si512(to + slice * apart, in_order(x)); };
  store(0, _mm512_unpacklo_epi64(ab, cd));
  store(1, _mm512_unpackhi_epi64(ab, cd));
  store(2, _mm512_unpacklo_epi64(last_ab, last_cd));
}

// Tiles 0 to 3 are sums: what they are before the first product, and where they go behind the last one. (GCC wants numbers
// for the names of tiles.)
template <class sum> inline void begin_sums(sum* const (&at)[4], int64_t stride, bool more) {
  asm volatile("" : : : "memory");  // what is loaded has been written: GCC does not know that tiles read memory
  if (more) {
    _tile_loadd(0, at[0], 4 * stride);
    _tile_loadd(1, at[1], 4 * stride);
    _tile_loadd(2, at[2], 4 * stride);
    _tile_loadd(3, at[3], 4 * stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
}
template <class sum> inline void end_sums(sum* const (&at)[4], int64_t stride) {
  _tile_stored(0, at[0], 4 * stride);
  _tile_stored(1, at[1], 4 * stride);
  _tile_stored(2, at[2], 4 * stride);
  _tile_stored(3, at[3], 4 * stride);
}

#define DOT(sums, left, right)                                              \
  if constexpr (std::is_same_v<Kind, Int8>) _tile_dpbssd(sums, left, right); \
  else _tile_dpbf16ps(sums, left, right)

// Tiles 4 and 5 are the upper and the lower rows, 6 and 7 the two panels. Rows pass by the first-level cache, so that panels
// stay there for the next rows.
template <class Kind, class Between>
inline void multiply_amx(const Factor& rows, const Factor& panels, int64_t steps, typename Kind::sum* c, int64_t c_stride,
                         bool more, Between&& between) {
  auto* const lower = c + 16 * c_stride;
  begin_sums({c, c + kPanel, lower, lower + kPanel}, c_stride, more);
  for (int64_t k = 0; k < steps; k++) {
    const char *left = rows.at(k), *right = panels.at(k);
    _tile_stream_loadd(4, left, rows.stride);
    _tile_loadd(6, right, kGroupBytes);
    _tile_loadd(7, right + panels.stride, kGroupBytes);
    DOT(0, 4, 6);
    DOT(1, 4, 7);
    _tile_stream_loadd(5, left + 16 * rows.stride, rows.stride);
    DOT(2, 5, 6);
    DOT(3, 5, 7);
    between(k);
  }
  end_sums({c, c + kPanel, lower, lower + kPanel}, c_stride);
}
#undef DOT

// 32 rows of up to two steps stay in tiles 4 to 7, while many panels pass by.
inline void hold_rows(const Factor& rows, int64_t steps) {
  asm volatile("" : : : "memory");
  _tile_loadd(4, rows.at(0), rows.stride);
  _tile_loadd(5, rows.at(0) + 16 * rows.stride, rows.stride);
  if (steps < 2) return;
  _tile_loadd(6, rows.at(1), rows.stride);
  _tile_loadd(7, rows.at(1) + 16 * rows.stride, rows.stride);
}
inline void multiply_held(const Factor& panels, int64_t steps, float* c) {
  constexpr int64_t stride = kTile * sizeof(float);
  for (int i = 0; i < 2; i++, c += kPanel) {
    const char* right = panels.at(0) + i * panels.stride;
    asm volatile("" : : : "memory");
    _tile_zero(0);
    _tile_zero(1);
    _tile_loadd(2, right, kGroupBytes);
    _tile_dpbf16ps(0, 4, 2);
    _tile_dpbf16ps(1, 5, 2);
    if (steps == 2) {
      _tile_loadd(3, right + panels.step, kGroupBytes);
      _tile_dpbf16ps(0, 6, 3);
      _tile_dpbf16ps(1, 7, 3);
    }
    _tile_stored(0, c, stride);
    _tile_stored(1, c + 16 * kTile, stride);
    asm volatile("" : : : "memory");
  }
}

// Sixteen rows of a panel after the other. Each sum is worth 1/256 of the one before; tiles 4 to 6 are a panel's slices and 7
// one of the rows'. Each slice is loaded once: where neighbours use AMX too, a load takes as long as a product.
template <class Between>
inline void multiply_sliced(const Factor& rows, int64_t count, const Factor& panels, int64_t steps, int32_t* c, int64_t c_stride,
                            bool more, Between&& between) {
  const int64_t next = kTile * c_stride;
  for (int64_t tile = 0; tile < 4; tile++) {
    const int64_t row = tile % 2 * 16, panel = tile / 2;
    int32_t* const to = c + row * c_stride + panel * kPanel;
    if (row >= count) continue;
    begin_sums({to, to + next, to + 2 * next, to + 3 * next}, c_stride, more);
    for (int64_t k = 0; k < steps; k++) {
      const char *left = rows.at(k) + row * rows.stride, *right = panels.at(k) + panel * panels.stride;
      _tile_stream_loadd(7, left, rows.stride);
      _tile_loadd(4, right, kGroupBytes);
      _tile_dpbssd(0, 7, 4);
      _tile_loadd(5, right + panels.slice, kGroupBytes);
      _tile_dpbssd(1, 7, 5);
      _tile_loadd(6, right + 2 * panels.slice, kGroupBytes);
      _tile_dpbssd(2, 7, 6);
      _tile_stream_loadd(7, left + rows.slice, rows.stride);
      _tile_dpbssd(3, 7, 6);
      _tile_dpbssd(1, 7, 4);
      _tile_dpbssd(2, 7, 5);
      _tile_stream_loadd(7, left + 2 * rows.slice, rows.stride);
      _tile_dpbssd(3, 7, 5);
      _tile_dpbssd(2, 7, 4);
      between(tile * steps + k);
    }
    end_sums({to, to + next, to + 2 * next, to + 3 * next}, c_stride);
  }
}

}  // namespace bert_evaluation
