/* Sixteen float lanes on every machine: one AVX-512 register, two AVX registers, or a portable vector. Each operation
 * is IEEE exact per lane and each reduction has one fixed tree, so that AVX2, AVX-512 and NEON give the same bits.
 * Compile with -ffp-contract=off: only fma16 may fuse. */
#ifndef TANDEM_LANES_H
#define TANDEM_LANES_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define LANES 16

enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

#if defined(__AVX512F__) && !defined(TANDEM_PORTABLE) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define LANES_AVX512 1
#define LANES_AVX 1
typedef __m512 f32x16;
INLINE f32x16 zero16(void) { return _mm512_setzero_ps(); }
INLINE f32x16 set16(float x) { return _mm512_set1_ps(x); }
INLINE f32x16 load16(const float *p) { return _mm512_loadu_ps(p); }
INLINE void store16(float *p, f32x16 a) { _mm512_storeu_ps(p, a); }
INLINE f32x16 add16(f32x16 a, f32x16 b) { return _mm512_add_ps(a, b); }
INLINE f32x16 sub16(f32x16 a, f32x16 b) { return _mm512_sub_ps(a, b); }
INLINE f32x16 mul16(f32x16 a, f32x16 b) { return _mm512_mul_ps(a, b); }
INLINE f32x16 div16(f32x16 a, f32x16 b) { return _mm512_div_ps(a, b); }
INLINE f32x16 fma16(f32x16 a, f32x16 b, f32x16 c) { return _mm512_fmadd_ps(a, b, c); }
INLINE f32x16 max16(f32x16 a, f32x16 b) { return _mm512_max_ps(a, b); }
INLINE f32x16 min16(f32x16 a, f32x16 b) { return _mm512_min_ps(a, b); }
/* a where a lane of x is at least limit (or NaN), else 0 */
INLINE f32x16 keep_from16(f32x16 a, f32x16 x, float limit) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_NLT_UQ), a);
}
/* 2^n, where biased is n + 1.5 * 2^23 and n lies in -126 .. 127 */
INLINE f32x16 power16(f32x16 biased) {
    __m512i shifted = _mm512_slli_epi32(_mm512_castps_si512(biased), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(shifted, _mm512_set1_epi32(0x3f800000)));
}
INLINE f32x16 load_bf16(const uint16_t *p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
INLINE f32x16 load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE void store_f16(uint16_t *p, f32x16 a) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
INLINE __m256 low8(f32x16 a) { return _mm512_castps512_ps256(a); }
INLINE __m256 high8(f32x16 a) { return _mm512_extractf32x8_ps(a, 1); }

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !defined(TANDEM_PORTABLE)
#include <immintrin.h>
#define LANES_AVX 1
typedef struct {
    __m256 low, high;
} f32x16;
#define BOTH(operation) ((f32x16){operation(a.low, b.low), operation(a.high, b.high)})
INLINE f32x16 zero16(void) { return (f32x16){_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE f32x16 set16(float x) {
    __m256 lanes = _mm256_set1_ps(x);
    return (f32x16){lanes, lanes};
}
INLINE f32x16 load16(const float *p) { return (f32x16){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void store16(float *p, f32x16 a) {
    _mm256_storeu_ps(p, a.low);
    _mm256_storeu_ps(p + 8, a.high);
}
INLINE f32x16 add16(f32x16 a, f32x16 b) { return BOTH(_mm256_add_ps); }
INLINE f32x16 sub16(f32x16 a, f32x16 b) { return BOTH(_mm256_sub_ps); }
INLINE f32x16 mul16(f32x16 a, f32x16 b) { return BOTH(_mm256_mul_ps); }
INLINE f32x16 div16(f32x16 a, f32x16 b) { return BOTH(_mm256_div_ps); }
INLINE f32x16 max16(f32x16 a, f32x16 b) { return BOTH(_mm256_max_ps); }
INLINE f32x16 min16(f32x16 a, f32x16 b) { return BOTH(_mm256_min_ps); }
INLINE f32x16 fma16(f32x16 a, f32x16 b, f32x16 c) {
    return (f32x16){_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
INLINE f32x16 keep_from16(f32x16 a, f32x16 x, float limit) {
    __m256 bound = _mm256_set1_ps(limit);
    return (f32x16){_mm256_and_ps(a.low, _mm256_cmp_ps(x.low, bound, _CMP_NLT_UQ)),
                    _mm256_and_ps(a.high, _mm256_cmp_ps(x.high, bound, _CMP_NLT_UQ))};
}
INLINE __m256 power8(__m256 biased) {
    __m256i shifted = _mm256_slli_epi32(_mm256_castps_si256(biased), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(shifted, _mm256_set1_epi32(0x3f800000)));
}
INLINE f32x16 power16(f32x16 biased) { return (f32x16){power8(biased.low), power8(biased.high)}; }
INLINE __m256 load8_bf16(const uint16_t *p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
INLINE f32x16 load_bf16(const uint16_t *p) { return (f32x16){load8_bf16(p), load8_bf16(p + 8)}; }
INLINE f32x16 load_f16(const uint16_t *p) {
    return (f32x16){_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
                    _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8)))};
}
INLINE void store_f16(uint16_t *p, f32x16 a) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(a.low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    _mm_storeu_si128((__m128i *)(p + 8), _mm256_cvtps_ph(a.high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
INLINE __m256 low8(f32x16 a) { return a.low; }
INLINE __m256 high8(f32x16 a) { return a.high; }

#else /* the compiler splits these vectors into what the machine has (four NEON registers on arm64) */
typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
INLINE f32x16 zero16(void) { return (f32x16){0}; }
INLINE f32x16 set16(float x) { return (f32x16){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINE f32x16 load16(const float *p) {
    f32x16 a;
    memcpy(&a, p, sizeof a);
    return a;
}
INLINE void store16(float *p, f32x16 a) { memcpy(p, &a, sizeof a); }
INLINE f32x16 add16(f32x16 a, f32x16 b) { return a + b; }
INLINE f32x16 sub16(f32x16 a, f32x16 b) { return a - b; }
INLINE f32x16 mul16(f32x16 a, f32x16 b) { return a * b; }
INLINE f32x16 div16(f32x16 a, f32x16 b) { return a / b; }
INLINE f32x16 fma16(f32x16 a, f32x16 b, f32x16 c) {
    f32x16 result;
    for (int i = 0; i < LANES; i++) result[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return result;
}
INLINE f32x16 pick16(i32x16 mask, f32x16 a, f32x16 b) { return (f32x16)(((i32x16)a & mask) | ((i32x16)b & ~mask)); }
INLINE f32x16 max16(f32x16 a, f32x16 b) { return pick16((i32x16)(a > b), a, b); }
INLINE f32x16 min16(f32x16 a, f32x16 b) { return pick16((i32x16)(a < b), a, b); }
INLINE f32x16 keep_from16(f32x16 a, f32x16 x, float limit) { return (f32x16)((i32x16)a & ~(i32x16)(x < set16(limit))); }
INLINE f32x16 power16(f32x16 biased) {
    typedef uint32_t u32x16 __attribute__((vector_size(64)));
    return (f32x16)(((u32x16)biased << 23) + 0x3f800000u);
}
INLINE f32x16 load_bf16(const uint16_t *p) {
    f32x16 a;
    for (int i = 0; i < LANES; i++) {
        uint32_t bits = (uint32_t)p[i] << 16;
        float lane;
        memcpy(&lane, &bits, 4);
        a[i] = lane;
    }
    return a;
}
INLINE float widen_f16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = (half >> 10) & 31, fraction = half & 1023, bits;
    float value;
    if (exponent == 0) {
        value = (float)fraction * 0x1p-24f; /* zero and subnormals, exact */
        memcpy(&bits, &value, 4);
        bits |= sign;
    } else {
        bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
    }
    memcpy(&value, &bits, 4);
    return value;
}
INLINE uint16_t narrow_f16(float value) { /* to nearest, ties to even */
    uint32_t bits, sign;
    memcpy(&bits, &value, 4);
    sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return (uint16_t)(sign | 0x7e00 | (bits >> 13 & 0x3ff));
    if (bits >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    if (bits < 0x38800000) { /* a subnormal half counts steps of 2^-24 */
        float magnitude;
        memcpy(&magnitude, &bits, 4);
        return (uint16_t)(sign | (uint32_t)__builtin_rintf(magnitude * 0x1p24f));
    }
    bits += 0xfff + (bits >> 13 & 1);
    return (uint16_t)(sign | ((bits - 0x38000000) >> 13));
}
INLINE f32x16 load_f16(const uint16_t *p) {
    f32x16 a;
    for (int i = 0; i < LANES; i++) a[i] = widen_f16(p[i]);
    return a;
}
INLINE void store_f16(uint16_t *p, f32x16 a) {
    for (int i = 0; i < LANES; i++) p[i] = narrow_f16(a[i]);
}
#endif

/* The fixed tree: lanes i and i + 8, then i and i + 4, then i and i + 2, then the last two. */
#ifdef LANES_AVX
INLINE float sum16(f32x16 a) {
    __m256 eight = _mm256_add_ps(low8(a), high8(a));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
INLINE float top16(f32x16 a) {
    __m256 eight = _mm256_max_ps(low8(a), high8(a));
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
/* round to nearest even; a NaN stays one */
INLINE __m256i round8_bf16(__m256 a) {
    __m256i bits = _mm256_castps_si256(a);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
    return _mm256_srli_epi32(rounded, 16);
}
INLINE void store_bf16(uint16_t *p, f32x16 a) {
    __m256i packed = _mm256_packus_epi32(round8_bf16(low8(a)), round8_bf16(high8(a)));
    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(packed, 0xd8));
}
#else
INLINE float sum16(f32x16 a) {
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) a[i] = a[i] + a[i + half];
    return a[0];
}
INLINE float top16(f32x16 a) {
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) a[i] = a[i] > a[i + half] ? a[i] : a[i + half];
    return a[0];
}
INLINE void store_bf16(uint16_t *p, f32x16 a) {
    for (int i = 0; i < LANES; i++) {
        float lane = a[i];
        uint32_t bits;
        memcpy(&bits, &lane, 4);
        p[i] = lane != lane ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}
#endif

/* Sixteen elements of any of the three types from an array, as floats; and back, rounded to nearest even. */
INLINE f32x16 load_any(int type, const void *base, long index) {
    if (type == FLOAT32) return load16((const float *)base + index);
    if (type == BFLOAT16) return load_bf16((const uint16_t *)base + index);
    return load_f16((const uint16_t *)base + index);
}
INLINE void store_any(int type, void *base, long index, f32x16 a) {
    if (type == FLOAT32) store16((float *)base + index, a);
    else if (type == BFLOAT16) store_bf16((uint16_t *)base + index, a);
    else store_f16((uint16_t *)base + index, a);
}
INLINE long type_bytes(int type) { return type == FLOAT32 ? 4 : 2; }

/* The same for the first count < 16 lanes; the others load as 0. */
INLINE f32x16 load_some(int type, const void *base, long index, int count) {
    char whole[LANES * 4] = {0};
    memcpy(whole, (const char *)base + index * type_bytes(type), count * type_bytes(type));
    return load_any(type, whole, 0);
}
INLINE void store_some(int type, void *base, long index, f32x16 a, int count) {
    char whole[LANES * 4];
    store_any(type, whole, 0, a);
    memcpy((char *)base + index * type_bytes(type), whole, count * type_bytes(type));
}
/* Rounds to the type and back, as a tensor of that type between two operations would. */
INLINE f32x16 round_to(int type, f32x16 a) {
    uint16_t narrow[LANES];
    if (type == FLOAT32) return a;
    store_any(type, narrow, 0, a);
    return load_any(type, narrow, 0);
}

/* e^x: x = n ln 2 + r with |r| <= ln 2 / 2 (Cody and Waite), then the Taylor polynomial of degree 7, in Horner form.
 * 0 below -87.3, where 2^n would be subnormal; saturates above 88.37. Relative error below 1.2e-7. */
INLINE f32x16 exp16(f32x16 x) {
    const f32x16 magic = set16(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    f32x16 bounded = max16(min16(x, set16(88.37f)), set16(-87.3f));
    f32x16 biased = fma16(bounded, set16(1.44269504f), magic);
    f32x16 n = sub16(biased, magic);
    f32x16 r = fma16(n, set16(-0.693145752f), bounded);
    r = fma16(n, set16(-1.42860677e-6f), r);
    f32x16 p = set16(1.0f / 5040.0f);
    p = fma16(p, r, set16(1.0f / 720.0f));
    p = fma16(p, r, set16(1.0f / 120.0f));
    p = fma16(p, r, set16(1.0f / 24.0f));
    p = fma16(p, r, set16(1.0f / 6.0f));
    p = fma16(p, r, set16(0.5f));
    p = fma16(p, r, set16(1.0f));
    p = fma16(p, r, set16(1.0f));
    return keep_from16(mul16(p, power16(biased)), x, -87.3f);
}

#endif
