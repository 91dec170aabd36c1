// Rotary positions (Su et al. 2021) and the write of keys and values into their slots.
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
  for_rows(a.tokens, all * a.size * 2, [&](int64_t t) {
    const float* from = a.qkv + t * all * a.size;
    const float* cosines = a.cos_sin ? a.cos_sin + a.positions[t] * 2 * a.half : nullptr;
    for (int h = 0; h < a.heads; h++)
      rotate(from + h * a.size, a.q + (t * a.heads + h) * a.size, cosines, a.half, a.size);
    const int64_t block = a.slots[t] / a.block, offset = a.slots[t] % a.block;
    for (int h = 0; h < a.kv_heads; h++) {
      const int64_t base = (block * a.kv_heads + h) * a.block * a.size;
      const float* v = from + (a.heads + a.kv_heads + h) * a.size;
      float k[kMaxHead];
      rotate(from + (a.heads + h) * a.size, k, cosines, a.half, a.size);
      if (a.format == kBfloat16) {
        uint16_t* key = reinterpret_cast<uint16_t*>(a.key) + base + offset;
        uint16_t* value = reinterpret_cast<uint16_t*>(a.value) + base + offset * a.size;
        for (int64_t d = 0; d < a.size; d++) key[d * a.block] = narrow(k[d]);
        int64_t d = 0;
        for (; d + VL <= a.size; d += VL) store(value + d, narrow(load<vf>(v + d)));
        for (; d < a.size; d++) value[d] = narrow(v[d]);
      } else {
        float* key = reinterpret_cast<float*>(a.key) + base + offset;
        for (int64_t d = 0; d < a.size; d++) key[d * a.block] = k[d];
        std::copy(v, v + a.size, reinterpret_cast<float*>(a.value) + base + offset * a.size);
      }
    }
  });
}

}  // namespace argosy
