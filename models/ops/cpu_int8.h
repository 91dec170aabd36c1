// int8: y = (sum of code_w * code_x) * (scale_w * step_x), a scale per output and a step per row of x. See cpu_codes.h.
//
// Packed weight: panels of 32 outputs, [N / 32][ceil(K / 4)][32][4] bytes of code + 128, zeros of x where K ends. The
// 128 are taken off again through the sum of a row's codes: sum of (w + 128) * x - 128 * sum of x, all exact.
#pragma once

#include "cpu_codes.h"

namespace argosy {

struct Int8 {
  // 255 * 127 * K must stay below 2^31.
  static constexpr int64_t kMaxInputs = 65536;
  static constexpr int kVectors = kPanel / VL, kMaxRows = VL == 16 ? 12 : 4;
  static constexpr int64_t kBytes = kPanel * 4;  // per four k

  static INLINE int64_t group(int64_t k) { return k > 0 ? k : 1; }
  static INLINE int64_t steps(int64_t k) { return (k + 3) / 4; }

  static constexpr int vectors_at_once(int rows) {
    int count = kVectors;
    while (count > 1 && rows * count + count * kWords + kWords + 1 > kRegisters) count /= 2;
    return count;
  }

  template <int R>
  static void multiply(const CodedRows& x, int64_t row, const char* panel, const float* scales, int64_t steps,
                       const char* ahead, int64_t pace, float* tile) {
    constexpr int P = vectors_at_once(R);
    const RowWords<R> rows(x, row);
    for (int first = 0; first < kVectors; first += P) {
      vi sum[R][P];
#pragma GCC unroll 12
      for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int p = 0; p < P; p++) sum[r][p] = vi{};
      const char* from = panel + first * VL * 4;
      for (int64_t step = 0; step < steps; step++, from += kBytes) {
        if (first == 0) {
          __builtin_prefetch(ahead, 0, 3);
          __builtin_prefetch(ahead + 64, 0, 3);
          ahead += pace;
        }
        Quads w[P];
#pragma GCC unroll 8
        for (int p = 0; p < P; p++) w[p] = quads_of(load<vu>(from + p * VL * 4));
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
          const int32_t* codes = rows.at(r, step * kWords);
#pragma GCC unroll 8
          for (int p = 0; p < P; p++) sum[r][p] = add_products(sum[r][p], w[p], codes);
        }
      }
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) {
        const vi excess = splat(x.sums[row + r] * 128);
        const vf step = splat(x.steps[row + r]);
#pragma GCC unroll 8
        for (int p = 0; p < P; p++) {
          const vf scale = load<vf>(scales + (first + p) * VL) * step;
          store(tile + r * kPanel + (first + p) * VL, __builtin_convertvector(sum[r][p] - excess, vf) * scale);
        }
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
