// int8: a scale per output, and of x a step per row and span of inputs. For every output, over the spans in order:
//
//   total = fma(sum of code_w * code_x, step, total)        y = total * scale
//
// One step for a whole row would be the usual choice. But rows of language models have a few values that are a hundred
// times larger than the rest, and a step that covers them leaves few codes for the others. Measured on SmolLM2-135M as
// the divergence from bf16: 0.041 with one step per row, 0.013 with spans of 128, 0.0095 with 64; spans of 64 cost 3 %
// of the rate of whole rows.
//
// Packed weight: panels of 32 outputs, [N / 32][ceil(K / 4)][32][4] bytes of code + 128, zeros of x where K ends. The
// 128 are taken off again through the sum of a span's codes: sum of (w + 128) * x - 128 * sum of x, all exact.
#pragma once

#include "cpu_codes.h"

namespace argosy {

struct Int8 {
  static constexpr int64_t kGroupSize = 64;
  static constexpr int32_t kExcess = 128;
  static constexpr int kVectors = kPanel / VL, kMaxRows = VL == 16 ? 6 : 2;
  static constexpr int64_t kBytes = kPanel * 4;  // per four k

  static INLINE int64_t steps(int64_t k) { return (k + 3) / 4; }

  static constexpr int vectors_at_once(int rows) {
    int count = kVectors;
    while (count > 1 && 2 * rows * count + count * kWords + kWords > kRegisters) count /= 2;
    return count;
  }

  // `steps` steps over one span.
  template <int R, int P>
  static INLINE void add_span(vi (&sum)[R][P], const int32_t* const (&rows)[R], const char* from, int64_t steps,
                              const char* ahead, int64_t pace) {
    for (int64_t step = 0; step < steps; step++, from += kBytes, ahead += pace) {
      __builtin_prefetch(ahead, 0, 3);
      __builtin_prefetch(ahead + 64, 0, 3);
      Quads w[P];
#pragma GCC unroll 8
      for (int p = 0; p < P; p++) w[p] = quads_of(load<vu>(from + p * VL * 4));
#pragma GCC unroll 12
      for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int p = 0; p < P; p++) sum[r][p] = add_products(sum[r][p], w[p], rows[r] + step * kWords);
    }
  }

  template <int R>
  static __attribute__((noinline)) void multiply(const CodedRows& x, int64_t row, const char* panel,
                                                 const float* scales, int64_t steps, const char* ahead, int64_t pace,
                                                 float* tile) {
    constexpr int P = vectors_at_once(R);
    constexpr int64_t kSteps = kGroupSize / 4;
    for (int first = 0; first < kVectors; first += P) {
      vf total[R][P];
#pragma GCC unroll 12
      for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int p = 0; p < P; p++) total[r][p] = vf{};
      const char* from = panel + first * VL * 4;
      const char* next = first == 0 ? ahead : from;
      const int32_t *starts = x.starts + row, *words = x.words + row * x.stride;
      const float* units = x.steps + row;
      for (int64_t left = steps; left > 0; left -= kSteps) {
        vi sum[R][P];
        const int32_t* rows[R];
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
          rows[r] = words + r * x.stride;
#pragma GCC unroll 8
          for (int p = 0; p < P; p++) sum[r][p] = splat(starts[r]);
        }
        if (left >= kSteps)
          add_span<R, P>(sum, rows, from, kSteps, next, pace);
        else
          add_span<R, P>(sum, rows, from, left, next, pace);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
          for (int p = 0; p < P; p++)
            total[r][p] = fma_once(__builtin_convertvector(sum[r][p], vf), splat(units[r]), total[r][p]);
        from += kSteps * kBytes, next += kSteps * pace, words += kSteps * kWords, starts += x.m, units += x.m;
      }
#pragma GCC unroll 12
      for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) {
          const int64_t at = (first + p) * VL;
          store(tile + r * kPanel + at, total[r][p] * load<vf>(scales + at));
        }
    }
  }
};

// codes [n][k] -> panels; `out` holds ceil(n / 32) * ceil(k / 4) * 128 bytes.
inline void pack_int8(const int8_t* codes, uint8_t* out, int64_t n, int64_t k_size) {
  const int64_t panels = (n + kPanel - 1) / kPanel, depth = Int8::steps(k_size) * 4;
  pool().run(panels, [&](int64_t p, int) {
    uint8_t* panel = out + p * depth * kPanel;
    for (int64_t i = 0; i < kPanel; i++) {
      const int64_t row = p * kPanel + i;
      for (int64_t k = 0; k < depth; k++) {
        const bool is_padding = row >= n || k >= k_size;
        panel[(k / 4 * kPanel + i) * 4 + k % 4] = uint8_t(128 + (is_padding ? 0 : codes[row * k_size + k]));
      }
    }
  });
}

}  // namespace argosy
