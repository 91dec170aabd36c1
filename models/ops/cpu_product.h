// The two products of attention over one tile of keys, from widened scratch (many query rows share the widening) or
// straight from the paged blocks (few rows: a decode). Both run the same chains in the same order, so bits are equal.
#pragma once

#include "cpu_rows.h"

namespace argosy {

constexpr int kTile = 64, kChunk = 16, kChunks = kTile / kChunk;
// Register tile: kAcross vectors wide, kDown rows high.
constexpr int kAcross = kRegisters == 32 ? 4 : 2, kDown = 6;

// Where the chunks of 16 keys of a tile lie; `next` names the tile to fetch ahead.
template <class Cell>
struct Pages {
  const Cell *keys[kChunks], *values[kChunks];
};

// out[r][n] (+)= sum over k, in order, of a[r][k] * row(k)[n] for R rows and C vectors.
template <int R, int C, class Row>
INLINE void product_strip(const float* a, int64_t lda, int64_t first, int64_t last, float* out, int64_t ldo, bool adds,
                          Row&& row) {
  vf sum[R][C];
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) sum[r][c] = adds ? load<vf>(out + r * ldo + c * VL) : vf{};
  for (int64_t k = first; k < last; k++) {
    vf across[C];
    row(k, across);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
      vf s = splat(a[r * lda + k]);
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) sum[r][c] = fma(s, across[c], sum[r][c]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) store(out + r * ldo + c * VL, sum[r][c]);
}

// Calls strip.operator()<C>(first vector) over `vectors` vectors, in strips of C = kAcross, 2 or 1.
template <class Strip>
INLINE void for_strips(int vectors, Strip&& strip) {
  int v = 0;
  for (; v + kAcross <= vectors; v += kAcross) strip.template operator()<kAcross>(v);
  if constexpr (kAcross > 2)
    for (; v + 2 <= vectors; v += 2) strip.template operator()<2>(v);
  for (; v < vectors; v++) strip.template operator()<1>(v);
}

// From scratch: b [.., ldb] holds fp32.
template <int R>
void product(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t last, float* out, int64_t ldo,
             int64_t columns, bool adds) {
  for_strips(int(columns / VL), [&]<int C>(int v) INLINE_LAMBDA {
    const float* from = b + v * VL;
    product_strip<R, C>(a, lda, 0, last, out + v * VL, ldo, adds, [&](int64_t k, vf* across) INLINE_LAMBDA {
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) across[c] = load<vf>(from + k * ldb + c * VL);
    });
  });
}

// Scores of a tile straight from its key blocks: q [R][size] -> out [R][kTile].
template <int R, class Cell>
void score_pages(const float* q, int64_t size, const Pages<Cell>& here, const Pages<Cell>& next, int64_t block,
                 float* out) {
  for_strips(kTile / VL, [&]<int C>(int v) INLINE_LAMBDA {
    const Cell *from[C], *ahead[C];
    for (int c = 0; c < C; c++) {
      const int at = (v + c) * VL;
      from[c] = here.keys[at / kChunk] + at % kChunk;
      ahead[c] = next.keys[at / kChunk] + at % kChunk;
    }
    product_strip<R, C>(q, size, 0, size, out + v * VL, kTile, false, [&](int64_t d, vf* across) INLINE_LAMBDA {
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) {
        across[c] = widen_at(from[c] + d * block);
        if (c % (kChunk / VL) == 0) __builtin_prefetch(ahead[c] + d * block, 0, 3);
      }
    });
  });
}

// Weighted values of keys [first, last) of a tile straight from its value blocks, added to out [R][width].
template <int R, class Cell>
void mix_pages(const float* p, int64_t size, const Pages<Cell>& here, const Pages<Cell>& next, int64_t first,
               int64_t last, float* out, int64_t width) {
  for_strips(int(size / VL), [&]<int C>(int v) INLINE_LAMBDA {
    product_strip<R, C>(p, kTile, first, last, out + v * VL, width, true, [&](int64_t k, vf* across) INLINE_LAMBDA {
      const int64_t at = k % kChunk * size + v * VL;
      const Cell *from = here.values[k / kChunk] + at, *ahead = next.values[k / kChunk] + at;
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) across[c] = widen_at(from + c * VL);
      for (int64_t byte = 0; byte < int64_t(C * VL * sizeof(Cell)); byte += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(ahead) + byte, 0, 3);
    });
  });
}

// Calls f.operator()<rows>() for a number of rows that is known only now.
template <int R = kDown, class F>
INLINE void with_rows(int rows, F&& f) {
  if constexpr (R >= 1) {
    if (rows == R) return f.template operator()<R>();
    return with_rows<R - 1>(rows, f);
  }
}

}  // namespace argosy
