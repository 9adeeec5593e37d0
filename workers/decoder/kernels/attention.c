/* Attention over a paged KV cache: online softmax (Dao et al. 2022, Milakov and Gimelshein 2018) over panels of KEYS keys,
   queries of a key-value head's whole group together, so that a key is loaded once for all of them.

   Layout of the pools, of float32 or bfloat16:
     keys   [blocks, K, block_tokens / KEYS, D, KEYS]   a panel holds KEYS keys, transposed: scores are a small product
     values [blocks, K, block_tokens, W]                W: the value width rounded up to PANEL, the rest zeros
   Where a key's first columns are its value (latent attention) there is no second pool: a panel's values are turned
   into rows on the way, once for a tile of queries.

   A query visits its panels in the order of their positions, and a panel in which it sees no key leaves its sums as they
   were to the bit; so its result depends neither on the queries that share its tile nor on how the prompt was cut. */
#include "vector.h"

#include <stdlib.h>

#define KEYS 16
#define KV (KEYS / LANES) /* registers in a row of scores */
#if LANES == 16
#define TILE 12
#else
#define TILE 6
#endif
#define SPAN 32 /* query tokens in a task */
#define WIDEST 1024

int64_t gristmill_keys(void) { return KEYS; }
int64_t gristmill_widest_value(void) { return WIDEST; }

typedef struct {
  const float *query;                        /* [T, H, D], tokens query_stride apart */
  const void *keys, *values;                 /* pools, see above; values NULL: they are in the keys */
  const int32_t *query_start, *context_lens; /* [S + 1], [S] */
  const int32_t *block_table;                /* [S, B] */
  const float *slopes, *sinks;               /* [H] or NULL */
  float *out;                                /* [T, H, value_width] */
  int64_t query_stride, S, B, H, K, D, value_width, block_tokens, bf16, window;
  float scale, softcap;
} attention;

typedef struct {
  int32_t sequence, head, first, count; /* query tokens first .. first + count of the step, one key-value head */
} task;

/* A panel lies in a page of its own, which the processor's own prefetching does not cross into. */
INLINE void prefetch(const char *p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
}

/* scores [rows, KEYS] = query rows [rows, D] times a panel of keys [D, KEYS]. */
INLINE void score_tile(const int rows, const float *const *query, const void *keys, const int bf16, int64_t D,
                       float scores[][KEYS]) {
  vec acc[TILE][KV];
#pragma GCC unroll 12
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int v = 0; v < KV; v++) acc[r][v] = (vec){0};
  for (int64_t d = 0; d < D; d++) {
    vec k[KV];
#pragma GCC unroll 4
    for (int v = 0; v < KV; v++) k[v] = load_as(keys, d * KEYS + v * LANES, bf16);
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
      vec q = splat(query[r][d]);
#pragma GCC unroll 4
      for (int v = 0; v < KV; v++) acc[r][v] += q * k[v];
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int v = 0; v < KV; v++) store(scores[r] + v * LANES, acc[r][v]);
}

/* sums [rows, W] += weights [rows, KEYS] times values [count, W]. */
INLINE void value_tile(const int rows, float weights[][KEYS], const void *values, const int bf16, int64_t count,
                       int64_t W, float *sums) {
  for (int64_t w = 0; w < W; w += PANEL) {
    vec acc[TILE][2];
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
      acc[r][0] = load(sums + r * W + w);
      acc[r][1] = load(sums + r * W + w + LANES);
    }
    for (int64_t j = 0; j < count; j++) {
      vec v0 = load_as(values, j * W + w, bf16), v1 = load_as(values, j * W + w + LANES, bf16);
#pragma GCC unroll 12
      for (int r = 0; r < rows; r++) {
        vec p = splat(weights[r][j]);
        acc[r][0] += p * v0;
        acc[r][1] += p * v1;
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
      store(sums + r * W + w, acc[r][0]);
      store(sums + r * W + w + LANES, acc[r][1]);
    }
  }
}

/* The first value_width columns of a panel of keys [D, KEYS] -> rows [count, W] of float32. */
INLINE void turn(const void *keys, const int bf16, int64_t count, int64_t value_width, int64_t W, float *rows) {
  for (int64_t d = 0; d < value_width; d++) {
    float column[KEYS];
#pragma GCC unroll 4
    for (int v = 0; v < KV; v++) store(column + v * LANES, load_as(keys, d * KEYS + v * LANES, bf16));
    for (int64_t j = 0; j < count; j++) rows[j * W + d] = column[j];
  }
  for (int64_t j = 0; j < count; j++)
    for (int64_t d = value_width; d < W; d++) rows[j * W + d] = 0;
}

/* One row's scores of one panel -> its weights; its running maximum, total and sums [W] move on.
   Never inlined: in each tile size the compiler would choose anew which products and sums to fuse, and so the bits. */
static __attribute__((noinline)) void soften(const attention *a, float *scores, int64_t key, int64_t position,
                                             float slope, float *most, float *total, float *sums, int64_t W) {
  const int64_t first = a->window ? position - a->window + 1 : 0; /* the first key this query sees */
  const ivec lane = {LANE_NUMBERS};
  vec s[KV], high, added = {0};
  for (int v = 0; v < KV; v++) {
    s[v] = load(scores + v * LANES) * splat(a->scale);
    if (a->softcap > 0) { /* tanh(x) = 1 - 2 / (e^2x + 1) */
      vec twice = s[v] * splat(2.0f / a->softcap);
      s[v] = splat(a->softcap) * (splat(1.0f) - splat(2.0f) / (vexp(twice) + splat(1.0f)));
    }
    ivec distance = lane + (int32_t)(key + v * LANES - position);
    if (slope != 0.0f) s[v] += splat(slope) * __builtin_convertvector(distance, vec);
    if (key + KEYS - 1 > position || key < first)
      s[v] = choose((distance > 0) | (distance < (int32_t)(first - position)), splat(-INFINITY), s[v]);
    high = v ? vmax(s[v], high) : s[v];
  }
  float peak = maximum(high);
  peak = peak > *most ? peak : *most;
  if (peak == -INFINITY) { /* nothing seen yet */
    for (int v = 0; v < KV; v++) store(scores + v * LANES, (vec){0});
    return;
  }
  for (int v = 0; v < KV; v++) {
    vec weight = vexp(s[v] - splat(peak));
    store(scores + v * LANES, weight);
    added += weight;
  }
  if (*most < peak) { /* what was summed under a smaller maximum */
    const float factor = vexp(splat(*most - peak))[0];
    *total *= factor;
    for (int64_t w = 0; w < W; w += LANES) store(sums + w, load(sums + w) * splat(factor));
    *most = peak;
  }
  *total += sum(added);
}

/* A finished row's sums [W] over its total -> out [value_width]. Never inlined, as `soften`. */
static __attribute__((noinline)) void finish(const attention *a, const float *sums, float most, float total,
                                             int64_t head, float *out) {
  float scale = 1.0f;
  if (a->sinks) { /* a score without a value: it takes its share of the total */
    const float sink = a->sinks[head], peak = sink > most ? sink : most;
    scale = vexp(splat(most - peak))[0];
    total = total * scale + vexp(splat(sink - peak))[0];
  }
  scale /= total;
  for (int64_t w = 0; w < a->value_width; w++) out[w] = sums[w] * scale;
}

/* Where a pool keeps the panel of one head that starts at `key`, with `bytes` a token. */
INLINE const char *page(const attention *a, const void *pool, const int32_t *blocks, int64_t head, int64_t key,
                        int64_t bytes) {
  const int64_t block = blocks[key / a->block_tokens];
  return (const char *)pool + ((block * a->K + head) * a->block_tokens + key % a->block_tokens) * bytes;
}

INLINE void query_tile(const int rows, const attention *a, const task *t, int64_t first_row, float *sums,
                       float *turned) {
  const int64_t group = a->H / a->K, W = (a->value_width + PANEL - 1) / PANEL * PANEL, bytes = a->bf16 ? 2 : 4;
  const int32_t *blocks = a->block_table + t->sequence * a->B;
  /* position of the step's token i in its sequence: i + shift */
  const int64_t shift = a->context_lens[t->sequence] - a->query_start[t->sequence + 1];
  const float *query[TILE];
  float scores[TILE][KEYS] __attribute__((aligned(64))), most[TILE], total[TILE], slope[TILE];
  int64_t position[TILE], head[TILE], token[TILE];
  for (int r = 0; r < rows; r++) {
    token[r] = t->first + (first_row + r) / group;
    head[r] = t->head * group + (first_row + r) % group;
    position[r] = token[r] + shift;
    query[r] = a->query + token[r] * a->query_stride + head[r] * a->D;
    most[r] = -INFINITY;
    total[r] = 0;
    slope[r] = a->slopes ? a->slopes[head[r]] : 0;
  }
  memset(sums, 0, (size_t)(rows * W) * sizeof(float));
  int64_t key = a->window && position[0] - a->window + 1 > 0 ? (position[0] - a->window + 1) / KEYS * KEYS : 0;
  for (; key <= position[rows - 1]; key += KEYS) {
    const int64_t visible = position[rows - 1] - key + 1, count = visible < KEYS ? visible : KEYS;
    const char *keys = page(a, a->keys, blocks, t->head, key, a->D * bytes);
    const char *values = a->values ? page(a, a->values, blocks, t->head, key, W * bytes) : (const char *)turned;
    if (a->values)
      prefetch(values, count * W * bytes);
    else if (a->bf16)
      turn(keys, 1, count, a->value_width, W, turned);
    else
      turn(keys, 0, count, a->value_width, W, turned);
    if (a->bf16)
      score_tile(rows, query, keys, 1, a->D, scores);
    else
      score_tile(rows, query, keys, 0, a->D, scores);
    if (visible > KEYS) prefetch(page(a, a->keys, blocks, t->head, key + KEYS, a->D * bytes), KEYS * a->D * bytes);
    for (int r = 0; r < rows; r++)
      soften(a, scores[r], key, position[r], slope[r], &most[r], &total[r], sums + r * W, W);
    if (a->bf16 && a->values)
      value_tile(rows, scores, values, 1, count, W, sums);
    else
      value_tile(rows, scores, values, 0, count, W, sums);
  }
  for (int r = 0; r < rows; r++)
    finish(a, sums + r * W, most[r], total[r], head[r], a->out + (token[r] * a->H + head[r]) * a->value_width);
}

#define REST(n) \
  case n: query_tile(n, a, t, row, sums, turned); break;

static void run_task(const attention *a, const task *t) {
  float sums[TILE * WIDEST] __attribute__((aligned(64))), turned[KEYS * WIDEST] __attribute__((aligned(64)));
  int64_t row = 0, rows = t->count * (a->H / a->K);
  for (; rows - row >= TILE; row += TILE) query_tile(TILE, a, t, row, sums, turned);
  switch (rows - row) {
    REST(1) REST(2) REST(3) REST(4) REST(5)
#if TILE > 6
    REST(6) REST(7) REST(8) REST(9) REST(10) REST(11)
#endif
  }
}

/* Returns 0, or 1 when there is no memory for the list of tasks. */
int64_t gristmill_attention(const attention *a, int64_t threads) {
  int64_t total = 0, n = 0;
  for (int64_t s = 0; s < a->S; s++) total += (a->query_start[s + 1] - a->query_start[s] + SPAN - 1) / SPAN * a->K;
  task *tasks = malloc((size_t)(total ? total : 1) * sizeof(task));
  if (!tasks) return 1;
  for (int32_t s = 0; s < a->S; s++)
    for (int32_t first = a->query_start[s]; first < a->query_start[s + 1]; first += SPAN)
      for (int32_t head = 0; head < a->K; head++) {
        const int32_t left = a->query_start[s + 1] - first;
        tasks[n++] = (task){s, head, first, left < SPAN ? left : SPAN};
      }
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads)
  for (int64_t i = 0; i < total; i++) run_task(a, &tasks[i]);
  free(tasks);
  return 0;
}

/* Write key [T, K, D] and value [T, K, value_width] (tokens `*_stride` apart; 0 columns: none) to slots [T] of the pools. */
void gristmill_write(const float *key, int64_t key_stride, const float *value, int64_t value_stride,
                     const int64_t *slots, int64_t T, int64_t K, int64_t D, int64_t value_width, int64_t block_tokens,
                     int64_t bf16, void *keys, void *values, int64_t threads) {
  const int64_t W = (value_width + PANEL - 1) / PANEL * PANEL;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t t = 0; t < T; t++) {
    const int64_t block = slots[t] / block_tokens, offset = slots[t] % block_tokens;
    for (int64_t h = 0; h < K; h++) {
      const float *k = key + t * key_stride + h * D, *v = value + t * value_stride + h * value_width;
      const int64_t at = (block * K + h) * block_tokens + offset;
      const int64_t to_key = (at - at % KEYS) * D + at % KEYS, to_value = at * W;
      for (int64_t d = 0; d < D; d++)
        if (bf16)
          ((uint16_t *)keys)[to_key + d * KEYS] = to_bf16(k[d]);
        else
          ((float *)keys)[to_key + d * KEYS] = k[d];
      for (int64_t d = 0; d < value_width; d++)
        if (bf16)
          ((uint16_t *)values)[to_value + d] = to_bf16(v[d]);
        else
          ((float *)values)[to_value + d] = v[d];
    }
  }
}
