// Functions of one vector: exp, tanh, the normal distribution and the activations made of them.
//
// Elementwise, without tables and without branches on values, so a value has the same bits in every lane and vector.
// Polynomials are our own least-maximum fits (Lawson's algorithm, 4,000 Chebyshev nodes).
#pragma once

#include "cpu_simd.h"

namespace argosy {

// e^x within 2 ulp; 0 below -86.6 (2.4e-38), inf above 88.7, NaN for NaN; exp(0) is exactly 1.
// x = n ln 2 + r with |r| <= ln 2 / 2; e^r by a polynomial of degree 7 in r (Taylor: the remainder r^8 / 8! is under a
// tenth of an ulp); 2^n is applied as 2^(n - 1) * 2, so that n = 128 overflows to inf by itself.
INLINE vf vexp(vf x) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf capped = vmin(splat(89.0f), x);
  const vf shifted = fma(capped, splat(1.44269504f), magic);
  const vf n = shifted - magic;
  vf r = fma(n, splat(-0.693359375f), capped);  // ln 2 in two parts; the first has 9 bits, so n * it is exact
  r = fma(n, splat(2.12194440e-4f), r);
  vf p = splat(1.0f / 5040.0f);
  p = fma(p, r, splat(1.0f / 720.0f));
  p = fma(p, r, splat(1.0f / 120.0f));
  p = fma(p, r, splat(1.0f / 24.0f));
  p = fma(p, r, splat(1.0f / 6.0f));
  p = fma(p, r, splat(0.5f));
  p = fma(p * r, r, r) + splat(1.0f);
  const vu exponent = (bits<vu>(shifted) - bits<vu>(magic) + 126) << 23;
  return select(x < splat(-86.6f), splat(0.0f), p * bits<vf>(exponent) * splat(2.0f));
}

INLINE vf vabs(vf x) { return bits<vf>(bits<vu>(x) & 0x7fffffffu); }

// tanh within 4 ulp; NaN for NaN. An odd polynomial below 0.625 (relative error 4e-9), where 1 - 2 / (e^2x + 1) would
// cancel.
INLINE vf vtanh(vf x) {
  const vf size = vabs(x), z = x * x;
  vf p = splat(-5.71703678e-3f);
  p = fma(p, z, splat(2.06505786e-2f));
  p = fma(p, z, splat(-5.37434965e-2f));
  p = fma(p, z, splat(1.33314908e-1f));
  p = fma(p, z, splat(-3.33332837e-1f));
  const vf near = fma(p * z, x, x);
  const vf far = splat(1.0f) - splat(2.0f) / (vexp(size + size) + splat(1.0f));
  const vf signed_far = bits<vf>(bits<vu>(far) | (bits<vu>(x) & 0x80000000u));
  return select(size < splat(0.625f), near, signed_far);
}

// cap * tanh(x / cap) (Gemma 2); `inverse` is 1 / cap.
INLINE vf soft_capped(vf x, vf cap, vf inverse) { return vtanh(x * inverse) * cap; }

// The normal distribution function. Its tail beyond t is e^(-t^2 / 2) times a function that falls like 1 / t: a
// polynomial in 1 / (1 + 0.35 t) (relative error 3e-8 up to 14, where the exponential is 0). So the lower tail, which is
// what gelu needs, has no cancellation. The rounding of t^2 is corrected where there is an FMA.
INLINE vf normal_below(vf x) {
  const vf t = vmin(splat(14.0f), vabs(x)), square = t * t;
  const vf u = splat(1.0f) / fma(splat(0.35f), t, splat(1.0f));
  vf p = splat(-2.91461349e-2f);
  p = fma(p, u, splat(1.43972680e-1f));
  p = fma(p, u, splat(-2.55716264e-1f));
  p = fma(p, u, splat(1.59176439e-1f));
  p = fma(p, u, splat(-2.31113750e-2f));
  p = fma(p, u, splat(1.05508648e-1f));
  p = fma(p, u, splat(1.19832709e-1f));
  p = fma(p, u, splat(1.39861897e-1f));
  p = fma(p, u, splat(1.39621407e-1f));
  const vf rest = fma(t, t, -square);
  const vf power = vexp(splat(-0.5f) * square);
  const vf tail = p * u * fma(power, splat(-0.5f) * rest, power);
  return select(x < splat(0.0f), tail, splat(1.0f) - tail);
}

enum class Activation : int { kRelu, kGeluTanh, kGelu, kSilu };  // the order of ACTIVATIONS in kernels.py

// -inf gives NaN but for relu, as in torch: a row that holds one is broken and must say so.
template <Activation A>
INLINE vf activated(vf x) {
  if constexpr (A == Activation::kRelu) return vmax(splat(0.0f), x);
  if constexpr (A == Activation::kGelu) return x * normal_below(x);
  if constexpr (A == Activation::kSilu) return x / (splat(1.0f) + vexp(-x));
  // x / 2 * (1 + tanh z) = x / (1 + e^-2z), z = sqrt(2 / pi) (x + 0.044715 x^3)
  const vf cubic = fma(x * x * x, splat(0.044715f), x);
  return x / (splat(1.0f) + vexp(cubic * splat(-1.59576912f)));
}

// Calls f.operator()<activation>() for an activation that is known only now.
template <class F>
INLINE void with_activation(int activation, F&& f) {
  switch (Activation(activation)) {
    case Activation::kRelu: return f.template operator()<Activation::kRelu>();
    case Activation::kGeluTanh: return f.template operator()<Activation::kGeluTanh>();
    case Activation::kGelu: return f.template operator()<Activation::kGelu>();
    case Activation::kSilu: return f.template operator()<Activation::kSilu>();
  }
}

}  // namespace argosy
