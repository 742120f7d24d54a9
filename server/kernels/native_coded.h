/* A weight in bf16 in twelve bits a number, of which none is lost; native_tiles.h includes this file.

   A number is a sign, an exponent of eight bits and a fraction of seven. A weight's numbers have few exponents: of such as
   are normally distributed, 16 are those of all but one in 10,000. So four bits say which of the weight's 16 exponents a
   number has, and the odd ones, whose exponent is another, stand in a list. A step of few tokens takes as long as reading the
   weight does. Source: Zhang et al. 2025 (arXiv:2504.11651), whose codes have as many bits as each exponent is rare; here
   all have four, so that a register of them is looked up at a time.

   Four rows of a tile, 128 numbers, are a group: a word a column with the codes of the four, those of the first row lowest;
   then a word a column with the signs and fractions of the first two rows, then the same of the other two. In such a word
   the second row's sign and fraction have the bits that they have in a number, and the first row's those bits of the word
   turned by eight. Groups stand as tiles do; behind them the 16 exponents as they stand in a number, twice; then for each
   block, and behind the last, how many odd numbers are before it; then those. */
#define EXPONENTS 16
#define COLUMNS (DEEP / 2) /* of a tile in bf16 */
#define GROUP (4 * COLUMNS)
#define GROUP_BYTES (3 * DEEP)
#define KEPT 0x807f /* of a number: its sign and fraction */

typedef struct {
    uint32_t at; /* among the numbers of its block, as they stand in tiles */
    uint16_t value, unused;
} odd_t;

typedef struct {
    const uint8_t *groups;     /* of one block */
    const uint16_t *exponents; /* 2 * EXPONENTS */
    const odd_t *odd, *behind; /* of that block */
} coded_t;

INLINE int64_t block_numbers(int64_t inputs) { return BLOCK * inputs; }

INLINE int64_t coded_bytes(int64_t numbers) { return numbers / GROUP * GROUP_BYTES; }

/* Bytes of a weight in codes, so many of whose numbers are odd. */
int64_t mg_coded_size(int64_t outputs, int64_t inputs, int64_t odd) {
    const int64_t blocks = blocks_of(outputs);
    return coded_bytes(blocks * block_numbers(inputs)) + 2 * EXPONENTS * 2 + (blocks + 1) * 8 + odd * (int64_t)sizeof(odd_t);
}

static coded_t coded_block(const void *weight, int64_t outputs, int64_t inputs, int64_t block) {
    const int64_t blocks = blocks_of(outputs), size = coded_bytes(block_numbers(inputs));
    const uint16_t *const exponents = (const uint16_t *)((const char *)weight + blocks * size);
    const int64_t *const firsts = (const int64_t *)(exponents + 2 * EXPONENTS);
    const odd_t *const odd = (const odd_t *)(firsts + blocks + 1);
    return (coded_t){(const uint8_t *)weight + block * size, exponents, odd + firsts[block], odd + firsts[block + 1]};
}

/* How many of the numbers have each of the 256 exponents. */
void mg_count_exponents(const uint16_t *numbers, int64_t count, int64_t *counts, int threads) {
    memset(counts, 0, 256 * sizeof *counts);
#pragma omp parallel num_threads(threads)
    {
        int64_t own[256] = {0};
#pragma omp for schedule(static) nowait
        for (int64_t n = 0; n < count; n++) own[numbers[n] >> 7 & 255]++;
#pragma omp critical
        for (int e = 0; e < 256; e++) counts[e] += own[e];
    }
}

/* The numbers of a group in codes. codes: of each exponent, -1 for an odd one, whose numbers get any. */
static void code_group(const uint16_t *numbers, const int8_t *codes, uint8_t *group) {
    uint16_t *const words = (uint16_t *)group;
    for (int64_t n = 0; n < COLUMNS; n++) {
        const uint16_t *const own = numbers + n; /* rows are COLUMNS apart */
        const uint32_t halves[2] = {own[0] & KEPT, own[2 * COLUMNS] & KEPT}; /* of the first rows, turned below */
        words[n] = 0;
        for (int row = 0; row < 4; row++) words[n] |= (codes[own[row * COLUMNS] >> 7 & 255] & 15) << 4 * row;
        for (int half = 0; half < 2; half++)
            words[COLUMNS * (1 + half) + n] =
                (own[(2 * half + 1) * COLUMNS] & KEPT) | (uint16_t)(halves[half] << 8 | halves[half] >> 8);
    }
}

/* A number of a group again, if it is no odd one. */
INLINE uint16_t taken(const uint8_t *group, int64_t at, const uint16_t *exponents) {
    const int64_t row = at / COLUMNS, column = at % COLUMNS;
    const uint16_t *const codes = (const uint16_t *)group;
    const uint16_t word = codes[COLUMNS * (1 + row / 2) + column];
    return ((row % 2 ? word : (uint16_t)(word << 8 | word >> 8)) & KEPT) | exponents[codes[column] >> 4 * row & 15];
}

/* weight (outputs, inputs) in codes. `into` has room for its odd numbers. */
void mg_code(const uint16_t *weight, int64_t outputs, int64_t inputs, const uint8_t *exponents, void *into, int threads) {
    const int64_t blocks = blocks_of(outputs), numbers = block_numbers(inputs);
    uint16_t *const held = (uint16_t *)((char *)into + blocks * coded_bytes(numbers));
    int64_t *const firsts = (int64_t *)(held + 2 * EXPONENTS);
    odd_t *const odd = (odd_t *)(firsts + blocks + 1);
    int8_t codes[256];
    memset(codes, -1, sizeof codes);
    for (int n = 0; n < EXPONENTS; n++) codes[exponents[n]] = n, held[n] = held[n + EXPONENTS] = exponents[n] << 7;
    firsts[0] = 0;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t first = block * BLOCK, end = at_most(first + BLOCK, outputs) * inputs;
        firsts[block + 1] = 0;
        for (int64_t n = first * inputs; n < end; n++) firsts[block + 1] += codes[weight[n] >> 7 & 255] < 0;
    }
    for (int64_t block = 0; block < blocks; block++) firsts[block + 1] += firsts[block];
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
        uint8_t *const groups = (uint8_t *)into + block * coded_bytes(numbers);
        odd_t *next = odd + firsts[block];
        for (int64_t at = 0; at < numbers; at += GROUP) {
            const int64_t tile = at / (TILE * COLUMNS), first = block * BLOCK + tile % SIDE_BY_SIDE * TILE;
            const int64_t i = tile / SIDE_BY_SIDE * COLUMNS + at / COLUMNS % TILE * 2;
            uint16_t own[GROUP] = {0};
            for (int64_t n = 0; n < at_most(TILE, outputs - first); n++)
                for (int row = 0; row < 4; row++)
                    memcpy(own + row * COLUMNS + 2 * n, weight + (first + n) * inputs + i + 2 * row, 2 * sizeof *own);
            code_group(own, codes, groups + at / GROUP * GROUP_BYTES);
            for (int64_t n = 0; n < GROUP; n++)
                if (codes[own[n] >> 7 & 255] < 0 && first + n % COLUMNS / 2 < outputs) *next++ = (odd_t){at + n, own[n], 0};
        }
    }
}

/* A block's tiles again. */
static void decode_plainly(const coded_t *from, int64_t numbers, uint16_t *into) {
    for (int64_t at = 0; at < numbers; at++) into[at] = taken(from->groups + at / GROUP * GROUP_BYTES, at % GROUP, from->exponents);
    for (const odd_t *odd = from->odd; odd < from->behind; odd++) into[odd->at] = odd->value;
}

/* mg_code undone. Returns 0, or -1 when there is no memory. */
int mg_uncode(const void *from, int64_t outputs, int64_t inputs, uint16_t *weight, int threads) {
    int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < blocks_of(outputs); block++) {
        const coded_t own = coded_block(from, outputs, inputs, block);
        const int64_t first = block * BLOCK, count = at_most(BLOCK, outputs - first);
        uint16_t *const tiles = room_for(DECODED, block_numbers(inputs) * sizeof *tiles);
        if (!tiles) failed = -1;
        else decode_plainly(&own, block_numbers(inputs), tiles);
        for (int64_t o = 0; o < count && tiles; o++)
            for (int64_t i = 0; i < inputs; i++) weight[(first + o) * inputs + i] = tiles[tiled(o, i, inputs, 2)];
    }
    return failed;
}
