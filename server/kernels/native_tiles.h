/* y = W x on a matrix unit (AMX), in bf16 or in bytes, for any number of tokens; native.c includes this file. A token's
   sums run over its own inputs in one order, whatever the others are.

   A weight (outputs, inputs) is held in tiles of TILE outputs and so many inputs as are 64 bytes, of which those of four
   bytes stand together, as the unit takes them; SIDE_BY_SIDE tiles of outputs with the same inputs lie side by side, and
   behind them those with the next inputs, so that the weight is read from its first byte to its last. Inputs are 64 bytes
   or a multiple; outputs are filled up with zeros. */
#define TILE 16
#define DEEP 64 /* bytes */
#define SIDE_BY_SIDE 4
#define BLOCK (TILE * SIDE_BY_SIDE) /* outputs */
#define TILE_BYTES (TILE * DEEP)

static int64_t blocks_of(int64_t outputs) { return (outputs + BLOCK - 1) / BLOCK; }

/* Numbers of the packed weight. */
int64_t mg_tiled_size(int64_t outputs, int64_t inputs) { return blocks_of(outputs) * BLOCK * inputs; }

/* The place of weight[o][i] among the tiles, of numbers of so many bytes. */
INLINE int64_t tiled(int64_t o, int64_t i, int64_t inputs, const int64_t size) {
    const int64_t deep = DEEP / size, near = 4 / size;
    const int64_t tile = (o / BLOCK * (inputs / deep) + i / deep) * SIDE_BY_SIDE + o % BLOCK / TILE;
    return tile * TILE * deep + i % deep / near * near * TILE + o % TILE * near + i % near;
}

/* Numbers of `size` bytes, 1 or 2. */
void mg_tile(const void *weight, int64_t outputs, int64_t inputs, int64_t size, void *into, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t o = 0; o < blocks_of(outputs) * BLOCK; o++)
        for (int64_t i = 0; i < inputs; i++)
            if (size == 2)
                ((uint16_t *)into)[tiled(o, i, inputs, 2)] = o < outputs ? ((const uint16_t *)weight)[o * inputs + i] : 0;
            else
                ((uint8_t *)into)[tiled(o, i, inputs, 1)] = o < outputs ? ((const uint8_t *)weight)[o * inputs + i] : 0;
}

/* mg_tile undone. */
void mg_untile(const void *from, int64_t outputs, int64_t inputs, int64_t size, void *weight, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t o = 0; o < outputs; o++)
        for (int64_t i = 0; i < inputs; i++)
            if (size == 2)
                ((uint16_t *)weight)[o * inputs + i] = ((const uint16_t *)from)[tiled(o, i, inputs, 2)];
            else
                ((uint8_t *)weight)[o * inputs + i] = ((const uint8_t *)from)[tiled(o, i, inputs, 1)];
}

/* A product. In bytes x is codes with 128 for zero, and y = (sum - sums[o]) * scales[o] * x_scales[t], where sums[o] is 128
   times the sum of the output's codes. In bf16 there are none of these. */
typedef struct {
    const char *x;
    int64_t x_row; /* bytes */
    int64_t tokens;
    const char *weight;
    int64_t inputs, outputs;
    void *y; /* (tokens, outputs), BF16 or FP32 */
    int type;
    const float *x_scales, *scales;
    const int32_t *sums;
    const struct added *added; /* terms that are added before y is rounded; NULL: none */
} product_t;

/* The runs of many tokens whose terms the matrix unit adds: see native_terms.h. */
typedef struct added {
    struct many *runs;
    int64_t count, chunk_count;
} added_t;

#if defined(X86) && defined(__linux__) && defined(__has_include) && __has_include(<amxbf16intrin.h>)
#include <sys/syscall.h>
#include <unistd.h>
#define ON_TILES __attribute__((target("arch=x86-64-v4,amx-tile,amx-bf16,amx-int8")))
#define ON_TILES_INLINE static inline __attribute__((always_inline, target("arch=x86-64-v4,amx-tile,amx-bf16,amx-int8")))
#define ASK_FOR_STATE 0x1023 /* ARCH_REQ_XCOMP_PERM */
#define TILE_DATA 18
#define AHEAD 8 /* steps that the weight is asked for before it is used, into the second-level cache */

/* Whether this processor has the unit, and the system lets this process use it. */
int mg_has_tiles(void) {
    unsigned a, b, c, d;
    __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
    const unsigned all = 1u << 22 | 1u << 24 | 1u << 25;
    return (d & all) == all && __builtin_cpu_supports("x86-64-v4") && !syscall(SYS_arch_prctl, ASK_FOR_STATE, TILE_DATA);
}

/* Sums are tiles 0 to 3; x and the weight have the rest, x's with so many rows. */
ON_TILES static void set_tiles(int64_t rows) {
    struct {
        uint8_t palette, start, unused[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } __attribute__((aligned(64))) config = {.palette = 1};
    for (int n = 0; n < 8; n++) config.bytes[n] = 64, config.rows[n] = TILE;
    if (rows < TILE) /* one tile of x, in 4 */
        for (int n = 0; n < 5; n++) config.rows[n] = rows;
    _tile_loadconfig(&config);
}

ON_TILES static void release_tiles(void) { _tile_release(); }

ON_TILES static void clear_sums(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

ON_TILES static void store_sums(void *sums) {
    _tile_stored(0, sums, 64);
    _tile_stored(1, (char *)sums + TILE_BYTES, 64);
    _tile_stored(2, (char *)sums + 2 * TILE_BYTES, 64);
    _tile_stored(3, (char *)sums + 3 * TILE_BYTES, 64);
}

#define DOT(sums, x, w)                                \
    do {                                               \
        if (in_bytes) _tile_dpbusd(sums, x, w);        \
        else _tile_dpbf16ps(sums, x, w);               \
    } while (0)

#include "native_terms.h"

/* At most TILE tokens with a block of outputs: the weight comes from memory and is asked for ahead. */
ON_TILES_INLINE void multiply_few(const char *x, int64_t x_row, const char *w, int64_t steps, const int in_bytes) {
    clear_sums();
    for (int64_t i = 0; i < steps; i++, x += DEEP, w += SIDE_BY_SIDE * TILE_BYTES) {
        for (int n = 0; n < SIDE_BY_SIDE * TILE_BYTES; n += LINE)
            _mm_prefetch(w + AHEAD * SIDE_BY_SIDE * TILE_BYTES + n, _MM_HINT_T1);
        _tile_loadd(4, x, x_row);
        _tile_loadd(5, w, 64);
        DOT(0, 4, 5);
        _tile_loadd(6, w + TILE_BYTES, 64);
        DOT(1, 4, 6);
        _tile_loadd(7, w + 2 * TILE_BYTES, 64);
        DOT(2, 4, 7);
        _tile_loadd(5, w + 3 * TILE_BYTES, 64);
        DOT(3, 4, 5);
    }
}

/* 2 * TILE tokens with two tiles of outputs: sums[2 * x + w]. Meanwhile so many lines a step are asked for from `next` on. */
ON_TILES_INLINE void multiply_many(const char *x, int64_t x_row, const char *w, int64_t steps, const char *next, int64_t lines,
                                   const int in_bytes) {
    clear_sums();
    for (int64_t i = 0; i < steps; i++, x += DEEP, w += SIDE_BY_SIDE * TILE_BYTES) {
        for (int64_t n = 0; n < lines; n++, next += LINE) _mm_prefetch(next, _MM_HINT_T1);
        _tile_loadd(4, x, x_row);
        _tile_loadd(6, w, 64);
        DOT(0, 4, 6);
        _tile_loadd(7, w + TILE_BYTES, 64);
        DOT(1, 4, 7);
        _tile_loadd(5, x + TILE * x_row, x_row);
        DOT(2, 5, 6);
        DOT(3, 5, 7);
    }
}

/* A tile of sums, of tokens from t and outputs from o on, to its place in y. What terms add to sums of bytes stands apart. */
ON_TILES_INLINE void round_tile(const product_t *job, const float *sums, const float *terms, int64_t t, int64_t rows, int64_t o,
                                const int in_bytes) {
    const int64_t count = at_most(TILE, job->outputs - o);
    __m512 scales = _mm512_setzero_ps();
    __m512i zeros = _mm512_setzero_si512();
    if (in_bytes) {
        const __mmask16 some = (__mmask16)((1u << count) - 1);
        scales = _mm512_maskz_loadu_ps(some, job->scales + o);
        zeros = _mm512_maskz_loadu_epi32(some, job->sums + o);
    }
    for (int64_t n = 0; n < rows; n++) {
        __m512 value = _mm512_loadu_ps(sums + n * TILE);
        if (in_bytes) {
            value = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_castps_si512(value), zeros));
            value = _mm512_mul_ps(_mm512_mul_ps(value, scales), _mm512_set1_ps(job->x_scales[t + n]));
            if (job->added) value = _mm512_add_ps(value, _mm512_loadu_ps(terms + n * TILE));
        }
        void *const to = moved(job->y, (t + n) * job->outputs + o, job->type);
        if (count < TILE) {
            char row[TILE * 4];
            if (job->type == FP32) _mm512_storeu_ps(row, value);
            else store_bf16_v4((uint16_t *)row, (vec_v4)value);
            memcpy(to, row, bytes(count, job->type));
        } else if (job->type == FP32) _mm512_storeu_ps(to, value);
        else store_bf16_v4(to, (vec_v4)value);
    }
}

/* What stands in the tiles of sums, and what terms add to it. `add` adds that to tiles. */
#define STORE_SUMS(add)                 \
    do {                                \
        if (job->added && !in_bytes) add; \
        store_sums(sums);               \
        if (job->added && in_bytes) {   \
            clear_sums();               \
            add;                        \
            store_sums(terms);          \
        }                               \
    } while (0)

/* B: room for the terms' tiles. */
ON_TILES_INLINE void multiply_block(const product_t *job, int64_t block, char *B, const int in_bytes) {
    const int64_t steps = job->inputs * (in_bytes ? 1 : 2) / DEEP, size = steps * SIDE_BY_SIDE * TILE_BYTES;
    const int64_t first = block * BLOCK, outputs = at_most(BLOCK, job->outputs - first);
    const char *const w = job->weight + block * size;
    float sums[4 * TILE * TILE] __attribute__((aligned(64))), terms[4 * TILE * TILE] __attribute__((aligned(64)));
    int64_t t = 0;
    if (job->added) pack_block(job->added, first, B);
    if (job->tokens >= 2 * TILE) {
        const int64_t calls = job->tokens / (2 * TILE) * ((outputs + 2 * TILE - 1) / (2 * TILE));
        const int64_t lines = (size / LINE + calls * steps - 1) / (calls * steps);
        const char *next = w + size;
        set_tiles(TILE);
        for (; t + 2 * TILE <= job->tokens; t += 2 * TILE)
            for (int64_t o = 0; o < outputs; o += 2 * TILE) {
                multiply_many(job->x + t * job->x_row, job->x_row, w + o / TILE * TILE_BYTES, steps, next, lines, in_bytes);
                STORE_SUMS(add_many(job->added, t / TILE, first, o / TILE, B));
                next += lines * steps * LINE;
                for (int n = 0; n < 4; n++)
                    if (o + n % 2 * TILE < outputs)
                        round_tile(job, sums + n * TILE * TILE, terms + n * TILE * TILE, t + n / 2 * TILE, TILE,
                                   first + o + n % 2 * TILE, in_bytes);
            }
    }
    for (; t < job->tokens; t += TILE) {
        const int64_t rows = at_most(TILE, job->tokens - t);
        set_tiles(rows);
        multiply_few(job->x + t * job->x_row, job->x_row, w, steps, in_bytes);
        STORE_SUMS(add_few(job->added, t / TILE, first, B));
        for (int64_t o = 0; o < outputs; o += TILE) round_tile(job, sums + o * TILE, terms + o * TILE, t, rows, first + o, in_bytes);
    }
}

/* Returns 0, or -1 when there is no memory. */
ON_TILES static int multiply_tiles(const product_t *job, int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        char *const B = job->added ? room_for(IN_PRODUCT, job->added->chunk_count * SIDE_BY_SIDE * TILE_BYTES) : NULL;
        if (job->added && !B) failed = -1;
#pragma omp for schedule(static)
        for (int64_t n = 0; n < blocks_of(job->outputs); n++) {
            if (job->added && !B) continue;
            if (job->scales) multiply_block(job, n, B, 1);
            else multiply_block(job, n, B, 0);
        }
        release_tiles();
    }
    return failed;
}
#else
int mg_has_tiles(void) { return 0; }

static int multiply_tiles(const product_t *job, int threads) { return -1; }
#endif

/* The plain loop. Nothing is added there. */
static void multiply_plainly(const product_t *job, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t o = 0; o < job->outputs; o++)
        for (int64_t t = 0; t < job->tokens; t++) {
            const char *const x = job->x + t * job->x_row;
            float value = 0;
            int32_t whole = 0;
            for (int64_t i = 0; i < job->inputs; i++)
                if (job->scales)
                    whole += ((const uint8_t *)x)[i] * ((const int8_t *)job->weight)[tiled(o, i, job->inputs, 1)];
                else
                    value += widen(x, i, BF16) * widen(job->weight, tiled(o, i, job->inputs, 2), BF16);
            if (job->scales) value = (float)(whole - job->sums[o]) * job->scales[o] * job->x_scales[t];
            if (job->type == FP32) ((float *)job->y)[t * job->outputs + o] = value;
            else ((uint16_t *)job->y)[t * job->outputs + o] = narrow(value);
        }
}

static int has_tiles(void) {
    static int known = -1;
    if (known < 0) known = mg_has_tiles();
    return known;
}

static int multiply(const product_t *job, int threads) {
    if (has_tiles()) return multiply_tiles(job, threads);
    multiply_plainly(job, threads);
    return 0;
}

/* In bf16, and so is y. x: (tokens, inputs), rows x_row apart; y: (tokens, outputs), side by side. */
void mg_multiply(const uint16_t *x, int64_t x_row, int64_t tokens, const void *weight, int64_t inputs, int64_t outputs,
                 uint16_t *y, int threads) {
    const product_t job = {(const char *)x, x_row * 2, tokens, weight, inputs, outputs, y, BF16, NULL, NULL, NULL, NULL};
    multiply(&job, threads);
}

/* In bytes, and y in `type`: see product_t. codes: (tokens, inputs), side by side. */
void mg_multiply_bytes(const uint8_t *codes, const float *x_scales, int64_t tokens, const void *weight, const float *scales,
                       const int32_t *sums, int64_t inputs, int64_t outputs, void *y, int type, int threads) {
    const product_t job = {(const char *)codes, inputs, tokens, weight, inputs, outputs, y, type, x_scales, scales, sums, NULL};
    multiply(&job, threads);
}
