/* The one microkernel: C[rows][columns] (+)= A[rows][depth] B[depth][columns], held in registers. Every element is one
 * chain of fused multiply-adds over the depth, whatever the shape of the tile. */
#ifndef TANDEM_TILE_H
#define TANDEM_TILE_H

#include "lanes.h"

/* Rows and vectors of sixteen columns of the largest tile: 28 + 2 of 32 registers with AVX-512 and the same columns on
 * 32 NEON registers' half; 12 + 2 of 16 registers with AVX2. */
#if defined(LANES_AVX512)
#define TILE_ROWS 14
#define TILE_VECTORS 2
#else
#define TILE_ROWS 6
#define TILE_VECTORS 1
#endif
#define TILE_COLUMNS (TILE_VECTORS * LANES)

/* A's element (r, k) is a[r * a_row + k * a_step]. B's row k starts at element k * b_step, of type b_type. `add`:
 * start from what C holds, else from 0. Each of the depth steps prefetches `lines` cache lines from `soon` on. */
INLINE void tile_of(int rows, int vectors, long depth, const float *a, long a_row, long a_step, int b_type,
                    const void *b, long b_step, float *c, long c_row, int add, const char *soon, int lines) {
    f32x16 sums[TILE_ROWS][TILE_VECTORS];
    const long b_bytes = b_step * type_bytes(b_type);
#pragma GCC unroll 14
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) sums[r][v] = add ? load16(c + r * c_row + v * LANES) : zero16();
    for (long k = 0; k < depth; k++) {
        f32x16 columns[TILE_VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) columns[v] = load_any(b_type, b, v * LANES);
        if (lines > 0) __builtin_prefetch(soon, 0, 2);
        if (lines > 1) __builtin_prefetch(soon + 64, 0, 2);
        soon += 64 * lines;
#pragma GCC unroll 14
        for (int r = 0; r < rows; r++) {
            f32x16 factor = set16(a[r * a_row]);
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++) sums[r][v] = fma16(factor, columns[v], sums[r][v]);
        }
        a += a_step;
        b = (const char *)b + b_bytes;
    }
#pragma GCC unroll 14
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) store16(c + r * c_row + v * LANES, sums[r][v]);
}

/* `call(n)` with the number of rows as a constant, so that the sums stay in registers. */
#if TILE_ROWS == 14
#define WITH_ROWS(rows, call)                                                                                         \
    switch (rows) {                                                                                                   \
    case 1: call(1); break;                                                                                           \
    case 2: call(2); break;                                                                                           \
    case 3: call(3); break;                                                                                           \
    case 4: call(4); break;                                                                                           \
    case 5: call(5); break;                                                                                           \
    case 6: call(6); break;                                                                                           \
    case 7: call(7); break;                                                                                           \
    case 8: call(8); break;                                                                                           \
    case 9: call(9); break;                                                                                           \
    case 10: call(10); break;                                                                                         \
    case 11: call(11); break;                                                                                         \
    case 12: call(12); break;                                                                                         \
    case 13: call(13); break;                                                                                         \
    default: call(14); break;                                                                                         \
    }
#else
#define WITH_ROWS(rows, call)                                                                                         \
    switch (rows) {                                                                                                   \
    case 1: call(1); break;                                                                                           \
    case 2: call(2); break;                                                                                           \
    case 3: call(3); break;                                                                                           \
    case 4: call(4); break;                                                                                           \
    case 5: call(5); break;                                                                                           \
    default: call(6); break;                                                                                          \
    }
#endif

/* Rows of each tile when `rows` are cut evenly into the fewest tiles. */
INLINE long even_rows(long rows) {
    long tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    return (rows + tiles - 1) / tiles;
}

#endif
