// Kernels that treat every row alone: norms, activations, gathers.
#pragma once

#include <cmath>
#include <stdexcept>
#include <string>

#include "cpu_linear.h"
#include "cpu_math.h"

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
  return with_format(p, format, [&](auto* from) INLINE_LAMBDA {
    if (n == VL) return widen_at(from + i);
    float lanes[VL];
    for (int j = 0; j < VL; j++) lanes[j] = j < n ? widen(from[i + j]) : 0.0f;
    return load<vf>(lanes);
  });
}

// The sum of f(x) over a row. Lane i of accumulator j sums the elements that are i + VL * j modulo 4 VL; where the last
// vector is partial, the rest of it is `fill`.
template <class F>
INLINE float sum_over(const float* x, int64_t n, float fill, F&& f) {
  vf sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * VL <= n; i += 4 * VL)
    for (int j = 0; j < 4; j++) sum[j] = f(load<vf>(x + i + j * VL), sum[j]);
  for (int j = 0; i < n; i += VL, j++) sum[j] = f(load_n(x + i, n - i < VL ? n - i : VL, fill), sum[j]);
  return sum_of((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// What a row is multiplied by before its weight: the same for a token's features and for a head's.
INLINE vf rms_scale(const float* x, int64_t n, float eps) {
  const float squares = sum_over(x, n, 0.0f, [](vf v, vf sum) INLINE_LAMBDA { return fma(v, v, sum); });
  return splat(1.0f / std::sqrt(squares / float(n) + eps));
}

inline void rms_norm(const float* x, const void* weight, int format, float* out, int64_t rows, int64_t n, float eps) {
  for_rows(rows, n, [&](int64_t row) {
    const float* from = x + row * n;
    float* to = out + row * n;
    const vf scale = rms_scale(from, n, eps);
    for_vectors(n, [&](int64_t i, int64_t count) {
      store_n(to + i, load_n(from + i, count) * scale * load_as_float(weight, format, i, count), count);
    });
  });
}

struct LayerNorm {
  const float* x;
  const void *weight, *bias;  // bias may be null
  int weight_format, bias_format;
  float* out;
  int64_t rows, n;
  float eps;
};

// In two passes: the mean, then the variance around it.
inline void layer_norm(const LayerNorm& a) {
  for_rows(a.rows, 2 * a.n, [&](int64_t row) {
    const float* from = a.x + row * a.n;
    float* to = a.out + row * a.n;
    const float mean = sum_over(from, a.n, 0.0f, [](vf v, vf sum) INLINE_LAMBDA { return sum + v; }) / float(a.n);
    const vf centre = splat(mean);
    const float squares = sum_over(from, a.n, mean, [&](vf v, vf sum) INLINE_LAMBDA {
      const vf away = v - centre;
      return fma(away, away, sum);
    });
    const vf scale = splat(1.0f / std::sqrt(squares / float(a.n) + a.eps));
    for_vectors(a.n, [&](int64_t i, int64_t count) {
      const vf y = (load_n(from + i, count) - centre) * scale * load_as_float(a.weight, a.weight_format, i, count);
      store_n(to + i, a.bias ? y + load_as_float(a.bias, a.bias_format, i, count) : y, count);
    });
  });
}

inline void gate_mul(const float* gate_up, float* out, int64_t rows, int64_t n, int activation) {
  with_activation(activation, [&]<Activation A>() {
    for_rows(rows, 4 * n, [&](int64_t row) {
      const float *gate = gate_up + row * 2 * n, *up = gate + n;
      float* to = out + row * n;
      for_vectors(n, [&](int64_t i, int64_t count) {
        store_n(to + i, activated<A>(load_n(gate + i, count)) * load_n(up + i, count), count);
      });
    });
  });
}

// out[i] = f(x[i]); `out` may be `x`.
template <class F>
void map_values(const float* x, float* out, int64_t count, F&& f) {
  constexpr int64_t kSpan = 2048;
  pool().run((count + kSpan - 1) / kSpan, [&](int64_t task, int) {
    const int64_t first = task * kSpan, n = count - first < kSpan ? count - first : kSpan;
    for_vectors(n, [&](int64_t i, int64_t lanes) { store_n(out + first + i, f(load_n(x + first + i, lanes)), lanes); });
  });
}

inline void activate(const float* x, float* out, int64_t count, int activation) {
  with_activation(activation, [&]<Activation A>() {
    map_values(x, out, count, [](vf v) INLINE_LAMBDA { return activated<A>(v); });
  });
}

inline void soft_cap(float* x, int64_t count, float cap) {
  const vf limit = splat(cap), inverse = splat(1.0f / cap);
  map_values(x, x, count, [&](vf v) INLINE_LAMBDA { return soft_capped(v, limit, inverse); });
}

inline void gather_rows(const void* table, int format, const int32_t* ids, float* out, int64_t rows, int64_t n) {
  const int64_t size = format == kFloat32 ? 4 : 2;
  for_rows(rows, n, [&](int64_t row) {
    const char* from = static_cast<const char*>(table) + ids[row] * n * size;
    for_vectors(n, [&](int64_t i, int64_t count) {
      store_n(out + row * n + i, load_as_float(from, format, i, count), count);
    });
  });
}

}  // namespace argosy
