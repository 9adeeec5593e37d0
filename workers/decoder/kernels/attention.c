/* Attention over a paged KV cache: online softmax (Dao et al. 2022, Milakov and Gimelshein 2018) over panels of KEYS keys,
   queries of a key-value head's whole group together, so that a key is loaded once for all of them.

   Layout of the pools, of float32 or bfloat16:
     keys   [blocks, K, block_tokens / KEYS, D, KEYS]   a panel holds KEYS keys, transposed: scores are a small product
     values [blocks, K, block_tokens, W]                W: the value width rounded up to PANEL, the rest zeros
   Where a key's first columns are its value (latent attention) there is one pool, of rows that serve as both:
     keys   [blocks, K, block_tokens, R]                R: the key width rounded up to PANEL, the rest whatever it is

   A query visits its panels in the order of their positions, and a panel in which it sees no key leaves its sums as they
   were to the bit; so its result depends neither on the queries that share its tile nor on how the prompt was cut.

   What a head sees (patterns.py) is a run of keys that ends at the query, visited where it lies, and before it single
   keys of a column or of summaries, which are gathered into panels first, KEYS at a time from the sequence's first such
   key on. No other key is visited. */
#include "vector.h"

#include <stdlib.h>

#define KEYS 16
#define KV (KEYS / LANES) /* registers in a row of scores */
#if LANES == 16
#define TILE 12
#else
#define TILE 6
#endif
#if LANES == 16
#define SIDE 4 /* queries and keys of a block of scores, where keys lie in rows */
#else
#define SIDE 2
#endif
#define SPAN 32 /* query tokens in a task */
#define WIDEST 1024

int64_t gristmill_keys(void) { return KEYS; }
int64_t gristmill_widest_value(void) { return WIDEST; }

enum { ALL, WINDOW, BLOCK, NOTHING }; /* near */
enum { NO_MORE, COLUMN, SUMMARY };    /* far */

/* What heads[first .. first + count] see, which share a key-value head: patterns.py's Reach. */
typedef struct {
  int32_t kv_head, first, count, near, width, far, period, low, high;
} reach;

typedef struct {
  const float *query;                        /* [T, H, D], tokens query_stride apart */
  const void *keys, *values;                 /* pools, see above; values NULL: they are in the keys */
  const int32_t *query_start, *context_lens; /* [S + 1], [S] */
  const int32_t *block_table;                /* [S, B] */
  const float *slopes, *sinks;               /* [H] or NULL */
  const int32_t *heads;                      /* [H] query heads, those of a reach side by side */
  const reach *reaches;                      /* [R] */
  float *out;                                /* [T, H, value_width] */
  int64_t query_stride, S, B, H, K, R, D, value_width, block_tokens, bf16;
  float scale, softcap;
} attention;

typedef struct {
  int32_t sequence, reach, first, count; /* query tokens first .. first + count of the step, the heads of one reach */
} task;

/* Keys from anywhere, side by side. */
typedef struct {
  float keys[WIDEST * KEYS], values[KEYS * WIDEST]; /* [D, KEYS], [KEYS, W] */
  int32_t at[KEYS];                                 /* their positions */
} panel;

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

/* sums [rows, W] += weights [rows, from .. to] times values [from .. to, W], `stride` numbers apart. */
INLINE void value_tile(const int rows, float weights[][KEYS], const void *values, const int bf16, int64_t from,
                       int64_t to, int64_t W, int64_t stride, float *sums) {
  for (int64_t w = 0; w < W; w += PANEL) {
    vec acc[TILE][2];
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
      acc[r][0] = load(sums + r * W + w);
      acc[r][1] = load(sums + r * W + w + LANES);
    }
    for (int64_t j = from; j < to; j++) {
      vec v0 = load_as(values, j * stride + w, bf16), v1 = load_as(values, j * stride + w + LANES, bf16);
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

/* scores [n, SIDE] of n query rows [n, D] with SIDE keys of [KEYS, stride], the first of them `first`. */
INLINE void score_block(const int n, const float *const *query, const void *keys, const int bf16, int64_t first,
                        int64_t D, int64_t stride, float scores[][KEYS]) {
  vec acc[SIDE][SIDE];
  for (int r = 0; r < n; r++)
    for (int j = 0; j < SIDE; j++) acc[r][j] = (vec){0};
  for (int64_t d = 0; d < D; d += LANES) {
    const int whole = D - d >= LANES;
    const size_t left = (size_t)(D - d) * sizeof(float);
    vec k[SIDE];
    for (int j = 0; j < SIDE; j++) k[j] = load_as(keys, (first + j) * stride + d, bf16);
    if (!whole) { /* behind a key lies what nobody wrote, and behind a query the next one */
      const ivec lane = {LANE_NUMBERS};
      for (int j = 0; j < SIDE; j++) k[j] = choose(lane < (int32_t)(D - d), k[j], splat(0.0f));
    }
    for (int r = 0; r < n; r++) {
      vec q = {0};
      if (whole)
        q = load(query[r] + d);
      else
        memcpy(&q, query[r] + d, left);
      for (int j = 0; j < SIDE; j++) acc[r][j] += q * k[j];
    }
  }
  for (int r = 0; r < n; r++)
    for (int j = 0; j < SIDE; j++) scores[r][first + j] = sum(acc[r][j]);
}

/* As `score_tile`, of keys in rows [KEYS, stride]. */
INLINE void score_rows(const int rows, const float *const *query, const void *keys, const int bf16, int64_t D,
                       int64_t stride, float scores[][KEYS]) {
  for (int64_t j = 0; j < KEYS; j += SIDE) {
    for (int r = 0; r + SIDE <= rows; r += SIDE)
      score_block(SIDE, query + r, keys, bf16, j, D, stride, scores + r);
    for (int r = rows / SIDE * SIDE; r < rows; r++)
      score_block(1, query + r, keys, bf16, j, D, stride, scores + r);
  }
}

/* One row's scores of one panel, whose keys lie at `at` and of which it sees from .. to -> its weights; its running
   maximum, total and sums [W] move on.
   Never inlined: in each tile size the compiler would choose anew which products and sums to fuse, and so the bits. */
static __attribute__((noinline)) void soften(const attention *a, float *scores, const int32_t *at, int64_t position,
                                             int64_t from, int64_t to, float slope, float *most, float *total,
                                             float *sums, int64_t W) {
  const ivec lane = {LANE_NUMBERS};
  vec s[KV], high, added = {0};
  for (int v = 0; v < KV; v++) {
    s[v] = load(scores + v * LANES) * splat(a->scale);
    if (a->softcap > 0) { /* tanh(x) = 1 - 2 / (e^2x + 1) */
      vec twice = s[v] * splat(2.0f / a->softcap);
      s[v] = splat(a->softcap) * (splat(1.0f) - splat(2.0f) / (vexp(twice) + splat(1.0f)));
    }
    if (slope != 0.0f) {
      ivec distance;
      memcpy(&distance, at + v * LANES, sizeof distance);
      s[v] += splat(slope) * __builtin_convertvector(distance - (int32_t)position, vec);
    }
    if (from > 0 || to < KEYS) {
      ivec number = lane + v * LANES;
      s[v] = choose((number < (int32_t)from) | (number >= (int32_t)to), splat(-INFINITY), s[v]);
    }
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

/* Numbers from one key to the next where they lie in rows. */
INLINE int64_t in_rows(int64_t D) { return (D + PANEL - 1) / PANEL * PANEL; }

/* Where a pool keeps the panel of one head that starts at `key`, with `bytes` a token. */
INLINE const char *page(const attention *a, const void *pool, const int32_t *blocks, int64_t head, int64_t key,
                        int64_t bytes) {
  const int64_t block = blocks[key / a->block_tokens];
  return (const char *)pool + ((block * a->K + head) * a->block_tokens + key % a->block_tokens) * bytes;
}

/* Copy the key at position `at` of a head's pages, and its value, to place `lane` of a panel; bfloat16 is widened. */
static void gather(const attention *a, const int32_t *blocks, int64_t head, int64_t at, int64_t lane, panel *p) {
  const int64_t W = (a->value_width + PANEL - 1) / PANEL * PANEL, bytes = a->bf16 ? 2 : 4;
  const int64_t first = at / KEYS * KEYS, offset = at % KEYS;
  const char *row = page(a, a->keys, blocks, head, at, in_rows(a->D) * bytes);
  const char *keys = a->values ? page(a, a->keys, blocks, head, first, a->D * bytes) + offset * bytes : row;
  const char *values = a->values ? page(a, a->values, blocks, head, at, W * bytes) : row;
  const int64_t step = a->values ? KEYS : 1;
  for (int64_t d = 0; d < a->D; d++)
    p->keys[d * KEYS + lane] =
        a->bf16 ? from_bf16(((const uint16_t *)keys)[d * step]) : ((const float *)keys)[d * step];
  for (int64_t w = 0; w < W; w += LANES) store(p->values + lane * W + w, load_as(values, w, (int)a->bf16));
  p->at[lane] = (int32_t)at;
}

/* The first position of the run of keys that a query sees; the run ends at the query. */
INLINE int64_t near_start(const reach *h, int64_t position) {
  switch (h->near) {
    case WINDOW: return position >= h->width ? position - h->width + 1 : 0;
    case BLOCK: return position - position % h->width;
    case NOTHING: return position < h->low ? position : position + 1; /* before all summaries: itself */
    default: return 0;
  }
}

/* How many summary positions lie below `end`. */
INLINE int64_t summaries_below(const reach *h, int64_t end) {
  const int64_t offset = end % h->period - h->low, each = h->high - h->low;
  return end / h->period * each + (offset < 0 ? 0 : offset < each ? offset : each);
}

/* A tile of queries under way. */
typedef struct {
  const float *query[TILE];
  float scores[TILE][KEYS] __attribute__((aligned(64)));
  float most[TILE], total[TILE], slope[TILE], *sums;
  int64_t position[TILE], near[TILE]; /* of the query, and of the first key in its run */
} tile;

/* Rows first .. end of a tile, of one token, over their column below their run. */
static __attribute__((noinline)) void visit_column(const attention *a, const reach *h, const int32_t *blocks,
                                                   tile *t, int first, int end, int64_t W, panel *p) {
  const int64_t below = t->near[first], step = h->period;
  for (int64_t key = t->position[first] % step; key < below; key += KEYS * step) {
    const int64_t left = (below - key + step - 1) / step, count = left < KEYS ? left : KEYS;
    for (int64_t j = 0; j < count; j++) gather(a, blocks, h->kv_head, key + j * step, j, p);
    for (int r = first; r < end; r++) {
      score_tile(1, t->query + r, p->keys, 0, a->D, t->scores + r);
      soften(a, t->scores[r], p->at, t->position[r], 0, count, t->slope[r], &t->most[r], &t->total[r],
             t->sums + r * W, W);
      value_tile(1, t->scores + r, p->values, 0, 0, count, W, W, t->sums + r * W);
    }
  }
}

INLINE void query_tile(const int rows, const attention *a, const task *k, int64_t first_row, float *sums, panel *p) {
  const int64_t W = (a->value_width + PANEL - 1) / PANEL * PANEL, bytes = a->bf16 ? 2 : 4;
  const reach *h = &a->reaches[k->reach];
  const int32_t *blocks = a->block_table + k->sequence * a->B;
  /* position of the step's token i in its sequence: i + shift */
  const int64_t shift = a->context_lens[k->sequence] - a->query_start[k->sequence + 1];
  int64_t head[TILE], token[TILE];
  tile t;
  t.sums = sums;
  for (int r = 0; r < rows; r++) {
    token[r] = k->first + (first_row + r) / h->count;
    head[r] = a->heads[h->first + (first_row + r) % h->count];
    t.position[r] = token[r] + shift;
    t.near[r] = near_start(h, t.position[r]);
    t.query[r] = a->query + token[r] * a->query_stride + head[r] * a->D;
    t.most[r] = -INFINITY;
    t.total[r] = 0;
    t.slope[r] = a->slopes ? a->slopes[head[r]] : 0;
  }
  memset(sums, 0, (size_t)(rows * W) * sizeof(float));

  if (h->far == COLUMN)
    for (int r = 0, end = 0; r < rows; r = end) {
      while (end < rows && token[end] == token[r]) end++;
      visit_column(a, h, blocks, &t, r, end, W, p);
    }
  if (h->far == SUMMARY) {
    const int64_t most = summaries_below(h, t.near[rows - 1]), each = h->high - h->low;
    for (int64_t s = 0; s < most; s += KEYS) {
      const int64_t count = most - s < KEYS ? most - s : KEYS;
      for (int64_t j = 0; j < count; j++)
        gather(a, blocks, h->kv_head, (s + j) / each * h->period + h->low + (s + j) % each, j, p);
      score_tile(rows, t.query, p->keys, 0, a->D, t.scores);
      for (int r = 0; r < rows; r++)
        soften(a, t.scores[r], p->at, t.position[r], 0, summaries_below(h, t.near[r]) - s, t.slope[r], &t.most[r],
               &t.total[r], sums + r * W, W);
      value_tile(rows, t.scores, p->values, 0, 0, count, W, W, sums);
    }
  }

  const int64_t key_stride = a->values ? a->D : in_rows(a->D), value_stride = a->values ? W : key_stride;
  int64_t last = t.position[rows - 1];
  if (h->near == NOTHING && last >= h->low) last = h->low - 1;
  for (int64_t key = t.near[0] / KEYS * KEYS; key <= last; key += KEYS) {
    const int64_t visible = last - key + 1, to = visible < KEYS ? visible : KEYS;
    const int64_t from = t.near[0] > key ? t.near[0] - key : 0;
    const char *keys = page(a, a->keys, blocks, h->kv_head, key, key_stride * bytes);
    const char *values = a->values ? page(a, a->values, blocks, h->kv_head, key, W * bytes) : keys;
    prefetch(values, to * value_stride * bytes);
    if (a->values && a->bf16)
      score_tile(rows, t.query, keys, 1, a->D, t.scores);
    else if (a->values)
      score_tile(rows, t.query, keys, 0, a->D, t.scores);
    else if (a->bf16)
      score_rows(rows, t.query, keys, 1, a->D, key_stride, t.scores);
    else
      score_rows(rows, t.query, keys, 0, a->D, key_stride, t.scores);
    if (visible > KEYS)
      prefetch(page(a, a->keys, blocks, h->kv_head, key + KEYS, key_stride * bytes), KEYS * key_stride * bytes);
    int32_t at[KEYS];
    for (int j = 0; j < KEYS; j++) at[j] = (int32_t)key + j;
    for (int r = 0; r < rows; r++)
      soften(a, t.scores[r], at, t.position[r], t.near[r] - key, t.position[r] - key + 1, t.slope[r], &t.most[r],
             &t.total[r], sums + r * W, W);
    if (a->bf16)
      value_tile(rows, t.scores, values, 1, from, to, W, value_stride, sums);
    else
      value_tile(rows, t.scores, values, 0, from, to, W, value_stride, sums);
  }
  for (int r = 0; r < rows; r++)
    finish(a, sums + r * W, t.most[r], t.total[r], head[r], a->out + (token[r] * a->H + head[r]) * a->value_width);
}

#define REST(n) \
  case n: query_tile(n, a, t, row, sums, p); break;

static void run_task(const attention *a, const task *t, panel *p) {
  float sums[TILE * WIDEST] __attribute__((aligned(64)));
  int64_t row = 0, rows = t->count * a->reaches[t->reach].count;
  for (; rows - row >= TILE; row += TILE) query_tile(TILE, a, t, row, sums, p);
  switch (rows - row) {
    REST(1) REST(2) REST(3) REST(4) REST(5)
#if TILE > 6
    REST(6) REST(7) REST(8) REST(9) REST(10) REST(11)
#endif
  }
}

/* With room to gather keys in, which other tasks needn't lay out on their stack. */
static __attribute__((noinline)) void run_gathering_task(const attention *a, const task *t) {
  panel gathered;
  run_task(a, t, &gathered);
}

/* Returns 0, or 1 when there is no memory for the list of tasks. */
int64_t gristmill_attention(const attention *a, int64_t threads) {
  int64_t total = 0, n = 0;
  for (int64_t s = 0; s < a->S; s++) total += (a->query_start[s + 1] - a->query_start[s] + SPAN - 1) / SPAN * a->R;
  task *tasks = malloc((size_t)(total ? total : 1) * sizeof(task));
  if (!tasks) return 1;
  for (int32_t s = 0; s < a->S; s++)
    for (int32_t first = a->query_start[s]; first < a->query_start[s + 1]; first += SPAN)
      for (int32_t r = 0; r < a->R; r++) {
        const int32_t left = a->query_start[s + 1] - first;
        tasks[n++] = (task){s, r, first, left < SPAN ? left : SPAN};
      }
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads)
  for (int64_t i = 0; i < total; i++) {
    if (a->reaches[tasks[i].reach].far == NO_MORE)
      run_task(a, &tasks[i], NULL);
    else
      run_gathering_task(a, &tasks[i]);
  }
  free(tasks);
  return 0;
}

/* Write key [T, K, D] and value [T, K, value_width] (tokens `*_stride` apart) to slots [T] of the pools; value NULL: the
   keys hold it. */
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
      const int64_t to_key = value ? (at - at % KEYS) * D + at % KEYS : at * in_rows(D), to_value = at * W;
      const int64_t step = value ? KEYS : 1;
      for (int64_t d = 0; d < D; d++)
        if (bf16)
          ((uint16_t *)keys)[to_key + d * step] = to_bf16(k[d]);
        else
          ((float *)keys)[to_key + d * step] = k[d];
      for (int64_t d = 0; d < value_width; d++)
        if (bf16)
          ((uint16_t *)values)[to_value + d] = to_bf16(v[d]);
        else
          ((float *)values)[to_value + d] = v[d];
    }
  }
}
