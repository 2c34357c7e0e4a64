/* Causal attention of new tokens over a paged pool of K and V; decode, chunked prefill and verification alike.
 *
 * Online softmax (Milakov and Gimelshein 2018; the tiling of FlashAttention, Dao et al. 2022) over chunks of 64 keys
 * that lie at absolute positions. For a row, which is one (token, head), the order of operations is fixed by its
 * position alone: a score is one chain of fused multiply-adds over head_dim; a chunk's maximum joins the running one;
 * the weights are summed in 16 lanes; the output is one chain over the keys, ascending, scaled where the maximum has
 * grown. Rows share a tile only so that K and V are read once; nothing in the tile flows between rows. */
#include "lanes.h"
#include "threads.h"
#include "tile.h"

#define CHUNK 64
#define WIDEST_ROWS 84 /* aimed at in a tile: six full register tiles of AVX-512, fourteen of AVX2 */
#define WIDE_DIM 128   /* above this head_dim half as many, so that the tile stays in the second-level cache */

struct tandem_attention {
    void *out;           /* [T, heads, head_dim] contiguous */
    const void *q;       /* [T, heads, head_dim] with strides */
    const void *pool;    /* [blocks, layers, 2, block_size, kv_heads, head_dim] with strides, at the layer */
    const int32_t *tables, *starts, *lengths;
    int64_t q_token, q_head;                                /* strides, in elements */
    int64_t block_stride, kv_stride, slot_stride, head_stride;
    int64_t num_rows, num_blocks, num_sequences, max_blocks, num_heads, num_kv_heads, head_dim, block_size, window;
    float scale, softcap;
    int32_t q_type, kv_type, num_threads;
};

struct job {
    const struct tandem_attention *a;
    long group, tokens; /* heads of a KV head; tokens of a tile */
    long padded_dim;    /* head_dim in whole vectors */
    const int64_t *first_tile, *first_row; /* of each sequence */
};

/* Consecutive tokens of one sequence and one KV head; a row is a token and one of the head's queries. */
struct tile {
    const struct tandem_attention *a;
    const int32_t *table;
    long kv_head, start, num_tokens, group, rows, padded_dim;
    float *q;      /* [head_dim][rows] */
    float *keys;   /* [head_dim][CHUNK] */
    float *values; /* [CHUNK][padded_dim], unless V is read in place */
    float *scores; /* [rows][CHUNK] */
    float *out;    /* [rows][padded_dim] */
    float *lanes;  /* [rows][LANES], the sums of weights */
    float *top;    /* [rows], the running maxima */
};

static long at_least(long x, long bound) { return x > bound ? x : bound; }
static long at_most(long x, long bound) { return x < bound ? x : bound; }

/* Where K of each of the chunk's keys begins, as far as they are this tile's; V lies kv_stride further on. */
struct places {
    const char *keys[CHUNK];
    long count;
};

static void find_places(const struct tile *t, long chunk, struct places *p) {
    const struct tandem_attention *a = t->a;
    const long bytes = type_bytes(a->kv_type), slot_bytes = a->slot_stride * bytes;
    long block = chunk / a->block_size, slot = chunk % a->block_size;
    p->count = at_most(t->start + t->num_tokens - chunk, CHUNK);
    for (long j = 0; j < p->count; block++, slot = 0) {
        const long element = t->table[block] * a->block_stride + slot * a->slot_stride + t->kv_head * a->head_stride;
        const char *key = (const char *)a->pool + element * bytes;
        for (; j < p->count && slot < a->block_size; slot++, key += slot_bytes) p->keys[j++] = key;
    }
}

/* to[j][i] = element at + j of from[i], for eight arrays and eight elements of each. */
#ifdef LANES_AVX
INLINE __m256 load8(int type, const void *from, long at) {
    if (type == FLOAT32) return _mm256_loadu_ps((const float *)from + at);
    const __m128i narrow = _mm_loadu_si128((const __m128i *)((const uint16_t *)from + at));
    if (type == FLOAT16) return _mm256_cvtph_ps(narrow);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
}
INLINE void turn8(int type, const void *const *from, long at, float *to, long to_row) {
    __m256 r[8], s[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) r[i] = load8(type, from[i], at);
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(s[i], s[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(s[i], s[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(to + i * to_row, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        _mm256_storeu_ps(to + (i + 4) * to_row, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
}
#else
INLINE void turn8(int type, const void *const *from, long at, float *to, long to_row) {
    for (int i = 0; i < 8; i++) {
        float row[LANES];
        store16(row, load_some(type, from[i], at, 8));
        for (int j = 0; j < 8; j++) to[j * to_row + i] = row[j];
    }
}
#endif

/* `bytes` from `offset` on of the places from .. to - 1, as far as there are so many, towards the second-level cache.
 * Inline, because GCC takes a function that only prefetches for one without effect and drops its calls. */
INLINE void fetch(const struct places *p, long from, long to, long offset, long bytes) {
    for (to = at_most(to, p->count); from < to; from++)
        for (long i = 0; i < bytes; i += 64) __builtin_prefetch(p->keys[from] + offset + i, 0, 2);
}

INLINE void turn_some(int type, const void *const *from, long dim, float *to) {
    long d = 0;
    for (; d + 8 <= dim; d += 8) turn8(type, from, d, to + d * CHUNK, CHUNK);
    for (; d < dim; d++)
        for (int i = 0; i < 8; i++) {
            float one[LANES];
            store16(one, load_some(type, from[i], d, 1));
            to[d * CHUNK + i] = one[0];
        }
}

/* keys[d][j] of the chunk's keys, in whole groups of TILE_COLUMNS; columns beyond repeat the last key and are never
 * used. Meanwhile fetches the keys of the chunk that comes next. */
static void turn_keys(const struct tile *t, const struct places *here, const struct places *next) {
    const long dim = t->a->head_dim, columns = (here->count + TILE_COLUMNS - 1) / TILE_COLUMNS * TILE_COLUMNS;
    const int type = t->a->kv_type;
    for (long j = 0; j < columns; j += 8) {
        const void *from[8];
        for (int i = 0; i < 8; i++) from[i] = here->keys[at_most(j + i, here->count - 1)];
        fetch(next, j, j + 8, 0, dim * type_bytes(type));
        if (type == FLOAT32) turn_some(FLOAT32, from, dim, t->keys + j);
        else if (type == BFLOAT16) turn_some(BFLOAT16, from, dim, t->keys + j);
        else turn_some(FLOAT16, from, dim, t->keys + j);
    }
}

static void score_chunk(const struct tile *t, long count) {
    const long tile_rows = even_rows(t->rows), stride = t->rows;
    for (long j = 0; j < count; j += TILE_COLUMNS)
        for (long r = 0; r < t->rows; r += tile_rows) {
            const long rows = at_most(t->rows - r, tile_rows);
#define CALL_SCORES(n)                                                                                                \
    tile_of(n, TILE_VECTORS, t->a->head_dim, t->q + r, 1, stride, FLOAT32, t->keys + j, CHUNK,                        \
            t->scores + r * CHUNK + j, CHUNK, 0, NULL, 0)
            WITH_ROWS(rows, CALL_SCORES)
        }
}

/* Scores to weights for one row that sees the chunk's keys from .. to - 1; scales what the row has so far. */
static void weigh_row(const struct tile *t, long row, long from, long to) {
    const struct tandem_attention *a = t->a;
    float *scores = t->scores + row * CHUNK, *out = t->out + row * t->padded_dim;
    const long first = from / LANES * LANES, last = (to + LANES - 1) / LANES * LANES;
    const f32x16 scale = set16(a->scale);
    f32x16 tops = set16(-INFINITY), sums = load16(t->lanes + row * LANES);
    for (long j = first; j < last; j += LANES) {
        f32x16 score = mul16(load16(scores + j), scale);
        if (a->softcap > 0) { /* cap * tanh(score / cap), by tanh(x) = 1 - 2 / (e^2x + 1) */
            f32x16 power = exp16(div16(add16(score, score), set16(a->softcap)));
            f32x16 tanh = sub16(set16(1), div16(set16(2), add16(power, set16(1))));
            score = mul16(set16(a->softcap), tanh);
        }
        store16(scores + j, score);
        if (j < from || j + LANES > to)
            for (long i = 0; i < LANES; i++)
                if (j + i < from || j + i >= to) scores[j + i] = -INFINITY;
        tops = max16(tops, load16(scores + j));
    }
    const float before = t->top[row], chunk_top = top16(tops), top = chunk_top > before ? chunk_top : before;
    if (top > before) { /* a factor of one would change nothing */
        const f32x16 factor = exp16(set16(before - top));
        sums = mul16(sums, factor);
        for (long d = 0; d < t->padded_dim; d += LANES) store16(out + d, mul16(load16(out + d), factor));
        t->top[row] = top;
    }
    for (long j = first; j < last; j += LANES) {
        f32x16 weight = exp16(sub16(load16(scores + j), set16(top)));
        store16(scores + j, weight);
        sums = add16(sums, weight);
    }
    store16(t->lanes + row * LANES, sums);
}

/* out[row] += sum over the chunk's keys from .. to - 1 of weight * V, for rows row .. row + count - 1. */
static void add_values(const struct tile *t, long row, long count, const void *values, long value_row, long from,
                       long to) {
    const long tile_rows = even_rows(count), dim = t->padded_dim;
    for (long r = row; r < row + count; r += tile_rows) {
        const long rows = at_most(row + count - r, tile_rows);
        long d = 0;
#define CALL_WIDE(n)                                                                                                  \
    tile_of(n, TILE_VECTORS, to - from, t->scores + r * CHUNK + from, CHUNK, 1, FLOAT32, (const float *)values + d,   \
            value_row, t->out + r * dim + d, dim, 1, NULL, 0)
#define CALL_NARROW(n)                                                                                                \
    tile_of(n, 1, to - from, t->scores + r * CHUNK + from, CHUNK, 1, FLOAT32, (const float *)values + d, value_row,   \
            t->out + r * dim + d, dim, 1, NULL, 0)
        for (; d + TILE_COLUMNS <= dim; d += TILE_COLUMNS) WITH_ROWS(rows, CALL_WIDE)
        if (d < dim) WITH_ROWS(rows, CALL_NARROW)
    }
}

/* Whether V is read where it lies: as floats in whole vectors, and by few rows. Many rows make up for a copy that is
 * dense in the first-level cache. */
static int in_place(const struct tile *t) {
    return t->a->kv_type == FLOAT32 && t->padded_dim == t->a->head_dim && t->rows <= 2 * TILE_ROWS;
}

/* The same from wherever the values lie: in place, block by block, or widened in scratch. Fetches V of the next chunk,
 * once, if widening has not. */
static void add_keys(const struct tile *t, long chunk, const struct places *here, const struct places *next, long row,
                     long count, long from, long to) {
    const struct tandem_attention *a = t->a;
    if (!in_place(t)) {
        add_values(t, row, count, t->values + from * t->padded_dim, t->padded_dim, from, to);
        return;
    }
    while (from < to) {
        const long end = at_most(to, from + a->block_size - (chunk + from) % a->block_size);
        const float *values = (const float *)here->keys[from] + a->kv_stride;
        if (row == 0) fetch(next, from, end, a->kv_stride * 4, a->head_dim * 4);
        add_values(t, row, count, values, a->slot_stride, from, end);
        from = end;
    }
}

INLINE void widen_some(int type, const struct tile *t, const struct places *here, const struct places *next) {
    const struct tandem_attention *a = t->a;
    const long offset = a->kv_stride * type_bytes(type);
    for (long j = 0; j < here->count; j++) {
        const void *from = here->keys[j] + offset;
        fetch(next, j, j + 1, offset, a->head_dim * type_bytes(type));
        for (long d = 0; d < t->padded_dim; d += LANES) {
            const long lanes = a->head_dim - d;
            store16(t->values + j * t->padded_dim + d,
                    lanes >= LANES ? load_any(type, from, d) : load_some(type, from, d, (int)lanes));
        }
    }
}

/* V of the chunk as floats where the pool's cannot be read in place. Fetches V of the chunk that comes next. */
static void widen_values(const struct tile *t, const struct places *here, const struct places *next) {
    if (in_place(t)) return;
    if (t->a->kv_type == FLOAT32) widen_some(FLOAT32, t, here, next);
    else if (t->a->kv_type == BFLOAT16) widen_some(BFLOAT16, t, here, next);
    else widen_some(FLOAT16, t, here, next);
}

static void attend_chunk(const struct tile *t, long chunk, const struct places *here, const struct places *next) {
    const long count = here->count, window = t->a->window;
    turn_keys(t, here, next);
    score_chunk(t, count);
    widen_values(t, here, next);
    long whole = 0; /* rows in a run, up to this token, that see the same keys */
    long run_from = 0, run_to = 0;
    for (long token = 0; token <= t->num_tokens; token++) {
        long from = 0, to = 0;
        if (token < t->num_tokens) {
            const long position = t->start + token;
            from = window ? at_least(position - window + 1 - chunk, 0) : 0;
            to = at_most(position + 1 - chunk, count);
            if (from < to)
                for (long g = 0; g < t->group; g++) weigh_row(t, token * t->group + g, from, to);
        }
        if (token && (token == t->num_tokens || from != run_from || to != run_to)) {
            if (run_from < run_to) add_keys(t, chunk, here, next, whole, token * t->group - whole, run_from, run_to);
            whole = token * t->group;
        }
        run_from = from;
        run_to = to;
    }
}

static void load_queries(const struct tile *t, long first_row) {
    const struct tandem_attention *a = t->a;
    for (long row = 0; row < t->rows; row++) {
        const long head = t->kv_head * t->group + row % t->group;
        const long at = (first_row + row / t->group) * a->q_token + head * a->q_head;
        for (long d = 0; d < a->head_dim; d += LANES) {
            const long lanes = at_most(a->head_dim - d, LANES);
            float part[LANES];
            store16(part, lanes == LANES ? load_any(a->q_type, a->q, at + d)
                                         : load_some(a->q_type, a->q, at + d, (int)lanes));
            for (long i = 0; i < lanes; i++) t->q[(d + i) * t->rows + row] = part[i];
        }
    }
    memset(t->out, 0, t->rows * t->padded_dim * sizeof(float));
    memset(t->lanes, 0, t->rows * LANES * sizeof(float));
    for (long row = 0; row < t->rows; row++) t->top[row] = -INFINITY;
}

static void store_rows(const struct tile *t, long first_row) {
    const struct tandem_attention *a = t->a;
    for (long row = 0; row < t->rows; row++) {
        const long head = t->kv_head * t->group + row % t->group;
        const long at = ((first_row + row / t->group) * a->num_heads + head) * a->head_dim;
        const f32x16 inverse = set16(1.0f / sum16(load16(t->lanes + row * LANES)));
        for (long d = 0; d < a->head_dim; d += LANES) {
            const long lanes = at_most(a->head_dim - d, LANES);
            const f32x16 out = mul16(load16(t->out + row * t->padded_dim + d), inverse);
            if (lanes == LANES) store_any(a->q_type, a->out, at + d, out);
            else store_some(a->q_type, a->out, at + d, out, (int)lanes);
        }
    }
}

static void do_tile(void *argument, long item) {
    const struct job *job = argument;
    const struct tandem_attention *a = job->a;
    long sequence = 0, tile = item / a->num_kv_heads;
    while (tile >= job->first_tile[sequence + 1]) sequence++;
    const long token = (tile - job->first_tile[sequence]) * job->tokens;
    struct tile t = {
        .a = a, .table = a->tables + sequence * a->max_blocks, .kv_head = item % a->num_kv_heads,
        .start = a->starts[sequence] + token, .num_tokens = at_most(a->lengths[sequence] - token, job->tokens),
        .group = job->group, .padded_dim = job->padded_dim,
    };
    t.rows = t.num_tokens * t.group;
    const long dim = t.padded_dim, rows = t.rows, all = 2 * (CHUNK + rows) * dim + rows * (CHUNK + LANES + 1);
    /* Widest first, so that each part but the last two begins on a cache line. */
    t.keys = tandem_scratch(SCRATCH_ATTENTION, all * sizeof(float));
    t.values = t.keys + CHUNK * dim;
    t.scores = t.values + CHUNK * dim;
    t.lanes = t.scores + rows * CHUNK;
    t.out = t.lanes + rows * LANES;
    t.q = t.out + rows * dim;
    t.top = t.q + rows * dim;
    load_queries(&t, job->first_row[sequence] + token);
    const long oldest = a->window ? at_least(t.start - a->window + 1, 0) : 0;
    struct places places[2];
    int turn = 0;
    find_places(&t, oldest / CHUNK * CHUNK, &places[turn]);
    for (long chunk = oldest / CHUNK * CHUNK; places[turn].count > 0; chunk += CHUNK, turn = !turn) {
        find_places(&t, chunk + CHUNK, &places[!turn]);
        attend_chunk(&t, chunk, &places[turn], &places[!turn]);
    }
    store_rows(&t, job->first_row[sequence] + token);
}

enum { DONE = 0, BAD_LENGTH = 1, BAD_TABLE = 2, BAD_BLOCK = 3 };

/* Whether every position that will be read lies in a block of the pool; else which sequence's does not. */
static int check(const struct tandem_attention *a, int64_t *which) {
    long rows = 0;
    for (long i = 0; i < a->num_sequences; i++) {
        *which = i;
        const long end = (long)a->starts[i] + a->lengths[i];
        if (a->lengths[i] < 0 || a->starts[i] < 0) return BAD_LENGTH;
        rows += a->lengths[i];
        if (end > a->max_blocks * a->block_size) return BAD_TABLE;
        for (long block = 0; block * a->block_size < end; block++) {
            const int32_t id = a->tables[i * a->max_blocks + block];
            if (id < 0 || id >= a->num_blocks) return BAD_BLOCK;
        }
    }
    *which = a->num_sequences;
    return rows == a->num_rows ? DONE : BAD_LENGTH;
}

/* `marks` is room for 2 (num_sequences + 1) numbers. Returns DONE, or what is wrong, with the sequence in marks[0]. */
int tandem_paged_attention(const struct tandem_attention *a, int64_t *marks) {
    const int wrong = check(a, marks);
    if (wrong) return wrong;
    const long group = a->num_heads / a->num_kv_heads;
    const long aim = a->head_dim > WIDE_DIM ? WIDEST_ROWS / 2 : WIDEST_ROWS;
    struct job job = {
        .a = a, .group = group, .tokens = at_least(aim / group, 1),
        .padded_dim = (a->head_dim + LANES - 1) / LANES * LANES,
        .first_tile = marks, .first_row = marks + a->num_sequences + 1,
    };
    marks[0] = marks[a->num_sequences + 1] = 0;
    for (long i = 0; i < a->num_sequences; i++) {
        marks[i + 1] = marks[i] + (a->lengths[i] + job.tokens - 1) / job.tokens;
        marks[a->num_sequences + 2 + i] = marks[a->num_sequences + 1 + i] + a->lengths[i];
    }
    tandem_parallel(do_tile, &job, marks[a->num_sequences] * a->num_kv_heads, a->num_threads);
    return DONE;
}
