/* y = x W^T, for weights packed into panels of PANEL output columns: packed[panel][k][column], the last panel padded with
   zeros. A tile of ROWS x PANEL sums stays in registers while k runs through a chunk of CHUNK, and the chunks' sums are
   added in order, for every shape of x: one order of additions whatever the number of rows, and a rounding error that grows
   with the chunk and the number of chunks rather than with K. A chunk of a panel stays in the first-level cache.

   Weights are float32, bfloat16, or 8-bit integers with a scale an output column. All are float32 in a register before they
   meet x; the scale is applied to the finished sum.

   A pure loop of multiply-adds gives what the processor can do at most; a tile whose numbers are in the first-level cache
   reaches 99% of it. What is left to lose is waiting, for weights first of all, which are fetched ahead a share a tile. */
#include "vector.h"

/* Of omp.h, which not every compiler that knows OpenMP brings along. */
int omp_get_num_threads(void);
int omp_get_thread_num(void);

#define CHUNK 256

enum { F32 = 0, BF16 = 1, I8 = 2 }; /* the numbers in `kind`; native.py knows them */
static const int64_t width_of[] = {4, 2, 1};

INLINE vec load_weights(const void *w, int64_t i, const int kind) {
  return kind == I8 ? load_i8((const int8_t *)w + i) : load_as(w, i, kind == BF16);
}

int64_t gristmill_panel(void) { return PANEL; }

/* `rows` rows of x [.., ldx] times a chunk of a panel w [K, PANEL], plus sums [rows, PANEL] unless it is the first -> y
   [rows, PANEL], its rows ldy apart; y may be sums. */
INLINE void tile(const int rows, const float *x, int64_t ldx, const void *w, const int kind, int64_t K, const float *sums, float *y, int64_t ldy,
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
    store(y + r * ldy, acc[r][0]);
    store(y + r * ldy + LANES, acc[r][1]);
  }
}

#define REST(n) \
  case n: tile(n, x, ldx, w, kind, K, sums, y, ldy, first); break;

/* `ahead` is what is multiplied with next, fetched into the cache a `stride` of bytes a tile: otherwise the first tile of
   every chunk would wait for memory. */
INLINE void chunk_rows(int64_t T, const float *x, int64_t ldx, const void *w, const int kind, int64_t K, const float *sums,
                       float *y, int64_t ldy, int first, const char *ahead, int64_t stride) {
  for (; T >= ROWS; T -= ROWS, x += ROWS * ldx, sums += ROWS * PANEL, y += ROWS * ldy, ahead += stride) {
    for (int64_t i = 0; i < stride; i += 64) __builtin_prefetch(ahead + i);
    tile(ROWS, x, ldx, w, kind, K, sums, y, ldy, first);
  }
  switch (T) {
    REST(1) REST(2) REST(3) REST(4) REST(5)
#if ROWS > 6
    REST(6) REST(7) REST(8) REST(9) REST(10) REST(11)
#endif
  }
}

/* One kind a function: each loop is compiled for it alone. */
#define ROWS_OF(name, kind)                                                                                            \
  static void name(int64_t T, const float *x, int64_t ldx, const void *w, int64_t K, const float *sums, float *y,      \
                   int64_t ldy, int first, const char *ahead, int64_t stride) {                                        \
    chunk_rows(T, x, ldx, w, kind, K, sums, y, ldy, first, ahead, stride);                                             \
  }
ROWS_OF(rows_f32, F32)
ROWS_OF(rows_bf16, BF16)
ROWS_OF(rows_i8, I8)

static void widen(const void *w, int64_t count, int64_t kind, float *wide) {
  for (int64_t i = 0; i < count; i += LANES)
    store(wide + i, kind == I8 ? load_weights(w, i, I8) : load_weights(w, i, BF16));
}

#define BAND 192 /* rows that meet all panels before the next rows do; the sums of one panel are kept on the stack */

/* y [T, columns] (rows ldy apart) = x [T, K] times one panel, T at most BAND. */
static void panel_rows(int64_t T, const float *x, const void *w, int64_t kind, const float *scales, int64_t K, float *y,
                       int64_t ldy, int64_t columns, const float *bias) {
  float sums[BAND * PANEL] __attribute__((aligned(64))), wide[CHUNK * PANEL] __attribute__((aligned(64)));
  const int straight = columns == PANEL && !scales && !bias; /* the last chunk's sums go to y */
  const int64_t tiles = T / ROWS, chunk_bytes = CHUNK * PANEL * width_of[kind];
  const int64_t share = tiles < 2 ? 0 : (chunk_bytes / tiles + 63) / 64 * 64;
  const int64_t stride = share < 1024 ? share : 1024; /* more at once would be waited for itself */
  for (int64_t k = 0; k < K; k += CHUNK) {
    const int64_t depth = K - k < CHUNK ? K - k : CHUNK;
    const int last = straight && k + CHUNK >= K;
    float *to = last ? y : sums;
    const int64_t apart = last ? ldy : PANEL;
    const char *own = (const char *)w + k * PANEL * width_of[kind], *ahead = own + depth * PANEL * width_of[kind];
    if (kind == F32) {
      rows_f32(T, x + k, K, own, depth, sums, to, apart, k == 0, ahead, stride);
    } else if (T <= ROWS) {
      (kind == BF16 ? rows_bf16 : rows_i8)(T, x + k, K, own, depth, sums, to, apart, k == 0, ahead, 0);
    } else { /* widened once for all rows */
      widen(own, depth * PANEL, kind, wide);
      rows_f32(T, x + k, K, wide, depth, sums, to, apart, k == 0, ahead, stride);
    }
  }
  if (straight) return;
  for (int64_t r = 0; r < T; r++) {
    float *out = y + r * ldy, *in = sums + r * PANEL;
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

/* x [T, K] times panels from .. to of one matrix -> those columns of y [T, N]. */
static void some_panels(int64_t T, int64_t from, int64_t to, const float *x, const char *packed, int64_t kind,
                        const float *scales, int64_t K, int64_t N, const float *bias, float *y) {
  for (int64_t t = 0; t < T; t += BAND)
    for (int64_t p = from; p < to; p++)
      panel_rows(T - t < BAND ? T - t : BAND, x + t * K, packed + p * K * PANEL * width_of[kind], kind,
                 scales ? scales + p * PANEL : 0, K, y + t * N + p * PANEL, N,
                 N - p * PANEL < PANEL ? N - p * PANEL : PANEL, bias ? bias + p * PANEL : 0);
}

/* x [sum of rows, K] in runs, the run of slot s times that slot's matrix: y [same, N]. packed [slots, panels, K, PANEL] of
   `kind`, rows [slots], scales and bias NULL or [slots, panels * PANEL]. One slot makes it a plain product. */
void gristmill_matmul(const float *x, const void *packed, int64_t kind, const float *scales, const int64_t *rows,
                      int64_t slots, int64_t K, int64_t N, const float *bias, float *y, int64_t threads) {
  const int64_t panels = (N + PANEL - 1) / PANEL, bytes = panels * K * PANEL * width_of[kind];
#pragma omp parallel num_threads(threads)
  {
    const int64_t all = omp_get_num_threads(), own = omp_get_thread_num();
    const float *in = x;
    float *out = y;
    for (int64_t s = 0; s < slots; in += rows[s] * K, out += rows[s] * N, s++) {
      const float *scale = scales ? scales + s * panels * PANEL : 0, *add = bias ? bias + s * panels * PANEL : 0;
      const char *matrix = (const char *)packed + s * bytes;
      if (rows[s] >= all * BAND) { /* each thread has rows of its own, else columns */
        const int64_t tiles = (rows[s] + ROWS - 1) / ROWS, first = tiles * own / all * ROWS;
        const int64_t end = own + 1 == all ? rows[s] : tiles * (own + 1) / all * ROWS;
        some_panels(end - first, 0, panels, in + first * K, matrix, kind, scale, K, N, add, out + first * N);
      } else if (rows[s]) {
        some_panels(rows[s], panels * own / all, panels * (own + 1) / all, in, matrix, kind, scale, K, N, add, out);
      }
    }
  }
}
