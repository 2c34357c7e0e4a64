/* y[M, N] = x[M, K] W[N, K]^T + bias[N] with W packed into panels [N / 32][K][32], columns of zeros at the end.
 *
 * Each element of y is one chain of fused multiply-adds over k = 0 .. K - 1 from 0, then + bias: no bit of it depends
 * on M, the tile, the thread or the vector width. Blocking after Goto and van de Geijn, "Anatomy of high-performance
 * matrix multiplication" (2008), with the sums of a block of K carried on in memory instead of split. */
#include "lanes.h"
#include "threads.h"
#include "tile.h"

#define PANEL 32
#define DEPTH_BYTES 24576    /* of a panel, kept in the first-level cache while the rows pass */
#define ROWS_BYTES (1 << 19) /* of packed x, kept in the second-level cache while the panels pass */
#define MAX_ROWS 224         /* rows whose sums of one panel lie on the stack */
#define AHEAD 2048           /* bytes prefetched ahead where a panel is streamed once */

struct product {
    const float *x; /* packed: tiles of tile_rows rows, each [K][tile_rows] */
    const void *weight;
    const void *bias;
    void *y;
    long num_rows, tile_rows, num_columns, depth, y_row;
    int x_type, weight_type;
};

/* `soon` with lines 0 .. 2: what to prefetch meanwhile, see tile_of. */
static void multiply(int rows, long depth, const float *a, long a_step, int type, const void *b, float *c, int add,
                     const char *soon, int lines) {
    for (long column = 0; column < PANEL; column += TILE_COLUMNS) {
        const void *from = (const char *)b + column * type_bytes(type);
#define CALL_FLOAT(n)                                                                                                 \
    tile_of(n, TILE_VECTORS, depth, a, 1, a_step, FLOAT32, from, PANEL, c + column, PANEL, add, soon, lines)
#define CALL_BFLOAT(n)                                                                                                \
    tile_of(n, TILE_VECTORS, depth, a, 1, a_step, BFLOAT16, from, PANEL, c + column, PANEL, add, soon, lines)
        if (type == FLOAT32) WITH_ROWS(rows, CALL_FLOAT) else WITH_ROWS(rows, CALL_BFLOAT)
        lines = 0;
    }
}

static void finish(const struct product *p, long panel, const float *sums) {
    const long first = panel * PANEL;
    for (long v = 0; v < PANEL; v += LANES) {
        const long column = first + v;
        const long count = p->num_columns - column < LANES ? p->num_columns - column : LANES;
        if (count <= 0) return;
        f32x16 bias = zero16();
        if (p->bias) bias = load_some(p->x_type, p->bias, column, (int)count);
        for (long r = 0; r < p->num_rows; r++) {
            f32x16 sum = load16(sums + r * PANEL + v);
            if (p->bias) sum = add16(sum, bias);
            if (count == LANES) store_any(p->x_type, p->y, r * p->y_row + column, sum);
            else store_some(p->x_type, p->y, r * p->y_row + column, sum, (int)count);
        }
    }
}

static void do_panel(void *argument, long panel) {
    const struct product *p = argument;
    const long panel_row = PANEL * type_bytes(p->weight_type);
    const char *weight = (const char *)p->weight + panel * p->depth * panel_row;
    const int single = p->num_rows <= p->tile_rows;
    const long step = single && TILE_COLUMNS == PANEL ? p->depth : DEPTH_BYTES / panel_row;
    float sums[MAX_ROWS * PANEL] __attribute__((aligned(64)));
    for (long k = 0; k < p->depth; k += step) {
        const long depth = p->depth - k < step ? p->depth - k : step;
        const char *block = weight + k * panel_row, *next = block + depth * panel_row;
        for (long r = 0; r < p->num_rows; r += p->tile_rows) {
            const long rows = p->num_rows - r < p->tile_rows ? p->num_rows - r : p->tile_rows;
            /* One tile streams its own panel; of several, the first fetch the block that comes next. */
            const char *soon = single ? block + AHEAD : next + r / p->tile_rows * depth * 64;
            const int lines = single ? (int)(panel_row / 64) : soon < next + depth * panel_row;
            multiply((int)rows, depth, p->x + r * p->depth + k * rows, rows, p->weight_type, block, sums + r * PANEL,
                     k > 0, soon, lines);
        }
    }
    finish(p, panel, sums);
}

/* Rows r .. of x as tiles [K][rows], widened to float. */
static void pack_rows(float *packed, const void *x, long x_row, int type, long num_rows, long tile_rows, long depth) {
    for (long r = 0; r < num_rows; r += tile_rows) {
        const long rows = num_rows - r < tile_rows ? num_rows - r : tile_rows;
        float *to = packed + r * depth;
        for (long i = 0; i < rows; i++)
            for (long k = 0; k < depth; k += LANES) {
                const long count = depth - k < LANES ? depth - k : LANES;
                float lanes[LANES];
                const long at = (r + i) * x_row + k;
                store16(lanes, count == LANES ? load_any(type, x, at) : load_some(type, x, at, (int)count));
                for (long j = 0; j < count; j++) to[(k + j) * rows + i] = lanes[j];
            }
    }
}

void tandem_gemm(void *y, long y_row, const void *x, long x_row, int x_type, const void *panels, int weight_type,
                 const void *bias, long m, long n, long k, int num_threads) {
    long block = ROWS_BYTES / 4 / (k ? k : 1) / TILE_ROWS * TILE_ROWS;
    if (block > MAX_ROWS / TILE_ROWS * TILE_ROWS) block = MAX_ROWS / TILE_ROWS * TILE_ROWS;
    if (block < 2 * TILE_ROWS) block = 2 * TILE_ROWS;
    for (long begin = 0; begin < m; begin += block) {
        const long rows = m - begin < block ? m - begin : block;
        const long tile_rows = even_rows(rows);
        const void *from = (const char *)x + begin * x_row * type_bytes(x_type);
        struct product product = {
            .weight = panels, .bias = bias, .y = (char *)y + begin * y_row * type_bytes(x_type), .num_rows = rows,
            .tile_rows = tile_rows, .num_columns = n, .depth = k, .y_row = y_row, .x_type = x_type,
            .weight_type = weight_type,
        };
        if (rows == 1 && x_type == FLOAT32) {
            product.x = from;
        } else {
            float *packed = tandem_scratch(SCRATCH_GEMM, (size_t)(rows * k) * sizeof(float));
            pack_rows(packed, from, x_row, x_type, rows, tile_rows, k);
            product.x = packed;
        }
        /* Below some 2^19 multiplications waking a thread costs more than it saves. */
        tandem_parallel(do_panel, &product, (n + PANEL - 1) / PANEL, rows * n * k < 1 << 19 ? 1 : num_threads);
    }
}
