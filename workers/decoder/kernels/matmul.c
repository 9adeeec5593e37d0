/* y = x W^T, for weights packed into panels of PANEL output columns: packed[panel][k][column], the last panel padded with
   zeros. A tile of ROWS x PANEL sums stays in registers while k runs through a chunk of CHUNK, and the chunks' sums are
   added in order, for every shape of x: one order of additions whatever the number of rows, and a rounding error that grows
   with the chunk and the number of chunks rather than with K. A chunk of a panel stays in the first-level cache.

   Weights are float32, bfloat16, or 8-bit integers with a scale an output column. All are float32 in a register before they
   meet x; the scale is applied to the finished sum. */
#include "vector.h"

#define CHUNK 256

enum { F32 = 0, BF16 = 1, I8 = 2 }; /* the numbers in `kind`; native.py knows them */
static const int64_t width_of[] = {4, 2, 1};

INLINE vec load_weights(const void *w, int64_t i, const int kind) {
  return kind == I8 ? load_i8((const int8_t *)w + i) : load_as(w, i, kind == BF16);
}

int64_t gristmill_panel(void) { return PANEL; }

/* `rows` rows of x [.., ldx] times a chunk of a panel w [K, PANEL], added to sums [rows, PANEL] unless it is the first. */
INLINE void tile(const int rows, const float *x, int64_t ldx, const void *w, const int kind, int64_t K, float *sums,
                 int first) {
  vec acc[ROWS][2];
#pragma GCC unroll 12
  for (int r = 0; r < rows; r++) acc[r][0] = acc[r][1] = (vec){0};
  for (int64_t k = 0; k < K; k++) {
    vec w0 = load_weights(w, k * PANEL, kind), w1 = load_weights(w, k * PANEL + LANES, kind);
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
      vec a = splat(x[r * ldx + k]);
      acc[r][0] += a * w0;
      acc[r][1] += a * w1;
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < rows; r++) {
    if (!first) {
      acc[r][0] += load(sums + r * PANEL);
      acc[r][1] += load(sums + r * PANEL + LANES);
    }
    store(sums + r * PANEL, acc[r][0]);
    store(sums + r * PANEL + LANES, acc[r][1]);
  }
}

#define REST(n) \
  case n: tile(n, x, ldx, w, kind, K, sums, first); break;

INLINE void chunk_rows(int64_t T, const float *x, int64_t ldx, const void *w, const int kind, int64_t K, float *sums,
                       int first) {
  for (; T >= ROWS; T -= ROWS, x += ROWS * ldx, sums += ROWS * PANEL) tile(ROWS, x, ldx, w, kind, K, sums, first);
  switch (T) {
    REST(1) REST(2) REST(3) REST(4) REST(5)
#if ROWS > 6
    REST(6) REST(7) REST(8) REST(9) REST(10) REST(11)
#endif
  }
}

/* One kind a function: each loop is compiled for it alone. */
static void rows_f32(int64_t T, const float *x, int64_t ldx, const void *w, int64_t K, float *sums, int first) {
  chunk_rows(T, x, ldx, w, F32, K, sums, first);
}

static void rows_bf16(int64_t T, const float *x, int64_t ldx, const void *w, int64_t K, float *sums, int first) {
  chunk_rows(T, x, ldx, w, BF16, K, sums, first);
}

static void rows_i8(int64_t T, const float *x, int64_t ldx, const void *w, int64_t K, float *sums, int first) {
  chunk_rows(T, x, ldx, w, I8, K, sums, first);
}

static void widen(const void *w, int64_t count, int64_t kind, float *wide) {
  for (int64_t i = 0; i < count; i += LANES)
    store(wide + i, kind == I8 ? load_weights(w, i, I8) : load_weights(w, i, BF16));
}

#define BAND 96 /* rows whose sums of one panel are kept on the stack */

/* y [T, columns] (rows ldy apart) = x [T, K] times one panel. */
static void panel_rows(int64_t T, const float *x, const void *w, int64_t kind, const float *scales, int64_t K, float *y,
                       int64_t ldy, int64_t columns, const float *bias) {
  float sums[BAND * PANEL] __attribute__((aligned(64))), wide[CHUNK * PANEL] __attribute__((aligned(64)));
  for (int64_t t = 0; t < T; t += BAND) {
    const int64_t rows = T - t < BAND ? T - t : BAND;
    for (int64_t k = 0; k < K; k += CHUNK) {
      const int64_t depth = K - k < CHUNK ? K - k : CHUNK;
      const float *part = x + t * K + k;
      const void *own = (const char *)w + k * PANEL * width_of[kind];
      if (kind == F32) {
        rows_f32(rows, part, K, own, depth, sums, k == 0);
      } else if (rows <= ROWS) {
        (kind == BF16 ? rows_bf16 : rows_i8)(rows, part, K, own, depth, sums, k == 0);
      } else { /* widened once for all rows */
        widen(own, depth * PANEL, kind, wide);
        rows_f32(rows, part, K, wide, depth, sums, k == 0);
      }
    }
    for (int64_t r = 0; r < rows; r++) {
      float *out = y + (t + r) * ldy, *in = sums + r * PANEL;
      if (scales)
        for (int64_t c = 0; c < PANEL; c++) in[c] *= scales[c];
      if (bias)
        for (int64_t c = 0; c < PANEL; c++) in[c] += bias[c];
      if (columns == PANEL)
        memcpy(out, in, PANEL * sizeof(float));
      else
        memcpy(out, in, (size_t)columns * sizeof(float));
    }
  }
}

/* x [sum of rows, K] in runs, the run of slot s times that slot's matrix: y [same, N]. packed [slots, panels, K, PANEL] of
   `kind`, rows [slots], scales and bias NULL or [slots, panels * PANEL]. One slot makes it a plain product. */
void gristmill_matmul(const float *x, const void *packed, int64_t kind, const float *scales, const int64_t *rows,
                      int64_t slots, int64_t K, int64_t N, const float *bias, float *y, int64_t threads) {
  const int64_t panels = (N + PANEL - 1) / PANEL, panel_bytes = K * PANEL * width_of[kind];
#pragma omp parallel num_threads(threads)
  {
    int64_t first = 0;
    for (int64_t s = 0; s < slots; first += rows[s++]) {
      if (rows[s] == 0) continue;
#pragma omp for schedule(static) nowait
      for (int64_t p = 0; p < panels; p++) {
        const int64_t at = s * panels + p;
        const int64_t columns = N - p * PANEL < PANEL ? N - p * PANEL : PANEL;
        panel_rows(rows[s], x + first * K, (const char *)packed + at * panel_bytes, kind, scales ? scales + at * PANEL : 0,
                   K, y + first * N + p * PANEL, N, columns, bias ? bias + at * PANEL : 0);
      }
    }
  }
}
