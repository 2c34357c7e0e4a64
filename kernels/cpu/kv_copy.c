/* Writes new K and V into the pool by slot, and copies memory while hashing it.
 *
 * The hash is XXH3-64 with seed 0 and the default secret, for inputs longer than 240 bytes, after the specification
 * in the xxHash repository (doc/xxhash_spec.md): stripes of 64 bytes into eight 64-bit accumulators, scrambled after
 * every sixteen, merged at the end. */
#include "lanes.h"

#define STRIPE 64
#define STRIPES 16 /* of a block: (192 - 64) / 8 */

static const uint8_t secret[192] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4, 0x6d,
    0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0,
    0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0,
    0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b,
    0x1b, 0x53, 0x2e, 0xa3, 0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac,
    0xd8, 0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51,
    0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34,
    0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb, 0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49,
    0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e, 0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8,
    0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b,
    0x40, 0x7e,
};

#define PRIME32_1 0x9E3779B1u
#define PRIME32_2 0x85EBCA77u
#define PRIME32_3 0xC2B2AE3Du
#define PRIME64_1 0x9E3779B185EBCA87u
#define PRIME64_2 0xC2B2AE3D27D4EB4Fu
#define PRIME64_3 0x165667B19E3779F9u
#define PRIME64_4 0x85EBCA77C2B2AE63u
#define PRIME64_5 0x27D4EB2F165667C5u

static uint64_t read64(const void *from) {
    uint64_t value;
    memcpy(&value, from, 8);
    return value; /* little-endian machines only: build.py refuses others */
}

static uint64_t fold(uint64_t a, uint64_t b) {
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

/* The eight accumulators. Two registers with AVX-512 as well: one of 64 bytes was measured no faster, and half as fast
 * where the source is not aligned. */
#if defined(LANES_AVX)
#define PARTS 2
typedef __m256i part;
INLINE part load_part(const void *p) { return _mm256_loadu_si256(p); }
INLINE void store_part(void *p, part a) { _mm256_storeu_si256(p, a); }
INLINE void stream_part(void *p, part a) { _mm256_stream_si256(p, a); }
INLINE part absorb(part sum, part data, part key) {
    const part mixed = _mm256_xor_si256(data, key);
    const part product = _mm256_mul_epu32(mixed, _mm256_srli_epi64(mixed, 32));
    return _mm256_add_epi64(product, _mm256_add_epi64(sum, _mm256_shuffle_epi32(data, 0x4e)));
}
INLINE part scramble(part sum, part key) {
    const part prime = _mm256_set1_epi64x(PRIME32_1);
    sum = _mm256_xor_si256(_mm256_xor_si256(sum, _mm256_srli_epi64(sum, 47)), key);
    const part high = _mm256_mul_epu32(_mm256_srli_epi64(sum, 32), prime);
    return _mm256_add_epi64(_mm256_mul_epu32(sum, prime), _mm256_slli_epi64(high, 32));
}
#else
#define PARTS 4
typedef uint64_t part __attribute__((vector_size(16)));
INLINE part load_part(const void *p) {
    part a;
    memcpy(&a, p, sizeof a);
    return a;
}
INLINE void store_part(void *p, part a) { memcpy(p, &a, sizeof a); }
INLINE void stream_part(void *p, part a) { store_part(p, a); }
INLINE part absorb(part sum, part data, part key) {
    const part mixed = data ^ key, swapped = {data[1], data[0]};
    return sum + swapped + (mixed & 0xffffffffu) * (mixed >> 32);
}
INLINE part scramble(part sum, part key) { return ((sum ^ (sum >> 47)) ^ key) * PRIME32_1; }
#endif
#define PART_BYTES ((long)sizeof(part))

struct state {
    part sums[PARTS];
    long stripe; /* of the block */
};

static void begin(struct state *s) {
    static const uint64_t start[8] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3,
                                      PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
    for (int i = 0; i < PARTS; i++) s->sums[i] = load_part((const char *)start + i * PART_BYTES);
    s->stripe = 0;
}

enum { ONLY_HASH, COPY, STREAM };

/* Takes in whole stripes, and copies them to `to` on the way. */
INLINE void take(struct state *s, char *to, const char *from, long stripes, int copy) {
    part sums[PARTS];
    long stripe = s->stripe;
    memcpy(sums, s->sums, sizeof sums);
    for (; stripes > 0; stripes--, from += STRIPE) {
        __builtin_prefetch(from + 1024);
#pragma GCC unroll 4
        for (int i = 0; i < PARTS; i++) {
            const part data = load_part(from + i * PART_BYTES);
            if (copy == COPY) store_part(to + i * PART_BYTES, data);
            if (copy == STREAM) stream_part(to + i * PART_BYTES, data);
            sums[i] = absorb(sums[i], data, load_part(secret + stripe * 8 + i * PART_BYTES));
        }
        if (copy != ONLY_HASH) to += STRIPE;
        if (++stripe == STRIPES) {
#pragma GCC unroll 4
            for (int i = 0; i < PARTS; i++) sums[i] = scramble(sums[i], load_part(secret + 128 + i * PART_BYTES));
            stripe = 0;
        }
    }
    memcpy(s->sums, sums, sizeof sums);
    s->stripe = stripe;
}

/* `last`: the final 64 bytes of the whole input, which may overlap stripes taken already. */
static uint64_t end(struct state *s, const char *last, uint64_t num_bytes) {
    uint64_t sums[8], result = num_bytes * PRIME64_1;
    for (int i = 0; i < PARTS; i++) {
        const part data = load_part(last + i * PART_BYTES), key = load_part(secret + 121 + i * PART_BYTES);
        store_part((char *)sums + i * PART_BYTES, absorb(s->sums[i], data, key));
    }
    for (int i = 0; i < 4; i++)
        result += fold(sums[2 * i] ^ read64(secret + 11 + 16 * i), sums[2 * i + 1] ^ read64(secret + 19 + 16 * i));
    result = (result ^ (result >> 37)) * 0x165667919E3779F9u;
    return result ^ (result >> 32);
}

/* From so many bytes on the copy goes past the caches: measured 1.1 to 1.8 times memcpy from 1 MiB on, while ordinary
 * stores are faster below. */
#define STREAM_BYTES (1 << 19)

/* Pieces in turn, `piece_bytes` each, as one input: from piece source[i] to piece target[i] of two arrays of pieces.
 * Without `to` nothing is copied. In all more than 240 bytes; of several, each a multiple of 64. Returns the hash of
 * the bytes written: each is loaded once, stored and hashed from the same register, the last 64 read back. */
uint64_t tandem_copy_and_hash(char *to, const int64_t *target, const char *from, const int64_t *source, int64_t pieces,
                              int64_t piece_bytes) {
    struct state s;
    const char *last = NULL;
    const int aligned = ((uintptr_t)to | (uintptr_t)piece_bytes * (pieces > 1)) % 64 == 0;
    const int stream = aligned && pieces * piece_bytes >= STREAM_BYTES;
    begin(&s);
    for (long i = 0; i < pieces; i++) {
        const char *piece = from + source[i] * piece_bytes;
        char *copy = to ? to + target[i] * piece_bytes : NULL;
        /* The last stripe is mixed otherwise, even where it is whole. */
        const long bytes = i + 1 < pieces ? piece_bytes : (piece_bytes - 1) / STRIPE * STRIPE;
        if (!to) take(&s, NULL, piece, bytes / STRIPE, ONLY_HASH);
        else if (stream) take(&s, copy, piece, bytes / STRIPE, STREAM);
        else take(&s, copy, piece, bytes / STRIPE, COPY);
        if (to) memcpy(copy + bytes, piece + bytes, piece_bytes - bytes);
        last = to ? copy : piece;
    }
#ifdef LANES_AVX
    if (to && stream) _mm_sfence(); /* a reader that is told of the copy must see it */
#endif
    return end(&s, last + piece_bytes - STRIPE, (uint64_t)(pieces * piece_bytes));
}

/* Rows of k and v, [tokens][heads][dim] with strides in elements, to the slots of one layer of the pool. */
struct tandem_write {
    void *pool; /* at the layer */
    const void *k, *v;
    const int64_t *slots;
    int64_t block_stride, kv_stride, slot_stride, head_stride;
    int64_t k_token, k_head, v_token, v_head;
    int64_t tokens, heads, dim, block_size;
    int32_t type, pool_type;
};

void tandem_write_kv(const struct tandem_write *w) {
    const long bytes = type_bytes(w->pool_type);
    for (long i = 0; i < w->tokens; i++) {
        if (w->slots[i] < 0) continue;
        const long at = w->slots[i] / w->block_size * w->block_stride + w->slots[i] % w->block_size * w->slot_stride;
        for (long j = 0; j < w->heads; j++)
            for (int which = 0; which < 2; which++) {
                const void *base = which ? w->v : w->k;
                const long from = which ? i * w->v_token + j * w->v_head : i * w->k_token + j * w->k_head;
                const long to = at + which * w->kv_stride + j * w->head_stride;
                if (w->type == w->pool_type) {
                    memcpy((char *)w->pool + to * bytes, (const char *)base + from * bytes, w->dim * bytes);
                    continue;
                }
                for (long d = 0; d < w->dim; d += LANES) {
                    const int lanes = w->dim - d < LANES ? (int)(w->dim - d) : LANES;
                    store_some(w->pool_type, w->pool, to + d, load_some(w->type, base, from + d, lanes), lanes);
                }
            }
    }
}
