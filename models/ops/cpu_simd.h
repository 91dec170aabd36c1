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
// The second operand wins when either is NaN, so a NaN in `b` is kept.
INLINE vf vmax(vf a, vf b) { return select(a > b, a, b); }

INLINE float max_of(vf v) {
  float lanes[VL], best;
  store(lanes, v);
  best = lanes[0];
  for (int i = 1; i < VL; i++) best = best > lanes[i] ? best : lanes[i];
  return best;
}

// Sum of the lanes, always pairing lane i with lane i + half.
INLINE float sum_of(vf v) {
  float lanes[VL];
  store(lanes, v);
  for (int half = VL / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
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
INLINE vf widen(vh h) { return bits<vf>(__builtin_convertvector(h, vu) << 16); }
INLINE float widen(uint16_t h) { return bits<float>(uint32_t(h) << 16); }

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

// e^x within 2 ulp where the result is normal; 0 below, inf above, NaN for NaN; exp(0) is exactly 1.
// x = n ln 2 + r with |r| <= ln 2 / 2; e^r by a polynomial of degree 7 in r (Taylor: the remainder
// r^8 / 8! is under a tenth of an ulp); n enters the exponent in two halves so that 2^128 does not overflow early.
INLINE vf vexp(vf x) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  vf clamped = select(x > splat(89.0f), splat(89.0f), select(x < splat(-88.0f), splat(-88.0f), x));
  vf shifted = fma(clamped, splat(1.44269504f), magic);
  vf n = shifted - magic;
  vf r = fma(n, splat(-0.693359375f), clamped);  // ln 2 in two parts; the first has 9 bits, so n * it is exact
  r = fma(n, splat(2.12194440e-4f), r);
  vf p = splat(1.0f / 5040.0f);
  p = fma(p, r, splat(1.0f / 720.0f));
  p = fma(p, r, splat(1.0f / 120.0f));
  p = fma(p, r, splat(1.0f / 24.0f));
  p = fma(p, r, splat(1.0f / 6.0f));
  p = fma(p, r, splat(0.5f));
  p = fma(p * r, r, r) + splat(1.0f);
  vi e = bits<vi>(shifted) - bits<vi>(magic);
  vi low = e >> 1;
  vf scaled = p * bits<vf>((low + 127) << 23) * bits<vf>((e - low + 127) << 23);
  scaled = select(x < splat(-87.3f), splat(0.0f), scaled);
  return select(x == x, scaled, x);
}

INLINE float exp_one(float x) {
  float lanes[VL];
  store(lanes, vexp(splat(x)));
  return lanes[0];
}

}  // namespace argosy
