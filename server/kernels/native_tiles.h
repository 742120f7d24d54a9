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

#include "native_coded.h"

/* A product. In bytes x is codes with 128 for zero, and y = (sum - sums[o]) * scales[o] * x_scales[t], where sums[o] is 128
   times the sum of the output's codes. In bf16 there are none of these. */
typedef struct {
    const char *x;
    int64_t x_row; /* bytes */
    int64_t tokens;
    const char *weight;
    int64_t coded; /* whether the weight is one of mg_code */
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
#define ON_TILES __attribute__((target("arch=x86-64-v4,avx512vbmi2,amx-tile,amx-bf16,amx-int8")))
#define ON_TILES_INLINE static inline __attribute__((always_inline, target("arch=x86-64-v4,avx512vbmi2,amx-tile,amx-bf16,amx-int8")))
#define ASK_FOR_STATE 0x1023 /* ARCH_REQ_XCOMP_PERM */
#define TILE_DATA 18
#define AHEAD 8 /* steps that the weight is asked for before it is used, into the second-level cache */

/* Whether this processor has the unit, and the system lets this process use it. */
int mg_has_tiles(void) {
    unsigned a, b, c, d;
    __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
    const unsigned all = 1u << 22 | 1u << 24 | 1u << 25;
    return (d & all) == all && __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512vbmi2") &&
           !syscall(SYS_arch_prctl, ASK_FOR_STATE, TILE_DATA);
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

#define STEP_BYTES (SIDE_BY_SIDE * TILE_BYTES) /* of a block's weight */
#define STEP_NUMBERS (STEP_BYTES / 2)
#define AHEAD_CODED (AHEAD * coded_bytes(STEP_NUMBERS))

ON_TILES_INLINE void ask_for(const char *from, int64_t count) {
    for (int64_t n = 0; n < count; n += LINE) _mm_prefetch(from + n, _MM_HINT_T1);
}

/* `count` numbers from `first` on again, as decode_plainly has them. What lies so many bytes ahead is asked for. `odd` is no
   odd number behind the first of them; returns the next behind all. */
ON_TILES_INLINE const odd_t *decode_tiles(const coded_t *from, int64_t first, const int64_t count, const int64_t ahead,
                                          const odd_t *odd, uint16_t *into) {
    const uint8_t *group = from->groups + coded_bytes(first);
    const __m512i exponents = _mm512_loadu_si512(from->exponents), kept = _mm512_set1_epi16((short)KEPT);
    uint16_t *to = into;
    for (int64_t n = 0; n < count / GROUP; n++, group += GROUP_BYTES, to += GROUP) {
        const __m512i codes = _mm512_loadu_si512(group);
        const __m512i one = _mm512_loadu_si512(group + DEEP), two = _mm512_loadu_si512(group + 2 * DEEP);
        ask_for((const char *)group + ahead, ahead ? GROUP_BYTES : 0);
#define SELECT 0xca /* of each bit: kept ? word : exponents */
#define ROW(row, word, codes)                                                                                           \
    _mm512_store_si512(to + row * COLUMNS,                                                                               \
                       _mm512_ternarylogic_epi64(kept, word, _mm512_permutexvar_epi16(codes, exponents), SELECT))
        ROW(0, _mm512_shldi_epi16(one, one, 8), codes);
        ROW(1, one, _mm512_srli_epi16(codes, 4));
        ROW(2, _mm512_shldi_epi16(two, two, 8), _mm512_srli_epi16(codes, 8));
        ROW(3, two, _mm512_srli_epi16(codes, 12));
#undef SELECT
#undef ROW
    }
    while (odd < from->behind && odd->at < first) odd++;
    for (; odd < from->behind && odd->at < first + count; odd++) into[odd->at - first] = odd->value;
    __asm__ volatile("" ::: "memory"); /* the compiler does not know that tiles are loaded from there */
    return odd;
}

/* At most TILE tokens with a step of a block. */
ON_TILES_INLINE void multiply_step(const char *x, int64_t x_row, const char *w, const int in_bytes) {
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

/* At most TILE tokens with a block of outputs: the weight comes from memory and is asked for ahead. */
ON_TILES_INLINE void multiply_few(const char *x, int64_t x_row, const char *w, int64_t steps, const int in_bytes) {
    clear_sums();
    for (int64_t i = 0; i < steps; i++, x += DEEP, w += STEP_BYTES) {
        ask_for(w + AHEAD * STEP_BYTES, STEP_BYTES);
        multiply_step(x, x_row, w, in_bytes);
    }
}

/* The same of a weight in codes: a step is decoded while the one before it is multiplied. Of the tiles so many steps are kept
   at a time, two at least. */
ON_TILES_INLINE void multiply_few_coded(const char *x, int64_t x_row, const coded_t *w, int64_t steps, uint16_t *tiles,
                                        int64_t kept) {
    const odd_t *odd = decode_tiles(w, 0, STEP_NUMBERS, AHEAD_CODED, w->odd, tiles);
    clear_sums();
    for (int64_t i = 0; i < steps; i++, x += DEEP) {
        const int64_t next = i + 1;
        uint16_t *const into = tiles + next % kept * STEP_NUMBERS;
        if (next < steps) odd = decode_tiles(w, next * STEP_NUMBERS, STEP_NUMBERS, AHEAD_CODED, odd, into);
        multiply_step(x, x_row, (const char *)(tiles + i % kept * STEP_NUMBERS), 0);
    }
}

/* 2 * TILE tokens with a step of two tiles of outputs: sums[2 * x + w]. */
ON_TILES_INLINE void multiply_pairs(const char *x, int64_t x_row, const char *w, const int in_bytes) {
    _tile_loadd(4, x, x_row);
    _tile_loadd(6, w, 64);
    DOT(0, 4, 6);
    _tile_loadd(7, w + TILE_BYTES, 64);
    DOT(1, 4, 7);
    _tile_loadd(5, x + TILE * x_row, x_row);
    DOT(2, 5, 6);
    DOT(3, 5, 7);
}

/* 2 * TILE tokens with two tiles of outputs. Meanwhile so many lines a step are asked for from `next` on. Returns what is next
   then. */
ON_TILES_INLINE const char *multiply_many(const char *x, int64_t x_row, const char *w, int64_t steps, const char *next,
                                          int64_t lines, const int in_bytes) {
    clear_sums();
    for (int64_t i = 0; i < steps; i++, x += DEEP, w += STEP_BYTES, next += lines * LINE) {
        ask_for(next, lines * LINE);
        multiply_pairs(x, x_row, w, in_bytes);
    }
    return next;
}

/* The same of a weight in codes, which is decoded into its tiles meanwhile, from the o-th tile of each step on. */
ON_TILES_INLINE void multiply_many_coded(const char *x, int64_t x_row, const coded_t *w, int64_t o, int64_t steps,
                                         uint16_t *tiles) {
    const int64_t first = o * TILE * COLUMNS, count = STEP_NUMBERS / 2;
    const odd_t *odd = decode_tiles(w, first, count, 0, w->odd, tiles + first);
    clear_sums();
    for (int64_t i = 0; i < steps; i++, x += DEEP) {
        const int64_t own = i * STEP_NUMBERS + first, next = own + STEP_NUMBERS;
        if (!o) ask_for((const char *)w->groups + coded_bytes(i * STEP_NUMBERS) + AHEAD_CODED, coded_bytes(STEP_NUMBERS));
        if (i + 1 < steps) odd = decode_tiles(w, next, count, 0, odd, tiles + next);
        multiply_pairs(x, x_row, (const char *)(tiles + own), 0);
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

/* B: room for the terms' tiles; tiles: for the weight's, where it is in codes and tokens are more than TILE. The first tokens'
   product decodes it. */
ON_TILES_INLINE void multiply_block(const product_t *job, int64_t block, char *B, uint16_t *tiles, const int in_bytes,
                                    const int in_codes) {
    const int64_t steps = job->inputs * (in_bytes ? 1 : 2) / DEEP, whole = steps * STEP_BYTES;
    const int64_t size = in_codes ? coded_bytes(whole / 2) : whole, x_row = job->x_row;
    const int64_t first = block * BLOCK, outputs = at_most(BLOCK, job->outputs - first);
    const char *const w = in_codes ? (const char *)tiles : job->weight + block * size;
    float sums[4 * TILE * TILE] __attribute__((aligned(64))), terms[4 * TILE * TILE] __attribute__((aligned(64)));
    uint16_t two[2 * STEP_NUMBERS] __attribute__((aligned(64)));
    coded_t coded;
    int64_t t = 0;
    if (in_codes) coded = coded_block(job->weight, job->outputs, job->inputs, block);
    if (job->added) pack_block(job->added, first, B);
    if (job->tokens >= 2 * TILE) {
        const int64_t times = job->tokens / (2 * TILE) - in_codes, calls = times * ((outputs + 2 * TILE - 1) / (2 * TILE));
        const int64_t lines = calls ? (size / LINE + calls * steps - 1) / (calls * steps) : 0;
        const char *next = job->weight + (block + 1) * size;
        set_tiles(TILE);
        for (; t + 2 * TILE <= job->tokens; t += 2 * TILE)
            for (int64_t o = 0; o < outputs; o += 2 * TILE) {
                const char *const x = job->x + t * x_row;
                if (in_codes && !t) multiply_many_coded(x, x_row, &coded, o / TILE, steps, tiles);
                else next = multiply_many(x, x_row, w + o / TILE * TILE_BYTES, steps, next, lines, in_bytes);
                STORE_SUMS(add_many(job->added, t / TILE, first, o / TILE, B));
                for (int n = 0; n < 4; n++)
                    if (o + n % 2 * TILE < outputs)
                        round_tile(job, sums + n * TILE * TILE, terms + n * TILE * TILE, t + n / 2 * TILE, TILE,
                                   first + o + n % 2 * TILE, in_bytes);
            }
    }
    for (; t < job->tokens; t += TILE) {
        const int64_t rows = at_most(TILE, job->tokens - t);
        const char *const x = job->x + t * x_row;
        set_tiles(rows);
        if (in_codes && job->tokens <= TILE) multiply_few_coded(x, x_row, &coded, steps, two, 2);
        else if (in_codes && !t) multiply_few_coded(x, x_row, &coded, steps, tiles, steps);
        else multiply_few(x, x_row, w, steps, in_bytes);
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
        const int decodes = job->coded && job->tokens > TILE;
        uint16_t *const tiles = decodes ? room_for(DECODED, block_numbers(job->inputs) * sizeof *tiles) : NULL;
        const int lacks = (job->added && !B) || (decodes && !tiles);
        if (lacks) failed = -1;
#pragma omp for schedule(static)
        for (int64_t n = 0; n < blocks_of(job->outputs); n++) {
            if (lacks) continue;
            if (job->scales) multiply_block(job, n, B, NULL, 1, 0);
            else if (job->coded) multiply_block(job, n, B, tiles, 0, 1);
            else multiply_block(job, n, B, NULL, 0, 0);
        }
        release_tiles();
    }
    return failed;
}
#else
int mg_has_tiles(void) { return 0; }

static int multiply_tiles(const product_t *job, int threads) { return -1; }
#endif

/* The plain loop. Nothing is added there. Returns 0, or -1 when there is no memory. */
static int multiply_plainly(const product_t *job, int threads) {
    const int64_t numbers = block_numbers(job->inputs);
    int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < blocks_of(job->outputs); block++) {
        const char *w = job->weight + block * numbers * (job->scales ? 1 : 2);
        if (job->coded) {
            const coded_t coded = coded_block(job->weight, job->outputs, job->inputs, block);
            uint16_t *const tiles = room_for(DECODED, numbers * sizeof *tiles);
            if (!tiles) failed = -1;
            if (!tiles) continue;
            decode_plainly(&coded, numbers, tiles);
            w = (const char *)tiles;
        }
        for (int64_t o = block * BLOCK; o < at_most((block + 1) * BLOCK, job->outputs); o++)
            for (int64_t t = 0; t < job->tokens; t++) {
                const char *const x = job->x + t * job->x_row;
                float value = 0;
                int32_t whole = 0;
                for (int64_t i = 0; i < job->inputs; i++)
                    if (job->scales) whole += ((const uint8_t *)x)[i] * ((const int8_t *)w)[tiled(o % BLOCK, i, job->inputs, 1)];
                    else value += widen(x, i, BF16) * widen(w, tiled(o % BLOCK, i, job->inputs, 2), BF16);
                if (job->scales) value = (float)(whole - job->sums[o]) * job->scales[o] * job->x_scales[t];
                if (job->type == FP32) ((float *)job->y)[t * job->outputs + o] = value;
                else ((uint16_t *)job->y)[t * job->outputs + o] = narrow(value);
            }
    }
    return failed;
}

static int has_tiles(void) {
    static int known = -1;
    if (known < 0) known = mg_has_tiles();
    return known;
}

static int multiply(const product_t *job, int threads) {
    return has_tiles() ? multiply_tiles(job, threads) : multiply_plainly(job, threads);
}

/* In bf16, and so is y. x: (tokens, inputs), rows x_row apart; y: (tokens, outputs), side by side. The weight is one of mg_tile
   or, coded, of mg_code. Returns 0, or -1 when there is no memory. */
int mg_multiply(const uint16_t *x, int64_t x_row, int64_t tokens, const void *weight, int coded, int64_t inputs, int64_t outputs,
                uint16_t *y, int threads) {
    const product_t job = {(const char *)x, x_row * 2, tokens, weight, coded, inputs, outputs, y, BF16, NULL, NULL, NULL, NULL};
    return multiply(&job, threads);
}

/* In bytes, and y in `type`: see product_t. codes: (tokens, inputs), side by side. */
void mg_multiply_bytes(const uint8_t *codes, const float *x_scales, int64_t tokens, const void *weight, const float *scales,
                       const int32_t *sums, int64_t inputs, int64_t outputs, void *y, int type, int threads) {
    const product_t job = {(const char *)codes, inputs, tokens, weight, 0, inputs, outputs, y, type, x_scales, scales, sums, NULL};
    multiply(&job, threads);
}
