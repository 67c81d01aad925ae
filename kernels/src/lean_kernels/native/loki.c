// Loki decode on a CPU: the arithmetic of lean_kernels/ref/loki.py for float32 and bfloat16 caches, one KV head a task.
//
// Rows of a cache are fetched ahead of their use: the chosen ones lie apart, and no processor foresees them. This file
// is compiled when first asked for (see __init__.py).
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef float v8 __attribute__((vector_size(32), aligned(4)));
typedef float v4 __attribute__((vector_size(16), aligned(4)));
typedef int32_t i8 __attribute__((vector_size(32)));
typedef uint16_t h8 __attribute__((vector_size(16), aligned(2)));
typedef int32_t i4 __attribute__((vector_size(16)));
#ifdef __clang__
#define MIX(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define MIX(a, b, i, j, k, l) __builtin_shuffle(a, b, (i4){i, j, k, l})
#endif

enum { LANES = 8, CHUNK = 64, GROUP = 4, LINE = 64, HEADS = 64 };

typedef struct {  // a plane of the cache: row j of batch row b and head h begins at data + (b, h, j) . strides
    const char *data;
    int64_t b, h, s;  // bytes
} Plane;

typedef struct {
    int64_t batch, heads, kv_heads, queries, width, low, sink, recent;
    int32_t bfloat16, by_head, by_max, threads;
    float scale, softcap;  // softcap 0: none
} Shape;

static inline float sum8(v8 x) {
    return ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7]));
}

static inline v4 halves(v8 x) {
    v4 low, high;
    memcpy(&low, &x, 16);
    memcpy(&high, (char *)&x + 16, 16);
    return low + high;
}

// [sum a, sum b, sum c, sum d]
static inline v4 sums_of(v8 a8, v8 b8, v8 c8, v8 d8) {
    v4 a = halves(a8), b = halves(b8), c = halves(c8), d = halves(d8);
    v4 ab = MIX(a, b, 0, 4, 1, 5) + MIX(a, b, 2, 6, 3, 7), cd = MIX(c, d, 0, 4, 1, 5) + MIX(c, d, 2, 6, 3, 7);
    return MIX(ab, cd, 0, 1, 4, 5) + MIX(ab, cd, 2, 3, 6, 7);
}

// exp to a relative error of about 1e-7 for x <= 0; from -87 down it is 0, NaN stays NaN
static inline v8 exp8(v8 x) {
    i8 live = ~(i8)(x <= -87.0f);
    v8 y = (v8)(live & (i8)x);
    v8 magic = (v8){0} + 12582912.0f, n = (y * 1.44269504088896f + magic) - magic;
    v8 r = y - n * 0.693359375f + n * 2.12194440e-4f;
    v8 p = (v8){0} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    i8 power = (__builtin_convertvector(n, i8) + 127) << 23;
    return (v8)(live & (i8)(p * (v8)power));
}

// The greatest of n numbers, NaN left out. x has room for a multiple of 8: what is past n is made -inf
static float greatest(float *x, int64_t n) {
    v8 top = (v8){0} - INFINITY;
    for (int64_t i = n; i % LANES; i++) x[i] = -INFINITY;
    for (int64_t i = 0; i < n; i += LANES) {
        v8 next = *(v8 *)(x + i);
        i8 more = next > top;
        top = (v8)((more & (i8)next) | (~more & (i8)top));
    }
    float found = top[0];
    for (int i = 1; i < LANES; i++) found = top[i] > found ? top[i] : found;
    return found;
}

// x, of which `greatest` gave the top, becomes exp(x - top); their sum
static double exp_all(float *x, int64_t n, float top) {
    double total = 0;
    for (int64_t at = 0; at < n; at += 1024) {
        v8 part = {0};
        for (int64_t i = at; i < n && i < at + 1024; i += LANES) {
            v8 e = exp8(*(v8 *)(x + i) - top);
            *(v8 *)(x + i) = e;
            part += e;
        }
        total += sum8(part);
    }
    return total;
}

typedef struct {  // rows of a run of tokens; tokens NULL: first, first + 1, ..
    const char *data;
    int64_t stride, first, total, width;
    const int32_t *tokens;
    int bfloat16;
    float *wide;
} Rows;

// Whether rows lie apart, so that the processor does not foresee the next ones
static inline int apart(const Rows *of) {
    return of->tokens || of->stride > of->width * (of->bfloat16 ? 2 : 4);
}

// Into the second cache: on an EPYC a third quicker than into the first, which is full of the rows in use
static inline void ahead(const char *line) { __builtin_prefetch(line, 0, 1); }

static inline const char *row_at(const Rows *of, int64_t i) {
    i = i < of->total ? i : of->total - 1;
    return of->data + (of->tokens ? of->tokens[i] : of->first + i) * of->stride;
}

// CHUNK rows from `at` on as float, in place or widened (past the end the last one again), and those to fetch meanwhile
static void rows_of(const Rows *of, int64_t at, const float **rows, const char **next) {
    for (int64_t i = 0; i < CHUNK; i++) {
        const char *row = row_at(of, at + i);
        rows[i] = (const float *)row;
        next[i] = row_at(of, at + i + CHUNK);
        if (!of->bfloat16) continue;
        for (int64_t c = 0; c < of->width; c += LINE / 2) ahead(next[i] + 2 * c);
        const uint16_t *half = (const uint16_t *)row;
        float *wide = of->wide + i * of->width;
        int64_t c = 0;
        for (; c + LANES <= of->width; c += LANES)
            *(v8 *)(wide + c) = (v8)(__builtin_convertvector(*(const h8 *)(half + c), i8) << 16);
        for (; c < of->width; c++) {
            uint32_t bits = (uint32_t)half[c] << 16;
            memcpy(wide + c, &bits, 4);
        }
        rows[i] = of->wide + i * of->width;
    }
}

// logits[g * room + i] = q[g] . row i
static void products(const float *q, int64_t step, int64_t heads, const Rows *of, float *logits, int64_t room) {
    const float *rows[CHUNK];
    const char *next[CHUNK];
    int fetch = !of->bfloat16 && apart(of);  // rows in a run are foreseen
    for (int64_t at = 0; at < of->total; at += CHUNK) {
        rows_of(of, at, rows, next);
        for (int64_t i = 0; i < CHUNK && at + i < of->total; i++) {
            for (int64_t g = 0; g < heads; g += GROUP) {
                const float *h[GROUP];
                for (int64_t a = 0; a < GROUP; a++) h[a] = q + (g + a < heads ? g + a : g) * step;
                v8 x[GROUP] = {{0}}, y[GROUP] = {{0}};
                int64_t c = 0;
                for (; c + 2 * LANES <= of->width; c += 2 * LANES)
                    for (int a = 0; a < GROUP; a++) {
                        x[a] += *(const v8 *)(rows[i] + c) * *(const v8 *)(h[a] + c);
                        y[a] += *(const v8 *)(rows[i] + c + LANES) * *(const v8 *)(h[a] + c + LANES);
                    }
                v4 found = sums_of(x[0] + y[0], x[1] + y[1], x[2] + y[2], x[3] + y[3]);
                for (; c < of->width; c++)
                    for (int a = 0; a < GROUP; a++) found[a] += rows[i][c] * h[a][c];
                for (int a = 0; a < GROUP && g + a < heads; a++) logits[(g + a) * room + at + i] = found[a];
            }
            for (int64_t c = 0; fetch && c < of->width; c += LINE / 4) ahead(next[i] + 4 * c);
        }
    }
}

// out[g] = sum over rows of weights[g * room + i] * row i, four heads at a time; the width is a multiple of 8
static void sums(const float *weights, int64_t room, int64_t heads, const Rows *of, float *out) {
    const float *rows[CHUNK];
    const char *next[CHUNK];
    int fetch = !of->bfloat16;
    memset(out, 0, heads * of->width * sizeof(float));
    for (int64_t at = 0; at < of->total; at += CHUNK) {
        int64_t n = of->total - at < CHUNK ? of->total - at : CHUNK;
        rows_of(of, at, rows, next);
        for (int64_t g = 0; g < heads; g += GROUP) {
            const float *w[GROUP];
            int64_t own = heads - g < GROUP ? heads - g : GROUP;
            for (int64_t a = 0; a < GROUP; a++) w[a] = weights + (g + (a < own ? a : 0)) * room + at;
            for (int64_t c = 0; c < of->width; c += 2 * LANES) {
                int two = c + 2 * LANES <= of->width;
                v8 left[GROUP] = {{0}}, right[GROUP] = {{0}};
                for (int64_t i = 0; i < n; i++) {
                    v8 l = *(const v8 *)(rows[i] + c), r = two ? *(const v8 *)(rows[i] + c + LANES) : l;
                    if (fetch && !g) ahead(next[i] + 4 * c);
                    for (int64_t a = 0; a < GROUP; a++) {
                        left[a] += w[a][i] * l;
                        right[a] += w[a][i] * r;
                    }
                }
                for (int64_t a = 0; a < own; a++) {
                    *(v8 *)(out + (g + a) * of->width + c) += left[a];
                    if (two) *(v8 *)(out + (g + a) * of->width + c + LANES) += right[a];
                }
            }
        }
    }
}

// Bits that sort as the numbers do, NaN as -inf
static inline uint32_t sortable(float x) {
    uint32_t bits;
    if (x != x) x = -INFINITY;
    x += 0.0f;  // -0 is 0
    memcpy(&bits, &x, 4);
    return bits ^ ((uint32_t)((int32_t)bits >> 31) | 0x80000000u);
}

// The `wanted`-th greatest of keys, digit by digit, and how many of those equal to it belong to the wanted ones
static uint32_t threshold(const uint32_t *keys, int64_t n, int64_t wanted, int64_t *equal) {
    static const int shifts[] = {21, 10, 0};
    uint32_t found = 0, known = 0;
    for (int level = 0; level < 3; level++) {
        uint32_t digits = level == 2 ? 1023 : 2047, counts[2048] = {0};
        for (int64_t i = 0; i < n; i++)
            if ((keys[i] & known) == found) counts[(keys[i] >> shifts[level]) & digits]++;
        uint32_t digit = digits;
        while (counts[digit] < wanted) wanted -= counts[digit--];
        found |= digit << shifts[level];
        known |= digits << shifts[level];
    }
    *equal = wanted;
    return found;
}

// Ascending: the first `sink` and last `recent` of n, and the best others until there are `count`; ties to the lowest
static int64_t best(const float *scores, int64_t n, int64_t count, int64_t sink, int64_t recent, int64_t lo,
                    uint32_t *keys, int32_t *tokens) {
    if (sink > n) sink = n;
    if (recent > n) recent = n;
    if (count < sink + recent) count = sink + recent;
    int64_t found = 0;
    if (count >= n) {
        for (int64_t i = 0; i < n; i++) tokens[found++] = (int32_t)(lo + i);
        return found;
    }
    int64_t last = n - recent, wanted = count - sink - recent, equal = 0;
    uint32_t least = UINT32_MAX;
    for (int64_t i = sink; i < last; i++) keys[i] = sortable(scores[i]);
    if (wanted) least = threshold(keys + sink, last - sink, wanted, &equal);
    for (int64_t i = 0; i < sink; i++) tokens[found++] = (int32_t)(lo + i);
    for (int64_t i = sink; wanted && i < last; i++) {
        int take = keys[i] > least || (keys[i] == least && equal-- > 0);
        tokens[found] = (int32_t)(lo + i);
        found += take;
    }
    for (int64_t i = last; i < n; i++) tokens[found++] = (int32_t)(lo + i);
    return found;
}

// NaN becomes -inf, +inf the greatest number; where all heads have NaN is noted
static void clean(float *scores, int64_t room, int64_t heads, int64_t n, char *unknown) {
    memset(unknown, 1, n);
    for (int64_t g = 0; g < heads; g++)
        for (int64_t i = 0; i < n; i++) {
            float x = scores[g * room + i];
            unknown[i] &= x != x;
            scores[g * room + i] = x != x ? -INFINITY : x > FLT_MAX ? FLT_MAX : x;
        }
}

// One score a token from those of a group's heads, left in the first row: as `reduce_group`
static void reduce(float *scores, int64_t room, int64_t heads, int64_t n, int by_max, char *unknown) {
    int64_t odd = 0;
    for (int64_t g = 0; g < heads && !by_max; g++)
        for (int64_t i = 0; i < n; i++) odd += !(fabsf(scores[g * room + i]) <= FLT_MAX);
    if (odd) clean(scores, room, heads, n, unknown);
    for (int64_t g = 0; g < heads; g++) {
        float *row = scores + g * room;
        if (by_max) {  // NaN gives way to any number
            for (int64_t i = 0; g && i < n; i++)
                if (row[i] > scores[i] || scores[i] != scores[i]) scores[i] = row[i];
            continue;
        }
        float top = greatest(row, n), share = top == -INFINITY ? 0 : 1 / (float)exp_all(row, n, top);
        for (int64_t i = 0; i < n; i++) {
            float own = share != 0 ? row[i] * share : 0;
            scores[i] = g ? scores[i] + own : own;
        }
    }
    for (int64_t i = 0; odd && i < n; i++)
        if (unknown[i]) scores[i] = -INFINITY;
}

typedef struct {  // what one thread works in
    float *logits, *wide, *q, *out;
    uint32_t *keys;
    int32_t *tokens;
    char *unknown;
    int64_t room;
} Desk;

static int desk(Desk *at, const Shape *shape, int64_t longest) {
    int64_t group = shape->heads / shape->kv_heads;
    at->room = (longest + 2 * LANES) / LANES * LANES;
    at->logits = malloc(group * at->room * sizeof(float));
    at->wide = malloc(CHUNK * shape->width * sizeof(float));
    at->q = malloc(group * shape->width * sizeof(float));
    at->out = malloc(group * shape->width * sizeof(float));
    at->keys = malloc(at->room * sizeof(uint32_t));
    at->tokens = malloc(at->room * sizeof(int32_t));
    at->unknown = malloc(at->room);
    return at->logits && at->wide && at->q && at->out && at->keys && at->tokens && at->unknown;
}

static void clear(Desk *at) {
    free(at->logits), free(at->wide), free(at->q), free(at->out), free(at->keys), free(at->tokens), free(at->unknown);
}

// `heads` queries attend to n tokens (all from lo on if tokens is NULL): out [heads, width], lse [heads] by `step`
static void attend(const Shape *shape, Desk *at, const float *q, int64_t heads, const char *k, int64_t k_step,
                   const char *v, int64_t v_step, const int32_t *tokens, int64_t lo, int64_t n, float *out, float *lse,
                   int64_t step) {
    int64_t width = shape->width;
    Rows keys = {k, k_step, lo, n, width, tokens, shape->bfloat16, at->wide};
    Rows values = {v, v_step, lo, n, width, tokens, shape->bfloat16, at->wide};
    products(q, width, heads, &keys, at->logits, at->room);
    double totals[HEADS];
    for (int64_t g = 0; g < heads; g++) {
        float *row = at->logits + g * at->room;
        for (int64_t i = 0; shape->softcap > 0 && i < n; i++) row[i] = shape->softcap * tanhf(row[i] / shape->softcap);
        float top = greatest(row, n);
        totals[g] = exp_all(row, n, top);
        lse[g * step] = top + (float)log(totals[g]);
    }
    sums(at->logits, at->room, heads, &values, at->out);
    for (int64_t g = 0; g < heads; g++)
        for (int64_t c = 0; c < width; c++) out[g * step * width + c] = at->out[g * width + c] / (float)totals[g];
}

static void query(const Shape *shape, Desk *at, const float *q, Plane k, Plane v, int64_t lo, int64_t hi, int64_t topk,
                  int64_t b, int64_t h, int64_t i, float *out, float *lse) {
    int64_t group = shape->heads / shape->kv_heads, width = shape->width, n = hi - lo;
    if (n <= 0) return;
    const char *keys = k.data + b * k.b + h * k.h, *values = v.data + b * v.b + h * v.h;
    int64_t first = (b * shape->heads + h * group) * shape->queries + i;  // of [B, Hq, Q]
    for (int64_t g = 0; g < group; g++)
        for (int64_t c = 0; c < width; c++)
            at->q[g * width + c] = q[(first + g * shape->queries) * width + c] * shape->scale;
    out += first * width, lse += first;
    int64_t count = topk > shape->sink + shape->recent ? topk : shape->sink + shape->recent;
    if (count >= n) {
        attend(shape, at, at->q, group, keys, k.s, values, v.s, NULL, lo, n, out, lse, shape->queries);
        return;
    }
    Rows leading = {keys, k.s, lo, n, shape->low, NULL, shape->bfloat16, at->wide};
    products(at->q, width, group, &leading, at->logits, at->room);
    if (!shape->by_head) {
        reduce(at->logits, at->room, group, n, shape->by_max, at->unknown);
        n = best(at->logits, n, count, shape->sink, shape->recent, lo, at->keys, at->tokens);
        attend(shape, at, at->q, group, keys, k.s, values, v.s, at->tokens, lo, n, out, lse, shape->queries);
        return;
    }
    for (int64_t g = 0; g < group; g++) {  // the logits of later heads wait past those that `attend` writes
        int64_t found = best(at->logits + g * at->room, n, count, shape->sink, shape->recent, lo, at->keys, at->tokens);
        Desk own = *at;
        own.logits = at->logits + g * at->room;
        attend(shape, &own, at->q + g * width, 1, keys, k.s, values, v.s, at->tokens, lo, found,
               out + g * shape->queries * width, lse + g * shape->queries, shape->queries);
    }
}

// q, out [B, Hq, Q, D] and lse [B, Hq, Q], contiguous; starts, lens, topk [B]. 0, or 1 where memory ran out
int loki_decode(const Shape *shape, const float *q, const Plane *k, const Plane *v, const int64_t *starts,
                const int64_t *lens, const int64_t *topk, float *out, float *lse) {
    int64_t longest = 0, failed = 0, tasks = shape->batch * shape->kv_heads;
    for (int64_t b = 0; b < shape->batch; b++) longest = lens[b] > longest ? lens[b] : longest;
#pragma omp parallel num_threads(shape->threads) reduction(| : failed)
    {
        Desk at;
        failed = !desk(&at, shape, longest);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) {
            int64_t b = task / shape->kv_heads, h = task % shape->kv_heads;
            for (int64_t i = 0; !failed && i < shape->queries; i++)
                query(shape, &at, q, *k, *v, starts[b], lens[b] - shape->queries + 1 + i, topk[b], b, h, i, out, lse);
        }
        clear(&at);
    }
    return (int)failed;
}
