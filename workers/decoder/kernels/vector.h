/* Vectors of floats as wide as the processor's registers, in the compiler's own portable extension (GCC, Clang).

   Every kernel here keeps one rule: the value of an output row depends on that row's inputs alone, never on how many rows
   came with it. Sums run in a fixed order over the inner dimension, a multiply-add at a time, and the code for one row and
   for many is the same code, inlined with another constant. */
#ifndef GRISTMILL_VECTOR_H
#define GRISTMILL_VECTOR_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16 /* floats in a register */
#define ROWS 12  /* rows in a tile: ROWS x 2 sums, 2 weights and 1 input fit the 32 registers */
#elif defined(__AVX__)
#define LANES 8
#define ROWS 6 /* of 16 registers */
#else
#define LANES 4 /* NEON, SSE */
#define ROWS 6
#endif
#define PANEL (2 * LANES) /* output columns that a tile computes, and keys in a block of the KV cache's layout */

#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES)));
typedef int8_t bvec __attribute__((vector_size(LANES)));

INLINE vec splat(float x) { return x - (vec){0}; }

INLINE vec load(const float *p) {
  vec v;
  memcpy(&v, p, sizeof v);
  return v;
}

INLINE void store(float *p, vec v) { memcpy(p, &v, sizeof v); }

/* bfloat16 is the upper half of a float32: widening is exact. */
INLINE float from_bf16(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}

INLINE vec load_bf16(const uint16_t *p) {
  hvec h;
  memcpy(&h, p, sizeof h);
  return (vec)(__builtin_convertvector(h, ivec) << 16);
}

/* 8-bit integers are floats exactly. GCC takes the portable form apart into single bytes, at four times the cost, so
   that processors which have the instruction for it are told. */
INLINE vec load_i8(const int8_t *p) {
#if defined(__AVX512F__)
  return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif defined(__AVX2__)
  return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
  bvec b;
  memcpy(&b, p, sizeof b);
  return __builtin_convertvector(__builtin_convertvector(b, ivec), vec);
#endif
}

/* Element `i` of an array of float32 (bf16 = 0) or bfloat16 (bf16 = 1), LANES of them. */
INLINE vec load_as(const void *p, int64_t i, const int bf16) {
  return bf16 ? load_bf16((const uint16_t *)p + i) : load((const float *)p + i);
}

/* Round to nearest even, as torch does; not-a-number stays so. */
INLINE uint16_t to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if (x != x) return 0x7fc0;
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE vec choose(ivec mask, vec a, vec b) { return (vec)((mask & (ivec)a) | (~mask & (ivec)b)); }
INLINE vec vmax(vec a, vec b) { return choose(a > b, a, b); }
INLINE vec vmin(vec a, vec b) { return choose(a < b, a, b); }

#if defined(__clang__)
#define SHUFFLE(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#else
#define SHUFFLE(v, ...) __builtin_shuffle(v, (ivec){__VA_ARGS__})
#endif

#if LANES == 16
#define LANE_NUMBERS 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
#define FOLD(v, combine)                                                             \
  v = combine(v, SHUFFLE(v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)); \
  v = combine(v, SHUFFLE(v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)); \
  v = combine(v, SHUFFLE(v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)); \
  v = combine(v, SHUFFLE(v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
#elif LANES == 8
#define LANE_NUMBERS 0, 1, 2, 3, 4, 5, 6, 7
#define FOLD(v, combine)                                     \
  v = combine(v, SHUFFLE(v, 4, 5, 6, 7, 0, 1, 2, 3));       \
  v = combine(v, SHUFFLE(v, 2, 3, 0, 1, 6, 7, 4, 5));       \
  v = combine(v, SHUFFLE(v, 1, 0, 3, 2, 5, 4, 7, 6));
#else
#define LANE_NUMBERS 0, 1, 2, 3
#define FOLD(v, combine)                  \
  v = combine(v, SHUFFLE(v, 2, 3, 0, 1)); \
  v = combine(v, SHUFFLE(v, 1, 0, 3, 2));
#endif

INLINE vec vadd(vec a, vec b) { return a + b; }

/* Sum and maximum over the lanes, in halves. */
INLINE float sum(vec v) {
  FOLD(v, vadd)
  return v[0];
}

INLINE float maximum(vec v) {
  FOLD(v, vmax)
  return v[0];
}

/* e^x within 2 units in the last place: x = n ln 2 + r, a polynomial in r (Cephes' expf), then n into the exponent.
   exp(0) is exactly 1, below -87 it is 0, above 88 infinity, and not-a-number stays so. */
INLINE vec vexp(vec x) {
  vec clamped = vmin(vmax(x, splat(-87.0f)), splat(88.0f));
  vec shifted = clamped * splat(1.44269504088896341f) + splat(12582912.0f); /* 1.5 * 2^23: rounds to an integer */
  vec n = shifted - splat(12582912.0f);
  vec r = clamped - n * splat(0.693359375f);
  r = r - n * splat(-2.12194440e-4f);
  vec p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * r * r + r + splat(1.0f);
  ivec exponent = (__builtin_convertvector(n, ivec) + 127) << 23;
  vec result = p * (vec)exponent;
  result = choose(x < splat(-87.0f), splat(0.0f), result);
  result = choose(x > splat(88.0f), splat(INFINITY), result);
  return choose(x == x, result, x);
}

#endif
