// Kernels that treat every row alone: norms, activations, gathers.
#pragma once

#include <cmath>
#include <stdexcept>
#include <string>

#include "cpu_linear.h"

namespace argosy {

// Indices come from a plan: one out of range must be an error that names it, never a write elsewhere.
inline void check_range(const char* what, const int32_t* values, int64_t count, int64_t limit) {
  for (int64_t i = 0; i < count; i++)
    if (values[i] < 0 || values[i] >= limit)
      throw std::out_of_range(std::string(what) + " must be in 0.." + std::to_string(limit - 1) + "; got " +
                              std::to_string(values[i]) + " at index " + std::to_string(i));
}

// Rows per task, so that a task is worth waking a thread for (about 5 microseconds).
template <class F>
void for_rows(int64_t rows, int64_t width, F&& f) {
  constexpr int64_t kValues = 8192;
  const int64_t step = width >= kValues ? 1 : kValues / (width > 0 ? width : 1);
  const int64_t tasks = (rows + step - 1) / step;
  pool().run(tasks, [&](int64_t task, int) {
    const int64_t last = (task + 1) * step < rows ? (task + 1) * step : rows;
    for (int64_t row = task * step; row < last; row++) f(row);
  });
}

// Calls f(index, count) over [0, n) in vectors; the last may be partial.
template <class F>
INLINE void for_vectors(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + VL <= n; i += VL) f(i, int64_t(VL));
  if (i < n) f(i, n - i);
}

INLINE vf load_n(const float* p, int64_t n, float fill = 0.0f) { return n == VL ? load<vf>(p) : load_part(p, n, fill); }

INLINE void store_n(float* p, vf v, int64_t n) {
  if (n == VL)
    store(p, v);
  else
    store_part(p, v, n);
}

INLINE vf load_as_float(const void* p, int format, int64_t i, int64_t n) {
  if (format == kFloat32) return load_n(static_cast<const float*>(p) + i, n);
  const uint16_t* half = static_cast<const uint16_t*>(p) + i;
  if (n == VL) return widen(load<vh>(half));
  float lanes[VL];
  for (int j = 0; j < VL; j++) lanes[j] = j < n ? widen(half[j]) : 0.0f;
  return load<vf>(lanes);
}

// Lane i of accumulator j sums the elements that are i + VL * j modulo 4 VL.
INLINE float sum_of_squares(const float* x, int64_t n) {
  vf sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * VL <= n; i += 4 * VL)
    for (int j = 0; j < 4; j++) {
      vf v = load<vf>(x + i + j * VL);
      sum[j] = fma(v, v, sum[j]);
    }
  for (int j = 0; i < n; i += VL, j++) {
    vf v = load_n(x + i, n - i < VL ? n - i : VL);
    sum[j] = fma(v, v, sum[j]);
  }
  return sum_of((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

inline void rms_norm(const float* x, const void* weight, int format, float* out, int64_t rows, int64_t n, float eps) {
  for_rows(rows, n, [&](int64_t row) {
    const float* from = x + row * n;
    float* to = out + row * n;
    const vf scale = splat(1.0f / std::sqrt(sum_of_squares(from, n) / float(n) + eps));
    for_vectors(n, [&](int64_t i, int64_t count) {
      store_n(to + i, load_n(from + i, count) * scale * load_as_float(weight, format, i, count), count);
    });
  });
}

inline void silu_mul(const float* gate_up, float* out, int64_t rows, int64_t n) {
  for_rows(rows, 4 * n, [&](int64_t row) {
    const float *gate = gate_up + row * 2 * n, *up = gate + n;
    float* to = out + row * n;
    for_vectors(n, [&](int64_t i, int64_t count) {
      vf g = load_n(gate + i, count);
      store_n(to + i, g / (splat(1.0f) + vexp(-g)) * load_n(up + i, count), count);
    });
  });
}

inline void gather_rows(const void* table, int format, const int32_t* ids, float* out, int64_t rows, int64_t n) {
  const int64_t size = format == kBfloat16 ? 2 : 4;
  for_rows(rows, n, [&](int64_t row) {
    const char* from = static_cast<const char*>(table) + ids[row] * n * size;
    for_vectors(n, [&](int64_t i, int64_t count) {
      store_n(out + row * n + i, load_as_float(from, format, i, count), count);
    });
  });
}

}  // namespace argosy
