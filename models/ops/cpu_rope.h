// Norms of heads, rotary positions (Su et al. 2021) and the write of keys and values into their slots.
#pragma once

#include "cpu_rows.h"

namespace argosy {

constexpr int kMaxHead = 256;

struct RopeStore {
  const float* qkv;
  const int32_t *positions, *slots;
  const float* cos_sin;  // [.., 2 * half] or null
  int64_t half, max_positions;
  char *key, *value;
  int format;
  int64_t block, num_blocks, tokens;
  int heads, kv_heads, size;
  float* q;
  const void *q_norm, *k_norm;  // [size], both or neither
  int q_norm_format, k_norm_format;
  float eps;
};

// Weights of a head's norm, widened once per call; `from` null = no norm.
struct HeadNorm {
  alignas(64) float weight[kMaxHead];
  bool is_on;
  float eps;
  HeadNorm(const void* from, int format, int64_t size, float e) : is_on(from != nullptr), eps(e) {
    if (is_on)
      for_vectors(size, [&](int64_t i, int64_t n) { store_n(weight + i, load_as_float(from, format, i, n), n); });
  }
  INLINE const float* operator()(const float* head, float* memory, int64_t size) const {
    if (!is_on) return head;
    const vf scale = rms_scale(head, size, eps);
    for_vectors(size, [&](int64_t i, int64_t n) {
      store_n(memory + i, load_n(head + i, n) * scale * load_n(weight + i, n), n);
    });
    return memory;
  }
};

INLINE void rotate(const float* from, float* to, const float* cosines, int64_t half, int64_t size) {
  if (!cosines) {
    std::copy(from, from + size, to);
    return;
  }
  for_vectors(half, [&](int64_t i, int64_t n) {
    const vf c = load_n(cosines + i, n), s = load_n(cosines + half + i, n);
    const vf x = load_n(from + i, n), y = load_n(from + half + i, n);
    store_n(to + i, fma(-y, s, x * c), n);
    store_n(to + half + i, fma(x, s, y * c), n);
  });
  std::copy(from + 2 * half, from + size, to + 2 * half);
}

inline void rope_store(const RopeStore& a) {
  const int64_t all = a.heads + 2 * a.kv_heads;
  check_range("slot", a.slots, a.tokens, a.num_blocks * a.block);
  if (a.cos_sin) check_range("position", a.positions, a.tokens, a.max_positions);
  const HeadNorm q_norm(a.q_norm, a.q_norm_format, a.size, a.eps), k_norm(a.k_norm, a.k_norm_format, a.size, a.eps);
  for_rows(a.tokens, all * a.size * 2, [&](int64_t t) {
    float normed[kMaxHead];
    const float* from = a.qkv + t * all * a.size;
    const float* cosines = a.cos_sin ? a.cos_sin + a.positions[t] * 2 * a.half : nullptr;
    for (int h = 0; h < a.heads; h++)
      rotate(q_norm(from + h * a.size, normed, a.size), a.q + (t * a.heads + h) * a.size, cosines, a.half, a.size);
    const int64_t block = a.slots[t] / a.block, offset = a.slots[t] % a.block;
    for (int h = 0; h < a.kv_heads; h++) {
      const int64_t base = (block * a.kv_heads + h) * a.block * a.size;
      const float* v = from + (a.heads + a.kv_heads + h) * a.size;
      float k[kMaxHead];
      rotate(k_norm(from + (a.heads + h) * a.size, normed, a.size), k, cosines, a.half, a.size);
      with_format(a.key, a.format, [&]<class Cell>(const Cell*) INLINE_LAMBDA {
        Cell* key = reinterpret_cast<Cell*>(a.key) + base + offset;
        Cell* value = reinterpret_cast<Cell*>(a.value) + base + offset * a.size;
        for (int64_t d = 0; d < a.size; d++) narrow_to(key + d * a.block, k[d]);
        int64_t d = 0;
        for (; d + VL <= a.size; d += VL) narrow_to(value + d, load<vf>(v + d));
        for (; d < a.size; d++) narrow_to(value + d, v[d]);
      });
    }
  });
}

}  // namespace argosy
