/* Norms, rotary embedding and gated activations, row by row, in Hugging Face's order of rounding. */
#include "lanes.h"

INLINE f32x16 load_at(int type, const void *base, long index, long left) {
    return left >= LANES ? load_any(type, base, index) : load_some(type, base, index, (int)left);
}
INLINE void store_at(int type, void *base, long index, f32x16 a, long left) {
    if (left >= LANES) store_any(type, base, index, a);
    else store_some(type, base, index, a, (int)left);
}

/* One row: y = x / rms(x) * weight. The squares are summed in 16 lanes, then in the fixed tree. */
INLINE void norm_row(int type, void *y, long y_at, const void *x, long x_at, const void *weight, int weight_type,
                     long width, float eps, int plus_one) {
    f32x16 squares = zero16();
    for (long i = 0; i < width; i += LANES) {
        const f32x16 part = load_at(type, x, x_at + i, width - i);
        squares = fma16(part, part, squares);
    }
    const f32x16 factor = set16(1.0f / sqrtf(sum16(squares) / (float)width + eps));
    for (long i = 0; i < width; i += LANES) {
        const long left = width - i;
        const f32x16 scale = load_at(weight_type, weight, i, left);
        f32x16 part = mul16(load_at(type, x, x_at + i, left), factor);
        if (plus_one) part = mul16(part, add16(set16(1), scale));
        else part = mul16(scale, round_to(type, part));
        store_at(type, y, y_at + i, part, left);
    }
}

/* The type as a constant, so that each loop is compiled for one type. */
#define WITH_TYPE(type, call)                                                                                         \
    switch (type) {                                                                                                   \
    case FLOAT32: call(FLOAT32); break;                                                                               \
    case BFLOAT16: call(BFLOAT16); break;                                                                             \
    default: call(FLOAT16); break;                                                                                    \
    }

/* Rows [outer][inner][width] with strides in elements; y may be x. */
void tandem_rms_norm(void *y, int64_t y_outer, int64_t y_inner, const void *x, int64_t x_outer, int64_t x_inner,
                     const void *weight, int64_t outer, int64_t inner, int64_t width, float eps, int type,
                     int weight_type, int plus_one) {
    for (long i = 0; i < outer; i++)
        for (long j = 0; j < inner; j++) {
            const long to = i * y_outer + j * y_inner, from = i * x_outer + j * x_inner;
#define CALL_NORM(t) norm_row(t, y, to, x, from, weight, weight_type, width, eps, plus_one)
            WITH_TYPE(type, CALL_NORM)
        }
}

INLINE void add_row(int type, void *residual, const void *x, long r_at, long x_at, long width) {
    for (long i = 0; i < width; i += LANES) {
        const long left = width - i;
        const f32x16 sum = add16(load_at(type, residual, r_at + i, left), load_at(type, x, x_at + i, left));
        store_at(type, residual, r_at + i, sum, left);
    }
}

void tandem_add_rms_norm(void *y, void *residual, const void *x, int64_t x_row, const void *weight, int64_t rows,
                         int64_t width, float eps, int type, int weight_type, int plus_one) {
    for (long i = 0; i < rows; i++) {
        const long at = i * width;
#define CALL_ADD(t) add_row(t, residual, x, at, i * x_row, width)
        WITH_TYPE(type, CALL_ADD)
#define CALL_ADD_NORM(t) norm_row(t, y, at, residual, at, weight, weight_type, width, eps, plus_one)
        WITH_TYPE(type, CALL_ADD_NORM)
    }
}

/* Dimensions i and i + width / 2 turn as a pair; each product is rounded before they are added, as between tensors. */
INLINE void rotate_head(int type, void *x, long at, const void *cos, const void *sin, int table_type, long row,
                        long width) {
    const long half = width / 2;
    for (long i = 0; i < half; i += LANES) {
        const long left = half - i;
        const f32x16 low = load_at(type, x, at + i, left), high = load_at(type, x, at + half + i, left);
        const f32x16 cos_low = round_to(type, load_at(table_type, cos, row + i, left));
        const f32x16 sin_low = round_to(type, load_at(table_type, sin, row + i, left));
        const f32x16 cos_high = round_to(type, load_at(table_type, cos, row + half + i, left));
        const f32x16 sin_high = round_to(type, load_at(table_type, sin, row + half + i, left));
        const f32x16 new_low = sub16(round_to(type, mul16(low, cos_low)), round_to(type, mul16(high, sin_low)));
        const f32x16 new_high = add16(round_to(type, mul16(high, cos_high)), round_to(type, mul16(low, sin_high)));
        store_at(type, x, at + i, new_low, left);
        store_at(type, x, at + half + i, new_high, left);
    }
}

/* x[tokens][heads][>= width] in place; cos and sin [tokens][width], rows `table_row` apart. */
void tandem_rope(void *x, int64_t x_token, int64_t x_head, const void *cos, const void *sin, int64_t table_row,
                 int64_t tokens, int64_t heads, int64_t width, int type, int table_type) {
    for (long i = 0; i < tokens; i++)
        for (long j = 0; j < heads; j++) {
            const long at = i * x_token + j * x_head;
#define CALL_ROTATE(t) rotate_head(t, x, at, cos, sin, table_type, i * table_row, width)
            WITH_TYPE(type, CALL_ROTATE)
        }
}

/* Both activations are gate * sigmoid(u): u = gate for SiLU; for the tanh form of gelu
 * u = 2 sqrt(2 / pi) (gate + 0.044715 gate^3), since (1 + tanh(u / 2)) / 2 = sigmoid(u). */
INLINE void gate_row(int type, void *y, long y_at, const void *x, long x_at, long width, int gelu) {
    for (long i = 0; i < width; i += LANES) {
        const long left = width - i;
        const f32x16 gate = load_at(type, x, x_at + i, left), up = load_at(type, x, x_at + width + i, left);
        f32x16 u = gate;
        if (gelu) {
            const f32x16 cube = mul16(mul16(gate, gate), gate);
            u = mul16(set16(1.59576912f), fma16(set16(0.044715f), cube, gate));
        }
        const f32x16 active = div16(gate, add16(set16(1), exp16(sub16(zero16(), u))));
        store_at(type, y, y_at + i, mul16(round_to(type, active), up), left);
    }
}

void tandem_gated(void *y, int64_t y_row, const void *x, int64_t x_row, int64_t rows, int64_t width, int type,
                  int gelu) {
    for (long i = 0; i < rows; i++) {
#define CALL_GATE(t) gate_row(t, y, i * y_row, x, i * x_row, width, gelu)
        WITH_TYPE(type, CALL_GATE)
    }
}
