/* What lies between the products, a pass each over the tokens' rows. */
#include "vector.h"

/* y [T, C] = x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019). */
void gristmill_rms_norm(const float *x, const float *weight, float eps, int64_t T, int64_t C, float *y, int64_t threads) {
  const int64_t whole = C / LANES * LANES;
#pragma omp parallel for schedule(static) num_threads(threads) if (T * C > 16384)
  for (int64_t t = 0; t < T; t++) {
    const float *in = x + t * C;
    float *out = y + t * C, squares;
    vec acc[4] = {{0}, {0}, {0}, {0}};
    for (int64_t c = 0, i = 0; c < whole; c += LANES, i = (i + 1) & 3) acc[i] += load(in + c) * load(in + c);
    squares = sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
    for (int64_t c = whole; c < C; c++) squares += in[c] * in[c];
    const float scale = 1.0f / sqrtf(squares / (float)C + eps);
    for (int64_t c = 0; c < whole; c += LANES) store(out + c, load(in + c) * splat(scale) * load(weight + c));
    for (int64_t c = whole; c < C; c++) out[c] = in[c] * scale * weight[c];
  }
}

/* y [n] = 1 / (1 + e^-x). */
void gristmill_sigmoid(const float *x, int64_t n, float *y) {
  for (int64_t i = 0; i < n / LANES * LANES; i += LANES)
    store(y + i, splat(1.0f) / (splat(1.0f) + vexp(-load(x + i))));
  for (int64_t i = n / LANES * LANES; i < n; i++) y[i] = 1.0f / (1.0f + vexp(splat(-x[i]))[0]);
}

INLINE vec gated(vec gate, vec up, float alpha, float limit, float shift) {
  /* not-a-number is neither above nor below: it stays */
  gate = choose(gate > splat(limit), splat(limit), gate);
  up = choose(up > splat(limit), splat(limit), choose(up < splat(-limit), splat(-limit), up)) + splat(shift);
  return gate / (splat(1.0f) + vexp(splat(-alpha) * gate)) * up;
}

/* y [T, F] = gate * sigmoid(alpha gate) * (up + shift), gate at most `limit` and up within it, for gate_up [T, 2F]: gate in
   the first half, up in the second. alpha 1, limit infinity, shift 0: silu(gate) * up (Shazeer 2020, SwiGLU). */
void gristmill_swiglu(const float *gate_up, int64_t T, int64_t F, float alpha, float limit, float shift, float *y,
                      int64_t threads) {
  const int64_t whole = F / LANES * LANES;
#pragma omp parallel for schedule(static) num_threads(threads) if (T * F > 16384)
  for (int64_t t = 0; t < T; t++) {
    const float *gate = gate_up + t * 2 * F, *up = gate + F;
    float *out = y + t * F;
    for (int64_t f = 0; f < whole; f += LANES)
      store(out + f, gated(load(gate + f), load(up + f), alpha, limit, shift));
    for (int64_t f = whole; f < F; f++) out[f] = gated(splat(gate[f]), splat(up[f]), alpha, limit, shift)[0];
  }
}

/* x / (1 + e^-2u) with u = sqrt(2 / pi) (x + 0.044715 x^3): x / 2 (1 + tanh u) (Hendrycks and Gimpel 2016). */
INLINE vec gelu_tanh(vec x) {
  const vec u = x * splat(0.79788456080286536f) * (splat(1.0f) + splat(0.044715f) * x * x);
  return x / (splat(1.0f) + vexp(splat(-2.0f) * u));
}

INLINE float gelu_exact(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }

/* y [T, F] = gelu(x) for x [T, F], or gelu(gate) * up for x [T, 2F] with the gate in the first half (GeGLU).
   Row by row, so that an element's bits do not depend on how many rows there are. */
void gristmill_gelu(const float *x, int64_t T, int64_t F, int64_t gated, int64_t exact, float *y, int64_t threads) {
  const int64_t whole = exact ? 0 : F / LANES * LANES;
#pragma omp parallel for schedule(static) num_threads(threads) if (T * F > 16384)
  for (int64_t t = 0; t < T; t++) {
    const float *gate = x + t * (gated ? 2 * F : F), *up = gated ? gate + F : 0;
    float *out = y + t * F;
    for (int64_t f = 0; f < whole; f += LANES) {
      const vec g = gelu_tanh(load(gate + f));
      store(out + f, up ? g * load(up + f) : g);
    }
    for (int64_t f = whole; f < F; f++) {
      const float g = exact ? gelu_exact(gate[f]) : gelu_tanh(splat(gate[f]))[0];
      out[f] = up ? g * up[f] : g;
    }
  }
}

/* y [T, H, D] = x with the first 2 * half columns of each head rotated by the token's angles cos, sin [T, half]:
   column i pairs with i + half (Su et al. 2021, in the order of GPT-NeoX and Llama). x's tokens are `stride` apart. */
void gristmill_rotate(const float *x, int64_t stride, const float *cosine, const float *sine, int64_t T, int64_t H,
                      int64_t D, int64_t half, float *y, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (T * H * D > 16384)
  for (int64_t t = 0; t < T; t++)
    for (int64_t h = 0; h < H; h++) {
      const float *in = x + t * stride + h * D, *c = cosine + t * half, *s = sine + t * half;
      float *out = y + (t * H + h) * D;
      for (int64_t i = 0; i < half; i++) {
        out[i] = in[i] * c[i] - in[i + half] * s[i];
        out[i + half] = in[i + half] * c[i] + in[i] * s[i];
      }
      for (int64_t i = 2 * half; i < D; i++) out[i] = in[i];
    }
}
