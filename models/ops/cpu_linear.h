// y[m][n] = sum over k of x[m][k] * w[n][k]: one chain of FMAs in the order of k for every (m, n), whatever M, the
// tile, the thread. A bf16 or fp16 weight is widened in registers, which is exact, so one arithmetic serves every batch.
//
// Packed weight: panels of 32 outputs, [N / 32][K][32], the last one padded with zeros. bf16 panels hold 16 words of
// 32 bits per k, (output i | output i + 16 << 16), so one load, one shift and one mask give two vectors in order. fp16
// is converted by an instruction of its own, which wants its values side by side.
#pragma once

#include "cpu_dot.h"

namespace argosy {

constexpr int kPanel = 32, kHalf = 16;
enum Format : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// Calls f(pointer of the format's type).
template <class F>
INLINE auto with_format(const void* p, int format, F&& f) {
  if (format == kBfloat16) return f(static_cast<const Brain*>(p));
  if (format == kFloat16) return f(static_cast<const Half*>(p));
  return f(static_cast<const float*>(p));
}

INLINE float read_as_float(const void* p, int format, int64_t i) {
  return with_format(p, format, [&](auto* from) INLINE_LAMBDA { return widen(from[i]); });
}

struct Bf16Panel {
  static constexpr int64_t kBytes = kPanel * 2;  // per k
  static INLINE void get(const char* p, int pair, vf& low, vf& high) {
    vu words = load<vu>(p + pair * VL * 4);
    low = bits<vf>(words << 16);
    high = bits<vf>(words & 0xffff0000u);
  }
};

struct Fp16Panel {
  static constexpr int64_t kBytes = kPanel * 2;
  static INLINE void get(const char* p, int pair, vf& low, vf& high) {
    low = widen_half(load<vh>(p + pair * VL * 2));
    high = widen_half(load<vh>(p + (kHalf + pair * VL) * 2));
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
  const int64_t columns = a.n - column < kPanel ? a.n - column : kPanel;
  alignas(64) float bias[kPanel] = {};
  if (a.bias)
    for (int64_t i = 0; i < columns; i++) bias[i] = read_as_float(a.bias, a.bias_format, column + i);
  for (int r = 0; r < rows; r++) {
    float* out = a.out + (row + r) * a.n + column;
    const float* sums = tile + r * kPanel;
    int64_t i = 0;
    for (; i + VL <= columns; i += VL) {
      vf y = load<vf>(sums + i);
      if (a.bias) y += load<vf>(bias + i);
      store(out + i, a.is_residual ? load<vf>(out + i) + y : y);
    }
    for (; i < columns; i++) {
      float y = sums[i];
      if (a.bias) y += bias[i];
      out[i] = a.is_residual ? out[i] + y : y;
    }
  }
}

// How M rows and N outputs are cut into tasks: tiles of nearly equal height (tile t starts at row t * m / tiles), columns
// of neighbouring panels, and bands of tiles where there are few columns.
struct Cut {
  int64_t m, tiles, panels, step, columns, bands;
  Cut(int64_t rows, int64_t n, int max_rows, int num_threads) : m(rows) {
    tiles = (m + max_rows - 1) / max_rows, panels = (n + kPanel - 1) / kPanel;
    const int64_t wanted = 8 * num_threads;
    step = panels > 2 * wanted ? panels / wanted : 1;
    columns = (panels + step - 1) / step;
    bands = columns < wanted / 2 && tiles > 1 ? (tiles < wanted / columns ? tiles : wanted / columns) : 1;
  }
  int64_t first_row(int64_t tile) const { return tile * m / tiles; }
  // Calls f(panel, tile, first row, rows) for every tile of a task, panel by panel.
  template <class F>
  INLINE void for_tiles(int64_t task, F&& f) const {
    const int64_t column = task / bands, band = task % bands;
    const int64_t last_panel = (column + 1) * step < panels ? (column + 1) * step : panels;
    for (int64_t p = column * step; p < last_panel; p++)
      for (int64_t t = band * tiles / bands; t < (band + 1) * tiles / bands; t++)
        f(p, t, first_row(t), int(first_row(t + 1) - first_row(t)));
  }
};

template <class Panel>
void linear_by_fma(const Linear& a) {
  Pool& threads = pool();
  const Cut cut(a.m, a.n, kMaxRows, threads.num_threads());
  const float* packed = a.x;
  if (a.m > 1) {
    float* scratch = threads.shared().floats(size_t(a.m * a.k));
    auto pack = [&](int64_t t, int) {
      int64_t first = cut.first_row(t), last = cut.first_row(t + 1);
      interleave(a, first, int(last - first), scratch + first * a.k);
    };
    if (a.m * a.k > 65536)
      threads.run(cut.tiles, pack);
    else
      for (int64_t t = 0; t < cut.tiles; t++) pack(t, 0);
    packed = scratch;
  }
  threads.run(cut.columns * cut.bands, [&](int64_t task, int) {
    alignas(64) float tile[kMaxRows * kPanel];
    cut.for_tiles(task, [&](int64_t p, int64_t, int64_t first, int rows) INLINE_LAMBDA {
      multiply_rows<Panel>(rows, packed + first * a.k, a.weight + p * a.k * Panel::kBytes, a.k, tile);
      finish(a, tile, first, rows, p * kPanel);
    });
  });
}

#if defined(__AVX512BF16__)
inline void linear_by_dot(const Linear& a) {
  static_assert(Dot::kPanel == kPanel);
  Pool& threads = pool();
  const Cut cut(a.m, a.n, Dot::kMaxRows, threads.num_threads());
  const int64_t pairs = Dot::pairs(a.k), stride = Dot::stride(a.k), panel_bytes = pairs * Dot::kBytes;
  uint32_t* x = reinterpret_cast<uint32_t*>(threads.shared().floats(size_t(a.m * stride)));
  auto round = [&](int64_t row, int) { Dot::round_row(a.x + row * a.k, a.k, x + row * stride); };
  if (a.m * a.k > 131072)
    threads.run(a.m, round);
  else
    for (int64_t row = 0; row < a.m; row++) round(row, 0);
  // A lone tile is fed by memory: fetch 8 KiB ahead in its own stream. Several share a panel, which stays in the
  // cache: each fetches its part of the next one, so that memory works while they compute.
  const int64_t per_band = cut.tiles / cut.bands;
  const int64_t pace = per_band <= 1 ? Dot::kBytes : (Dot::kBytes + per_band - 1) / per_band;
  threads.run(cut.columns * cut.bands, [&](int64_t task, int) {
    alignas(64) float tile[Dot::kMaxRows * kPanel];
    const int64_t first_tile = task % cut.bands * cut.tiles / cut.bands;
    cut.for_tiles(task, [&](int64_t p, int64_t t, int64_t first, int rows) INLINE_LAMBDA {
      const char* panel = a.weight + p * panel_bytes;
      const int64_t next = (p + 1) % cut.step ? p + 1 : p + 1 + (threads.num_threads() - 1) * cut.step;
      const char* ahead =
          per_band <= 1 ? panel + 8192 : a.weight + next * panel_bytes + (t - first_tile) * pairs * pace;
      Dot::multiply_rows(rows, x + first * stride, stride, panel, pairs, ahead, pace, tile);
      finish(a, tile, first, rows, p * kPanel);
    });
  });
}
#endif

inline void linear(const Linear& a) {
  if (a.format == kFloat32) return linear_by_fma<Fp32Panel>(a);
  if (a.format == kFloat16) return linear_by_fma<Fp16Panel>(a);
#if defined(__AVX512BF16__)
  linear_by_dot(a);
#else
  linear_by_fma<Bf16Panel>(a);
#endif
}

// Values of k that a packed panel holds: bf16 pairs need an even number.
inline int64_t packed_depth(int format, int64_t k) { return kHasDot && format == kBfloat16 ? (k + 1) / 2 * 2 : k; }

// 64 bytes of each of a panel's rows, turned so that the outputs lie side by side.
INLINE void turn_tile(const uint32_t (&tile)[kPanel][16], void* out, int format, int64_t steps) {
  auto* words = static_cast<uint32_t*>(out);
  auto half = [&](int64_t i, int64_t k) { return tile[i][k / 2] >> (k % 2 * 16) & 0xffffu; };
  if (format == kFloat32) {
    for (int64_t k = 0; k < steps; k++)
      for (int64_t i = 0; i < kPanel; i++) words[k * kPanel + i] = tile[i][k];
  } else if (format == kFloat16) {
    auto* values = static_cast<uint16_t*>(out);
    for (int64_t k = 0; k < steps; k++)
      for (int64_t i = 0; i < kPanel; i++) values[k * kPanel + i] = uint16_t(half(i, k));
  } else if (kHasDot) {
    for (int64_t pair = 0; pair < steps / 2; pair++)
      for (int64_t i = 0; i < kPanel; i++) words[pair * kPanel + i] = tile[i][pair] << 16 | tile[i][pair] >> 16;
  } else {
    for (int64_t k = 0; k < steps; k++)
      for (int64_t i = 0; i < kHalf; i++) words[k * kHalf + i] = half(i, k) | half(i + kHalf, k) << 16;
  }
}

// weight [N][K] -> panels. `out` holds ceil(N / 32) * packed_depth * 32 values. By tiles, since a panel of whole rows
// leaves the first cache, and rows whose distance is a power of two share one set of it.
inline void pack_weight(const void* weight, void* out, int format, int64_t n, int64_t k_size) {
  const int64_t panels = (n + kPanel - 1) / kPanel, item = format == kFloat32 ? 4 : 2;
  const int64_t row_bytes = k_size * item, depth_bytes = packed_depth(format, k_size) * item;
  pool().run(panels, [&](int64_t p, int) {
    const char* from = static_cast<const char*>(weight) + p * kPanel * row_bytes;
    char* to = static_cast<char*>(out) + p * kPanel * depth_bytes;
    const int64_t rows = n - p * kPanel < kPanel ? n - p * kPanel : kPanel;
    alignas(64) uint32_t tile[kPanel][16] = {};
    for (int64_t at = 0; at < depth_bytes; at += 64) {
      if (at + 64 <= row_bytes) {
        for (int64_t i = 0; i < rows; i++) std::memcpy(tile[i], from + i * row_bytes + at, 64);
      } else {
        std::memset(tile, 0, sizeof tile);
        for (int64_t i = 0; i < rows; i++) std::memcpy(tile[i], from + i * row_bytes + at, size_t(row_bytes - at));
      }
      const int64_t left = depth_bytes - at < 64 ? depth_bytes - at : 64;
      turn_tile(tile, to + at * kPanel, format, left / item);
    }
  });
}

}  // namespace argosy
