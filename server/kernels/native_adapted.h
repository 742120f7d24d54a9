/* Products with all that a step's adapters do at their Linears, and whole layers of them; native.c includes this file last. */

/* What mg_tile, mg_code and mg_panel give. Activations are in bf16 for the first two, in fp32 for panels. */
enum { TILED, CODED, IN_PANELS };

/* The weight of a product, of one or more Linears that read the same input. */
typedef struct {
    const void *weight;
    int64_t form;
    const float *scales; /* NULL: in bf16 */
    const int32_t *sums; /* NULL in panels */
    int64_t group; /* among those of the low-rank terms */
    int64_t first; /* number of its first Linear, see where_t; the others follow it */
} weight_t;

/* What the tokens of a step carry. */
typedef struct {
    int64_t tokens;
    const run_t *runs; /* none: no adapters */
    int64_t run_count;
    const pair_t *pairs;
    const terms_t *held; /* (groups, columns) */
    int64_t groups, columns;
    const site_t *const *sites; /* (columns), see where_t; NULL: no adapter has any */
} adapters_t;

/* Linears that read the same input, one product. Their outputs are its columns from firsts[m] on. */
typedef struct {
    int64_t members, inputs;
    const int64_t *firsts; /* and behind them the number of all outputs */
} shape_t;

static int type_of(const weight_t *weight) { return weight->form == IN_PANELS ? FP32 : BF16; }

#ifdef ON_TILES
/* Whether the unit adds a run's terms: all in bf16, of many tokens, whose adapters do nothing else here. */
static int takes_run(const adapters_t *step, const shape_t *shape, const weight_t *weight, const lowrank_t *job,
                     const run_t *run) {
    if (job->type != BF16 || run->count < TILE || shape->inputs * 2 % DEEP || !has_tiles() || !ranks_of(job, run)) return 0;
    FOR_TERMS(job, run, pair, term) if (term->A_type != BF16 || term->B_type != BF16) return 0;
    for (int64_t m = 0; step->sites && m < shape->members; m++)
        for (int behind = 0; behind < 2; behind++) {
            const where_t where = {step->sites, weight->first + m, behind};
            if (changes(&where, step->pairs, run)) return 0;
        }
    return 1;
}

static int64_t chunks_of(const lowrank_t *job, const run_t *run) {
    int64_t count = 0;
    FOR_TERMS(job, run, pair, term) count += (term->rank + CHUNK - 1) / CHUNK;
    return count;
}

/* What a run needs of memory behind its place among all. */
static int64_t size_of(const many_t *many, int64_t steps) {
    const int64_t tiles = many->groups * steps + many->tiles * many->chunk_count;
    const int64_t tables = many->groups * TILE * (sizeof *many->rows + sizeof *many->factors);
    return (tiles * TILE_BYTES + many->chunk_count * sizeof(chunk_t) + tables + LINE - 1) / LINE * LINE;
}

static many_t plan_run(const lowrank_t *job, const run_t *run) {
    many_t many = {.run = run, .first_tile = run->first / TILE, .groups = tiles_of(ranks_of(job, run))};
    many.tiles = tiles_of(run->first + run->count) - many.first_tile;
    many.chunk_count = chunks_of(job, run);
    return many;
}

/* Its tables, in that memory. */
static void fill_run(const lowrank_t *job, const shape_t *shape, many_t *many, char *own) {
    int64_t chunk_count = 0, at = 0;
    many->A = own;
    many->middles = many->A + many->groups * (shape->inputs * 2 / DEEP) * TILE_BYTES;
    many->chunks = (chunk_t *)(many->middles + many->tiles * many->chunk_count * TILE_BYTES);
    many->rows = (const uint16_t **)(many->chunks + many->chunk_count);
    many->factors = (float *)(many->rows + many->groups * TILE);
    memset(many->rows, 0, many->groups * TILE * sizeof *many->rows);
    FOR_TERMS(job, many->run, pair, term)
        for (int64_t r = 0; r < term->rank; r++, at++) {
            if (r % CHUNK == 0)
                many->chunks[chunk_count++] = (chunk_t){term, r, at_most(CHUNK, term->rank - r), at, shape->firsts[term->member]};
            many->rows[at] = (const uint16_t *)term->A + r * job->inputs;
            many->factors[at] = pair->gate * term->scaling;
        }
}

/* The runs that the unit takes, marked in `taken`, with their middles. NULL: none. Returns 0, or -1 when there is no memory. */
static int find_runs(const adapters_t *step, const shape_t *shape, const weight_t *weight, const lowrank_t *job, added_t *added,
                     const char **taken, int threads) {
    const int64_t steps = shape->inputs * 2 / DEEP;
    int64_t size = step->run_count;
    *added = (added_t){NULL, 0, 0};
    for (const run_t *run = step->runs; run < step->runs + step->run_count; run++) {
        if (!takes_run(step, shape, weight, job, run)) continue;
        const many_t many = plan_run(job, run);
        added->count++;
        added->chunk_count += many.chunk_count;
        size += sizeof many + size_of(&many, steps) + LINE;
    }
    *taken = NULL;
    if (!added->count) return 0;
    char *own = room_for(FOR_TERMS_ADDED, size + LINE);
    if (!own) return -1;
    added->runs = (many_t *)own;
    char *const marks = (char *)(added->runs + added->count);
    own = (char *)(((uintptr_t)marks + step->run_count + LINE - 1) / LINE * LINE);
    many_t *many = added->runs;
    for (const run_t *run = step->runs; run < step->runs + step->run_count; run++) {
        marks[run - step->runs] = takes_run(step, shape, weight, job, run);
        if (!marks[run - step->runs]) continue;
        *many = plan_run(job, run);
        fill_run(job, shape, many, own);
        own += size_of(many++, steps);
    }
    *taken = marks;
    shrink_runs(added, job->x, step->tokens, shape->inputs, threads);
    return 0;
}
#else
static int find_runs(const adapters_t *step, const shape_t *shape, const weight_t *weight, const lowrank_t *job, added_t *added,
                     const char **taken, int threads) {
    *added = (added_t){NULL, 0, 0};
    *taken = NULL;
    return 0;
}
#endif

/* y = W x, and what is added to it. spare: room for a float and `inputs` bytes for each token. Returns 0, or -1 when there is no
   memory. */
static int multiply_tokens(const void *x, int64_t tokens, const shape_t *shape, const weight_t *weight, float least, void *y,
                           const added_t *added, void *spare, int threads) {
    const int64_t inputs = shape->inputs, outputs = shape->firsts[shape->members];
    if (weight->form == IN_PANELS)
        return mg_multiply_panels(x, inputs, tokens, weight->weight, weight->scales ? 1 : 2, weight->scales, inputs, outputs, y,
                                  threads);
    product_t job = {x, inputs * 2, tokens, weight->weight, weight->form == CODED, inputs, outputs, y, BF16, NULL,
                     weight->scales, weight->sums, added->count ? added : NULL};
    if (weight->scales) {
        float *const x_scales = spare;
        uint8_t *const codes = (uint8_t *)(x_scales + tokens);
        mg_round(x, inputs, tokens, inputs, codes, x_scales, least, BF16, threads);
        job.x = (const char *)codes, job.x_row = inputs, job.x_scales = x_scales;
    }
    return multiply(&job, threads);
}

/* Each token t of a member m whose input adapters change, the n-th of all. */
#define FOR_CHANGED(m, run, t, n)                                                                                   \
    int64_t n = 0;                                                                                                  \
    for (int64_t m = 0; m < shape->members; m++)                                                                    \
        for (const run_t *run = step->runs; run < step->runs + step->run_count; run++)                              \
            for (int64_t t = run->first, carries = changes(&inputs_of[m], step->pairs, run);                        \
                 carries && t < run->first + run->count; t++, n++)

/* y = W x' of Linears that read the same input. The tokens whose input some adapter changes, for one of them, ride behind the
   step's, in x and in y, which have room for that. Returns 0, or -1 when there is no memory. */
static int multiply_beside(const adapters_t *step, void *x, const shape_t *shape, const weight_t *weight, float least,
                           void *y, const added_t *added, void *spare, int threads) {
    const loops_t *const fast = loops();
    const int type = type_of(weight);
    const int64_t T = step->tokens, inputs = shape->inputs, outputs = shape->firsts[shape->members];
    where_t inputs_of[MEMBERS];
    int64_t all = 0;
    int failed = 0;
    for (int64_t m = 0; m < shape->members; m++) inputs_of[m] = (where_t){step->sites, weight->first + m, 0};
    {
        FOR_CHANGED(m, run, t, n) all++;
    }
#pragma omp parallel num_threads(threads_for(all * inputs, threads))
    {
        float *const wide = room(2 * inputs);
        if (!wide) failed = -1;
        FOR_CHANGED(m, run, t, n)
            if (wide && n % omp_get_num_threads() == omp_get_thread_num()) {
                void *const row = moved(x, (T + n) * inputs, type);
                memcpy(row, moved(x, t * inputs, type), bytes(inputs, type));
                fast->change[type](row, step->pairs + run->first_pair, run->pairs, &inputs_of[m], inputs, wide);
            }
    }
    failed |= multiply_tokens(x, T + all, shape, weight, least, y, added, spare, threads);
    FOR_CHANGED(m, run, t, n)
        memcpy(moved(y, t * outputs + shape->firsts[m], type), moved(y, (T + n) * outputs + shape->firsts[m], type),
               bytes(shape->firsts[m + 1] - shape->firsts[m], type));
    return failed;
}

/* y = W x' of a Linear alone. changed: room for x. */
static int multiply_alone(const adapters_t *step, const void *x, const shape_t *shape, const weight_t *weight, float least,
                          void *y, const added_t *added, void *changed, void *spare, int threads) {
    const where_t where = {step->sites, weight->first, 0};
    const int type = type_of(weight);
    int any = 0, failed = 0;
    for (const run_t *run = step->runs; run < step->runs + step->run_count; run++) any |= changes(&where, step->pairs, run);
    if (any) {
        memcpy(changed, x, bytes(step->tokens * shape->inputs, type));
        failed = mg_change(changed, shape->inputs, shape->inputs, type, step->runs, step->run_count, step->pairs, step->sites,
                           weight->first, 0, threads);
        x = changed;
    }
    return failed | multiply_tokens(x, step->tokens, shape, weight, least, y, added, spare, threads);
}

/* A product, and all that adapters do at its members: y = W x' + ..., as server/primitives/site.py has it. x has room behind it
   where adapters change inputs, and so has y: see multiply_beside; `changed` has room for x, `spare` for a float and `inputs`
   bytes for each row of x. Returns 0, or -1 when there is no memory. */
static int multiply_with_adapters(const adapters_t *step, void *x, const shape_t *shape, const weight_t *weight, float least,
                                  void *y, void *changed, void *spare, int threads) {
    const int type = type_of(weight);
    void *places[MEMBERS];
    int64_t rows[MEMBERS];
    const int64_t outputs = shape->firsts[shape->members], inputs = shape->inputs;
    const int has_terms = step->run_count && weight->group < step->groups;
    const terms_t *const held = has_terms ? step->held + weight->group * step->columns : NULL;
    const lowrank_t job = {loops(), x, inputs, inputs, type, places, rows, shape->members, step->pairs, held};
    added_t added = {NULL, 0, 0};
    const char *taken = NULL;
    int failed = has_terms ? find_runs(step, shape, weight, &job, &added, &taken, threads) : 0;
    if (!step->sites) failed |= multiply_tokens(x, step->tokens, shape, weight, least, y, &added, spare, threads);
    else if (shape->members > 1) failed |= multiply_beside(step, x, shape, weight, least, y, &added, spare, threads);
    else failed |= multiply_alone(step, x, shape, weight, least, y, &added, changed, spare, threads);
    for (int64_t m = 0; m < shape->members; m++) {
        places[m] = moved(y, shape->firsts[m], type), rows[m] = outputs;
        if (step->sites)
            failed |= mg_change(places[m], outputs, shape->firsts[m + 1] - shape->firsts[m], type, step->runs, step->run_count,
                                step->pairs, step->sites, weight->first + m, 1, threads);
    }
    return has_terms ? failed | add_terms(&job, step->runs, step->run_count, taken, threads) : failed;
}

/* The same for one product. least: of the scale of a token in bytes. */
int mg_multiply_with_adapters(const adapters_t *step, void *x, int64_t inputs, const int64_t *firsts, int64_t members,
                              const weight_t *weight, float least, void *y, void *changed, void *spare, int threads) {
    const shape_t shape = {members, inputs, firsts};
    return multiply_with_adapters(step, x, &shape, weight, least, y, changed, spare, threads);
}

/* One layer of a decoder: norms, products, and its part of the KV cache. See server/model/decode.py. */
typedef struct {
    weight_t qkv, o, gate_up, down;
    const void *before, *behind; /* weights of its norms */
    const void *bias;            /* of qkv, or NULL */
    head_norm_t head_norms[2];   /* of queries and of keys */
    void *keys, *values;
    int64_t window; /* 0 for none */
    int64_t before_number, behind_number;
    float before_eps, behind_eps, before_offset, behind_offset;
} layer_t;

/* What all layers of a step share: T tokens, each with the positions that it sees, its own the last of them. */
typedef struct {
    adapters_t adapters, last; /* last: what those carry that go on behind the last attention */
    const int64_t *wanted;     /* which these are, in order; NULL: all */
    int64_t features, heads, kv_heads, dim, inner; /* features of the stream; inner ones of an MLP */
    const void *cos, *sin;
    int64_t rotated;
    const int64_t *places, *blocks, *lengths; /* of the tokens */
    int64_t rows, width, block_size;          /* rows: of the cache */
    float scale, least;                       /* of the attention's scores; of the scale of a token in bytes */
} decode_t;

/* What adapters do to a norm of the stream. */
static int add_gains(const adapters_t *own, int64_t features, int64_t number, const void *stream, const void *weight,
                     float offset, float eps, void *out, int type, int threads) {
    if (!own->sites) return 0;
    return mg_gain(stream, features, weight, offset, eps, out, type, own->runs, own->run_count, own->pairs, own->sites,
                   number, threads);
}

/* Rows of so many bytes, of which some are to be the first ones. */
static void keep_rows(char *rows, int64_t width, const int64_t *wanted, int64_t count) {
    for (int64_t n = 0; n < count; n++) memmove(rows + n * width, rows + wanted[n] * width, width);
}

/* Layers one after the other, as server/model/fused.py has them: an attention of a norm, then an MLP of a norm are
   added to the stream (tokens, features). What the last MLP makes is left in `pending` (tokens, features), not yet added. Of
   both the first rows are those of the tokens that are wanted. Activations are of the type that the weights take, one for all.
   most: the tokens, and once more for each Linear whose input adapters may change beside others. work: room for most * (E + Q +
   2 * K + 2 * F) + tokens * (Q + F + the larger of both) activations, and behind them for a float and as many bytes as any of
   these products has inputs, `most` times. Returns 0, or -1 when there is no memory. */
int mg_decode(const decode_t *step, const layer_t *layers, int64_t count, void *stream, void *pending, void *work, int64_t most,
              int threads) {
    const adapters_t *own = &step->adapters;
    const int type = type_of(&layers->qkv);
    const int64_t E = step->features, F = step->inner, Q = step->heads * step->dim;
    const int64_t K = step->kv_heads * step->dim, widest = Q > F ? Q : F;
    int64_t T = own->tokens;
    const shape_t qkv = {3, E, (int64_t[]){0, Q, Q + K, Q + 2 * K}}, o = {1, Q, (int64_t[]){0, E}};
    const shape_t gate_up = {2, E, (int64_t[]){0, F, 2 * F}}, down = {1, F, (int64_t[]){0, E}};
    void *const x = work, *const made = moved(x, most * E, type), *const seen = moved(made, most * (Q + 2 * K), type);
    void *const both = moved(seen, T * Q, type), *const inner = moved(both, most * 2 * F, type);
    void *const changed = moved(inner, T * F, type), *const spare = moved(changed, T * widest, type);
    int failed = 0;
    for (int64_t n = 0; n < count; n++) {
        const layer_t *const layer = layers + n;
        if (!n) mg_norm(stream, E, T, E, layer->before, layer->before_offset, layer->before_eps, x, type, threads);
        else mg_add_and_norm(pending, stream, T, E, layer->before, layer->before_offset, layer->before_eps, x, type, threads);
        failed |= add_gains(own, E, layer->before_number, stream, layer->before, layer->before_offset, layer->before_eps, x,
                            type, threads);
        failed |= multiply_with_adapters(own, x, &qkv, &layer->qkv, step->least, made, changed, spare, threads);
        failed |= mg_begin_attention(made, layer->bias, layer->head_norms, T, step->heads, step->kv_heads, step->dim, step->cos,
                                     step->sin, step->rotated, step->places, layer->keys, layer->values, step->rows, type, T,
                                     step->blocks, step->width, step->lengths, step->block_size, layer->window, step->scale,
                                     seen, threads);
        if (n == count - 1 && step->wanted) {
            own = &step->last, T = own->tokens;
            keep_rows(seen, bytes(Q, type), step->wanted, T);
            keep_rows(stream, bytes(E, type), step->wanted, T);
            if (!T) break;
        }
        failed |= multiply_with_adapters(own, seen, &o, &layer->o, step->least, pending, changed, spare, threads);
        mg_add_and_norm(pending, stream, T, E, layer->behind, layer->behind_offset, layer->behind_eps, x, type, threads);
        failed |= add_gains(own, E, layer->behind_number, stream, layer->behind, layer->behind_offset, layer->behind_eps, x,
                            type, threads);
        failed |= multiply_with_adapters(own, x, &gate_up, &layer->gate_up, step->least, both, changed, spare, threads);
        mg_swiglu(both, 2 * F, moved(both, F, type), 2 * F, T, F, inner, type, threads);
        failed |= multiply_with_adapters(own, inner, &down, &layer->down, step->least, pending, changed, spare, threads);
    }
    return failed;
}
