// Linears with bf16 weights where the CPU multiplies bf16 pairs (AVX512-BF16, two flops per lane more than an FMA).
//
// x is rounded to bf16, to nearest even, once per call; sums stay fp32. vdpbf16ps adds the product of the upper halves
// of its words, rounds, then adds that of the lower halves and rounds again. Pairs are stored with the even k in the
// upper half, so every output is one chain in the order of k, as everywhere: the bits of an FMA chain over the rounded
// x, whatever M, the tile, the thread. One difference is the instruction's own: denormals count as zero.
//
// Packed weight: panels of 32 outputs, [N / 32][ceil(K / 2)][32] words of (even k << 16 | odd k), zeros where N or K
// end. One aligned load feeds 16 outputs without widening. The only file that knows these instructions.
#pragma once

#include "cpu_pool.h"

namespace argosy {

#if defined(__AVX512BF16__)

constexpr bool kHasDot = true;

struct Dot {
  static constexpr int kVectors = 2, kPanel = kVectors * 16, kMaxRows = 12;
  static constexpr int64_t kBytes = kPanel * 4;  // of a panel, per pair of k

  static INLINE int64_t pairs(int64_t k) { return (k + 1) / 2; }

  // Words per row of rounded x: whole cache lines, and an odd number of them, so that the rows of a tile do not meet in
  // the same few sets of the cache.
  static INLINE int64_t stride(int64_t k) { return ((pairs(k) + 15) / 16 | 1) * 16; }

  // Two floats become (x[0] << 16 | x[1]) for every pair; an odd last one is paired with 0.
  static INLINE void round_row(const float* x, int64_t k, uint32_t* to) {
    int64_t i = 0;
    for (; i + 32 <= k; i += 32) {
      const __m512bh halves = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + i + 16), _mm512_loadu_ps(x + i));
      _mm512_storeu_si512(to + i / 2, _mm512_rol_epi32((__m512i)halves, 16));
    }
    for (; i < k; i += 2) {
      const __m128bh halves = _mm_cvtne2ps_pbh(_mm_setzero_ps(), _mm_setr_ps(x[i], i + 1 < k ? x[i + 1] : 0, 0, 0));
      const uint32_t word = uint32_t(_mm_cvtsi128_si32((__m128i)halves));
      to[i / 2] = word << 16 | word >> 16;
    }
  }

  // R rows times one panel into tile [R][32]; asks meanwhile for memory that is needed soon, `pace` bytes per pair.
  template <int R>
  static void multiply(const uint32_t* x, int64_t stride, const char* panel, int64_t pairs, const char* ahead,
                       int64_t pace, float* tile) {
    __m512 sum[R][kVectors];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
      for (int v = 0; v < kVectors; v++) sum[r][v] = _mm512_setzero_ps();
    // Three rows per pointer: base, base + stride, base + 2 * stride are addresses that cost nothing.
    const uint32_t* rows[(R + 2) / 3];
#pragma GCC unroll 4
    for (int i = 0; i < (R + 2) / 3; i++) rows[i] = x + 3 * i * stride;
    for (int64_t k = 0; k < pairs; k++, panel += kBytes, ahead += pace) {
      __builtin_prefetch(ahead, 0, 3);
      __builtin_prefetch(ahead + 64, 0, 3);
      __m512bh w[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) w[v] = (__m512bh)_mm512_load_si512(panel + v * 64);
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) {
        const __m512bh pair = (__m512bh)_mm512_set1_epi32(int32_t(rows[r / 3][k + r % 3 * stride]));
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v++) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], pair, w[v]);
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
      for (int v = 0; v < kVectors; v++) _mm512_storeu_ps(tile + r * kPanel + v * 16, sum[r][v]);
  }

  template <int R = kMaxRows>
  static INLINE void multiply_rows(int rows, const uint32_t* x, int64_t stride, const char* panel, int64_t pairs,
                                   const char* ahead, int64_t pace, float* tile) {
    if constexpr (R >= 1) {
      if (rows == R) return multiply<R>(x, stride, panel, pairs, ahead, pace, tile);
      return multiply_rows<R - 1>(rows, x, stride, panel, pairs, ahead, pace, tile);
    }
  }
};

#else

constexpr bool kHasDot = false;

#endif

}  // namespace argosy
