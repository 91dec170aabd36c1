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

// What weights, keys and values are stored as, beside float.
struct Brain {  // bf16
  uint16_t bits;
};
struct Half {  // IEEE fp16
  uint16_t bits;
};

// bf16 is the upper half of fp32: widening is exact.
INLINE vf widen_brain(vh h) {
#if ARGOSY_VL == 16
  return bits<vf>((vu)_mm512_cvtepu16_epi32((__m256i)h) << 16);
#elif ARGOSY_VL == 8
  return bits<vf>((vu)_mm256_cvtepu16_epi32((__m128i)h) << 16);
#else
  return bits<vf>(__builtin_convertvector(h, vu) << 16);
#endif
}

// Round to nearest, ties to even; a NaN stays a (quiet) NaN.
INLINE vh narrow_brain(vf f) {
  vu u = bits<vu>(f);
  vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  vu quiet = (u >> 16) | 0x40;
  vu is_nan = bits<vu>(f != f);
  return __builtin_convertvector((rounded & ~is_nan) | (quiet & is_nan), vh);
}

// fp16 where no instruction converts it, in vectors or one by one (F, U: float and its bits). Its exponent is moved by a
// product with 2^112, which is exact for its denormals, too.
template <class F, class U>
INLINE F half_to_float(U h) {
  const U size = h & 0x7fff, sign = (h & 0x8000) << 16;
  const F moved = bits<F>(size << 13) * 0x1p112f;
  const U special = bits<U>(moved) | 0x7f800000 | (size > 0x7c00 ? U{} + 0x400000 : U{});
  return bits<F>(sign | (size >= 0x7c00 ? special : bits<U>(moved)));
}

// To nearest, ties to even, as the instructions do: 65520 and more become infinite, a NaN keeps its upper bits. A sum
// with 0.5, whose last bit is 2^-24, rounds what becomes denormal.
template <class F, class U>
INLINE U float_to_half(F f) {
  const U u = bits<U>(f), size = u & 0x7fffffff, sign = (u >> 16) & 0x8000;
  const U normal = (size + 0xfff + ((size >> 13) & 1) - (U{} + (112u << 23))) >> 13;
  const U small = bits<U>(bits<F>(size) + 0.5f) - 0x3f000000;
  const U nan = ((size >> 13) & 0x3ff) | 0x7e00;
  const U finite = size < 0x38800000 ? small : normal;
  const U large = size > 0x7f800000 ? nan : U{} + 0x7c00;
  return sign | (size >= 0x477ff000 ? large : finite);
}

INLINE vf widen_half(vh h) {
#if ARGOSY_VL == 16
  return (vf)_mm512_cvtph_ps((__m256i)h);
#elif ARGOSY_VL == 8
  return (vf)_mm256_cvtph_ps((__m128i)h);
#else
  return half_to_float<vf>(__builtin_convertvector(h, vu));
#endif
}

INLINE vh narrow_half(vf f) {
#if ARGOSY_VL == 16
  return (vh)_mm512_cvtps_ph((__m512)f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif ARGOSY_VL == 8
  return (vh)_mm256_cvtps_ph((__m256)f, _MM_FROUND_TO_NEAREST_INT);
#else
  return __builtin_convertvector(float_to_half<vf, vu>(f), vh);
#endif
}

INLINE float widen(Brain b) { return bits<float>(uint32_t(b.bits) << 16); }
INLINE float widen(Half h) { return half_to_float<float>(uint32_t(h.bits)); }
INLINE float widen(float f) { return f; }

INLINE vf widen_at(const Brain* p) { return widen_brain(load<vh>(p)); }
INLINE vf widen_at(const Half* p) { return widen_half(load<vh>(p)); }
INLINE vf widen_at(const float* p) { return load<vf>(p); }

INLINE void narrow_to(Brain* p, float f) {
  const uint32_t u = bits<uint32_t>(f);
  p->bits = f != f ? uint16_t((u >> 16) | 0x40) : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
INLINE void narrow_to(Half* p, float f) { p->bits = uint16_t(float_to_half<float, uint32_t>(f)); }
INLINE void narrow_to(float* p, float f) { *p = f; }

INLINE void narrow_to(Brain* p, vf f) { store(p, narrow_brain(f)); }
INLINE void narrow_to(Half* p, vf f) { store(p, narrow_half(f)); }
INLINE void narrow_to(float* p, vf f) { store(p, f); }

}  // namespace argosy
