// int4: groups of 32 inputs share a scale and, unless the codes are symmetric around 8, an offset; x has a step per row
// and group. For every output, over the groups in order:
//
//   sum = fma(sum of code_w * code_x, scale * step, sum);  sum = fma(offset, step * sum of code_x, sum)
//
// The inner sum is exact; symmetric codes start it at -8 * sum of code_x and have no second term.
//
// Packed weight: panels of 32 outputs, [N / 32][K / 32] blocks of 8 * 64 bytes of codes, 32 scales and, if there are
// any, 32 offsets in fp16: what a step needs lies together, in one stream. A word of codes holds four inputs of output
// i in its low halves of bytes and of output i + 16 in the high ones.
#pragma once

#include "cpu_codes.h"

namespace argosy {

template <bool HasOffsets>
struct Int4 {
  static constexpr int kPairs = kHalf / VL, kMaxRows = VL == 16 ? 6 : 2;
  static constexpr int64_t kGroupSize = kGroup;
  static constexpr int32_t kExcess = HasOffsets ? 0 : 8;
  static constexpr int64_t kCodes = kQuads * 64, kBytes = kCodes + kPanel * (HasOffsets ? 4 : 2);  // per group

  static INLINE int64_t steps(int64_t k) { return k / kGroup; }

  template <int R>
  static __attribute__((noinline)) void multiply(const CodedRows& x, int64_t row, const char* panel, const float*, int64_t steps,
                       const char* ahead, int64_t pace, float* tile) {
    const RowWords<R> rows(x, row);
    for (int pair = 0; pair < kPairs; pair++) {
      vf total[R][2];
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) total[r][0] = total[r][1] = vf{};
      const char* block = panel;
      for (int64_t g = 0; g < steps; g++, block += kBytes) {
        if (pair == 0) {
          for (int64_t line = 0; line < pace; line += 64) __builtin_prefetch(ahead + line, 0, 3);
          ahead += pace;
        }
        vi sum[R][2];
#pragma GCC unroll 12
        for (int r = 0; r < R; r++)
          sum[r][0] = sum[r][1] = HasOffsets ? vi{} : splat(x.starts[g * x.m + row + r]);
#pragma GCC unroll 8
        for (int q = 0; q < kQuads; q++) {
          const vu both = load<vu>(block + q * 64 + pair * VL * 4);
          const Quads low = quads_of(both & 0x0f0f0f0fu), high = quads_of((both >> 4) & 0x0f0f0f0fu);
#pragma GCC unroll 12
          for (int r = 0; r < R; r++) {
            const int32_t* codes = rows.at(r, (g * kQuads + q) * kWords);
            sum[r][0] = add_products(sum[r][0], low, codes);
            sum[r][1] = add_products(sum[r][1], high, codes);
          }
        }
        const char* scales = block + kCodes + pair * VL * 2;
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
          const vf scale = widen_half(load<vh>(scales + h * kHalf * 2));
          vf offset = {};
          if constexpr (HasOffsets) offset = widen_half(load<vh>(scales + (kPanel + h * kHalf) * 2));
#pragma GCC unroll 12
          for (int r = 0; r < R; r++) {
            const int64_t at = g * x.m + row + r;
            const vf dot = __builtin_convertvector(sum[r][h], vf);
            total[r][h] = fma_once(dot, scale * splat(x.steps[at]), total[r][h]);
            if constexpr (HasOffsets) total[r][h] = fma_once(offset, splat(x.shifts[at]), total[r][h]);
          }
        }
      }
#pragma GCC unroll 12
      for (int r = 0; r < R; r++)
        for (int h = 0; h < 2; h++) store(tile + r * kPanel + h * kHalf + pair * VL, total[r][h]);
    }
  }
};

// codes [n][k / 2] (input 2j in the low half of byte j), scales and offsets fp16 [n][k / 32] -> panels of blocks.
// `offsets` may be null. `out` holds ceil(n / 32) * k / 32 blocks.
inline void pack_int4(const uint8_t* codes, const uint16_t* scales, const uint16_t* offsets, char* out, int64_t n,
                      int64_t k_size) {
  const int64_t panels = (n + kPanel - 1) / kPanel, groups = k_size / kGroup;
  const int64_t block_bytes = offsets ? Int4<true>::kBytes : Int4<false>::kBytes;
  pool().run(panels, [&](int64_t p, int) {
    char* block = out + p * groups * block_bytes;
    for (int64_t g = 0; g < groups; g++, block += block_bytes) {
      std::memset(block, 0, size_t(block_bytes));
      for (int64_t i = 0; i < kPanel && p * kPanel + i < n; i++) {
        const int64_t row = p * kPanel + i;
        const uint8_t* from = codes + row * (k_size / 2) + g * kGroup / 2;
        const int shift = i < kHalf ? 0 : 4;
        auto* to = reinterpret_cast<uint8_t*>(block) + i % kHalf * 4;
        for (int64_t k = 0; k < kGroup; k++)
          to[k / 4 * 64 + k % 4] |= uint8_t((from[k / 2] >> (k % 2 * 4) & 15) << shift);
        std::memcpy(block + Int4<true>::kCodes + i * 2, scales + row * groups + g, 2);
        if (offsets) std::memcpy(block + Int4<true>::kCodes + (kPanel + i) * 2, offsets + row * groups + g, 2);
      }
    }
  });
}

}  // namespace argosy
