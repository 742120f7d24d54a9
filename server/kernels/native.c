/* The step's inner loops for a CPU: the gathered low-rank product, attention of decodes over the paged KV cache, and the
   small operations between the products, each in one pass.

   Plain C over pointers, called through ctypes (server/kernels/native.py), which says what each argument is. Numbers are
   fp32 inside, whatever they are stored as. Every function has a plain loop in Python that tests compare it with.

   The innermost loops (native_loops.h) are compiled for several instruction sets, of which the processor's best is
   taken; what is shared out among threads stands here.

   T tokens, I in, O out, R rank of one term. A is (R, I), B is (R, O), both row by row. */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#define X86
#include <immintrin.h>
#endif

#define TOKENS 12       /* tokens of one piece of work */
#define RANKS 8         /* rows of A of one piece of work */
#define OUTPUTS 1024    /* columns of B of one piece of work */
#define MEMBERS 8       /* Linears that read the same input, at most */
#define WIDEST 16       /* floats of the longest vector register */
#define LINE 64         /* bytes of a cache's line */
#define SOON 512        /* bytes that an adapter is asked for ahead */
#define ROWS_AT_ONCE 64 /* of the KV cache, widened for all query heads of a KV head */
#define FEW 65536       /* products and sums that one thread does before another has begun */
#define ABREAST 6       /* tokens whose sums with a panel fit the registers */
#define DEPTH 1024      /* inputs of a panel that all tokens take before the next: they stay in a cache near by */
#define WIDE_DEPTH 256  /* inputs of a panel in bytes that are kept in fp32 for the next tokens, in the nearest cache */
#define PANEL_SOON 2048 /* bytes that a panel is asked for ahead */
#define WIDENED 65536   /* numbers of a weight that are widened at a time: they stay in a second-level cache */

enum { FP32, BF16, FP16 };

#define UNROLL _Pragma("GCC unroll 8")
#define UNROLL16 _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline))

/* One adapter's term at one Linear. `member` is the Linear's place among those that read the same input. */
typedef struct {
    const void *A, *B;
    int64_t rank, outputs, member;
    int32_t A_type, B_type;
    float scaling;
    int32_t unused;
} term_t;

/* All terms of one adapter at Linears that read the same input. */
typedef struct {
    const term_t *terms;
    int64_t count;
} terms_t;

/* Neighbouring tokens that carry the same adapters: pairs[first_pair ... + pairs). */
typedef struct {
    int64_t first, count, first_pair, pairs;
} run_t;

typedef struct {
    int64_t column;
    float gate;
    int32_t unused;
} pair_t;

/* What one adapter does to what a Linear is given, or to what it has made: x * (1 + scale) + (R - I) x + bias. R - I are
   blocks, each (inputs, outputs), that take their features `stride` apart: see server/primitives/rotate.py. NULL: nothing. */
typedef struct {
    const void *scale, *bias, *blocks;
    int64_t size, stride;
} change_t;

/* What one adapter does at one Linear, or at one norm, whose weight gains something. */
typedef struct {
    change_t in, out;
    const void *gain;
} site_t;

/* Where adapters do that: by column, and by the number of the Linear or norm; a column may have none at all. */
typedef struct {
    const site_t *const *held; /* (columns) */
    int64_t number;
    int behind; /* the product, or before it */
} where_t;

INLINE float widen(const void *p, int64_t at, const int type) {
    if (type == FP32) return ((const float *)p)[at];
    uint32_t bits = (uint32_t)((const uint16_t *)p)[at] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* To nearest, ties to even; what is no number stays none. */
INLINE uint16_t narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* What an adapter of a token does there; NULL: nothing, or its gate is zero. */
INLINE const site_t *site_of(const pair_t *pair, const where_t *where) {
    const site_t *const own = pair->gate != 0 && where->held ? where->held[pair->column] : NULL;
    return own ? own + where->number : NULL;
}

INLINE const change_t *change_of(const pair_t *pair, const where_t *where) {
    const site_t *const site = site_of(pair, where);
    const change_t *const change = site ? where->behind ? &site->out : &site->in : NULL;
    return change && (change->scale || change->bias || change->blocks) ? change : NULL;
}

INLINE const void *gain_of(const pair_t *pair, const where_t *where) {
    const site_t *const site = site_of(pair, where);
    return site ? site->gain : NULL;
}

static int threads_for(int64_t work, int threads) { return work < FEW ? 1 : threads; }

static int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }

#ifdef X86
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#define LANES 16
#define NAME(x) x##_v4
#include "native_loops.h"
#undef LANES
#undef NAME
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define LANES 8
#define NAME(x) x##_v3
#include "native_loops.h"
#undef LANES
#undef NAME
#pragma GCC pop_options
#endif
#define LANES 4
#define NAME(x) x##_any
#include "native_loops.h"
#undef LANES
#undef NAME

/* The loops for one instruction set, by what the numbers are stored as. */
typedef struct {
    void (*shrink[3])(const float *x, int64_t x_row, int64_t tokens, const void *A, int64_t rank, int64_t ranks,
                      int64_t inputs, float *middle, int64_t middle_row);
    void (*expand[3])(const float *middle, int64_t row, int64_t tokens, const void *B, int64_t ranks, int64_t outputs,
                      int64_t at, int64_t count, float *into, int64_t into_row);
    void (*attend[2])(const float *query, const void *keys, const void *values, const int64_t *blocks,
                      int64_t block_size, int64_t first, int64_t length, int64_t group, int64_t dim, float softcap,
                      const float *sinks, float *scores, int64_t padded, float *tile, float *out);
    void (*norm[2])(const void *x, const void *weight, float offset, float eps, void *out, int64_t count);
    void (*add[2])(const void *x, void *y, int64_t count);
    void (*swiglu[2])(const void *a, const void *b, void *out, int64_t count);
    void (*rotate[2])(const void *x, const void *cos, const void *sin, void *out, int64_t half, int64_t count);
    float (*round[2])(const void *x, uint8_t *codes, int64_t count, float least);
    void (*scale[2])(const float *x, float scale, void *out, int64_t count);
    void (*gain[2])(const void *x, const void *weight, float offset, float eps, void *out, int64_t count,
                    const pair_t *pairs, int64_t some, const where_t *where, float *wide);
    void (*change[2])(void *x, const pair_t *pairs, int64_t some, const where_t *where, int64_t count, float *wide);
    void (*widen_row)(const uint16_t *from, float *to, int64_t count);
    void (*narrow_row)(const float *from, uint16_t *to, int64_t count);
    void (*widen_4)(const uint8_t *codes, const float *levels, const float *scales, const float *offsets, int64_t inputs,
                    int64_t group, float *into);
    void (*widen_8)(const uint8_t *codes, float scale, int64_t inputs, float *into);
    void (*multiply_panel[2])(const float *x, int64_t x_row, int64_t tokens, const char *panel, int64_t inputs, float *y,
                              int64_t y_row);
    int64_t lanes;
} loops_t;

#define LOOPS(NAME)                                          \
    {                                                        \
        {NAME(shrink_FP32), NAME(shrink_BF16), NAME(shrink_FP16)}, \
        {NAME(expand_FP32), NAME(expand_BF16), NAME(expand_FP16)}, \
        {NAME(attend_FP32), NAME(attend_BF16)}, {NAME(norm_FP32), NAME(norm_BF16)}, \
        {NAME(add_FP32), NAME(add_BF16)}, {NAME(swiglu_FP32), NAME(swiglu_BF16)}, {NAME(rotate_FP32), NAME(rotate_BF16)}, \
        {NAME(round_FP32), NAME(round_BF16)}, {NAME(scale_FP32), NAME(scale_BF16)}, \
        {NAME(gain_FP32), NAME(gain_BF16)}, {NAME(change_FP32), NAME(change_BF16)}, \
        NAME(widen_row), NAME(narrow_row), NAME(widen_4), NAME(widen_8), \
        {NAME(multiply_panel_int8), NAME(multiply_panel_bf16)}, sizeof(NAME(vec)) / 4 }
#define V4(x) x##_v4
#define V3(x) x##_v3
#define ANY(x) x##_any

static const loops_t *loops(void) {
    static const loops_t any = LOOPS(ANY);
#ifdef X86
    static const loops_t v3 = LOOPS(V3), v4 = LOOPS(V4);
    if (__builtin_cpu_supports("x86-64-v4")) return &v4;
    if (__builtin_cpu_supports("x86-64-v3")) return &v3;
#endif
    return &any;
}

/* Room that the calling thread keeps from call to call, for each purpose its own. */
enum { IN_LOOPS, IN_PRODUCT, DECODED, FOR_TERMS_ADDED, PURPOSES };

static void *room_for(int purpose, int64_t size) {
    static _Thread_local void *kept[PURPOSES];
    static _Thread_local int64_t sizes[PURPOSES];
    if (sizes[purpose] < size) {
        free(kept[purpose]);
        kept[purpose] = aligned_alloc(LINE, (size + LINE - 1) / LINE * LINE);
        sizes[purpose] = kept[purpose] ? size : 0;
    }
    return kept[purpose];
}

static float *room(int64_t floats) { return room_for(IN_LOOPS, floats * sizeof(float)); }

/* A call of mg_lowrank: what all of its pieces share. A piece is a few neighbouring tokens that carry the same adapters. */
typedef struct {
    const loops_t *fast;
    const void *x;
    int64_t x_row, inputs;
    int type;
    void *const *y;
    const int64_t *y_row;
    int64_t members;
    const pair_t *pairs;
    const terms_t *held;
} lowrank_t;

/* One term after another of the adapters that a run's tokens carry, those with a gate of zero left out. */
#define FOR_TERMS(job, run, pair, term)                                                                          \
    for (const pair_t *pair = (job)->pairs + (run)->first_pair; pair < (job)->pairs + (run)->first_pair + (run)->pairs; \
         pair++)                                                                                                 \
        for (const term_t *term = (job)->held[pair->column].terms;                                               \
             pair->gate != 0 && term < (job)->held[pair->column].terms + (job)->held[pair->column].count; term++)

/* Tokens of a run's pieces: about as many in each, and the same number of pieces for each thread. */
static int64_t piece_of(const run_t *run, int threads) {
    if (run->count <= TOKENS) return TOKENS;
    const int64_t rounds = (run->count + TOKENS * threads - 1) / (TOKENS * threads), pieces = rounds * threads;
    return (run->count + pieces - 1) / pieces;
}

static int64_t ranks_of(const lowrank_t *job, const run_t *run) {
    int64_t total = 0;
    FOR_TERMS(job, run, pair, term) total += term->rank;
    return total;
}

/* middles[term][t] = gate * scaling * A x[t], a share of the ranks: every `all`-th from `me` on, RANKS at a time. */
static void shrink_piece(const lowrank_t *job, const run_t *run, int64_t first, int64_t tokens, float *middles, float *wide_x,
                         int me, int all) {
    const float *x = (const float *)job->x + first * job->x_row;
    int64_t x_row = job->x_row, work = 0;
    if (job->type == BF16) {
        for (int64_t t = 0; t < tokens; t++)
            job->fast->widen_row((const uint16_t *)job->x + (first + t) * job->x_row, wide_x + t * job->inputs, job->inputs);
        x = wide_x, x_row = job->inputs;
    }
    FOR_TERMS(job, run, pair, term) {
        const float factor = pair->gate * term->scaling;
        for (int64_t r = 0; r < term->rank; r += RANKS) {
            if (work++ % all != me) continue;
            const int64_t ranks = at_most(term->rank - r, RANKS);
            job->fast->shrink[term->A_type](x, x_row, tokens, term->A, r, ranks, job->inputs, middles + r, term->rank);
            for (int64_t t = 0; t < tokens; t++)
                for (int64_t i = r; i < r + ranks; i++) middles[t * term->rank + i] *= factor;
        }
        middles += tokens * term->rank;
    }
}

/* y[t] += sum of B middles[term][t], a share of the outputs. In bf16 aside, so that it is rounded once. */
static void expand_piece(const lowrank_t *job, const run_t *run, int64_t first, int64_t tokens, const float *middles, int me,
                         int all) {
    float tile[TOKENS * OUTPUTS];
    int64_t widest[MEMBERS] = {0}, work = 0;
    FOR_TERMS(job, run, pair, term) widest[term->member] = term->outputs;
    for (int64_t m = 0; m < job->members; m++)
        for (int64_t o = 0; o < widest[m]; o += OUTPUTS) {
            if (work++ % all != me) continue;
            const int64_t count = at_most(widest[m] - o, OUTPUTS), row = job->y_row[m];
            uint16_t *const y = (uint16_t *)job->y[m] + first * row + o;
            float *const into = job->type == FP32 ? (float *)job->y[m] + first * row + o : tile;
            const int64_t into_row = job->type == FP32 ? row : OUTPUTS;
            for (int64_t t = 0; t < tokens && job->type != FP32; t++)
                job->fast->widen_row(y + t * row, tile + t * OUTPUTS, count);
            const float *middle = middles;
            FOR_TERMS(job, run, pair, term) {
                if (term->member == m)
                    job->fast->expand[term->B_type](middle, term->rank, tokens, term->B, term->rank, term->outputs, o, count,
                                                    into, into_row);
                middle += tokens * term->rank;
            }
            for (int64_t t = 0; t < tokens && job->type != FP32; t++)
                job->fast->narrow_row(tile + t * OUTPUTS, y + t * row, count);
        }
}

static int64_t bytes(int64_t numbers, int type) { return numbers * (type == FP32 ? 4 : 2); }

static void *moved(const void *p, int64_t numbers, int type) { return (char *)p + bytes(numbers, type); }

/* What mg_lowrank does, for the runs that are not `taken`; NULL: none is. */
static int add_terms(const lowrank_t *job, const run_t *runs, int64_t run_count, const char *taken, int threads) {
    int64_t most = 0, needed = 0, pieces = 0;
#define FOR_RUNS(run)                                                    \
    for (const run_t *run = runs; run < runs + run_count; run++)         \
        if (!taken || !taken[run - runs])
    FOR_RUNS(run) {
        const int64_t ranks = ranks_of(job, run);
        needed += run->count * ranks;
        most = ranks > most ? ranks : most;
    }
    if (!needed) return 0;
    threads = threads_for(needed * job->inputs, threads);
    FOR_RUNS(run) pieces += (run->count + piece_of(run, threads) - 1) / piece_of(run, threads);
    const int together = pieces < threads;
    float *const shared = together ? room(needed + threads * TOKENS * job->inputs) : NULL;
    if (together && !shared) return -1;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        const int me = omp_get_thread_num(), all = omp_get_num_threads();
        float *const own = together ? shared + needed + me * TOKENS * job->inputs : room(TOKENS * (job->inputs + most));
        if (!own) failed = -1;
        int64_t work = 0, at = 0;
        if (own) FOR_RUNS(run) {
            const int64_t piece = piece_of(run, all);
            for (int64_t t = 0; t < run->count; t += piece) {
                const int64_t first = run->first + t, some = at_most(run->count - t, piece);
                if (together) {
                    shrink_piece(job, run, first, some, shared + at, own, me, all);
                    at += some * ranks_of(job, run);
                } else if (work++ % all == me) {
                    shrink_piece(job, run, first, some, own + TOKENS * job->inputs, own, 0, 1);
                    expand_piece(job, run, first, some, own + TOKENS * job->inputs, 0, 1);
                }
            }
        }
        if (together) {
#pragma omp barrier
            at = 0;
            FOR_RUNS(run) {
                const int64_t piece = piece_of(run, all);
                for (int64_t t = 0; t < run->count; t += piece) {
                    const int64_t some = at_most(run->count - t, piece);
                    expand_piece(job, run, run->first + t, some, shared + at, me, all);
                    at += some * ranks_of(job, run);
                }
            }
        }
    }
    return failed;
}

/* y_m[t] += sum_k g_k scaling_k B_k A_k x[t], for each of a token's adapters k and each Linear m that reads x.

   x: (tokens, inputs), rows `x_row` apart. y[m]: rows y_row[m] apart. All of `type`, FP32 or BF16. held[column]: the
   terms of an adapter here; none where its count is 0. A pair whose gate is 0 is left out, and what overflows in one
   adapter stays with the tokens that carry it. Threads share out the pieces and meet at the end alone; where there are
   fewer pieces than threads, they share out each. Returns 0, or -1 when there is no memory. */
int mg_lowrank(const void *x, int64_t x_row, int64_t tokens, int64_t inputs, int type, void *const *y,
               const int64_t *y_row, int64_t members, const run_t *runs, int64_t run_count, const pair_t *pairs,
               const terms_t *held, int threads) {
    const lowrank_t job = {loops(), x, x_row, inputs, type, y, y_row, members, pairs, held};
    return add_terms(&job, runs, run_count, NULL, threads);
}

/* The newest tokens of some sequences over their cached positions: what all of them share. */
typedef struct {
    const loops_t *fast;
    const void *query;
    int64_t head_row, token_row; /* query[h][b] is at query + h * head_row + b * token_row, (dim) */
    void *out;                   /* (sequences, heads, dim) */
    const void *keys, *values;   /* (kv_heads, rows, dim) */
    int64_t rows, sequences, heads, kv_heads, dim; /* dim a multiple of 16 */
    int type;
    const int64_t *blocks, *lengths; /* (sequences, width), (sequences) */
    int64_t width, block_size, window; /* window: 0 for none */
    float scale, softcap;              /* softcap: 0 for none */
    const float *sinks;                /* (heads) or NULL */
} attention_t;

/* The query heads of KV head n % kv_heads in sequence n / kv_heads. Returns 0, or -1 when there is no memory. */
static int attend_piece(const attention_t *job, int64_t n) {
    const int64_t group = job->heads / job->kv_heads, dim = job->dim, b = n / job->kv_heads, head = n % job->kv_heads;
    const int64_t length = job->lengths[b];
    const int64_t first = job->window && length > job->window ? length - job->window : 0;
    const int64_t padded = (length - first + WIDEST - 1) / WIDEST * WIDEST;
    float *const own = room(group * (padded + 2 * dim) + ROWS_AT_ONCE * dim);
    if (!own) return -1;
    float *const wide = own + group * padded, *const made = wide + group * dim, *const tile = made + group * dim;
    for (int64_t g = 0; g < group; g++) {
        const int64_t at = (head * group + g) * job->head_row + b * job->token_row;
        for (int64_t d = 0; d < dim; d++) {
            wide[g * dim + d] = widen(job->query, at + d, job->type) * job->scale;
            made[g * dim + d] = 0;
        }
    }
    const int64_t at = head * job->rows * dim;
    job->fast->attend[job->type](wide, moved(job->keys, at, job->type), moved(job->values, at, job->type),
                                 job->blocks + b * job->width, job->block_size, first, length, group, dim, job->softcap,
                                 job->sinks ? job->sinks + head * group : NULL, own, padded, tile, made);
    for (int64_t i = 0; i < group * dim; i++) {
        const int64_t to = (b * job->heads + head * group) * dim + i;
        if (job->type == FP32) ((float *)job->out)[to] = made[i];
        else ((uint16_t *)job->out)[to] = narrow(made[i]);
    }
    return 0;
}

static int64_t attention_work(const attention_t *job) {
    int64_t seen = 0;
    for (int64_t b = 0; b < job->sequences; b++) seen += job->lengths[b];
    return seen * job->heads * job->dim;
}

/* The newest token of each sequence over its cached positions: see attention_t. Returns 0, or -1 without memory. */
int mg_attend(const void *query, int64_t head_row, int64_t token_row, void *out, const void *keys, const void *values,
              int64_t rows, int type, int64_t sequences, int64_t heads, int64_t kv_heads, int64_t dim,
              const int64_t *blocks, int64_t width, const int64_t *lengths, int64_t block_size, int64_t window,
              float scale, float softcap, const float *sinks, int threads) {
    const attention_t job = {loops(), query, head_row, token_row, out, keys, values, rows, sequences, heads, kv_heads, dim,
                             type, blocks, lengths, width, block_size, window, scale, softcap, sinks};
    int failed = 0;
#pragma omp parallel for num_threads(threads_for(attention_work(&job), threads)) schedule(dynamic, 1)
    for (int64_t n = 0; n < sequences * kv_heads; n++)
        if (attend_piece(&job, n)) failed = -1;
    return failed;
}

/* RMSNorm of rows `x_row` apart into rows that lie side by side. weight has their type. */
void mg_norm(const void *x, int64_t x_row, int64_t rows, int64_t count, const void *weight, float offset, float eps,
             void *out, int type, int threads) {
    const loops_t *const fast = loops();
#pragma omp parallel for num_threads(threads_for(rows * count, threads)) schedule(static)
    for (int64_t n = 0; n < rows; n++)
        fast->norm[type](moved(x, n * x_row, type), weight, offset, eps, moved(out, n * count, type), count);
}

/* y += x, rounded, then RMSNorm of that. Rows lie side by side. */
void mg_add_and_norm(const void *x, void *y, int64_t rows, int64_t count, const void *weight, float offset, float eps,
                     void *out, int type, int threads) {
    const loops_t *const fast = loops();
#pragma omp parallel for num_threads(threads_for(rows * count, threads)) schedule(static)
    for (int64_t n = 0; n < rows; n++) {
        void *const own = moved(y, n * count, type);
        fast->add[type](moved(x, n * count, type), own, count);
        fast->norm[type](own, weight, offset, eps, moved(out, n * count, type), count);
    }
}

/* silu(a) * b: rows a_row and b_row apart, into rows that lie side by side. */
void mg_swiglu(const void *a, int64_t a_row, const void *b, int64_t b_row, int64_t rows, int64_t count, void *out,
               int type, int threads) {
    const loops_t *const fast = loops();
#pragma omp parallel for num_threads(threads_for(rows * count, threads)) schedule(static)
    for (int64_t n = 0; n < rows; n++)
        fast->swiglu[type](moved(a, n * a_row, type), moved(b, n * b_row, type), moved(out, n * count, type), count);
}

/* Each row of x in codes of a byte, zero at 128, with a scale of its own, `least` at least. Rows of x `x_row` apart. */
void mg_round(const void *x, int64_t x_row, int64_t rows, int64_t count, uint8_t *codes, float *scales, float least,
              int type, int threads) {
    const loops_t *const fast = loops();
#pragma omp parallel for num_threads(threads_for(rows * count, threads)) schedule(static)
    for (int64_t n = 0; n < rows; n++)
        scales[n] = fast->round[type](moved(x, n * x_row, type), codes + n * count, count, least);
}

/* Each row of x times its scale. x is fp32 and lies side by side like out, which is of `type`. */
void mg_scale(const float *x, const float *scales, int64_t rows, int64_t count, void *out, int type, int threads) {
    const loops_t *const fast = loops();
#pragma omp parallel for num_threads(threads_for(rows * count, threads)) schedule(static)
    for (int64_t n = 0; n < rows; n++)
        fast->scale[type](x + n * count, scales[n], moved(out, n * count, type), count);
}

static int changes(const where_t *where, const pair_t *pairs, const run_t *run) {
    for (const pair_t *pair = pairs + run->first_pair; pair < pairs + run->first_pair + run->pairs; pair++)
        if (change_of(pair, where)) return 1;
    return 0;
}

static int gains(const where_t *where, const pair_t *pairs, const run_t *run) {
    for (const pair_t *pair = pairs + run->first_pair; pair < pairs + run->first_pair + run->pairs; pair++)
        if (gain_of(pair, where)) return 1;
    return 0;
}

/* Each token t of the runs for which `used` holds, shared out among the threads. */
#define FOR_TOKENS(run, t, used)                                                                                    \
    int64_t work = 0;                                                                                               \
    for (const run_t *run = runs; run < runs + run_count; run++)                                                    \
        for (int64_t t = run->first, own = used; own && t < run->first + run->count; t++)                           \
            if (work++ % omp_get_num_threads() == omp_get_thread_num())

/* x, where it is, becomes x + sum_k g_k (s_k x + (R_k - I) x + b_k) over the adapters k of a token; of none it keeps its bits.
   x: (tokens, features), rows x_row apart, of `type`, as all of the adapters is. Returns 0, or -1 when there is no memory. */
int mg_change(void *x, int64_t x_row, int64_t features, int type, const run_t *runs, int64_t run_count, const pair_t *pairs,
              const site_t *const *held, int64_t number, int behind, int threads) {
    const loops_t *const fast = loops();
    const where_t where = {held, number, behind};
    int64_t carrying = 0;
    int failed = 0;
    for (const run_t *run = runs; run < runs + run_count; run++) carrying += changes(&where, pairs, run) * run->count;
    if (!carrying) return 0;
#pragma omp parallel num_threads(threads_for(carrying * features, threads))
    {
        float *const wide = room(2 * features);
        if (!wide) failed = -1;
        FOR_TOKENS(run, t, wide && changes(&where, pairs, run))
            fast->change[type](moved(x, t * x_row, type), pairs + run->first_pair, run->pairs, &where, features, wide);
    }
    return failed;
}

/* What mg_norm gives, once more for the tokens whose adapters change the weight: to it add sum_k g_k gain_k. x and out:
   (tokens, features), side by side. Returns 0, or -1 when there is no memory. */
int mg_gain(const void *x, int64_t features, const void *weight, float offset, float eps, void *out, int type,
            const run_t *runs, int64_t run_count, const pair_t *pairs, const site_t *const *held, int64_t number, int threads) {
    const loops_t *const fast = loops();
    const where_t where = {held, number, 0};
    int64_t carrying = 0;
    int failed = 0;
    for (const run_t *run = runs; run < runs + run_count; run++) carrying += gains(&where, pairs, run) * run->count;
    if (!carrying) return 0;
#pragma omp parallel num_threads(threads_for(carrying * features, threads))
    {
        float *const wide = room(features);
        if (!wide) failed = -1;
        FOR_TOKENS(run, t, wide && gains(&where, pairs, run))
            fast->gain[type](moved(x, t * features, type), weight, offset, eps, moved(out, t * features, type), features,
                             pairs + run->first_pair, run->pairs, &where, wide);
    }
    return failed;
}

/* An RMSNorm of each head, of the activations' type. weight: (dim); NULL: there is none. */
typedef struct {
    const void *weight;
    float offset, eps;
} head_norm_t;

/* What stands before attention: queries rotated where they are, keys rotated on their way to the cache, values copied. Where
   there are norms, queries and keys take them before, where they are. */
typedef struct {
    const loops_t *fast;
    void *query; /* (tokens, heads, dim), rows of a token query_row apart; key and value alike, of kv_heads */
    int64_t query_row;
    void *key;
    int64_t key_row;
    const void *value;
    int64_t value_row, heads, kv_heads, dim;
    const void *cos, *sin; /* (tokens, rotated) */
    int64_t rotated;
    const int64_t *places; /* of each token in the cache */
    void *keys, *values;   /* (kv_heads, rows, dim) */
    int64_t rows;
    int type;
    head_norm_t query_norm, key_norm;
} storing_t;

static void take_norm(const storing_t *job, const head_norm_t *norm, void *head) {
    if (norm->weight) job->fast->norm[job->type](head, norm->weight, norm->offset, norm->eps, head, job->dim);
}

static void store_token(const storing_t *job, int64_t t) {
    const int type = job->type;
    const int64_t dim = job->dim, half = job->rotated / 2;
    const void *const c = moved(job->cos, t * job->rotated, type), *const s = moved(job->sin, t * job->rotated, type);
    for (int64_t h = 0; h < job->heads; h++) {
        void *const own = moved(job->query, t * job->query_row + h * dim, type);
        take_norm(job, &job->query_norm, own);
        job->fast->rotate[type](own, c, s, own, half, dim);
    }
    for (int64_t h = 0; h < job->kv_heads; h++) {
        const int64_t to = (h * job->rows + job->places[t]) * dim;
        void *const own = moved(job->key, t * job->key_row + h * dim, type);
        take_norm(job, &job->key_norm, own);
        job->fast->rotate[type](own, c, s, moved(job->keys, to, type), half, dim);
        memcpy(moved(job->values, to, type), moved(job->value, t * job->value_row + h * dim, type), bytes(dim, type));
    }
}

/* See storing_t. */
void mg_rotate_and_store(void *query, int64_t query_row, void *key, int64_t key_row, const void *value,
                         int64_t value_row, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t dim,
                         const void *cos, const void *sin, int64_t rotated, const int64_t *places, void *keys,
                         void *values, int64_t rows, int type, int threads) {
    const storing_t job = {loops(), query, query_row, key, key_row, value, value_row, heads, kv_heads, dim,
                           cos, sin, rotated, places, keys, values, rows, type, {NULL}, {NULL}};
#pragma omp parallel for num_threads(threads_for(tokens * heads * dim, threads)) schedule(static)
    for (int64_t t = 0; t < tokens; t++) store_token(&job, t);
}

/* An attention from its one product on: what mg_rotate_and_store does with the product, its bias and the norms behind it, then
   what mg_attend does for the first `sequences` tokens, each the newest of its sequence.

   made: (tokens, (heads + 2 * kv_heads) * dim), queries, keys and values side by side, which becomes what is attended
   with; bias: as long as a row, or NULL; norms: of queries and of keys. out: (tokens, heads, dim), of which the first
   `sequences` are written. Returns 0, or -1 when there is no memory. */
int mg_begin_attention(void *made, const void *bias, const head_norm_t norms[2], int64_t tokens, int64_t heads,
                       int64_t kv_heads, int64_t dim, const void *cos, const void *sin, int64_t rotated,
                       const int64_t *places, void *keys, void *values, int64_t rows, int type, int64_t sequences,
                       const int64_t *blocks, int64_t width, const int64_t *lengths, int64_t block_size, int64_t window,
                       float scale, void *out, int threads) {
    const loops_t *const fast = loops();
    const int64_t row = (heads + 2 * kv_heads) * dim;
    void *const key = moved(made, heads * dim, type), *const value = moved(made, (heads + kv_heads) * dim, type);
    const storing_t storing = {fast, made, row, key, row, value, row, heads, kv_heads, dim, cos, sin, rotated, places, keys,
                               values, rows, type, norms[0], norms[1]};
    const attention_t attention = {fast, made, dim, row, out, keys, values, rows, sequences, heads, kv_heads, dim,
                                   type, blocks, lengths, width, block_size, window, scale, 0, NULL};
    int failed = 0;
#pragma omp parallel num_threads(threads_for(attention_work(&attention) + tokens * row, threads))
    {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++) {
            if (bias) fast->add[type](bias, moved(made, t * row, type), row);
            store_token(&storing, t);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t n = 0; n < sequences * kv_heads; n++)
            if (attend_piece(&attention, n)) failed = -1;
    }
    return failed;
}

/* y = W x of a weight in few bits: w[o][i] = levels[code] * scales[o][i / group] + offsets[o][i / group].

   x: (tokens, inputs), rows `x_row` apart; y: (tokens, outputs); both of `type`, FP32 or BF16. With `levels`, 4 bits: inputs
   and group are multiples of 32. Without, float8 e4m3, a scale per output, no offsets. offsets may be NULL. Some outputs'
   weights are widened at a time, and multiplied with all tokens. Returns 0, or -1 when there is no memory. */
int mg_few_bits(const void *x, int64_t x_row, int64_t tokens, void *y, int type, const uint8_t *codes,
                const float *levels, const float *scales, const float *offsets, int64_t inputs, int64_t outputs,
                int64_t group, int threads) {
    const loops_t *const fast = loops();
    const int64_t groups = levels ? inputs / group : 1, row_bytes = levels ? inputs / 2 : inputs;
    int64_t rows = at_most(tokens > TOKENS ? WIDENED / inputs : RANKS, outputs / (4 * threads)) / RANKS * RANKS;
    if (rows < RANKS) rows = RANKS;
    const int64_t tile = rows * inputs + TOKENS * rows, widened = type == BF16 ? tokens * inputs : 0;
    float *const wide_x = room(widened + threads * tile);
    if (!wide_x) return -1;
#pragma omp parallel num_threads(threads)
    {
        float *const weights = wide_x + widened + omp_get_thread_num() * tile, *const answers = weights + rows * inputs;
        const float *own_x = x;
        int64_t own_row = x_row;
        if (type == BF16) {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < tokens; t++)
                fast->widen_row((const uint16_t *)x + t * x_row, wide_x + t * inputs, inputs);
            own_x = wide_x, own_row = inputs;
        }
#pragma omp for schedule(static)
        for (int64_t o = 0; o < outputs; o += rows) {
            const int64_t count = at_most(rows, outputs - o);
            for (int64_t r = 0; r < count; r++) {
                const uint8_t *const row = codes + (o + r) * row_bytes;
                const float *const own = offsets ? offsets + (o + r) * groups : NULL;
                if (levels)
                    fast->widen_4(row, levels, scales + (o + r) * groups, own, inputs, group, weights + r * inputs);
                else
                    fast->widen_8(row, scales[o + r], inputs, weights + r * inputs);
            }
            for (int64_t t = 0; t < tokens; t += TOKENS) {
                const int64_t some = at_most(TOKENS, tokens - t);
                float *const into = type == FP32 ? (float *)y + t * outputs + o : answers;
                fast->shrink[FP32](own_x + t * own_row, own_row, some, weights, 0, count, inputs, into,
                                   type == FP32 ? outputs : rows);
                for (int64_t a = 0; a < some && type != FP32; a++)
                    for (int64_t r = 0; r < count; r++)
                        ((uint16_t *)y)[(t + a) * outputs + o + r] = narrow(answers[a * rows + r]);
            }
        }
    }
    return 0;
}

/* Whether this processor's vectors are long enough for panels to be worth it: 8 floats or more. */
int mg_has_panels(void) { return loops()->lanes >= 8; }

/* Numbers that a weight takes in panels. */
int64_t mg_panels_size(int64_t outputs, int64_t inputs) {
    const int64_t panel = 2 * loops()->lanes;
    return (outputs + panel - 1) / panel * panel * inputs;
}

/* Where output j of a panel stands among the numbers of an input, which have `size` bytes each. */
static int64_t place_in_panel(int64_t j, int64_t lanes, int size) { return size == 2 ? j % lanes * 2 + j / lanes : j; }

/* A weight (outputs, inputs) in bf16 or int8, numbers of `size` bytes, into panels: see native_panels.h. */
void mg_panel(const char *weight, int64_t outputs, int64_t inputs, char *panels, int size, int threads) {
    const int64_t lanes = loops()->lanes, panel = 2 * lanes;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t o = 0; o < outputs; o += panel) {
        char *const own = panels + o * inputs * size;
        memset(own, 0, panel * inputs * size);
        for (int64_t j = 0; j < at_most(panel, outputs - o); j++)
            for (int64_t i = 0; i < inputs; i++)
                memcpy(own + (i * panel + place_in_panel(j, lanes, size)) * size, weight + ((o + j) * inputs + i) * size, size);
    }
}

/* The weight of mg_panel again. */
void mg_unpanel(const char *panels, int64_t outputs, int64_t inputs, char *weight, int size, int threads) {
    const int64_t lanes = loops()->lanes, panel = 2 * lanes;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t o = 0; o < outputs; o++) {
        const char *const own = panels + o / panel * panel * inputs * size;
        for (int64_t i = 0; i < inputs; i++)
            memcpy(weight + (o * inputs + i) * size, own + (i * panel + place_in_panel(o % panel, lanes, size)) * size, size);
    }
}

/* y = W x in fp32 of a weight in panels. x: (tokens, inputs), rows x_row apart; y: (tokens, outputs), each output times its
   scale unless `scales` is NULL. Returns 0, or -1 when there is no memory. */
int mg_multiply_panels(const float *x, int64_t x_row, int64_t tokens, const char *panels, int size, const float *scales,
                       int64_t inputs, int64_t outputs, float *y, int threads) {
    const loops_t *const fast = loops();
    const int64_t panel = 2 * fast->lanes;
    int failed = 0;
#pragma omp parallel for num_threads(threads_for(tokens * inputs * outputs, threads)) schedule(static)
    for (int64_t o = 0; o < outputs; o += panel) {
        const int64_t some = at_most(panel, outputs - o);
        float *const last = some < panel ? room(tokens * panel) : NULL;
        if (some < panel && !last) {
            failed = -1;
            continue;
        }
        fast->multiply_panel[size - 1](x, x_row, tokens, panels + o * inputs * size, inputs, last ? last : y + o,
                                       last ? panel : outputs);
        for (int64_t t = 0; t < tokens; t++) {
            float *const own = y + t * outputs + o;
            if (last) memcpy(own, last + t * panel, some * sizeof(float));
            for (int64_t j = 0; j < some && scales; j++) own[j] *= scales[o + j];
        }
    }
    return failed;
}

#include "native_tiles.h"
#include "native_adapted.h"

