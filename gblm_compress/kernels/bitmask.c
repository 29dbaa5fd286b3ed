/* Kernels of the bitmask layout for decoding, 1 to 8 tokens, and the expansion of rows. See job.h.
 *
 * Every kernel computes rows [begin, end) for all tokens; each token of `x` is readable for whole words. Paths: portable C,
 * NEON, AVX2, AVX-512 (fp32; fp16 with VBMI2; bf16 with VBMI2 and BF16). They are compiled for their instruction set by
 * attribute, so that one library runs anywhere; `gblm_paths` says what the CPU has.
 */
#include "bitmask.h"
#include "many_tokens.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

typedef void (*Kernel)(const Job *, int64_t begin, int64_t end);

/* ---- portable ---- */

#define PORTABLE(NAME, TYPE, TO_FLOAT, X_TYPE, X_TO_FLOAT)                              \
    static void portable_##NAME(const Job *job, int64_t begin, int64_t end) {           \
        const int64_t stride = job->words * 64;                                         \
        for (int64_t r = begin; r < end; r++) {                                         \
            const TYPE *v = (const TYPE *)job->values + gblm_start(job, r);             \
            float sums[FEW_TOKENS] = {0};                                               \
            for (int64_t w = 0; w < job->words; w++) {                                  \
                uint64_t bits = gblm_bits(job, r, w);                                   \
                const X_TYPE *x = (const X_TYPE *)job->x + w * 64;                      \
                for (; bits; bits &= bits - 1, v++) {                                   \
                    const int b = __builtin_ctzll(bits);                                \
                    const float value = TO_FLOAT(*v);                                   \
                    for (int64_t t = 0; t < job->tokens; t++)                           \
                        sums[t] += value * X_TO_FLOAT(x[t * stride + b]);               \
                }                                                                       \
            }                                                                           \
            for (int64_t t = 0; t < job->tokens; t++) gblm_put(job, t, r, sums[t]);     \
        }                                                                               \
    }
PORTABLE(f32, float, f32_to_float, float, f32_to_float)
PORTABLE(f16, uint16_t, f16_to_float, uint16_t, f16_to_float)
PORTABLE(bf16, uint16_t, bf16_to_float, uint16_t, bf16_to_float)
PORTABLE(f16_x32, uint16_t, f16_to_float, float, f32_to_float)

/* The bits of word w that are columns of a row. */
static inline uint64_t in_row(int64_t columns, int64_t w) {
    const int64_t left = columns - w * 64;
    return left >= 64 ? ~0ull : (1ull << left) - 1;
}

/* Write rows [begin, end) dense, columns·element bytes each, into `dense`. */
#define PORTABLE_EXPAND(NAME, TYPE)                                                                       \
    static void portable_expand_##NAME(const Job *job, int64_t begin, int64_t end, void *dense, int64_t columns) { \
        memset(dense, 0, (size_t)((end - begin) * columns) * sizeof(TYPE));                               \
        for (int64_t r = begin; r < end; r++) {                                                           \
            const TYPE *v = (const TYPE *)job->values + job->starts[r];                                   \
            TYPE *row = (TYPE *)dense + (r - begin) * columns;                                            \
            for (int64_t w = 0; w < job->words; w++)                                                      \
                for (uint64_t bits = job->mask[r * job->words + w] & in_row(columns, w); bits; bits &= bits - 1) \
                    row[w * 64 + __builtin_ctzll(bits)] = *v++;                                           \
        }                                                                                                 \
    }
PORTABLE_EXPAND(32, uint32_t)
PORTABLE_EXPAND(16, uint16_t)

/* ---- for every instruction set ---- */

/* Decoding is bound by memory, and one core fills more of its bandwidth with several streams: STREAMS rows, a quarter of the
 * share apart, are read side by side. */
#define STREAMS 4

/* Several tokens, and one with AVX2 and NEON: each vector of weights is used once for every token, and each of x for every row that is
 * read beside. T is a constant, so that the sums live in registers; there are at least four, lest one wait for the other. P
 * gives the operations of VECTOR, and SUM the sum of its numbers. */
#define TOKENS(NAME, ATTRIBUTE, VECTOR, P, SUM, TYPE, X_TYPE, WIDTH, VALUES, PRODUCT, T)                             \
    ATTRIBUTE static inline __attribute__((always_inline)) void NAME##_##T##_rows(const Job *job, int64_t first,     \
                                                                                  int64_t apart, const int streams) {\
        const int64_t stride = job->words * 64;                                                                      \
        const TYPE *v[STREAMS];                                                                                      \
        const X_TYPE *x = (const X_TYPE *)job->x;                                                                    \
        VECTOR sums[STREAMS][T];                                                                                     \
        for (int i = 0; i < streams; i++) {                                                                          \
            v[i] = (const TYPE *)job->values + gblm_start(job, first + i * apart);                                   \
            for (int t = 0; t < T; t++) sums[i][t] = P(setzero_ps)();                                                \
        }                                                                                                            \
        for (int64_t w = 0; w < job->words; w++, x += 64) {                                                          \
            uint64_t m[STREAMS];                                                                                     \
            for (int i = 0; i < streams; i++) {                                                                      \
                m[i] = gblm_bits(job, first + i * apart, w);                                                         \
                __builtin_prefetch(v[i] + 1024);                                                                     \
                __builtin_prefetch(v[i] + 1040);                                                                     \
            }                                                                                                        \
            _Pragma("GCC unroll 4") for (int part = 0; part < 64; part += WIDTH)                                     \
                _Pragma("GCC unroll 4") for (int i = 0; i < streams; i++) {                                          \
                    const VECTOR values = VALUES(v + i, m[i]);                                                       \
                    m[i] >>= WIDTH;                                                                                  \
                    _Pragma("GCC unroll 8") for (int t = 0; t < T; t++)                                              \
                        sums[i][t] = PRODUCT(values, x + t * stride + part, sums[i][t]);                             \
                }                                                                                                    \
        }                                                                                                            \
        for (int i = 0; i < streams; i++)                                                                            \
            for (int t = 0; t < T; t++) gblm_put(job, t, first + i * apart, SUM(sums[i][t]));                        \
    }                                                                                                                \
    ATTRIBUTE static void NAME##_##T(const Job *job, int64_t begin, int64_t end) {                                   \
        const int streams = T <= 2 ? STREAMS : T <= 4 ? 2 : 1;                                                       \
        const int64_t apart = (end - begin) / streams;                                                               \
        for (int64_t r = begin; r < begin + apart; r++) NAME##_##T##_rows(job, r, apart, streams);                   \
        for (int64_t r = begin + streams * apart; r < end; r++) NAME##_##T##_rows(job, r, 0, 1);                     \
    }
#define KERNEL(NAME, ONE, ...)                                                                                       \
    TOKENS(NAME, __VA_ARGS__, 2) TOKENS(NAME, __VA_ARGS__, 3) TOKENS(NAME, __VA_ARGS__, 4)                           \
    TOKENS(NAME, __VA_ARGS__, 5) TOKENS(NAME, __VA_ARGS__, 6) TOKENS(NAME, __VA_ARGS__, 7)                           \
    TOKENS(NAME, __VA_ARGS__, 8)                                                                                     \
    static void NAME(const Job *job, int64_t begin, int64_t end) {                                                   \
        static const Kernel by_tokens[] = {ONE,      NAME##_2, NAME##_3, NAME##_4,                                   \
                                           NAME##_5,   NAME##_6, NAME##_7, NAME##_8};                                \
        by_tokens[job->tokens - 1](job, begin, end);                                                                 \
    }

#if defined(__x86_64__)

/* ---- AVX-512 ---- */

/* One token. Four sums a row hide the latency of the multiply-add. */
#define ONE_TOKEN(NAME, ATTRIBUTE, TYPE, X_TYPE, WORD)                                                               \
    ATTRIBUTE static inline __attribute__((always_inline)) void NAME##_rows(const Job *job, int64_t first, int64_t apart, \
                                                                            const int streams) {                     \
        const TYPE *v[STREAMS];                                                                                      \
        const X_TYPE *x = (const X_TYPE *)job->x;                                                                    \
        __m512 sums[STREAMS][4];                                                                                     \
        for (int i = 0; i < streams; i++) {                                                                          \
            v[i] = (const TYPE *)job->values + gblm_start(job, first + i * apart);                                   \
            for (int j = 0; j < 4; j++) sums[i][j] = _mm512_setzero_ps();                                            \
        }                                                                                                            \
        for (int64_t w = 0; w < job->words; w++, x += 64)                                                            \
            _Pragma("GCC unroll 4") for (int i = 0; i < streams; i++)                                                \
                v[i] = WORD(gblm_bits(job, first + i * apart, w), v[i], x, sums[i]);                                 \
        for (int i = 0; i < streams; i++)                                                                            \
            gblm_put(job, 0, first + i * apart, _mm512_reduce_add_ps(_mm512_add_ps(                                  \
                _mm512_add_ps(sums[i][0], sums[i][1]), _mm512_add_ps(sums[i][2], sums[i][3]))));                     \
    }                                                                                                                \
    ATTRIBUTE static void NAME(const Job *job, int64_t begin, int64_t end) {                                         \
        const int64_t apart = (end - begin) / STREAMS;                                                               \
        for (int64_t r = begin; r < begin + apart; r++) NAME##_rows(job, r, apart, STREAMS);                         \
        for (int64_t r = begin + STREAMS * apart; r < end; r++) NAME##_rows(job, r, 0, 1);                           \
    }

AVX512 static inline __attribute__((always_inline)) const float *word_f32(uint64_t m, const float *v, const float *x,
                                                                          __m512 *sums) {
    const int n1 = __builtin_popcountll(m & 0xffff), n2 = __builtin_popcountll(m & 0xffffffff),
              n3 = __builtin_popcountll(m & 0xffffffffffff);
    _mm_prefetch((const char *)(v + 512), _MM_HINT_T0);
    _mm_prefetch((const char *)(v + 528), _MM_HINT_T0);
#define F32_STEP(J, OFFSET)                                                                                        \
    sums[J] = _mm512_fmadd_ps(expand_ps((__mmask16)(m >> (16 * J)), v + OFFSET),                                   \
                              _mm512_loadu_ps(x + 16 * J), sums[J])
    F32_STEP(0, 0);
    F32_STEP(1, n1);
    F32_STEP(2, n2);
    F32_STEP(3, n3);
    return v + __builtin_popcountll(m);
}
ONE_TOKEN(avx512_f32_one, AVX512, float, float, word_f32)

/* fp16 values and fp32 x: 32 values are spread at a time and widened in halves. */
AVX512_16 static inline __attribute__((always_inline)) const uint16_t *word_f16_x32(uint64_t m, const uint16_t *v,
                                                                                    const float *x, __m512 *sums) {
    _mm_prefetch((const char *)(v + 1024), _MM_HINT_T0);
#define F16_X32_STEP(J, OFFSET)                                                                                    \
    do {                                                                                                           \
        const __m512i spread = expand_epi16((__mmask32)(m >> (32 * J)), v + OFFSET);                               \
        sums[2 * J] = _mm512_fmadd_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(spread)),                             \
                                      _mm512_loadu_ps(x + 32 * J), sums[2 * J]);                                   \
        sums[2 * J + 1] = _mm512_fmadd_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(spread, 1)),                   \
                                          _mm512_loadu_ps(x + 32 * J + 16), sums[2 * J + 1]);                      \
    } while (0)
    F16_X32_STEP(0, 0);
    F16_X32_STEP(1, __builtin_popcountll(m & 0xffffffff));
    return v + __builtin_popcountll(m);
}
ONE_TOKEN(avx512_f16_x32_one, AVX512_16, uint16_t, float, word_f16_x32)

AVX512 static inline __attribute__((always_inline)) const float *word_dense_f32(uint64_t m, const float *v, const float *x,
                                                                                __m512 *sums) {
    (void)m;
    for (int j = 0; j < 4; j++) {
        _mm_prefetch((const char *)(v + 1024 + 16 * j), _MM_HINT_T0);
        sums[j] = _mm512_fmadd_ps(_mm512_loadu_ps(v + 16 * j), _mm512_loadu_ps(x + 16 * j), sums[j]);
    }
    return v + 64;
}
ONE_TOKEN(avx512_dense_f32_one, AVX512, float, float, word_dense_f32)

AVX512_16 static inline __attribute__((always_inline)) const uint16_t *word_dense_f16(uint64_t m, const uint16_t *v,
                                                                                      const float *x, __m512 *sums) {
    (void)m;
    for (int j = 0; j < 4; j++) {
        if (j % 2 == 0) _mm_prefetch((const char *)(v + 2048 + 16 * j), _MM_HINT_T0);
        const __m512 value = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(v + 16 * j)));
        sums[j] = _mm512_fmadd_ps(value, _mm512_loadu_ps(x + 16 * j), sums[j]);
    }
    return v + 64;
}
ONE_TOKEN(avx512_dense_f16_one, AVX512_16, uint16_t, float, word_dense_f16)

/* 16 weights as fp32, and v moved past them. */
AVX512 static inline __m512 packed_f32(const float **v, uint64_t bits) {
    const float *from = *v;
    *v += __builtin_popcount((unsigned)bits & 0xffff);
    return expand_ps((__mmask16)bits, from);
}
AVX512_16 static inline __m512 packed_f16(const uint16_t **v, uint64_t bits) {
    __m256i values = _mm256_loadu_si256((const __m256i *)*v);
    __asm__("vpexpandw %0, %0 %{%1%}%{z%}" : "+v"(values) : "Yk"((__mmask16)bits)); /* as expand_ps */
    *v += __builtin_popcount((unsigned)bits & 0xffff);
    return _mm512_cvtph_ps(values);
}
AVX512 static inline __m512 dense_f32(const float **v, uint64_t bits) {
    (void)bits;
    return _mm512_loadu_ps((*v += 16) - 16);
}
AVX512_16 static inline __m512 dense_f16(const uint16_t **v, uint64_t bits) {
    (void)bits;
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)((*v += 16) - 16)));
}

#define AVX512_KERNEL(NAME, ATTRIBUTE, ...) KERNEL(NAME, NAME##_one, ATTRIBUTE, __m512, OF_512, _mm512_reduce_add_ps, __VA_ARGS__)
#define PRODUCT_X32(VALUES, X, SUMS) _mm512_fmadd_ps(VALUES, _mm512_loadu_ps(X), SUMS)
AVX512_KERNEL(avx512_f32, AVX512, float, float, 16, packed_f32, PRODUCT_X32)
AVX512_KERNEL(avx512_f16_x32, AVX512_16, uint16_t, float, 16, packed_f16, PRODUCT_X32)
AVX512_KERNEL(avx512_dense_f32, AVX512, float, float, 16, dense_f32, PRODUCT_X32)
AVX512_KERNEL(avx512_dense_f16, AVX512_16, uint16_t, float, 16, dense_f16, PRODUCT_X32)

/* bf16: 32 values a vector, products of pairs summed in float32 by vdpbf16ps. */
AVX512_BF16 static inline __attribute__((always_inline)) const uint16_t *word_bf16(uint64_t m, const uint16_t *v,
                                                                                   const uint16_t *x, __m512 *sums) {
    _mm_prefetch((const char *)(v + 1024), _MM_HINT_T0);
#define BF16_STEP(J, OFFSET)                                                                                       \
    sums[J] = _mm512_dpbf16_ps(                                                                                    \
        sums[J], (__m512bh)expand_epi16((__mmask32)(m >> (32 * J)), v + OFFSET),                                   \
        (__m512bh)_mm512_loadu_si512(x + 32 * J))
    BF16_STEP(0, 0);
    BF16_STEP(1, __builtin_popcountll(m & 0xffffffff));
    return v + __builtin_popcountll(m);
}
ONE_TOKEN(avx512_bf16_one, AVX512_BF16, uint16_t, uint16_t, word_bf16)

/* 32 weights, and v moved past them. */
AVX512_BF16 static inline __m512 packed_bf16(const uint16_t **v, uint64_t bits) {
    const uint16_t *from = *v;
    *v += __builtin_popcount((unsigned)bits);
    return (__m512)expand_epi16((__mmask32)bits, from);
}
#define PRODUCT_BF16(VALUES, X, SUMS) _mm512_dpbf16_ps(SUMS, (__m512bh)(VALUES), (__m512bh)_mm512_loadu_si512(X))
AVX512_KERNEL(avx512_bf16, AVX512_BF16, uint16_t, uint16_t, 32, packed_bf16, PRODUCT_BF16)

AVX512_16 static void avx512_f16(const Job *job, int64_t begin, int64_t end) {
    const int64_t stride = job->words * 64, tokens = job->tokens;
    for (int64_t r = begin; r < end; r++) {
        const uint16_t *v = (const uint16_t *)job->values + job->starts[r], *x = (const uint16_t *)job->x;
        const uint64_t *mask = job->mask + r * job->words;
        __m512 low[FEW_TOKENS], high[FEW_TOKENS];
        for (int64_t t = 0; t < tokens; t++) low[t] = high[t] = _mm512_setzero_ps();
        for (int64_t w = 0; w < job->words; w++, x += 64) {
            uint64_t m = mask[w];
            _mm_prefetch((const char *)(v + 2048), _MM_HINT_T0);
            for (int part = 0; part < 2; part++, m >>= 32) {
                const __m512i packed = expand_epi16((__mmask32)m, v);
                const __m512 first = _mm512_cvtph_ps(_mm512_castsi512_si256(packed)),
                             second = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(packed, 1));
                for (int64_t t = 0; t < tokens; t++) {
                    const __m256i *token = (const __m256i *)(x + t * stride + 32 * part);
                    low[t] = _mm512_fmadd_ps(first, _mm512_cvtph_ps(_mm256_loadu_si256(token)), low[t]);
                    high[t] = _mm512_fmadd_ps(second, _mm512_cvtph_ps(_mm256_loadu_si256(token + 1)), high[t]);
                }
                v += __builtin_popcount((unsigned)m);
            }
        }
        for (int64_t t = 0; t < tokens; t++)
            gblm_put(job, t, r, _mm512_reduce_add_ps(_mm512_add_ps(low[t], high[t])));
    }
}

AVX512 static void avx512_expand_32(const Job *job, int64_t begin, int64_t end, void *dense, int64_t columns) {
    for (int64_t r = begin; r < end; r++) {
        const float *v = (const float *)job->values + job->starts[r];
        float *row = (float *)dense + (r - begin) * columns;
        for (int64_t w = 0; w < job->words; w++) {
            uint64_t m = job->mask[r * job->words + w];
            uint64_t valid = in_row(columns, w);
            for (int part = 0; part < 4; part++, m >>= 16, valid >>= 16) {
                const __m512 value = expand_ps((__mmask16)m, v);
                _mm512_mask_storeu_ps(row + w * 64 + 16 * part, (__mmask16)valid, value);
                v += __builtin_popcount((unsigned)m & 0xffff);
            }
        }
    }
}

AVX512_16 static void avx512_expand_16(const Job *job, int64_t begin, int64_t end, void *dense, int64_t columns) {
    for (int64_t r = begin; r < end; r++) {
        const uint16_t *v = (const uint16_t *)job->values + job->starts[r];
        uint16_t *row = (uint16_t *)dense + (r - begin) * columns;
        for (int64_t w = 0; w < job->words; w++) {
            uint64_t m = job->mask[r * job->words + w];
            uint64_t valid = in_row(columns, w);
            for (int part = 0; part < 2; part++, m >>= 32, valid >>= 32) {
                const __m512i value = expand_epi16((__mmask32)m, v);
                _mm512_mask_storeu_epi16(row + w * 64 + 32 * part, (__mmask32)valid, value);
                v += __builtin_popcount((unsigned)m);
            }
        }
    }
}

/* ---- AVX2: 8 values are spread by a table of 256 permutations ---- */

static int32_t spread_32[256][8] __attribute__((aligned(32))); /* where lane i takes its value from */
static int32_t lanes_32[256][8] __attribute__((aligned(32)));  /* -1 where a lane has a value */
static uint8_t spread_16[256][16] __attribute__((aligned(16))); /* where byte i is taken from; 128 where there is none */

__attribute__((constructor)) static void fill_tables(void) {
    for (int mask = 0; mask < 256; mask++)
        for (int lane = 0, next = 0; lane < 8; lane++) {
            const int has = mask >> lane & 1;
            lanes_32[mask][lane] = -has;
            spread_32[mask][lane] = has ? next : 0;
            spread_16[mask][2 * lane] = has ? (uint8_t)(2 * next) : 128;
            spread_16[mask][2 * lane + 1] = has ? (uint8_t)(2 * next + 1) : 128;
            next += has;
        }
}

AVX2 static inline __m256 widened_f16(__m128i halves) { return _mm256_cvtph_ps(halves); }
AVX2 static inline __m256 widened_bf16(__m128i halves) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

/* 8 weights as fp32, and v moved past them. */
AVX2 static inline __m256 eight_f32(const float **v, uint64_t bits) {
    const unsigned mask = (unsigned)bits & 255;
    const __m256 packed = _mm256_loadu_ps(*v);
    *v += __builtin_popcount(mask);
    return _mm256_and_ps(_mm256_permutevar8x32_ps(packed, _mm256_load_si256((const __m256i *)spread_32[mask])),
                         _mm256_load_ps((const float *)lanes_32[mask]));
}
AVX2 static inline __m128i eight_16(const uint16_t **v, uint64_t bits) {
    const unsigned mask = (unsigned)bits & 255;
    const __m128i packed = _mm_loadu_si128((const __m128i *)*v);
    *v += __builtin_popcount(mask);
    return _mm_shuffle_epi8(packed, _mm_load_si128((const __m128i *)spread_16[mask]));
}
#define EIGHT_F16(V, BITS) widened_f16(eight_16(V, BITS))
#define EIGHT_BF16(V, BITS) widened_bf16(eight_16(V, BITS))
AVX2 static inline __m256 eight_dense_f32(const float **v, uint64_t bits) {
    (void)bits;
    return _mm256_loadu_ps((*v += 8) - 8);
}
AVX2 static inline __m256 eight_dense_f16(const uint16_t **v, uint64_t bits) {
    (void)bits;
    return widened_f16(_mm_loadu_si128((const __m128i *)((*v += 8) - 8)));
}

#define AVX2_KERNEL(NAME, ...)                                          \
    TOKENS(NAME, AVX2, __m256, OF_256, gblm_sum_256, __VA_ARGS__, 1)    \
    KERNEL(NAME, NAME##_1, AVX2, __m256, OF_256, gblm_sum_256, __VA_ARGS__)
#define EIGHT_X32(VALUES, X, SUMS) _mm256_fmadd_ps(VALUES, _mm256_loadu_ps(X), SUMS)
#define EIGHT_XF16(VALUES, X, SUMS) _mm256_fmadd_ps(VALUES, widened_f16(_mm_loadu_si128((const __m128i *)(X))), SUMS)
#define EIGHT_XBF16(VALUES, X, SUMS) _mm256_fmadd_ps(VALUES, widened_bf16(_mm_loadu_si128((const __m128i *)(X))), SUMS)
AVX2_KERNEL(avx2_f32, float, float, 8, eight_f32, EIGHT_X32)
AVX2_KERNEL(avx2_f16, uint16_t, uint16_t, 8, EIGHT_F16, EIGHT_XF16)
AVX2_KERNEL(avx2_bf16, uint16_t, uint16_t, 8, EIGHT_BF16, EIGHT_XBF16)
AVX2_KERNEL(avx2_f16_x32, uint16_t, float, 8, EIGHT_F16, EIGHT_X32)
AVX2_KERNEL(avx2_dense_f32, float, float, 8, eight_dense_f32, EIGHT_X32)
AVX2_KERNEL(avx2_dense_f16, uint16_t, float, 8, eight_dense_f16, EIGHT_X32)
#endif

#if defined(__aarch64__)

/* ---- NEON: 4 values are spread by a table of 16 shuffles ---- */

static uint8_t neon_32[16][16], neon_16[16][8]; /* where a byte is taken from; 255 where there is none */
static const uint8_t bits_in[16] = {0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4};

__attribute__((constructor)) static void fill_tables(void) {
    for (int mask = 0; mask < 16; mask++)
        for (int lane = 0, next = 0; lane < 4; next += mask >> lane++ & 1) {
            const int has = mask >> lane & 1;
            for (int byte = 0; byte < 4; byte++) neon_32[mask][4 * lane + byte] = has ? (uint8_t)(4 * next + byte) : 255;
            for (int byte = 0; byte < 2; byte++) neon_16[mask][2 * lane + byte] = has ? (uint8_t)(2 * next + byte) : 255;
        }
}

static inline float32x4_t widened_f16(uint16x4_t halves) { return vcvt_f32_f16(vreinterpret_f16_u16(halves)); }
static inline float32x4_t widened_bf16(uint16x4_t halves) { return vreinterpretq_f32_u32(vshll_n_u16(halves, 16)); }

/* 4 weights as fp32, and v moved past them. */
static inline float32x4_t four_f32(const float **v, uint64_t bits) {
    const uint8x16_t packed = vreinterpretq_u8_f32(vld1q_f32(*v));
    *v += bits_in[bits & 15];
    return vreinterpretq_f32_u8(vqtbl1q_u8(packed, vld1q_u8(neon_32[bits & 15])));
}
static inline uint16x4_t four_16(const uint16_t **v, uint64_t bits) {
    const uint8x8_t packed = vreinterpret_u8_u16(vld1_u16(*v));
    *v += bits_in[bits & 15];
    return vreinterpret_u16_u8(vtbl1_u8(packed, vld1_u8(neon_16[bits & 15])));
}
#define FOUR_F16(V, BITS) widened_f16(four_16(V, BITS))
#define FOUR_BF16(V, BITS) widened_bf16(four_16(V, BITS))
static inline float32x4_t four_dense_f32(const float **v, uint64_t bits) {
    (void)bits;
    return vld1q_f32((*v += 4) - 4);
}
static inline float32x4_t four_dense_f16(const uint16_t **v, uint64_t bits) {
    (void)bits;
    return widened_f16(vld1_u16((*v += 4) - 4));
}

#define NEON_KERNEL(NAME, ...)                                            \
    TOKENS(NAME, NEON, float32x4_t, OF_NEON, vaddvq_f32, __VA_ARGS__, 1)  \
    KERNEL(NAME, NAME##_1, NEON, float32x4_t, OF_NEON, vaddvq_f32, __VA_ARGS__)
#define FOUR_X32(VALUES, X, SUMS) vfmaq_f32(SUMS, VALUES, vld1q_f32(X))
#define FOUR_XF16(VALUES, X, SUMS) vfmaq_f32(SUMS, VALUES, widened_f16(vld1_u16(X)))
#define FOUR_XBF16(VALUES, X, SUMS) vfmaq_f32(SUMS, VALUES, widened_bf16(vld1_u16(X)))
NEON_KERNEL(neon_f32, float, float, 4, four_f32, FOUR_X32)
NEON_KERNEL(neon_f16, uint16_t, uint16_t, 4, FOUR_F16, FOUR_XF16)
NEON_KERNEL(neon_bf16, uint16_t, uint16_t, 4, FOUR_BF16, FOUR_XBF16)
NEON_KERNEL(neon_f16_x32, uint16_t, float, 4, FOUR_F16, FOUR_X32)
NEON_KERNEL(neon_dense_f32, float, float, 4, four_dense_f32, FOUR_X32)
NEON_KERNEL(neon_dense_f16, uint16_t, float, 4, four_dense_f16, FOUR_X32)
#endif

/* ---- choice of path ---- */

#if defined(__x86_64__) && defined(__linux__)
/* Whether the CPU has matrix tiles for bf16, and the kernel lets this process use them (it must be asked). */
static int has_amx(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return 0;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#endif

#if defined(__x86_64__)
static int has_f16c(void) { /* not every compiler's __builtin_cpu_supports knows it */
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && c >> 29 & 1;
}
#endif

static int paths_of(int type) {
    int paths = 1 << PORTABLE_PATH;
#if defined(__aarch64__)
    (void)type;
    paths |= 1 << NEON_PATH;
#elif defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) paths |= 1 << AVX2_PATH;
    const int base = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const int expand16 = base && __builtin_cpu_supports("avx512vbmi2");
    if ((type == F32 && base) || ((type == F16 || type == F16_X32) && expand16) ||
        (type == BF16 && expand16 && __builtin_cpu_supports("avx512bf16")))
        paths |= 1 << AVX512_PATH;
#if defined(__linux__)
    if (type == BF16 && paths >> AVX512_PATH & 1 && has_amx()) paths |= 1 << AMX_PATH;
#endif
#endif
    return paths;
}

/* Bit p of the result is set where the CPU can run path p for elements of `type`. Found once: asking for AMX is a system
 * call, and cpuid leaves a virtual machine. */
EXPORT int gblm_paths(int type) {
    static int found[TYPES];
    if (type < 0 || type >= TYPES) return 0;
    int paths = __atomic_load_n(&found[type], __ATOMIC_RELAXED);
    if (!paths) __atomic_store_n(&found[type], paths = paths_of(type), __ATOMIC_RELAXED);
    return paths;
}

static Kernel kernel_of(int path, int type, int dense) {
    static const Kernel portable[TYPES] = {portable_f32, portable_f16, portable_bf16, portable_f16_x32};
#if defined(__x86_64__)
    static const Kernel avx2[TYPES] = {avx2_f32, avx2_f16, avx2_bf16, avx2_f16_x32};
    static const Kernel avx512[TYPES] = {avx512_f32, avx512_f16, avx512_bf16, avx512_f16_x32};
    if (path >= AVX512_PATH && dense) return type == F32 ? avx512_dense_f32 : avx512_dense_f16;
    if (path >= AVX512_PATH) return avx512[type]; /* tiles do not pay for few tokens */
    if (path == AVX2_PATH && dense) return type == F32 ? avx2_dense_f32 : avx2_dense_f16;
    if (path == AVX2_PATH) return avx2[type];
#elif defined(__aarch64__)
    static const Kernel neon[TYPES] = {neon_f32, neon_f16, neon_bf16, neon_f16_x32};
    if (path == NEON_PATH && dense) return type == F32 ? neon_dense_f32 : neon_dense_f16;
    if (path == NEON_PATH) return neon[type];
#endif
    (void)path, (void)dense;
    return portable[type];
}

/* ---- work shared by threads ---- */

typedef struct {
    const Job *jobs;
    int count, parts;
    Kernel kernel;
} Products;

static void few_tokens_part(void *argument, int index) {
    const Products *products = argument;
    for (int i = 0; i < products->count; i++) {
        const Job *job = products->jobs + i;
        int64_t begin, end;
        gblm_share(job->rows, products->parts, index, &begin, &end);
        products->kernel(job, begin, end);
    }
}

void gblm_few_tokens(const Job *jobs, int count, const Threads *threads) {
    Products products = {jobs, count, threads->count, kernel_of(jobs->path, jobs->type, !jobs->mask)};
    threads->run(threads->context, few_tokens_part, &products, threads->count);
}

typedef struct {
    const Job *job;
    int parts;
    int64_t first, count, columns;
    char *dense;
} Expansion;

static void expand_part(void *argument, int index) {
    const Expansion *work = argument;
    const int wide = work->job->type == F32;
    int64_t begin, end;
    gblm_share(work->count, work->parts, index, &begin, &end);
    void *dense = work->dense + begin * work->columns * (wide ? 4 : 2);
    begin += work->first;
    end += work->first;
#if defined(__x86_64__)
    if (work->job->path >= AVX512_PATH) {
        (wide ? avx512_expand_32 : avx512_expand_16)(work->job, begin, end, dense, work->columns);
        return;
    }
#endif
    (wide ? portable_expand_32 : portable_expand_16)(work->job, begin, end, dense, work->columns);
}

/* ---- torch's threads ---- */

static void (*gomp_parallel)(void (*)(void *), void *, unsigned, unsigned);
static int (*thread_number)(void), (*team_size)(void);

/* Borrow the OpenMP runtime that the process already has (a second pool would spin against the first); without it
 * everything runs on the calling thread. */
EXPORT void gblm_set_parallel(void *parallel, void *omp_get_thread_num, void *omp_get_num_threads) {
    gomp_parallel = (void (*)(void (*)(void *), void *, unsigned, unsigned))parallel;
    thread_number = (int (*)(void))omp_get_thread_num;
    team_size = (int (*)(void))omp_get_num_threads;
}

typedef struct {
    void (*part)(void *, int);
    void *work;
    int count;
} Region;

/* The team may be smaller than what was asked for (OMP_THREAD_LIMIT, OMP_DYNAMIC, a region within a region). */
static void region_part(void *argument) {
    const Region *region = argument;
    for (int index = thread_number(); index < region->count; index += team_size()) region->part(region->work, index);
}

static void run_openmp(void *context, void (*part)(void *, int), void *work, int count) {
    (void)context;
    Region region = {part, work, count};
    if (count == 1) part(work, 0);
    else gomp_parallel(region_part, &region, (unsigned)count, 0);
}

Threads gblm_threads(int count) {
    const Threads threads = {run_openmp, NULL, gomp_parallel ? count : 1};
    return threads;
}

/* Whether numbers that choose code or size work are within their tables and what the CPU can run. */
static int can_run(int64_t rows, int64_t words, int type, int path, int count) {
    return rows >= 0 && words > 0 && count > 0 && path >= 0 && path < PATHS && gblm_paths(type) >> path & 1;
}

/* y [tokens, rows] = x [tokens, words·64] Wᵀ, both in the type of the values (fp32 with F16_X32), accumulated in float32.
 * A dense weight, without mask and starts, is of type F32 or F16_X32. Without `panels`
 * at most FEW_TOKENS tokens; with them (gblm_panel_bytes) any number, on the path for many. Returns 0, and has done
 * nothing, where a number is not one that there is code for. */
EXPORT int gblm_bitmask_linear(const void *mask, const void *values, const int64_t *starts, const void *x, void *y,
                               void *panels, int64_t rows, int64_t words, int64_t tokens, int type, int path, int count) {
    const int many = panels != NULL;
    if (!can_run(rows, words, type, path, count) || tokens < 1) return 0;
    if (!mask != !starts || (!mask && !gblm_x32(type))) return 0;
    if (many ? !gblm_has_many(type, path) : tokens > FEW_TOKENS) return 0;
    const Job job = {mask, values, starts, x, y, rows, words, tokens, type, path, panels};
    const Threads threads = gblm_threads(count);
    (many ? gblm_many_tokens : gblm_few_tokens)(&job, 1, &threads);
    return 1;
}

/* Rows [first, first + count) dense, [count, columns], in the type of the values. Returns as gblm_bitmask_linear. */
EXPORT int gblm_bitmask_expand(const void *mask, const void *values, const int64_t *starts, void *dense, int64_t first,
                               int64_t rows, int64_t columns, int64_t words, int type, int path, int count) {
    if (!can_run(rows, words, type, path, count) || !mask || !starts || first < 0 || columns <= (words - 1) * 64 || columns > words * 64)
        return 0;
    const Job job = {.mask = mask, .values = values, .starts = starts, .words = words, .type = type, .path = path};
    const Threads threads = gblm_threads(count);
    Expansion work = {.job = &job, .parts = threads.count, .first = first, .count = rows, .columns = columns, .dense = dense};
    threads.run(threads.context, expand_part, &work, threads.count);
    return 1;
}
