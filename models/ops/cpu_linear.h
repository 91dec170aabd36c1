// y[m][n] = sum over k of x[m][k] * w[n][k]: one chain of FMAs in the order of k for every (m, n), whatever M, the
// tile, the thread. A bf16 weight is widened in registers, which is exact, so one arithmetic serves every batch.
//
// Packed weight: panels of 32 outputs, [N / 32][K][32], the last one padded with zeros. bf16 panels hold 16 words of
// 32 bits per k, (output i | output i + 16 << 16), so one load, one shift and one mask give two vectors in order.
#pragma once

#include "cpu_pool.h"

namespace argosy {

constexpr int kPanel = 32, kHalf = 16;
enum Format : int { kFloat32 = 0, kBfloat16 = 1 };

INLINE float read_as_float(const void* p, int format, int64_t i) {
  return format == kBfloat16 ? widen(static_cast<const uint16_t*>(p)[i]) : static_cast<const float*>(p)[i];
}

struct Bf16Panel {
  static constexpr int64_t kBytes = kPanel * 2;  // per k
  static INLINE void get(const char* p, int pair, vf& low, vf& high) {
    vu words = load<vu>(p + pair * VL * 4);
    low = bits<vf>(words << 16);
    high = bits<vf>(words & 0xffff0000u);
  }
};

struct Fp32Panel {
  static constexpr int64_t kBytes = kPanel * 4;
  static INLINE void get(const char* p, int pair, vf& low, vf& high) {
    low = load<vf>(p + pair * VL * 4);
    high = load<vf>(p + (kHalf + pair * VL) * 4);
  }
};

// Pairs of vectors computed at once for R rows, so that accumulators and operands fit the registers.
constexpr int kPairs = kHalf / VL;
constexpr int pairs_at_once(int rows) {
  int pairs = kPairs;
  while (pairs > 1 && rows * 2 * pairs + 2 * pairs + 1 > kRegisters) pairs /= 2;
  return pairs;
}
constexpr int kMaxRows = kRegisters == 32 && VL == 16 ? 12 : 6;

// R rows of x (interleaved: [K][R]) times one panel; tile receives [R][32].
template <int R, class Panel>
void multiply(const float* x, const char* panel, int64_t k_size, float* tile) {
  constexpr int P = pairs_at_once(R);
  for (int first = 0; first < kPairs; first += P) {
    vf sum[R][P][2] = {};
    const char* w = panel;
    const float* a = x;
#pragma GCC unroll 2
    for (int64_t k = 0; k < k_size; k++, w += Panel::kBytes, a += R) {
      // 8 KiB ahead: at the pace of a few rows a nearer line would arrive too late (measured: M = 4, 14 -> 20 GB/s).
      if (first == 0)
        for (int64_t line = 0; line < Panel::kBytes; line += 64) __builtin_prefetch(w + 8192 + line, 0, 3);
      vf b[P][2];
#pragma GCC unroll 4
      for (int p = 0; p < P; p++) Panel::get(w, first + p, b[p][0], b[p][1]);
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) {
        vf s = splat(a[r]);
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
          sum[r][p][0] = fma(s, b[p][0], sum[r][p][0]);
          sum[r][p][1] = fma(s, b[p][1], sum[r][p][1]);
        }
      }
    }
    for (int r = 0; r < R; r++)
      for (int p = 0; p < P; p++) {
        store(tile + r * kPanel + (first + p) * VL, sum[r][p][0]);
        store(tile + r * kPanel + kHalf + (first + p) * VL, sum[r][p][1]);
      }
  }
}

template <class Panel, int R = kMaxRows>
INLINE void multiply_rows(int rows, const float* x, const char* panel, int64_t k_size, float* tile) {
  if constexpr (R >= 1) {
    if (rows == R) return multiply<R, Panel>(x, panel, k_size, tile);
    return multiply_rows<Panel, R - 1>(rows, x, panel, k_size, tile);
  }
}

struct Linear {
  const float* x;
  const char* weight;
  int format;
  const void* bias;  // or null
  int bias_format;
  float* out;
  bool is_residual;  // add to what `out` holds
  int64_t m, n, k;
};

// Rows are cut into tiles of nearly equal height; tile t starts at row t * m / tiles.
INLINE void interleave(const Linear& a, int64_t first, int rows, float* packed) {
  for (int r = 0; r < rows; r++) {
    const float* from = a.x + (first + r) * a.k;
    for (int64_t k = 0; k < a.k; k++) packed[k * rows + r] = from[k];
  }
}

INLINE void finish(const Linear& a, const float* tile, int64_t row, int rows, int64_t column) {
  int64_t columns = a.n - column < kPanel ? a.n - column : kPanel;
  for (int r = 0; r < rows; r++) {
    float* out = a.out + (row + r) * a.n + column;
    const float* sums = tile + r * kPanel;
    for (int64_t i = 0; i < columns; i++) {
      float y = sums[i];
      if (a.bias) y += read_as_float(a.bias, a.bias_format, column + i);
      out[i] = a.is_residual ? out[i] + y : y;
    }
  }
}

inline void linear(const Linear& a) {
  Pool& threads = pool();
  const int64_t tiles = (a.m + kMaxRows - 1) / kMaxRows, panels = (a.n + kPanel - 1) / kPanel;
  const int64_t panel_bytes = a.k * (a.format == kBfloat16 ? Bf16Panel::kBytes : Fp32Panel::kBytes);
  const float* packed = a.x;
  if (a.m > 1) {
    float* scratch = threads.shared().floats(size_t(a.m * a.k));
    auto pack = [&](int64_t t, int) {
      int64_t first = t * a.m / tiles, last = (t + 1) * a.m / tiles;
      interleave(a, first, int(last - first), scratch + first * a.k);
    };
    if (a.m * a.k > 65536)
      threads.run(tiles, pack);
    else
      for (int64_t t = 0; t < tiles; t++) pack(t, 0);
    packed = scratch;
  }
  const int64_t wanted = 8 * threads.num_threads();
  const int64_t step = panels > 2 * wanted ? panels / wanted : 1;  // neighbouring panels per task
  const int64_t columns = (panels + step - 1) / step;
  const int64_t bands = columns < wanted / 2 && tiles > 1 ? (tiles < wanted / columns ? tiles : wanted / columns) : 1;
  threads.run(columns * bands, [&](int64_t task, int) {
    const int64_t column = task / bands, band = task % bands;
    const int64_t last_panel = (column + 1) * step < panels ? (column + 1) * step : panels;
    alignas(64) float tile[kMaxRows * kPanel];
    for (int64_t p = column * step; p < last_panel; p++)
      for (int64_t t = band * tiles / bands; t < (band + 1) * tiles / bands; t++) {
        const int64_t first = t * a.m / tiles;
        const int rows = int((t + 1) * a.m / tiles - first);
        const char* panel = a.weight + p * panel_bytes;
        if (a.format == kBfloat16)
          multiply_rows<Bf16Panel>(rows, packed + first * a.k, panel, a.k, tile);
        else
          multiply_rows<Fp32Panel>(rows, packed + first * a.k, panel, a.k, tile);
        finish(a, tile, first, rows, p * kPanel);
      }
  });
}

// weight [N][K] -> panels. `out` holds ceil(N / 32) * K * 32 values.
inline void pack_weight(const void* weight, void* out, int format, int64_t n, int64_t k_size) {
  const int64_t panels = (n + kPanel - 1) / kPanel;
  pool().run(panels, [&](int64_t p, int) {
    for (int64_t i = 0; i < kPanel; i++) {
      const int64_t row = p * kPanel + i;
      for (int64_t k = 0; k < k_size; k++) {
        const int64_t at = (p * k_size + k) * kPanel;
        if (format == kBfloat16) {
          uint16_t value = row < n ? static_cast<const uint16_t*>(weight)[row * k_size + k] : 0;
          static_cast<uint16_t*>(out)[at + (i % kHalf) * 2 + i / kHalf] = value;
        } else {
          static_cast<float*>(out)[at + i] = row < n ? static_cast<const float*>(weight)[row * k_size + k] : 0.0f;
        }
      }
    }
  });
}

}  // namespace argosy
