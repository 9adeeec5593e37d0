/* y = x W^T, for weights packed into panels of PANEL output columns: packed[panel][k][column], the last panel padded with
   zeros. A tile of ROWS x PANEL sums stays in registers while k runs through a chunk of CHUNK, and the chunks' sums are
   added in order, for every shape of x: one order of additions whatever the number of rows, and a rounding error that grows
   with the chunk and the number of chunks rather than with K. A chunk of a panel stays in the first-level cache. */
#include "vector.h"

#define CHUNK 256

int64_t gristmill_panel(void) { return PANEL; }

/* `rows` rows of x [.., ldx] times a chunk of a panel w [K, PANEL], added to sums [rows, PANEL] unless it is the first. */
INLINE void tile(const int rows, const float *x, int64_t ldx, const void *w, const int bf16, int64_t K, float *sums,
                 int first) {
  vec acc[ROWS][2];
#pragma GCC unroll 12
  for (int r = 0; r < rows; r++) acc[r][0] = acc[r][1] = (vec){0};
  for (int64_t k = 0; k < K; k++) {
    vec w0 = load_as(w, k * PANEL, bf16), w1 = load_as(w, k * PANEL + LANES, bf16);
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
  case n: tile(n, x, ldx, w, bf16, K, sums, first); break;

INLINE void chunk_rows(int64_t T, const float *x, int64_t ldx, const void *w, const int bf16, int64_t K, float *sums,
                       int first) {
  for (; T >= ROWS; T -= ROWS, x += ROWS * ldx, sums += ROWS * PANEL) tile(ROWS, x, ldx, w, bf16, K, sums, first);
  switch (T) {
    REST(1) REST(2) REST(3) REST(4) REST(5)
#if ROWS > 6
    REST(6) REST(7) REST(8) REST(9) REST(10) REST(11)
#endif
  }
}

static void chunk_rows_f32(int64_t T, const float *x, int64_t ldx, const float *w, int64_t K, float *sums, int first) {
  chunk_rows(T, x, ldx, w, 0, K, sums, first);
}

static void chunk_rows_bf16(int64_t T, const float *x, int64_t ldx, const uint16_t *w, int64_t K, float *sums,
                            int first) {
  chunk_rows(T, x, ldx, w, 1, K, sums, first);
}

#define BAND 96 /* rows whose sums of one panel are kept on the stack */

/* y [T, columns] (rows ldy apart) = x [T, K] times one panel. */
static void panel_rows(int64_t T, const float *x, const void *w, int bf16, int64_t K, float *y, int64_t ldy,
                       int64_t columns, const float *bias) {
  float sums[BAND * PANEL] __attribute__((aligned(64))), wide[CHUNK * PANEL] __attribute__((aligned(64)));
  for (int64_t t = 0; t < T; t += BAND) {
    const int64_t rows = T - t < BAND ? T - t : BAND;
    for (int64_t k = 0; k < K; k += CHUNK) {
      const int64_t depth = K - k < CHUNK ? K - k : CHUNK;
      const float *part = x + t * K + k;
      if (!bf16) {
        chunk_rows_f32(rows, part, K, (const float *)w + k * PANEL, depth, sums, k == 0);
      } else if (rows <= ROWS) {
        chunk_rows_bf16(rows, part, K, (const uint16_t *)w + k * PANEL, depth, sums, k == 0);
      } else { /* widened once for all rows */
        for (int64_t i = 0; i < depth * PANEL; i += LANES)
          store(wide + i, load_bf16((const uint16_t *)w + k * PANEL + i));
        chunk_rows_f32(rows, part, K, wide, depth, sums, k == 0);
      }
    }
    for (int64_t r = 0; r < rows; r++) {
      float *out = y + (t + r) * ldy, *in = sums + r * PANEL;
      if (bias)
        for (int64_t c = 0; c < PANEL; c++) in[c] += bias[c];
      if (columns == PANEL)
        memcpy(out, in, PANEL * sizeof(float));
      else
        memcpy(out, in, (size_t)columns * sizeof(float));
    }
  }
}

/* x [sum of rows, K] in runs, the run of slot s times that slot's matrix: y [same, N]. packed [slots, panels, K, PANEL],
   rows [slots], bias NULL or [slots, panels * PANEL]. One slot makes it a plain product. */
void gristmill_matmul(const float *x, const void *packed, int64_t bf16, const int64_t *rows, int64_t slots, int64_t K,
                      int64_t N, const float *bias, float *y, int64_t threads) {
  const int64_t panels = (N + PANEL - 1) / PANEL, panel_bytes = K * PANEL * (bf16 ? 2 : 4);
#pragma omp parallel num_threads(threads)
  {
    int64_t first = 0;
    for (int64_t s = 0; s < slots; first += rows[s++]) {
      if (rows[s] == 0) continue;
#pragma omp for schedule(static) nowait
      for (int64_t p = 0; p < panels; p++) {
        const char *w = (const char *)packed + (s * panels + p) * panel_bytes;
        const float *b = bias ? bias + (s * panels + p) * PANEL : 0;
        const int64_t columns = N - p * PANEL < PANEL ? N - p * PANEL : PANEL;
        panel_rows(rows[s], x + first * K, w, bf16, K, y + first * N + p * PANEL, N, columns, b);
      }
    }
  }
}
