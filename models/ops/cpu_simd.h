// Vectors of one instruction set. The same source is compiled once per level; VL is its fp32 lane count.
//
// Exactness: contraction is off for the whole build, so an FMA is where this file says so and nowhere else.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include <immintrin.h>
#define ARGOSY_VL 16
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define ARGOSY_VL 8
#else
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif
#define ARGOSY_VL 4
#endif

namespace argosy {

constexpr int VL = ARGOSY_VL;
#if ARGOSY_VL == 16 || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef uint16_t vh __attribute__((vector_size(VL * 2)));

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

template <class V>
INLINE V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
INLINE void store(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

template <class To, class From>
INLINE To bits(From v) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, v);
}

INLINE vf splat(float s) {
#if ARGOSY_VL == 16
  return (vf)_mm512_set1_ps(s);
#elif ARGOSY_VL == 8
  return (vf)_mm256_set1_ps(s);
#else
  return vf{s, s, s, s};
#endif
}

INLINE vf fma(vf a, vf b, vf c) {
#if ARGOSY_VL == 16
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif ARGOSY_VL == 8
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON) && defined(__aarch64__)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

INLINE vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }

// The greater or smaller of each lane; the second operand where either is NaN.
INLINE vf vmax(vf a, vf b) {
#if ARGOSY_VL == 16
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif ARGOSY_VL == 8
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (vf)_mm_max_ps((__m128)a, (__m128)b);
#else
  return select(a > b, a, b);
#endif
}

INLINE vf vmin(vf a, vf b) {
#if ARGOSY_VL == 16
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif ARGOSY_VL == 8
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (vf)_mm_min_ps((__m128)a, (__m128)b);
#else
  return select(a < b, a, b);
#endif
}

// Lanes i and i + VL / 2 meet, then i and i + VL / 4, down to one.
template <class Op>
INLINE float reduce(vf v, Op&& op) {
#if ARGOSY_VL == 16
  v = op(v, (vf)_mm512_shuffle_f32x4((__m512)v, (__m512)v, 0x4e));
  v = op(v, (vf)_mm512_shuffle_f32x4((__m512)v, (__m512)v, 0xb1));
  v = op(v, (vf)_mm512_permute_ps((__m512)v, 0x4e));
  v = op(v, (vf)_mm512_permute_ps((__m512)v, 0xb1));
#elif ARGOSY_VL == 8
  v = op(v, (vf)_mm256_permute2f128_ps((__m256)v, (__m256)v, 1));
  v = op(v, (vf)_mm256_permute_ps((__m256)v, 0x4e));
  v = op(v, (vf)_mm256_permute_ps((__m256)v, 0xb1));
#else
  v = op(v, vf{v[2], v[3], v[0], v[1]});
  v = op(v, vf{v[1], v[0], v[3], v[2]});
#endif
  return v[0];
}

INLINE float max_of(vf v) {
  return reduce(v, [](vf a, vf b) INLINE_LAMBDA { return vmax(a, b); });
}

INLINE float sum_of(vf v) {
  return reduce(v, [](vf a, vf b) INLINE_LAMBDA { return a + b; });
}

INLINE vi lane_index() {
  vi v;
  for (int i = 0; i < VL; i++) v[i] = i;
  return v;
}

INLINE vf load_part(const float* p, int64_t n, float fill) {
  float lanes[VL];
  for (int i = 0; i < VL; i++) lanes[i] = i < n ? p[i] : fill;
  return load<vf>(lanes);
}

INLINE void store_part(float* p, vf v, int64_t n) {
  float lanes[VL];
  store(lanes, v);
  for (int i = 0; i < VL && i < n; i++) p[i] = lanes[i];
}

// bf16 is the upper half of fp32: widening is exact.
INLINE vf widen(vh h) {
#if ARGOSY_VL == 16
  return bits<vf>((vu)_mm512_cvtepu16_epi32((__m256i)h) << 16);
#elif ARGOSY_VL == 8
  return bits<vf>((vu)_mm256_cvtepu16_epi32((__m128i)h) << 16);
#else
  return bits<vf>(__builtin_convertvector(h, vu) << 16);
#endif
}
INLINE float widen(uint16_t h) { return bits<float>(uint32_t(h) << 16); }
INLINE float widen(float f) { return f; }

// Round to nearest, ties to even; a NaN stays a (quiet) NaN.
INLINE uint16_t narrow(float f) {
  uint32_t u = bits<uint32_t>(f);
  if (f != f) return uint16_t((u >> 16) | 0x40);
  return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

INLINE vh narrow(vf f) {
  vu u = bits<vu>(f);
  vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  vu quiet = (u >> 16) | 0x40;
  vu is_nan = bits<vu>(f != f);
  return __builtin_convertvector((rounded & ~is_nan) | (quiet & is_nan), vh);
}

}  // namespace argosy
