/* Products in fp32 with a weight that is held in panels, in bf16 or in bytes; native_loops.h includes this once for each
   instruction set.

   A panel is 2 * LANES outputs, and has of each input their numbers side by side (place_in_panel). In bf16 that of output
   j + LANES stands behind that of output j: a shift and a mask widen both. What the last panel has too many is zero.
   An output of a token is one sum over the inputs in their order, whatever tokens stand beside it. */

#define widen_two NAME(widen_two)
#define product NAME(product)
#define multiply_panel NAME(multiply_panel)

/* The numbers of one input, of `size` bytes each. */
INLINE void widen_two(const char *numbers, const int size, vec two[2]) {
    if (size == 2) {
        uvec both;
        memcpy(&both, numbers, sizeof both);
        two[0] = (vec)(both << 16), two[1] = (vec)(both & 0xffff0000);
    } else {
        UNROLL for (int half = 0; half < 2; half++)
            two[half] = size == 1 ? __builtin_convertvector(load_signed((const int8_t *)numbers + half * LANES), vec)
                                  : load_fp32((const float *)numbers + half * LANES);
    }
}

/* y[t] (+)= W x[t] for a few tokens and some inputs of one panel. The sums are registers, and begin with what y has unless
   `fresh`. The panel is asked for ahead where it is in memory; `kept` gains its numbers in fp32 unless it is NULL. */
#define PRODUCT(T)                                                                                                    \
    INLINE void NAME(product_##T)(const float *x, int64_t x_row, const char *panel, const int size, int64_t inputs,   \
                                  float *y, int64_t y_row, int fresh, const int ask, float *kept) {                   \
        vec sums[T][2] = {{{0}}};                                                                                     \
        UNROLL for (int t = 0; t < T && !fresh; t++)                                                                  \
            UNROLL for (int half = 0; half < 2; half++) sums[t][half] = load_fp32(y + t * y_row + half * LANES);      \
        for (int64_t i = 0; i < inputs; i++) {                                                                        \
            const char *const numbers = panel + i * 2 * LANES * size;                                                 \
            if (ask) __builtin_prefetch(numbers + PANEL_SOON);                                                        \
            vec weight[2];                                                                                            \
            widen_two(numbers, size, weight);                                                                         \
            if (kept) memcpy(kept + i * 2 * LANES, weight, sizeof weight);                                            \
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

INLINE void product(const float *x, int64_t x_row, int64_t tokens, const char *panel, const int size, int64_t inputs, float *y,
                    int64_t y_row, int fresh, const int ask, float *kept) {
    switch (tokens) {
    case 1: NAME(product_1)(x, x_row, panel, size, inputs, y, y_row, fresh, ask, kept); break;
    case 2: NAME(product_2)(x, x_row, panel, size, inputs, y, y_row, fresh, ask, kept); break;
    case 3: NAME(product_3)(x, x_row, panel, size, inputs, y, y_row, fresh, ask, kept); break;
    case 4: NAME(product_4)(x, x_row, panel, size, inputs, y, y_row, fresh, ask, kept); break;
    case 5: NAME(product_5)(x, x_row, panel, size, inputs, y, y_row, fresh, ask, kept); break;
    default: NAME(product_6)(x, x_row, panel, size, inputs, y, y_row, fresh, ask, kept);
    }
}

/* (tokens, 2 * LANES) of y, rows y_row apart. The panel is read from memory by the first tokens, by the others from a cache;
   of bytes, which take long to widen, they read what the first have kept. */
INLINE void multiply_panel(const float *x, int64_t x_row, int64_t tokens, const char *panel, const int size, int64_t inputs,
                           float *y, int64_t y_row) {
    const int64_t blocks = (tokens + ABREAST - 1) / ABREAST, depth = size == 1 && blocks > 1 ? WIDE_DEPTH : DEPTH;
    float kept[WIDE_DEPTH * 2 * LANES];
    for (int64_t i = 0; i < inputs; i += depth)
        for (int64_t block = 0, t = 0, end; block < blocks; block++, t = end) {
            end = tokens * (block + 1) / blocks;
            const float *const from = x + t * x_row + i;
            const char *const own = panel + i * 2 * LANES * size;
            float *const to = y + t * y_row;
            const int64_t deep = at_most(depth, inputs - i);
            if (block == 0 && size == 1 && blocks > 1) product(from, x_row, end - t, own, 1, deep, to, y_row, i == 0, 1, kept);
            else if (block == 0) product(from, x_row, end - t, own, size, deep, to, y_row, i == 0, 1, NULL);
            else if (size == 1) product(from, x_row, end - t, (const char *)kept, 4, deep, to, y_row, i == 0, 0, NULL);
            else product(from, x_row, end - t, own, size, deep, to, y_row, i == 0, 0, NULL);
        }
}

static void NAME(multiply_panel_int8)(const float *x, int64_t x_row, int64_t tokens, const char *panel, int64_t inputs, float *y,
                                      int64_t y_row) {
    multiply_panel(x, x_row, tokens, panel, 1, inputs, y, y_row);
}

static void NAME(multiply_panel_bf16)(const float *x, int64_t x_row, int64_t tokens, const char *panel, int64_t inputs, float *y,
                                      int64_t y_row) {
    multiply_panel(x, x_row, tokens, panel, 2, inputs, y, y_row);
}

#undef PRODUCT
#undef widen_two
#undef product
#undef multiply_panel
