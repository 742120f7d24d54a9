/* The low-rank terms of many neighbouring tokens that carry the same adapters, on the matrix unit, added to a product before
   it is rounded; native.c includes this file between the tiles' own functions. What they give is what mg_lowrank gives, but
   for the order of the sums: a middle, in fp32, is taken apart into three numbers of bf16, whose sum it is.

   A x is a product with the A's of all terms side by side, TILE ranks in a tile. Of the middles of a term CHUNK ranks and their
   three parts stand in one row of a tile; the rows of B stand three times in the other. */
#define CHUNK 10
#define PARTS 3

/* Some ranks of a term; their middles are those of rank `at` and the following. Its outputs are columns of y from `column` on. */
typedef struct {
    const term_t *term;
    int64_t first, ranks, at, column;
} chunk_t;

/* A run. Its tokens lie in so many tiles of the step's. */
typedef struct many {
    const run_t *run;
    int64_t first_tile, tiles, groups, chunk_count;
    const uint16_t **rows; /* of A, TILE for each group, NULL for none */
    float *factors;        /* of each of these */
    chunk_t *chunks;
    char *A;       /* (groups, steps) tiles: of TILE ranks and DEEP bytes of inputs */
    char *middles; /* (tiles, chunks) tiles, zeros for tokens of others */
} many_t;

static int64_t tiles_of(int64_t count) { return (count + TILE - 1) / TILE; }

/* TILE rows of A by pairs of inputs: the rows' lines as a matrix of pairs, transposed. */
ON_TILES static void pack_step(const uint16_t *const *rows, int64_t step, char *tile) {
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(TILE / 2));
    __m512i from[TILE], to[TILE];
    for (int r = 0; r < TILE; r++)
        from[r] = rows[r] ? _mm512_loadu_si512(rows[r] + step * (DEEP / 2)) : _mm512_setzero_si512();
    for (int bit = 1; bit < TILE; bit *= 2) { /* each turns the bits of all places, row and column, by one */
        for (int r = 0; r < TILE / 2; r++) {
            to[2 * r] = _mm512_permutex2var_epi32(from[r], low, from[r + TILE / 2]);
            to[2 * r + 1] = _mm512_permutex2var_epi32(from[r], high, from[r + TILE / 2]);
        }
        memcpy(from, to, sizeof from);
    }
    for (int i = 0; i < TILE; i++) _mm512_storeu_si512(tile + i * DEEP, from[i]);
}

/* A middle in three parts, of 8 bits each. What is no finite number is the first of them. */
static void store_parts(uint16_t *row, int64_t at, float middle) {
    for (int part = 0; part < PARTS; part++) {
        uint32_t bits;
        float top;
        memcpy(&bits, &middle, 4);
        row[part * CHUNK + at] = bits >> 16;
        bits &= 0xffff0000;
        memcpy(&top, &bits, 4);
        middle = isfinite(middle) ? middle - top : 0;
    }
}

/* Groups of ranks that are multiplied with a tile of tokens at once. */
#define GROUPS 4

/* The middles of some groups, from g on, of the n-th tile of a run, whose place is zeros. x: (tokens, inputs) of the step. */
ON_TILES static void shrink_tile(const many_t *many, const uint16_t *x, int64_t tokens, int64_t inputs, int64_t n, int64_t g) {
    const int64_t t0 = (many->first_tile + n) * TILE, rows = at_most(TILE, tokens - t0), steps = inputs * 2 / DEEP;
    const int64_t end = many->run->first + many->run->count, some = at_most(GROUPS, many->groups - g);
    const char *const own = (const char *)(x + t0 * inputs), *const A = many->A + g * steps * TILE_BYTES;
    char *const into = many->middles + n * many->chunk_count * TILE_BYTES;
    float sums[GROUPS * TILE * TILE] __attribute__((aligned(64)));
    const chunk_t *chunk = many->chunks;
    set_tiles(rows);
    clear_sums();
    for (int64_t s = 0; s < steps; s++) {
        _tile_loadd(4, own + s * DEEP, inputs * 2);
        _tile_loadd(5, A + s * TILE_BYTES, 64);
        _tile_dpbf16ps(0, 4, 5);
        if (some > 1) {
            _tile_loadd(6, A + (steps + s) * TILE_BYTES, 64);
            _tile_dpbf16ps(1, 4, 6);
        }
        if (some > 2) {
            _tile_loadd(7, A + (2 * steps + s) * TILE_BYTES, 64);
            _tile_dpbf16ps(2, 4, 7);
        }
        if (some > 3) {
            _tile_loadd(5, A + (3 * steps + s) * TILE_BYTES, 64);
            _tile_dpbf16ps(3, 4, 5);
        }
    }
    store_sums(sums);
    for (int64_t at = g * TILE; at < (g + some) * TILE && many->rows[at]; at++) {
        while (at >= chunk->at + chunk->ranks) chunk++;
        for (int64_t t = 0; t < rows; t++)
            if (t0 + t >= many->run->first && t0 + t < end)
                store_parts((uint16_t *)(into + (chunk - many->chunks) * TILE_BYTES + t * DEEP), at - chunk->at,
                            sums[((at / TILE - g) * TILE + t) * TILE + at % TILE] * many->factors[at]);
    }
}

/* TILE columns of y from o on: CHUNK rows of B by pairs of ranks, PARTS times. */
ON_TILES static void pack_chunk(const chunk_t *chunk, int64_t o, char *tile) {
    const int64_t outputs = chunk->term->outputs, from = o - chunk->column, left = outputs - from;
    const uint32_t below = left < TILE ? (1u << (left > 0 ? left : 0)) - 1 : 0xffff;
    const __mmask16 some = (__mmask16)(from < 0 ? from > -TILE ? below & 0xffffu << -from : 0 : below);
    const uint16_t *const B = (const uint16_t *)chunk->term->B + chunk->first * outputs + from;
    for (int64_t pair = 0; pair < CHUNK / 2; pair++) {
        const int64_t r = 2 * pair;
        __m512i both = _mm512_setzero_si512();
        if (r < chunk->ranks) both = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, B + r * outputs));
        if (r + 1 < chunk->ranks)
            both = _mm512_or_si512(
                both, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, B + (r + 1) * outputs)), 16));
        for (int64_t part = 0; part < PARTS; part++) _mm512_storeu_si512(tile + (part * CHUNK / 2 + pair) * DEEP, both);
    }
    memset(tile + PARTS * CHUNK / 2 * DEEP, 0, TILE_BYTES - PARTS * CHUNK / 2 * DEEP);
}

static int meets(const chunk_t *chunk, int64_t first) {
    return chunk->column < first + BLOCK && first < chunk->column + chunk->term->outputs;
}

/* All chunks of a block of outputs, SIDE_BY_SIDE tiles each. */
ON_TILES static void pack_block(const added_t *added, int64_t first, char *into) {
    for (int64_t a = 0; a < added->count; a++)
        for (int64_t c = 0; c < added->runs[a].chunk_count; c++)
            for (int64_t n = 0; n < SIDE_BY_SIDE; n++, into += TILE_BYTES)
                if (meets(added->runs[a].chunks + c, first)) pack_chunk(added->runs[a].chunks + c, first + n * TILE, into);
}

/* To the sums of the tile of tokens q and four tiles of outputs. B: of the block, see pack_block. */
ON_TILES_INLINE void add_few(const added_t *added, int64_t q, int64_t first, const char *B) {
    for (int64_t a = 0; a < added->count; a++) {
        const many_t *const many = added->runs + a;
        const int here = q >= many->first_tile && q < many->first_tile + many->tiles;
        for (int64_t c = 0; c < many->chunk_count; c++, B += SIDE_BY_SIDE * TILE_BYTES) {
            if (!here || !meets(many->chunks + c, first)) continue;
            _tile_loadd(4, many->middles + ((q - many->first_tile) * many->chunk_count + c) * TILE_BYTES, 64);
            _tile_loadd(5, B, 64);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(6, B + TILE_BYTES, 64);
            _tile_dpbf16ps(1, 4, 6);
            _tile_loadd(7, B + 2 * TILE_BYTES, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_loadd(5, B + 3 * TILE_BYTES, 64);
            _tile_dpbf16ps(3, 4, 5);
        }
    }
}

/* The same for the tiles of tokens q and q + 1 and two tiles of outputs, the o-th of the block and the next. */
ON_TILES_INLINE void add_many(const added_t *added, int64_t q, int64_t first, int64_t o, const char *B) {
    for (int64_t a = 0; a < added->count; a++) {
        const many_t *const many = added->runs + a;
        const int64_t n = q - many->first_tile;
        for (int64_t c = 0; c < many->chunk_count; c++, B += SIDE_BY_SIDE * TILE_BYTES) {
            if (n < -1 || n >= many->tiles || !meets(many->chunks + c, first)) continue;
            const char *const middles = many->middles + (n * many->chunk_count + c) * TILE_BYTES;
            _tile_loadd(6, B + o * TILE_BYTES, 64);
            _tile_loadd(7, B + (o + 1) * TILE_BYTES, 64);
            if (n >= 0) {
                _tile_loadd(4, middles, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
            }
            if (n + 1 < many->tiles) {
                _tile_loadd(5, middles + many->chunk_count * TILE_BYTES, 64);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
    }
}

static int64_t fours_of(const many_t *many) { return (many->groups + GROUPS - 1) / GROUPS; }

/* The middles of all runs. */
ON_TILES static void shrink_runs(const added_t *added, const uint16_t *x, int64_t tokens, int64_t inputs, int threads) {
    const int64_t steps = inputs * 2 / DEEP;
#pragma omp parallel num_threads(threads)
    {
        for (const many_t *many = added->runs; many < added->runs + added->count; many++)
#pragma omp for schedule(static) nowait
            for (int64_t n = 0; n < many->groups * steps; n++)
                pack_step(many->rows + n / steps * TILE, n % steps, many->A + n * TILE_BYTES);
        for (const many_t *many = added->runs; many < added->runs + added->count; many++)
#pragma omp for schedule(static) nowait
            for (int64_t n = 0; n < many->tiles; n++)
                memset(many->middles + n * many->chunk_count * TILE_BYTES, 0, many->chunk_count * TILE_BYTES);
#pragma omp barrier
        for (const many_t *many = added->runs; many < added->runs + added->count; many++)
#pragma omp for schedule(static) nowait
            for (int64_t n = 0; n < many->tiles * fours_of(many); n++)
                shrink_tile(many, x, tokens, inputs, n / fours_of(many), n % fours_of(many) * GROUPS);
        release_tiles();
    }
}
