/* Products in fp32 with a weight in bf16 that is held in panels; native_loops.h includes this once for each instruction set.

   A panel is 2 * LANES outputs. Of each input it has LANES words: the lower half of word j is the number of output j, the upper
   half that of output j + LANES, so that a shift and a mask widen them. What the last panel has too many is zero.
   An output of a token is one sum over the inputs in their order, whatever tokens stand beside it. */

#define load_words NAME(load_words)
#define product NAME(product)

INLINE uvec load_words(const uint32_t *p) {
    uvec v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* y[t] (+)= W x[t] for a few tokens and some inputs of one panel. The sums are registers, and begin with what y has unless
   `fresh`. */
#define PRODUCT(T)                                                                                                    \
    INLINE void NAME(product_##T)(const float *x, int64_t x_row, const uint32_t *words, int64_t inputs, float *y,     \
                                  int64_t y_row, const int fresh, const int ask) {                                    \
        vec sums[T][2] = {{{0}}};                                                                                     \
        UNROLL for (int t = 0; t < T && !fresh; t++)                                                                  \
            UNROLL for (int half = 0; half < 2; half++) sums[t][half] = load_fp32(y + t * y_row + half * LANES);      \
        for (int64_t i = 0; i < inputs; i++) {                                                                        \
            if (ask) __builtin_prefetch((const char *)(words + i * LANES) + PANEL_SOON);                              \
            const uvec both = load_words(words + i * LANES);                                                          \
            const vec weight[2] = {(vec)(both << 16), (vec)(both & 0xffff0000)};                                      \
            UNROLL for (int t = 0; t < T; t++)                                                                        \
                UNROLL for (int half = 0; half < 2; half++) sums[t][half] += x[t * x_row + i] * weight[half];         \
        }                                                                                                             \
        UNROLL for (int t = 0; t < T; t++)                                                                            \
            UNROLL for (int half = 0; half < 2; half++)                                                               \
                memcpy(y + t * y_row + half * LANES, &sums[t][half], sizeof(vec));                                    \
    }
PRODUCT(1)
PRODUCT(2)
PRODUCT(3)
PRODUCT(4)
PRODUCT(5)
PRODUCT(6)

INLINE void product(const float *x, int64_t x_row, int64_t tokens, const uint32_t *words, int64_t inputs, float *y,
                    int64_t y_row, const int fresh, const int ask) {
    switch (tokens) {
    case 1: NAME(product_1)(x, x_row, words, inputs, y, y_row, fresh, ask); break;
    case 2: NAME(product_2)(x, x_row, words, inputs, y, y_row, fresh, ask); break;
    case 3: NAME(product_3)(x, x_row, words, inputs, y, y_row, fresh, ask); break;
    case 4: NAME(product_4)(x, x_row, words, inputs, y, y_row, fresh, ask); break;
    case 5: NAME(product_5)(x, x_row, words, inputs, y, y_row, fresh, ask); break;
    default: NAME(product_6)(x, x_row, words, inputs, y, y_row, fresh, ask);
    }
}

/* (tokens, 2 * LANES) of y, rows y_row apart. The panel is read from memory by the first tokens, by the others from a cache. */
static void NAME(multiply_panel)(const float *x, int64_t x_row, int64_t tokens, const uint32_t *words, int64_t inputs,
                                 float *y, int64_t y_row) {
    const int64_t blocks = (tokens + ABREAST - 1) / ABREAST;
    for (int64_t i = 0; i < inputs; i += DEPTH)
        for (int64_t block = 0, t = 0, end; block < blocks; block++, t = end) {
            end = tokens * (block + 1) / blocks;
            const float *const from = x + t * x_row + i;
            const uint32_t *const own = words + i * LANES;
            const int64_t deep = at_most(DEPTH, inputs - i);
            if (block == 0 && i == 0) product(from, x_row, end - t, own, deep, y + t * y_row, y_row, 1, 1);
            else if (i == 0) product(from, x_row, end - t, own, deep, y + t * y_row, y_row, 1, 0);
            else product(from, x_row, end - t, own, deep, y + t * y_row, y_row, 0, block == 0);
        }
}

#undef PRODUCT
#undef load_words
#undef product
