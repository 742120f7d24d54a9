/* The innermost loops, compiled once for each instruction set: native.c includes this file with LANES, the floats of a
   vector register, and NAME, which gives every function its instruction set's name. */

typedef float NAME(vec) __attribute__((vector_size(LANES * 4)));
typedef uint32_t NAME(uvec) __attribute__((vector_size(LANES * 4)));
typedef int32_t NAME(ivec) __attribute__((vector_size(LANES * 4)));
typedef uint16_t NAME(hvec) __attribute__((vector_size(LANES * 2)));
typedef uint8_t NAME(bvec) __attribute__((vector_size(LANES)));
typedef int8_t NAME(cvec) __attribute__((vector_size(LANES)));
#define vec NAME(vec)
#define uvec NAME(uvec)
#define ivec NAME(ivec)
#define hvec NAME(hvec)
#define bvec NAME(bvec)
#define cvec NAME(cvec)
#define level NAME(level)
#define load_bytes NAME(load_bytes)
#define load_signed NAME(load_signed)
#define store_beside NAME(store_beside)
#define load_beside NAME(load_beside)
#define load_two NAME(load_two)
#define load_fp8 NAME(load_fp8)
#define load_fp32 NAME(load_fp32)
#define load_bf16 NAME(load_bf16)
#define load_fp16 NAME(load_fp16)
#define load NAME(load)
#define store_bf16 NAME(store_bf16)
#define load_some NAME(load_some)
#define sum NAME(sum)
#define exp_vec NAME(exp_vec)
#define larger NAME(larger)
#define attend_group NAME(attend_group)
#define store_up_to NAME(store_up_to)
#define rotate_row NAME(rotate_row)
#define swiglu_row NAME(swiglu_row)
#define norm_row NAME(norm_row)
#define sum_each NAME(sum_each)
#define score_rows NAME(score_rows)
#define weigh_rows NAME(weigh_rows)
#define wide_rows NAME(wide_rows)
#define ask_for NAME(ask_for)
#define ask_soon NAME(ask_soon)
#define AT_ONCE (LANES == 16 ? 16 : 8) /* sums that fit the registers */
#define add_row NAME(add_row)
#define round_row NAME(round_row)
#define scale_row NAME(scale_row)
#define add_scaled NAME(add_scaled)
#define gain_row NAME(gain_row)
#define turn_row NAME(turn_row)
#define change_row NAME(change_row)

INLINE vec load_fp32(const float *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE vec load_bf16(const uint16_t *p) {
#if LANES == 16 && defined(X86)
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16);
#elif LANES == 8 && defined(X86)
    return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)), 16);
#else
    hvec h;
    memcpy(&h, p, sizeof h);
    return (vec)(__builtin_convertvector(h, uvec) << 16);
#endif
}

/* In general: exponent and mantissa moved to their places, then scaled by 2^112: right for subnormals, too. There is no infinity
   among weights (Target.place). */
INLINE vec load_fp16(const uint16_t *p) {
#if LANES == 16 && defined(X86)
    return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)p));
#elif LANES == 8 && defined(X86)
    return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const void *)p));
#else
    hvec h;
    memcpy(&h, p, sizeof h);
    uvec bits = __builtin_convertvector(h, uvec);
    vec size = (vec)((bits & 0x7fff) << 13) * 0x1p112f;
    return (vec)((uvec)size | (bits & 0x8000) << 16);
#endif
}

INLINE vec load(const void *p, int64_t at, const int type) {
    if (type == FP32) return load_fp32((const float *)p + at);
    if (type == BF16) return load_bf16((const uint16_t *)p + at);
    return load_fp16((const uint16_t *)p + at);
}

/* To bf16: to nearest, ties to even; what is no number stays none. */
INLINE void store_bf16(uint16_t *p, vec value) {
    const uvec bits = (uvec)value, none = (uvec)(value != value);
    const uvec rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const uvec made = (rounded & ~none) | ((bits >> 16 | 0x40) & none);
#if LANES == 16 && defined(X86)
    _mm256_storeu_si256((void *)p, _mm512_cvtepi32_epi16((__m512i)made));
#else
    const hvec half = __builtin_convertvector(made, hvec);
    memcpy(p, &half, sizeof half);
#endif
}

/* The `left` values from `at` on, and zeros. */
INLINE vec load_some(const void *p, int64_t at, int64_t left, const int type) {
    char room[LANES * 4] = {0};
    const int64_t size = type == FP32 ? 4 : 2;
    memcpy(room, (const char *)p + at * size, left * size);
    return load(room, 0, type);
}

INLINE float sum(vec v) {
#if LANES == 16 && defined(X86)
    return _mm512_reduce_add_ps((__m512)v);
#elif LANES == 8 && defined(X86)
    __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
#else
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += v[lane];
    return total;
#endif
}

/* An adapter comes from memory: it is asked for so many bytes before. */
INLINE void ask_soon(const void *p, int64_t at, const int type) {
    __builtin_prefetch((const char *)p + at * (type == FP32 ? 4 : 2) + SOON);
}

/* 2 * LANES numbers of an adapter in the order in which they are widened fastest: without AVX-512 the blocks of 4 that a
   bf16 vector has are 0 and 2, and 1 and 3. `load_beside` and `store_beside` are fp32 numbers in the order of that `type`. */
INLINE void load_two(const void *p, int64_t at, const int type, vec two[2]) {
#if LANES == 8 && defined(X86)
    if (type == BF16) {
        const __m256i both = _mm256_loadu_si256((const void *)((const uint16_t *)p + at)), none = _mm256_setzero_si256();
        two[0] = (vec)_mm256_unpacklo_epi16(none, both), two[1] = (vec)_mm256_unpackhi_epi16(none, both);
        return;
    }
#endif
    UNROLL for (int half = 0; half < 2; half++) two[half] = load(p, at + half * LANES, type);
}

INLINE void load_beside(const float *p, const int type, vec two[2]) {
#if LANES == 8 && defined(X86)
    if (type == BF16) {
        UNROLL for (int half = 0; half < 2; half++)
            two[half] = (vec)_mm256_loadu2_m128(p + 8 + half * 4, p + half * 4);
        return;
    }
#endif
    UNROLL for (int half = 0; half < 2; half++) two[half] = load_fp32(p + half * LANES);
}

INLINE void store_beside(float *p, const int type, const vec two[2]) {
#if LANES == 8 && defined(X86)
    if (type == BF16) {
        UNROLL for (int half = 0; half < 2; half++)
            _mm256_storeu2_m128(p + 8 + half * 4, p + half * 4, (__m256)two[half]);
        return;
    }
#endif
    UNROLL for (int half = 0; half < 2; half++) memcpy(p + half * LANES, &two[half], sizeof(vec));
}

/* middle[t][r] = sum_i x[t][i] A[r][i] for a few tokens and ranks. The loops over both are unrolled: the sums are
   registers. */
#define DOTS(NAME, TOKENS_HERE, RANKS_HERE)                                                                         \
    INLINE void NAME(const float *x, int64_t x_row, const void *A, int64_t rank, int64_t inputs, float *middle,     \
                     int64_t middle_row, const int type) {                                                          \
        vec sums[TOKENS_HERE][RANKS_HERE] = {{{0}}};                                                                \
        int64_t i = 0;                                                                                              \
        for (; i + 2 * LANES <= inputs; i += 2 * LANES) {                                                           \
            vec own[TOKENS_HERE][2];                                                                                \
            UNROLL for (int t = 0; t < TOKENS_HERE; t++) load_beside(x + t * x_row + i, type, own[t]);              \
            UNROLL for (int r = 0; r < RANKS_HERE; r++) {                                                           \
                vec a[2];                                                                                           \
                ask_soon(A, (rank + r) * inputs + i, type);                                                          \
                load_two(A, (rank + r) * inputs + i, type, a);                                                      \
                UNROLL for (int t = 0; t < TOKENS_HERE; t++)                                                        \
                    UNROLL for (int half = 0; half < 2; half++) sums[t][r] += own[t][half] * a[half];               \
            }                                                                                                       \
        }                                                                                                           \
        for (int64_t some; i < inputs; i += some) {                                                                 \
            some = at_most(LANES, inputs - i);                                                                      \
            UNROLL for (int r = 0; r < RANKS_HERE; r++) {                                                           \
                const vec a = load_some(A, (rank + r) * inputs + i, some, type);                                    \
                UNROLL for (int t = 0; t < TOKENS_HERE; t++) sums[t][r] += load_some(x + t * x_row, i, some, FP32) * a; \
            }                                                                                                       \
        }                                                                                                           \
        UNROLL for (int t = 0; t < TOKENS_HERE; t++)                                                                \
            UNROLL for (int r = 0; r < RANKS_HERE; r++) middle[t * middle_row + r] = sum(sums[t][r]);               \
    }
DOTS(NAME(dots_1_1), 1, 1)
DOTS(NAME(dots_1_8), 1, 8)
DOTS(NAME(dots_3_4), 3, 4)
DOTS(NAME(dots_3_1), 3, 1)

#define SHRINK(TYPE)                                                                                                \
    static void NAME(shrink_##TYPE)(const float *x, int64_t x_row, int64_t tokens, const void *A, int64_t rank,    \
                                     int64_t ranks, int64_t inputs, float *middle, int64_t middle_row) {            \
        int64_t t = 0;                                                                                              \
        for (; t + 3 <= tokens; t += 3) {                                                                           \
            int64_t r = 0;                                                                                          \
            for (; r + 4 <= ranks; r += 4)                                                                          \
                NAME(dots_3_4)(x + t * x_row, x_row, A, rank + r, inputs, middle + t * middle_row + r, middle_row, TYPE); \
            for (; r < ranks; r++)                                                                                  \
                NAME(dots_3_1)(x + t * x_row, x_row, A, rank + r, inputs, middle + t * middle_row + r, middle_row, TYPE); \
        }                                                                                                           \
        for (; t < tokens; t++) {                                                                                   \
            int64_t r = 0;                                                                                          \
            for (; r + 8 <= ranks; r += 8)                                                                          \
                NAME(dots_1_8)(x + t * x_row, x_row, A, rank + r, inputs, middle + t * middle_row + r, middle_row, TYPE); \
            for (; r < ranks; r++)                                                                                  \
                NAME(dots_1_1)(x + t * x_row, x_row, A, rank + r, inputs, middle + t * middle_row + r, middle_row, TYPE); \
        }                                                                                                           \
    }
SHRINK(FP32)
SHRINK(BF16)
SHRINK(FP16)

/* into[t][o] += sum_r middle[t][r] B[r][o] for a few tokens and twice as many vectors of outputs as there are pairs. */
#define SPREAD(NAME, TOKENS_HERE, PAIRS)                                                                            \
    INLINE void NAME(const float *middle, int64_t middle_row, const void *B, int64_t ranks, int64_t outputs,        \
                     int64_t at, float *into, int64_t into_row, const int type) {                                   \
        vec sums[TOKENS_HERE][PAIRS][2];                                                                            \
        UNROLL for (int t = 0; t < TOKENS_HERE; t++)                                                                \
            UNROLL for (int v = 0; v < PAIRS; v++) load_beside(into + t * into_row + v * 2 * LANES, type, sums[t][v]); \
        for (int64_t r = 0; r < ranks; r++)                                                                         \
            UNROLL for (int v = 0; v < PAIRS; v++) {                                                                \
                vec b[2];                                                                                           \
                ask_soon(B, r * outputs + at + v * 2 * LANES, type);                                                 \
                load_two(B, r * outputs + at + v * 2 * LANES, type, b);                                             \
                UNROLL for (int t = 0; t < TOKENS_HERE; t++)                                                        \
                    UNROLL for (int half = 0; half < 2; half++) sums[t][v][half] += middle[t * middle_row + r] * b[half]; \
            }                                                                                                       \
        UNROLL for (int t = 0; t < TOKENS_HERE; t++)                                                                \
            UNROLL for (int v = 0; v < PAIRS; v++) store_beside(into + t * into_row + v * 2 * LANES, type, sums[t][v]); \
    }
SPREAD(NAME(spread_1_1), 1, 1)
SPREAD(NAME(spread_1_4), 1, 4)
SPREAD(NAME(spread_4_1), 4, 1)

#define EXPAND(TYPE)                                                                                                \
    static void NAME(expand_##TYPE)(const float *middle, int64_t row, int64_t tokens, const void *B, int64_t ranks, \
                                     int64_t outputs, int64_t at, int64_t count, float *into, int64_t into_row) {   \
        const int64_t whole = count / (2 * LANES) * (2 * LANES);                                                    \
        int64_t t = 0;                                                                                              \
        for (; t + 4 <= tokens; t += 4)                                                                             \
            for (int64_t o = 0; o < whole; o += 2 * LANES)                                                          \
                NAME(spread_4_1)(middle + t * row, row, B, ranks, outputs, at + o, into + t * into_row + o, into_row, TYPE); \
        for (; t < tokens; t++) {                                                                                   \
            int64_t o = 0;                                                                                          \
            for (; o + 8 * LANES <= whole; o += 8 * LANES)                                                          \
                NAME(spread_1_4)(middle + t * row, row, B, ranks, outputs, at + o, into + t * into_row + o, into_row, TYPE); \
            for (; o < whole; o += 2 * LANES)                                                                       \
                NAME(spread_1_1)(middle + t * row, row, B, ranks, outputs, at + o, into + t * into_row + o, into_row, TYPE); \
        }                                                                                                           \
        for (int64_t o = whole, some; o < count; o += some) {                                                       \
            some = at_most(LANES, count - o);                                                                       \
            for (t = 0; t < tokens; t++) {                                                                          \
                vec sums = load_some(into + t * into_row, o, some, FP32);                                           \
                for (int64_t r = 0; r < ranks; r++)                                                                 \
                    sums += middle[t * row + r] * load_some(B, r * outputs + at + o, some, TYPE);                   \
                memcpy(into + t * into_row + o, &sums, some * sizeof(float));                                       \
            }                                                                                                       \
        }                                                                                                           \
    }
EXPAND(FP32)
EXPAND(BF16)
EXPAND(FP16)

static void NAME(widen_row)(const uint16_t *from, float *to, int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        const vec wide = load_bf16(from + i);
        memcpy(to + i, &wide, sizeof wide);
    }
    for (; i < count; i++) to[i] = widen(from, i, BF16);
}

static void NAME(narrow_row)(const float *from, uint16_t *to, int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store_bf16(to + i, load_fp32(from + i));
    for (; i < count; i++) to[i] = narrow(from[i]);
}

INLINE uvec load_bytes(const uint8_t *p) {
#if LANES == 16 && defined(X86)
    return (uvec)_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)p));
#elif LANES == 8 && defined(X86)
    return (uvec)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)p));
#else
    bvec bytes;
    memcpy(&bytes, p, sizeof bytes);
    return __builtin_convertvector(bytes, uvec);
#endif
}

INLINE ivec load_signed(const int8_t *p) {
#if LANES == 16 && defined(X86)
    return (ivec)_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)p));
#elif LANES == 8 && defined(X86)
    return (ivec)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)p));
#else
    cvec bytes;
    memcpy(&bytes, p, sizeof bytes);
    return __builtin_convertvector(bytes, ivec);
#endif
}

/* float8 e4m3: the bits of a number in half precision, but for the bias of the exponent. */
INLINE vec load_fp8(const uint8_t *p) {
#if LANES >= 8 && defined(X86)
    const __m128i bytes = LANES == 16 ? _mm_loadu_si128((const void *)p) : _mm_loadl_epi64((const void *)p);
    const __m256i wide = _mm256_cvtepu8_epi16(bytes);
    const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x80)), 8);
    const __m256i size = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x7f)), 7);
    const __m256i half = _mm256_or_si256(sign, size);
    return load_fp16((const uint16_t *)&half) * 256;
#else
    const uvec bits = load_bytes(p);
    const vec size = (vec)((bits & 0x7f) << 20) * 0x1p120f;
    return (vec)((uvec)size | (bits & 0x80) << 24);
#endif
}

/* Which of 16 levels each code means; `low` and `high` are the levels where a register holds 8 of them or more. */
INLINE vec level(uvec codes, const float *levels, vec low, vec high) {
#if LANES == 16 && defined(X86)
    return (vec)_mm512_permutexvar_ps((__m512i)codes, (__m512)low);
#elif LANES == 8 && defined(X86)
    const __m256 first = _mm256_permutevar8x32_ps((__m256)low, (__m256i)codes);
    const __m256 second = _mm256_permutevar8x32_ps((__m256)high, (__m256i)codes);
    return (vec)_mm256_blendv_ps(first, second, (__m256)(codes << 28));
#else
    vec found;
    for (int lane = 0; lane < LANES; lane++) found[lane] = levels[codes[lane]];
    return found;
#endif
}

/* One row of a weight in 4 bits. 16 bytes hold 32 inputs, the first 16 of them in their low halves. */
static void NAME(widen_4)(const uint8_t *codes, const float *levels, const float *scales, const float *offsets,
                          int64_t inputs, int64_t group, float *restrict into) {
    const vec low = load_fp32(levels), high = load_fp32(levels + 16 - LANES);
    for (int64_t first = 0, g = 0; first < inputs; first += group, g++) {
        const float scale = scales[g], offset = offsets ? offsets[g] : 0;
        for (int64_t i = first; i < first + group; i += 32)
            UNROLL for (int64_t l = 0; l < 16; l += LANES) {
                const uvec both = load_bytes(codes + i / 2 + l);
                const vec front = level(both & 15, levels, low, high) * scale + offset;
                const vec back = level(both >> 4, levels, low, high) * scale + offset;
                memcpy(into + i + l, &front, sizeof front);
                memcpy(into + i + 16 + l, &back, sizeof back);
            }
    }
}

/* One row of a weight in float8. */
static void NAME(widen_8)(const uint8_t *codes, float scale, int64_t inputs, float *restrict into) {
    int64_t i = 0;
    for (; i + LANES <= inputs; i += LANES) {
        const vec wide = load_fp8(codes + i) * scale;
        memcpy(into + i, &wide, sizeof wide);
    }
    uint8_t rest[LANES] = {0};
    memcpy(rest, codes + i, inputs - i);
    const vec wide = load_fp8(rest) * scale;
    memcpy(into + i, &wide, (inputs - i) * sizeof(float));
}

/* exp for x <= 0, off by 2 units in the last place at most; 0 below -87. Cephes' polynomial. */
INLINE vec exp_vec(vec x) {
    const vec floor = (vec){0} - 87.0f, log2e = (vec){0} + 1.44269504f;
#if LANES == 16 && defined(X86)
    const __mmask16 whole = _mm512_cmp_ps_mask((__m512)x, (__m512)floor, _CMP_NLT_UQ);
    x = (vec)_mm512_max_ps((__m512)floor, (__m512)x);
    const vec n = (vec)_mm512_roundscale_ps((__m512)(x * log2e), _MM_FROUND_TO_NEAREST_INT);
#else
    const uvec tiny = (uvec)(x < floor);
    x = (vec)(((uvec)x & ~tiny) | ((uvec)floor & tiny));
    const vec shift = (vec){0} + 0x1.8p23f;
    const vec n = (x * log2e + shift) - shift;
#endif
    const vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
#if LANES == 16 && defined(X86)
    return (vec)_mm512_maskz_scalef_ps(whole, (__m512)p, (__m512)n);
#else
    const uvec power = (uvec)(__builtin_convertvector(n, ivec) + 127) << 23;
    return (vec)((uvec)(p * (vec)power) & ~tiny);
#endif
}

INLINE vec larger(vec a, vec b) {
    const uvec take = (uvec)(a > b);
    return (vec)(((uvec)a & take) | ((uvec)b & ~take));
}

/* The `count` numbers from `at` on, `left` of which are there. */
#define load_up_to(p, at, left, type) ((left) >= LANES ? load(p, at, type) : load_some(p, at, left, type))

INLINE void store_up_to(void *p, int64_t at, int64_t left, vec value, const int type) {
    float lanes[LANES];
    if (left >= LANES) {
        if (type == FP32) memcpy((float *)p + at, &value, sizeof value);
        else store_bf16((uint16_t *)p + at, value);
        return;
    }
    memcpy(lanes, &value, sizeof value);
    for (int64_t i = 0; i < LANES && i < left; i++)
        if (type == FP32) ((float *)p)[at + i] = lanes[i];
        else ((uint16_t *)p)[at + i] = narrow(lanes[i]);
}

/* out = x / sqrt(mean(x^2) + eps) * (weight + offset), the weight of a type of its own. */
INLINE void norm_row(const void *x, const void *weight, float offset, float eps, void *out, int64_t count,
                     const int weight_type, const int type) {
    vec squares = {0};
    for (int64_t i = 0; i < count; i += LANES) {
        const vec value = load_up_to(x, i, count - i, type);
        squares += value * value;
    }
    const float factor = 1 / sqrtf(sum(squares) / count + eps);
    for (int64_t i = 0; i < count; i += LANES) {
        const vec gain = load_up_to(weight, i, count - i, weight_type) + offset;
        store_up_to(out, i, count - i, load_up_to(x, i, count - i, type) * factor * gain, type);
    }
}

/* wide += factor * values * by; by: NULL for ones. */
INLINE void add_scaled(const void *values, float factor, const float *by, int64_t count, float *wide, const int type) {
    for (int64_t i = 0; values && i < count; i += LANES) {
        const int64_t left = count - i;
        vec added = factor * load_up_to(values, i, left, type);
        if (by) added *= load_up_to(by, i, left, FP32);
        store_up_to(wide, i, left, load_up_to(wide, i, left, FP32) + added, FP32);
    }
}

/* The norm of a token whose adapters change its weight, for which `wide` has room. */
INLINE void gain_row(const void *x, const void *weight, float offset, float eps, void *out, int64_t count, const pair_t *pairs,
                     int64_t some, const where_t *where, float *wide, const int type) {
    for (int64_t i = 0; i < count; i += LANES)
        store_up_to(wide, i, count - i, load_up_to(weight, i, count - i, type), FP32);
    for (const pair_t *pair = pairs; pair < pairs + some; pair++)
        add_scaled(gain_of(pair, where), pair->gate, NULL, count, wide, type);
    norm_row(x, wide, offset, eps, out, count, FP32, type);
}

/* y += x */
INLINE void add_row(const void *x, void *y, int64_t count, const int type) {
    for (int64_t i = 0; i < count; i += LANES) {
        const int64_t left = count - i;
        store_up_to(y, i, left, load_up_to(x, i, left, type) + load_up_to(y, i, left, type), type);
    }
}

/* out = a / (1 + exp(-a)) * b */
INLINE void swiglu_row(const void *a, const void *b, void *out, int64_t count, const int type) {
    for (int64_t i = 0; i < count; i += LANES) {
        const vec gate = load_up_to(a, i, count - i, type);
        const vec small = exp_vec((vec)((uvec)gate | 0x80000000u));
        const uvec negative = (uvec)(gate < 0.0f);
        const vec above = (vec)(((uvec)small & negative) | ((uvec)((vec){0} + 1.0f) & ~negative));
        store_up_to(out, i, count - i, gate * above / (1.0f + small) * load_up_to(b, i, count - i, type), type);
    }
}

/* Pairs (i, i + half) turned by their angles; what lies behind them is copied. */
INLINE void rotate_row(const void *x, const void *cos, const void *sin, void *out, int64_t half, int64_t count,
                       const int type) {
    for (int64_t i = 0; i < half; i += LANES) {
        const int64_t left = half - i;
        const vec low = load_up_to(x, i, left, type), high = load_up_to(x, half + i, left, type);
        const vec made = low * load_up_to(cos, i, left, type) - high * load_up_to(sin, i, left, type);
        const vec other = high * load_up_to(cos, half + i, left, type) + low * load_up_to(sin, half + i, left, type);
        store_up_to(out, i, left, made, type);
        store_up_to(out, half + i, left, other, type);
    }
    const int64_t size = type == FP32 ? 4 : 2;
    memmove((char *)out + 2 * half * size, (const char *)x + 2 * half * size, (count - 2 * half) * size);
}

/* Codes of a row, zero at 128, and its scale: its largest size by 127. What holds a number that is none has such a scale. */
INLINE float round_row(const void *x, uint8_t *codes, int64_t count, float least, const int type) {
    vec most = {0};
    uvec none = {0};
    for (int64_t i = 0; i < count; i += LANES) {
        const vec value = load_up_to(x, i, count - i, type);
        most = larger((vec)((uvec)value & 0x7fffffff), most);
        none |= (uvec)(value != value);
    }
    float scale = 0;
    uint32_t strange = 0;
    for (int lane = 0; lane < LANES; lane++) scale = most[lane] > scale ? most[lane] : scale, strange |= none[lane];
    scale = strange ? NAN : scale / 127;
    if (scale < least) scale = least;
    for (int64_t i = 0; i < count; i += LANES) {
        const vec value = load_up_to(x, i, count - i, type) / scale;
        const vec shift = (vec){0} + 0x1.8p23f;
        const uvec code = (uvec)(value + shift) + 128; /* the nearest whole number, ties to even, in the low bits */
        const bvec narrowed = __builtin_convertvector(code, bvec);
        memcpy(codes + i, &narrowed, at_most(LANES, count - i));
    }
    return scale;
}

/* x * scale */
INLINE void scale_row(const float *x, float scale, void *out, int64_t count, const int type) {
    for (int64_t i = 0; i < count; i += LANES)
        store_up_to(out, i, count - i, load_up_to(x, i, count - i, FP32) * scale, type);
}

/* made += gate * (R - I) x of one adapter. */
INLINE void turn_row(const float *x, float gate, const change_t *change, int64_t count, float *made, const int type) {
    const int64_t size = change->size, stride = change->stride;
    for (int64_t block = 0; change->blocks && block < count / size; block++) {
        const int64_t at = block * size * size, first = block / stride * size * stride + block % stride;
        for (int64_t o = 0; stride == 1 && size >= LANES && o < size; o += LANES) {
            vec gained = {0};
            for (int64_t i = 0; i < size; i++) gained += x[first + i] * load_up_to(change->blocks, at + i * size + o, size - o, type);
            store_up_to(made, first + o, size - o, load_up_to(made, first + o, size - o, FP32) + gate * gained, FP32);
        }
        for (int64_t o = 0; (stride > 1 || size < LANES) && o < size; o++) {
            float gained = 0;
            for (int64_t i = 0; i < size; i++) gained += x[first + i * stride] * widen(change->blocks, at + i * size + o, type);
            made[first + o * stride] += gate * gained;
        }
    }
}

/* What a token's adapters do to x, rounded once; `wide` has room for twice as many. */
INLINE void change_row(void *x, const pair_t *pairs, int64_t some, const where_t *where, int64_t count, float *wide,
                       const int type) {
    float *const made = wide + count;
    for (int64_t i = 0; i < count; i += LANES) {
        const vec value = load_up_to(x, i, count - i, type);
        store_up_to(wide, i, count - i, value, FP32);
        store_up_to(made, i, count - i, value, FP32);
    }
    for (const pair_t *pair = pairs; pair < pairs + some; pair++) {
        const change_t *const change = change_of(pair, where);
        if (!change) continue;
        add_scaled(change->scale, pair->gate, wide, count, made, type);
        turn_row(wide, pair->gate, change, count, made, type);
        add_scaled(change->bias, pair->gate, NULL, count, made, type);
    }
    for (int64_t i = 0; i < count; i += LANES) store_up_to(x, i, count - i, load_up_to(made, i, count - i, FP32), type);
}

#define ROWS(TYPE)                                                                                                  \
    static void NAME(norm_##TYPE)(const void *x, const void *weight, float offset, float eps, void *out,            \
                                  int64_t count) {                                                                  \
        norm_row(x, weight, offset, eps, out, count, TYPE, TYPE);                                                   \
    }                                                                                                               \
    static void NAME(gain_##TYPE)(const void *x, const void *weight, float offset, float eps, void *out,            \
                                  int64_t count, const pair_t *pairs, int64_t some, const where_t *where, float *wide) { \
        gain_row(x, weight, offset, eps, out, count, pairs, some, where, wide, TYPE);                               \
    }                                                                                                               \
    static void NAME(add_##TYPE)(const void *x, void *y, int64_t count) { add_row(x, y, count, TYPE); }                \
    static void NAME(swiglu_##TYPE)(const void *a, const void *b, void *out, int64_t count) {                       \
        swiglu_row(a, b, out, count, TYPE);                                                                         \
    }                                                                                                               \
    static void NAME(rotate_##TYPE)(const void *x, const void *cos, const void *sin, void *out, int64_t half,       \
                                    int64_t count) {                                                                \
        rotate_row(x, cos, sin, out, half, count, TYPE);                                                            \
    }                                                                                                               \
    static float NAME(round_##TYPE)(const void *x, uint8_t *codes, int64_t count, float least) {                    \
        return round_row(x, codes, count, least, TYPE);                                                             \
    }                                                                                                               \
    static void NAME(scale_##TYPE)(const float *x, float scale, void *out, int64_t count) {                         \
        scale_row(x, scale, out, count, TYPE);                                                                      \
    }                                                                                                               \
    static void NAME(change_##TYPE)(void *x, const pair_t *pairs, int64_t some, const where_t *where,               \
                                    int64_t count, float *wide) {                                                   \
        change_row(x, pairs, some, where, count, wide, TYPE);                                                       \
    }
ROWS(FP32)
ROWS(BF16)

/* The sums of AT_ONCE registers. */
INLINE void sum_each(const vec *v, float *sums) {
#if LANES == 16 && defined(X86)
    __m512 fours[4], pairs[2];
    for (int i = 0; i < 4; i++) {
        const __m512 a = (__m512)v[4 * i], b = (__m512)v[4 * i + 1], c = (__m512)v[4 * i + 2], d = (__m512)v[4 * i + 3];
        const __m512d ab = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        const __m512d cd = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        fours[i] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(ab, cd), (__m512)_mm512_unpackhi_pd(ab, cd));
    }
    for (int i = 0; i < 2; i++) {
        const __m512 a = fours[2 * i], b = fours[2 * i + 1];
        pairs[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    const __m512 even = _mm512_shuffle_f32x4(pairs[0], pairs[1], 0x88), odd = _mm512_shuffle_f32x4(pairs[0], pairs[1], 0xdd);
    _mm512_storeu_ps(sums, _mm512_add_ps(even, odd));
#else
    for (int i = 0; i < AT_ONCE; i++) sums[i] = sum(v[i]);
#endif
}

/* scores[p] = query . keys[p] */
INLINE void score_rows(const float *query, const float *keys, int64_t count, int64_t dim, float *scores) {
    int64_t p = 0;
    for (; p + AT_ONCE <= count; p += AT_ONCE) {
        vec sums[AT_ONCE] = {{0}};
        for (int64_t d = 0; d < dim; d += LANES) {
            const vec q = load_fp32(query + d);
            UNROLL16 for (int i = 0; i < AT_ONCE; i++) sums[i] += q * load_fp32(keys + (p + i) * dim + d);
        }
        sum_each(sums, scores + p);
    }
    for (; p < count; p++) {
        vec own = {0};
        for (int64_t d = 0; d < dim; d += LANES) own += load_fp32(query + d) * load_fp32(keys + p * dim + d);
        scores[p] = sum(own);
    }
}

/* out += sum_p weights[p] values[p], for some registers of out. */
#define WEIGH(NAME, VECTORS)                                                                                        \
    INLINE void NAME(const float *weights, const float *values, int64_t count, int64_t dim, float *out) {           \
        vec sums[VECTORS];                                                                                          \
        UNROLL for (int v = 0; v < VECTORS; v++) sums[v] = load_fp32(out + v * LANES);                              \
        for (int64_t p = 0; p < count; p++)                                                                         \
            UNROLL for (int v = 0; v < VECTORS; v++) sums[v] += weights[p] * load_fp32(values + p * dim + v * LANES); \
        UNROLL for (int v = 0; v < VECTORS; v++) memcpy(out + v * LANES, &sums[v], sizeof(vec));                    \
    }
WEIGH(NAME(weigh_1), 1)
WEIGH(NAME(weigh_4), 4)

INLINE void weigh_rows(const float *weights, const float *values, int64_t count, int64_t dim, float *out) {
    int64_t d = 0;
    for (; d + 4 * LANES <= dim; d += 4 * LANES) NAME(weigh_4)(weights, values + d, count, dim, out + d);
    for (; d < dim; d += LANES) NAME(weigh_1)(weights, values + d, count, dim, out + d);
}

/* Some rows of a cache in fp32: where they are, or in the tile. */
INLINE const float *wide_rows(const void *rows, int64_t first, int64_t count, int64_t dim, float *tile, const int type) {
    if (type == FP32) return (const float *)rows + first * dim;
    NAME(widen_row)((const uint16_t *)rows + first * dim, tile, count * dim);
    return tile;
}

/* Rows of a cache, asked for before they are used. */
INLINE void ask_for(const void *rows, int64_t first, int64_t count, int64_t dim, const int type) {
    const char *const from = (const char *)rows + first * dim * (type == FP32 ? 4 : 2);
    for (int64_t at = 0; at < count * dim * (type == FP32 ? 4 : 2); at += LINE) __builtin_prefetch(from + at);
}

/* Each stretch of neighbouring rows of the cache, ROWS_AT_ONCE at most, in which positions first ... length - 1 lie. */
#define FOR_STRETCHES(l, row, count)                                                                                \
    for (int64_t l = first, row, count; l < length && (count = at_most(block_size - l % block_size, length - l),    \
                                                       count = at_most(count, ROWS_AT_ONCE),                        \
                                                       row = blocks[l / block_size] * block_size + l % block_size, 1); \
         l += count)

/* What one KV head's query heads see of one sequence: scores, softmax, weighted values, a stretch of the cache after the
   other. `query` (group, dim) is fp32 and scaled; `scores` has room for group * padded, `tile` for ROWS_AT_ONCE * dim,
   `out` (group, dim) is zero; positions first ... length - 1 are seen. */
INLINE void attend_group(const float *query, const void *keys, const void *values, const int64_t *blocks,
                         int64_t block_size, int64_t first, int64_t length, int64_t group, int64_t dim, float softcap,
                         const float *sinks, float *scores, int64_t padded, float *tile, float *out, const int type) {
    FOR_STRETCHES(l, row, count) {
        const int64_t next = l + count;
        ask_for(values, row, count, dim, type);
        if (next < length)
            ask_for(keys, blocks[next / block_size] * block_size + next % block_size, at_most(count, length - next), dim, type);
        const float *const wide = wide_rows(keys, row, count, dim, tile, type);
        for (int64_t g = 0; g < group; g++) score_rows(query + g * dim, wide, count, dim, scores + g * padded + l - first);
    }
    const int64_t seen = length - first;
    for (int64_t g = 0; g < group; g++) {
        float *const own = scores + g * padded;
        for (int64_t l = 0; l < seen && softcap > 0; l++) own[l] = softcap * tanhf(own[l] / softcap);
        for (int64_t l = seen; l < padded; l++) own[l] = -INFINITY;
        vec most = (vec){0} + (sinks ? sinks[g] : -INFINITY), total = {0};
        for (int64_t l = 0; l < padded; l += LANES) most = larger(load_fp32(own + l), most);
        float best = most[0];
        for (int lane = 1; lane < LANES; lane++) best = most[lane] > best ? most[lane] : best;
        for (int64_t l = 0; l < padded; l += LANES) {
            const vec weight = exp_vec(load_fp32(own + l) - best);
            memcpy(own + l, &weight, sizeof weight);
            total += weight;
        }
        const float share = 1 / (sum(total) + (sinks ? expf(sinks[g] - best) : 0));
        for (int64_t l = 0; l < seen; l++) own[l] *= share;
    }
    FOR_STRETCHES(l, row, count) {
        const float *const wide = wide_rows(values, row, count, dim, tile, type);
        for (int64_t g = 0; g < group; g++) weigh_rows(scores + g * padded + l - first, wide, count, dim, out + g * dim);
    }
}

#define ATTEND(TYPE)                                                                                                \
    static void NAME(attend_##TYPE)(const float *query, const void *keys, const void *values, const int64_t *blocks, \
                                    int64_t block_size, int64_t first, int64_t length, int64_t group, int64_t dim,  \
                                    float softcap, const float *sinks, float *scores, int64_t padded, float *tile,  \
                                    float *out) {                                                                   \
        attend_group(query, keys, values, blocks, block_size, first, length, group, dim, softcap, sinks, scores,    \
                     padded, tile, out, TYPE);                                                                      \
    }
ATTEND(FP32)
ATTEND(BF16)

#include "native_panels.h"

#undef vec
#undef uvec
#undef ivec
#undef hvec
#undef bvec
#undef cvec
#undef level
#undef load_bytes
#undef load_signed
#undef store_beside
#undef load_beside
#undef load_two
#undef load_fp8
#undef load_fp32
#undef load_bf16
#undef load_fp16
#undef load
#undef store_bf16
#undef load_some
#undef sum
#undef exp_vec
#undef larger
#undef attend_group
#undef load_up_to
#undef WEIGH
#undef FOR_STRETCHES
#undef ATTEND
#undef sum_each
#undef score_rows
#undef weigh_rows
#undef wide_rows
#undef ask_for
#undef ask_soon
#undef AT_ONCE
#undef ROWS
#undef store_up_to
#undef rotate_row
#undef swiglu_row
#undef norm_row
#undef add_row
#undef round_row
#undef scale_row
#undef add_scaled
#undef gain_row
#undef turn_row
#undef change_row
#undef DOTS
#undef SHRINK
#undef SPREAD
#undef EXPAND
