// Linears whose weights are small integers: x becomes signed 8-bit codes with a step per row and group of inputs,
// products are summed in int32 over a group, and fp32 enters in one fixed order. Integer sums are exact, so neither M nor
// the tile nor the thread nor the instruction set can change a bit.
//
// Four codes of a weight (unsigned bytes of one word) meet four codes of x. Where the CPU has AVX512-VNNI that is one
// instruction; elsewhere bytes are widened to 16 bits, even and odd ones apart, and two multiply-adds of pairs make it.
// Neither saturates. The only file that knows these instructions.
#pragma once

#include "cpu_linear.h"

namespace argosy {

#if defined(__AVX512VNNI__)
constexpr bool kHasVnni = true;
constexpr int kWords = 1;  // of 32 bits for four codes of x
#else
constexpr bool kHasVnni = false;
constexpr int kWords = 2;  // (x0, x2) and (x1, x3) as 16-bit halves
#endif

typedef int8_t vb __attribute__((vector_size(VL)));

constexpr int kGroup = 32, kQuads = kGroup / 4;

struct Quads {
  vu part[kWords];
};

// Four unsigned bytes per lane, in the form in which they are multiplied.
INLINE Quads quads_of(vu bytes) {
  Quads quads;
  quads.part[0] = kHasVnni ? bytes : bytes & 0x00ff00ffu;
  if (!kHasVnni) quads.part[kWords - 1] = (bytes >> 8) & 0x00ff00ffu;
  return quads;
}

INLINE vi splat(int32_t word) {
#if ARGOSY_VL == 16
  return (vi)_mm512_set1_epi32(word);
#elif ARGOSY_VL == 8
  return (vi)_mm256_set1_epi32(word);
#else
  return vi{word, word, word, word};
#endif
}

// Sums of neighbouring products of signed 16-bit halves.
INLINE vi multiply_pairs(vu a, vi b) {
#if ARGOSY_VL == 16
  return (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif ARGOSY_VL == 8
  return (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  const vi whole = bits<vi>(a);
  return ((whole << 16) >> 16) * ((b << 16) >> 16) + (whole >> 16) * (b >> 16);
#endif
}

// sum + the four products of every lane of `w` with the codes at `x`.
INLINE vi add_products(vi sum, const Quads& w, const int32_t* x) {
#if defined(__AVX512VNNI__)
  return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w.part[0], _mm512_set1_epi32(x[0]));
#else
  return sum + multiply_pairs(w.part[0], splat(x[0])) + multiply_pairs(w.part[kWords - 1], splat(x[kWords - 1]));
#endif
}

// a * b + c rounded once on every machine: libm does it where the instruction set does not.
INLINE vf fma_once(vf a, vf b, vf c) {
#if ARGOSY_VL > 4 || (defined(__ARM_NEON) && defined(__aarch64__))
  return fma(a, b, c);
#else
  return vf{__builtin_fmaf(a[0], b[0], c[0]), __builtin_fmaf(a[1], b[1], c[1]), __builtin_fmaf(a[2], b[2], c[2]),
            __builtin_fmaf(a[3], b[3], c[3])};
#endif
}

// Rows of x as codes -127..127: value = code * step.
//
// A row or group that holds a NaN or an infinity has the step NaN and codes 0, so that every output of the row is NaN;
// one whose values are all below 2^-100 counts as zero.
struct CodedRows {
  int32_t* words;   // [m][stride]
  float* steps;     // [groups][m]
  float* shifts;    // [groups][m]: step * sum of the codes
  int32_t* starts;  // [groups][m]: sum of the codes times what the weight's codes are too large by, negated
  int64_t stride, groups, m;

  static INLINE int64_t blocks(int64_t k) { return (k + kGroup - 1) / kGroup; }
  // Whole cache lines and an odd number of them: rows of a tile must not meet in the same few sets of the cache.
  static INLINE int64_t stride_of(int64_t k) { return ((blocks(k) * kQuads * kWords + 15) / 16 | 1) * 16; }
};

// Lanes i and i + VL / 2 meet, then i and i + VL / 4, down to one.
template <class Op>
INLINE int32_t reduce(vi v, Op&& op) {
#if ARGOSY_VL == 16
  v = op(v, (vi)_mm512_shuffle_i32x4((__m512i)v, (__m512i)v, 0x4e));
  v = op(v, (vi)_mm512_shuffle_i32x4((__m512i)v, (__m512i)v, 0xb1));
  v = op(v, (vi)_mm512_shuffle_epi32((__m512i)v, _MM_PERM_BADC));
  v = op(v, (vi)_mm512_shuffle_epi32((__m512i)v, _MM_PERM_CDAB));
#elif ARGOSY_VL == 8
  v = op(v, (vi)_mm256_permute2x128_si256((__m256i)v, (__m256i)v, 1));
  v = op(v, (vi)_mm256_shuffle_epi32((__m256i)v, 0x4e));
  v = op(v, (vi)_mm256_shuffle_epi32((__m256i)v, 0xb1));
#else
  v = op(v, vi{v[2], v[3], v[0], v[1]});
  v = op(v, vi{v[1], v[0], v[3], v[2]});
#endif
  return v[0];
}

INLINE int32_t max_of(vi v) {
  return reduce(v, [](vi a, vi b) INLINE_LAMBDA { return a > b ? a : b; });
}

INLINE int32_t sum_of(vi v) {
  return reduce(v, [](vi a, vi b) INLINE_LAMBDA { return a + b; });
}

// The greatest magnitude of n floats, as bits: NaN above infinity above numbers.
INLINE uint32_t peak_of(const float* x, int64_t n) {
  vi best = {};
  int64_t i = 0;
  for (; i + VL <= n; i += VL) {
    const vi here = bits<vi>(load<vu>(x + i) & 0x7fffffffu);
    best = best > here ? best : here;
  }
  int32_t peak = max_of(best);
  for (; i < n; i++) {
    const int32_t here = int32_t(bits<uint32_t>(x[i]) & 0x7fffffffu);
    peak = peak > here ? peak : here;
  }
  return uint32_t(peak);
}

struct Step {
  float step, inverse;
  explicit Step(uint32_t peak) : step(0), inverse(0) {
    constexpr uint32_t kInfinity = 0x7f800000u, kSmallest = (127u - 100u) << 23;  // 2^-100
    if (peak >= kInfinity) {
      step = bits<float>(0x7fc00000u);
    } else if (peak >= kSmallest) {
      step = bits<float>(peak) / 127.0f;
      inverse = 127.0f / bits<float>(peak);
    }
  }
};

// Codes of 32 values, round(x * inverse) to nearest even; returns sums of them.
INLINE vi encode_block(const float* x, float inverse, int32_t* words) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  alignas(64) int8_t codes[kGroup];
  vi sum = {};
  for (int i = 0; i < kGroup; i += VL) {
    const vi code = bits<vi>(load<vf>(x + i) * splat(inverse) + magic) - bits<vi>(magic);
    sum += code;
    store(codes + i, __builtin_convertvector(code, vb));
  }
  if constexpr (kHasVnni) {
    std::memcpy(words, codes, kGroup);
  } else {
    for (int q = 0; q < kQuads; q++) {
      const int8_t* c = codes + 4 * q;
      words[q * kWords] = int32_t(uint32_t(uint16_t(c[0])) | uint32_t(uint16_t(c[2])) << 16);
      words[q * kWords + kWords - 1] = int32_t(uint32_t(uint16_t(c[1])) | uint32_t(uint16_t(c[3])) << 16);
    }
  }
  return sum;
}

// Codes of one row, in groups of `group` values (a multiple of 32, or all of them).
inline void encode_row(const float* x, int64_t k, int64_t group, int32_t excess, const CodedRows& to, int64_t row) {
  int32_t* words = to.words + row * to.stride;
  for (int64_t g = 0; g < to.groups; g++) {
    const int64_t first = g * group, last = first + group < k ? first + group : k;
    const Step step(peak_of(x + first, last - first));
    vi sums = {};
    for (int64_t i = first; i < last; i += kGroup) {
      int32_t* block = words + i / 4 * kWords;
      if (step.inverse == 0) {
        std::memset(block, 0, kQuads * kWords * 4);
      } else if (i + kGroup <= last) {
        sums += encode_block(x + i, step.inverse, block);
      } else {
        alignas(64) float padded[kGroup] = {};
        std::memcpy(padded, x + i, size_t(last - i) * 4);
        sums += encode_block(padded, step.inverse, block);
      }
    }
    const int32_t sum = sum_of(sums);
    to.steps[g * to.m + row] = step.step;
    to.starts[g * to.m + row] = -excess * sum;
    to.shifts[g * to.m + row] = step.step * float(sum);
  }
}

inline CodedRows encode_rows(const Linear& a, int64_t group, int32_t excess) {
  CodedRows x;
  x.m = a.m, x.stride = CodedRows::stride_of(a.k), x.groups = (a.k + group - 1) / group;
  float* memory = pool().shared().floats(size_t(a.m * (x.stride + 3 * x.groups)));
  x.words = reinterpret_cast<int32_t*>(memory);
  x.steps = memory + a.m * x.stride;
  x.shifts = x.steps + a.m * x.groups;
  x.starts = reinterpret_cast<int32_t*>(x.shifts + a.m * x.groups);
  auto encode = [&](int64_t row, int) { encode_row(a.x + row * a.k, a.k, group, excess, x, row); };
  if (a.m * a.k > 65536)
    pool().run(a.m, encode);
  else
    for (int64_t row = 0; row < a.m; row++) encode(row, 0);
  return x;
}

// Three rows per pointer: base, base + stride, base + 2 * stride are addresses that cost nothing.
template <int R>
struct RowWords {
  const int32_t* base[(R + 2) / 3];
  int64_t stride;
  INLINE RowWords(const CodedRows& x, int64_t row) : stride(x.stride) {
#pragma GCC unroll 4
    for (int i = 0; i < (R + 2) / 3; i++) base[i] = x.words + (row + 3 * i) * stride;
  }
  INLINE const int32_t* at(int r, int64_t word) const { return base[r / 3] + r % 3 * stride + word; }
};

template <class Weight, int R = Weight::kMaxRows>
INLINE void multiply_rows_by(int rows, const CodedRows& x, int64_t row, const char* panel, const float* scales,
                             int64_t steps, const char* ahead, int64_t pace, float* tile) {
  if constexpr (R >= 1) {
    if (rows == R) return Weight::template multiply<R>(x, row, panel, scales, steps, ahead, pace, tile);
    return multiply_rows_by<Weight, R - 1>(rows, x, row, panel, scales, steps, ahead, pace, tile);
  }
}

// `Weight` multiplies a tile of rows by one panel and scales the sums; it reads kBytes of the panel per step.
template <class Weight>
void linear_by_codes(const Linear& a, const float* scales) {
  Pool& threads = pool();
  const CodedRows x = encode_rows(a, Weight::kGroupSize, Weight::kExcess);
  const Cut cut(a.m, a.n, Weight::kMaxRows, threads.num_threads());
  const int64_t steps = Weight::steps(a.k), panel_bytes = steps * Weight::kBytes;
  // What is fetched ahead: see linear_by_dot.
  const int64_t per_band = cut.tiles / cut.bands;
  const int64_t pace = per_band <= 1 ? Weight::kBytes : (Weight::kBytes + per_band - 1) / per_band;
  threads.run(cut.columns * cut.bands, [&](int64_t task, int) {
    alignas(64) float tile[Weight::kMaxRows * kPanel];
    const int64_t first_tile = task % cut.bands * cut.tiles / cut.bands;
    cut.for_tiles(task, [&](int64_t p, int64_t t, int64_t first, int rows) INLINE_LAMBDA {
      const char* panel = a.weight + p * panel_bytes;
      const int64_t next = (p + 1) % cut.step ? p + 1 : p + 1 + (threads.num_threads() - 1) * cut.step;
      const char* ahead =
          per_band <= 1 ? panel + 8192 : a.weight + next * panel_bytes + (t - first_tile) * steps * pace;
      multiply_rows_by<Weight>(rows, x, first, panel, scales ? scales + p * kPanel : nullptr, steps, ahead, pace, tile);
      finish(a, tile, first, rows, p * kPanel);
    });
  });
}

}  // namespace argosy
