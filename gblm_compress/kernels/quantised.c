/* Kernels of quantised weights, for tokens by eights, and the restoration of rows.
 *
 * A weight is scale · level: scales are fp16, one for each `group` columns of a row or for a row, levels are int8. Masks and
 * starts are those of job.h; what is stored for each bit is a level, or a place of 4 bits in a table of 16 levels. Places
 * are two to a byte, the first in the low half, and those of every word of the mask begin with a byte.
 *
 * x is rounded once for each call. On x86 more than 8 tokens get 8 bits, as do all tokens where places are spread, see
 * quantised_many.c. All others get 16 bits with one scale a token: q = round(x · 32767 / largest). The error is 1/65534 of the
 * largest input, so that outliers cost nothing. AVX-512 multiplies the two bytes of q + 32768 each (vpdpbusd takes unsigned ones)
 * and subtracts 32768 · (the row's sum of weights). AVX-VNNI does so for one token. NEON with sdot, which takes signed ones, splits
 * q - 128 and adds 128 · (that sum). AVX2, other NEON, and AVX-VNNI for several tokens multiply q in 16 bits. Products are summed
 * as integers along a group, or along a row that has one scale: with 256 bits or fewer along a part of it.
 *
 * The caller guarantees what quantised.h says.
 */
#include <float.h>

#include "bitmask.h"
#include "quantised_words.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__x86_64__)
#include <cpuid.h>
#endif

enum { BLOCK = 16 /* words whose scales are widened at once */, PERIOD = 4096 /* columns summed in int32 */ };

static inline float scale_at(const Quantised *job, int64_t row, int64_t group) {
    return group < job->groups ? f16_to_float(job->scales[row * job->groups + group]) : 0.0f;
}
static inline void put(const Quantised *job, int64_t token, int64_t row, float sum) {
    const int64_t at = token * job->rows + row;
    if (job->type == F32) ((float *)job->y)[at] = sum;
    else ((uint16_t *)job->y)[at] = job->type == BF16 ? float_to_bf16(sum) : float_to_f16(sum);
}

/* ---- x in 16 or 8 bits ---- */

static inline uint32_t bits_f32(uint32_t x) { return x; }
static inline uint32_t bits_bf16(uint16_t x) { return (uint32_t)x << 16; }
static inline uint32_t bits_f16(uint16_t x) {
    const float value = f16_to_float(x);
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

/* Round a token, and return its scale: NaN, which makes all of y NaN, where not all of x is finite. */
#define ROUNDED(NAME, ATTRIBUTE, TYPE, BITS)                                                                 \
    ATTRIBUTE static float NAME(const void *input, int64_t columns, int64_t words, int form, void *output) {   \
        const TYPE *x = input;                                                                               \
        uint32_t most = 0;                                                                                   \
        for (int64_t c = 0; c < columns; c++) {                                                              \
            const uint32_t bits = BITS(x[c]) & 0x7fffffff;                                                   \
            most = bits > most ? bits : most;                                                                \
        }                                                                                                    \
        float largest;                                                                                       \
        memcpy(&largest, &most, 4);                                                                          \
        const int usable = most < 0x7f800000 && largest > 1e-30f;                                            \
        const float inverse = usable ? 32767 / largest : 0;                                                  \
        for (int64_t w = 0; w < words; w++) {                                                                \
            const int64_t count = columns - 64 * w < 64 ? columns - 64 * w : 64;                             \
            int32_t q[64];                                                                                   \
            for (int c = 0; c < 64; c++) q[c] = 0;                                                           \
            for (int c = 0; c < count; c++) {                                                                \
                const uint32_t bits = usable ? BITS(x[64 * w + c]) : 0;                                      \
                float value;                                                                                 \
                memcpy(&value, &bits, 4);                                                                    \
                value = value * inverse + 12582912.0f; /* 1.5 · 2^23: the sum's last bits are the integer */ \
                memcpy(q + c, &value, 4);                                                                    \
                q[c] -= 0x4b400000;                                                                          \
            }                                                                                                \
            if (form != WHOLE) {                                                                             \
                uint8_t *high = (uint8_t *)output + 128 * w, *low = high + 64;                               \
                const int offset = form == UNSIGNED_BYTES ? 32768 : 0, sign = form == SIGNED_BYTES ? 128 : 0; \
                for (int c = 0; c < 64; c++) high[c] = (uint8_t)((q[c] + offset) >> 8);                      \
                for (int c = 0; c < 64; c++) low[c] = (uint8_t)(q[c] ^ sign);                                \
            } else {                                                                                         \
                int16_t *to = (int16_t *)output + 64 * w;                                                    \
                for (int c = 0; c < 64; c++) to[c] = (int16_t)q[c];                                          \
            }                                                                                                \
        }                                                                                                    \
        return most < 0x7f800000 ? (usable ? largest / 32767 : 0) : __builtin_nanf("");                      \
    }
/* Round a token of blocks of `width` tokens. Blocks with a number that is not finite have the scale NaN: all of y becomes NaN. */
#define ROUNDED_BLOCKS(NAME, ATTRIBUTE, TYPE, BITS)                                                                \
    ATTRIBUTE static void NAME(const void *input, int64_t columns, int64_t words, int width, uint8_t *block) { \
        for (int64_t first = 0; first < words * 64; first += BLOCK_COLUMNS, block += BLOCK_BYTES * width) {   \
            const int64_t left = columns - first;                                                             \
            TYPE last[BLOCK_COLUMNS] = {0};                                                                   \
            const TYPE *x = (const TYPE *)input + first;                                                      \
            if (left < BLOCK_COLUMNS) x = left > 0 ? memcpy(last, x, (size_t)left * sizeof *x) : last;        \
            int32_t most = 0, sum = 0;                                                                        \
            for (int c = 0; c < BLOCK_COLUMNS; c++) {                                                         \
                const int32_t bits = (int32_t)(BITS(x[c]) & 0x7fffffff);                                      \
                most = bits > most ? bits : most;                                                             \
            }                                                                                                 \
            float largest;                                                                                    \
            memcpy(&largest, &most, 4);                                                                       \
            const int usable = most < 0x7f800000 && largest > 1e-30f;                                         \
            const float inverse = usable ? 127 / largest : 0;                                                 \
            int8_t levels[BLOCK_COLUMNS];                                                                     \
            for (int c = 0; c < BLOCK_COLUMNS; c++) {                                                         \
                const uint32_t bits = usable ? BITS(x[c]) : 0;                                                \
                float value;                                                                                  \
                int32_t q;                                                                                    \
                memcpy(&value, &bits, 4);                                                                     \
                value = value * inverse + 12582912.0f;                                                        \
                memcpy(&q, &value, 4);                                                                        \
                q -= 0x4b400000;                                                                              \
                sum += q;                                                                                     \
                levels[c] = (int8_t)q;                                                                        \
            }                                                                                                 \
            for (int c = 0; c < BLOCK_COLUMNS; c += 4) memcpy(block + c * width, levels + c, 4);              \
            const float scale = most < 0x7f800000 ? (usable ? largest / 127 : 0) : __builtin_nanf("");        \
            const int32_t offset = -128 * sum;                                                                \
            memcpy(block + BLOCK_SCALES * width, &scale, 4), memcpy(block + BLOCK_OFFSETS * width, &offset, 4); \
        }                                                                                                     \
    }
#define ROUNDED_TYPES(NAME, ATTRIBUTE)                  \
    ROUNDED(NAME##_f32, ATTRIBUTE, uint32_t, bits_f32)  \
    ROUNDED(NAME##_f16, ATTRIBUTE, uint16_t, bits_f16)  \
    ROUNDED(NAME##_bf16, ATTRIBUTE, uint16_t, bits_bf16)
#define BLOCKS_TYPES(NAME, ATTRIBUTE)                            \
    ROUNDED_BLOCKS(NAME##_blocks_f32, ATTRIBUTE, uint32_t, bits_f32)  \
    ROUNDED_BLOCKS(NAME##_blocks_f16, ATTRIBUTE, uint16_t, bits_f16)  \
    ROUNDED_BLOCKS(NAME##_blocks_bf16, ATTRIBUTE, uint16_t, bits_bf16)
ROUNDED_TYPES(portable, )
typedef float (*Rounding)(const void *, int64_t, int64_t, int, void *);
typedef void (*BlockRounding)(const void *, int64_t, int64_t, int, uint8_t *);

/* The products of some rows, for up to FEW_TOKENS tokens. */
typedef void (*Rows)(const Quantised *, int64_t begin, int64_t end);

#if defined(__x86_64__) || defined(__aarch64__)
/* The place of so many tokens in a table by 1, 2, 4 and 8. */
static int by_tokens(int64_t tokens) { return tokens <= 2 ? (int)tokens - 1 : tokens <= 4 ? 2 : 3; }

/* NAME_any, which computes rows by NAME_row with kind and tokens as constants. */
#define TOKEN_KERNEL(NAME, ATTRIBUTE, KIND, TOKENS)                                                                      \
    ATTRIBUTE static void NAME##_##KIND##_##TOKENS(const Quantised *job, int64_t begin, int64_t end) {                   \
        for (int64_t r = begin; r < end; r++) NAME##_row(job, r, KIND, TOKENS);                                          \
    }
#define KIND_KERNELS(NAME, ATTRIBUTE, KIND)                                                                              \
    TOKEN_KERNEL(NAME, ATTRIBUTE, KIND, 1) TOKEN_KERNEL(NAME, ATTRIBUTE, KIND, 2)                                        \
    TOKEN_KERNEL(NAME, ATTRIBUTE, KIND, 4) TOKEN_KERNEL(NAME, ATTRIBUTE, KIND, 8)
#define KIND_TABLE(NAME, KIND) {NAME##_##KIND##_1, NAME##_##KIND##_2, NAME##_##KIND##_4, NAME##_##KIND##_8}
#define ROW_KERNELS(NAME, ATTRIBUTE)                                                                                     \
    KIND_KERNELS(NAME, ATTRIBUTE, LEVELS) KIND_KERNELS(NAME, ATTRIBUTE, PLACES) KIND_KERNELS(NAME, ATTRIBUTE, DENSE)     \
    static void NAME##_any(const Quantised *job, int64_t begin, int64_t end) {                                           \
        static const Rows rows[KINDS][4] = {KIND_TABLE(NAME, LEVELS), KIND_TABLE(NAME, PLACES), KIND_TABLE(NAME, DENSE)}; \
        rows[kind_of(job)][by_tokens(job->tokens)](job, begin, end);                                                     \
    }
#endif

/* ---- portable ---- */

static inline int level_at(const Quantised *job, const uint8_t *values, const int8_t *levels, int64_t at) {
    return job->levels ? levels[values[at / 2] >> (at % 2 * 4) & 15] : (int8_t)values[at];
}
static void portable_rows(const Quantised *job, int64_t begin, int64_t end) {
    const int64_t span = job->group ? job->group : 64;
    for (int64_t r = begin; r < end; r++) {
        const uint8_t *v = job->values + row_start(job, r);
        const int8_t *levels = job->levels + r * job->stride;
        double sums[FEW_TOKENS] = {0};
        for (int64_t w = 0; w < job->words; w++) {
            const int16_t *x = (const int16_t *)job->x + 64 * w;
            const uint64_t all = row_bits(job, r, w);
            int at = 0;
            for (uint64_t bits = all; bits; bits &= bits - 1, at++) {
                const int b = __builtin_ctzll(bits);
                const float scale = scale_at(job, r, job->group ? (64 * w + b) / span : 0);
                const float weight = scale * (float)level_at(job, v, levels, at);
                for (int64_t t = 0; t < job->tokens; t++) sums[t] += (double)weight * x[t * job->words * 64 + b];
            }
            v += bytes_in(__builtin_popcountll(all), kind_of(job));
        }
        for (int64_t t = 0; t < job->tokens; t++) put(job, t, r, (float)(sums[t] * job->x_scales[t]));
    }
}

static void portable_restore(const Quantised *job, int64_t begin, int64_t end, void *dense) {
    Quantised to = *job;
    to.y = dense, to.rows = job->columns; /* as `put` takes it: token by token */
    for (int64_t r = begin; r < end; r++) {
        const uint8_t *v = job->values + row_start(job, r);
        const int8_t *levels = job->levels + r * job->stride;
        for (int64_t w = 0; w < job->words; w++) {
            const uint64_t bits = row_bits(job, r, w);
            int at = 0;
            for (int b = 0; b < 64 && 64 * w + b < job->columns; b++) {
                float weight = 0;
                if (bits >> b & 1)
                    weight = scale_at(job, r, job->group ? (64 * w + b) / job->group : 0) * (float)level_at(job, v, levels, at++);
                put(&to, r - begin, 64 * w + b, weight);
            }
            v += bytes_in(__builtin_popcountll(bits), kind_of(job));
        }
    }
}

/* ---- NEON: spread 8 bytes by a table of 256 shuffles; products in 16 bits ---- */

#if defined(__aarch64__)

static uint8_t shuffles[256][8]; /* where byte i is taken from; 128 where there is none */

__attribute__((constructor)) static void fill_shuffles(void) {
    for (int mask = 0; mask < 256; mask++)
        for (int lane = 0, next = 0; lane < 8; lane++) shuffles[mask][lane] = mask >> lane & 1 ? (uint8_t)next++ : 128;
}

/* The levels of 64 places. */
static inline void neon_look_up(const uint8_t *places, int8x16_t table, int8_t *levels) {
    for (int half = 0; half < 2; half++) {
        const uint8x16_t packed = vld1q_u8(places + 16 * half);
        const int8x16_t even = vqtbl1q_s8(table, vandq_u8(packed, vdupq_n_u8(15))),
                        odd = vqtbl1q_s8(table, vshrq_n_u8(packed, 4));
        vst1q_s8(levels + 32 * half, vzip1q_s8(even, odd));
        vst1q_s8(levels + 32 * half + 16, vzip2q_s8(even, odd));
    }
}

/* 8 levels, and v moved past them. */
static inline int8x8_t neon_eight(const int8_t **v, unsigned bits) {
    const int8x8_t levels = vtbl1_s8(vld1_s8(*v), vld1_s8((const int8_t *)shuffles[bits]));
    *v += __builtin_popcount(bits);
    return levels;
}

/* The levels of all columns of a row. */
static void spread(const Quantised *job, int64_t row, int8_t *to) {
    const uint8_t *v = job->values + row_start(job, row);
    memset(to, 0, (size_t)job->words * 64);
    for (int64_t w = 0; w < job->words; w++, to += 64) {
        int at = 0;
        for (uint64_t bits = row_bits(job, row, w); bits; bits &= bits - 1)
            to[__builtin_ctzll(bits)] = (int8_t)level_at(job, v, job->levels + row * job->stride, at++);
        v += bytes_in(at, kind_of(job));
    }
}

static void neon_rows(const Quantised *job, int64_t begin, int64_t end) {
    const int64_t columns = job->words * 64, span = job->group ? job->group : PERIOD;
    const int kind = kind_of(job);
    for (int64_t r = begin; r < end; r++) {
        const int8_t *v = (const int8_t *)job->values + row_start(job, r);
        const uint8_t *places = (const uint8_t *)v;
        const int8x16_t table = kind == PLACES ? vld1q_s8(job->levels + r * job->stride) : vdupq_n_s8(0);
        int8_t word[72] = {0}; /* levels of the present word; 8 bytes are read at a time */
        float32x4_t sums[FEW_TOKENS];
        uint64_t bits = 0;
        for (int64_t t = 0; t < job->tokens; t++) sums[t] = vdupq_n_f32(0);
        for (int64_t first = 0; first < columns; first += span) {
            int32x4_t low[FEW_TOKENS], high[FEW_TOKENS];
            for (int64_t t = 0; t < job->tokens; t++) low[t] = high[t] = vdupq_n_s32(0);
            for (int64_t c = first; c < first + span && c < columns; c += 8) {
                if (c % 64 == 0) {
                    bits = row_bits(job, r, c / 64);
                    if (kind == PLACES) {
                        neon_look_up(places, table, word);
                        v = word;
                    }
                    places += bytes_in(__builtin_popcountll(bits), kind);
                }
                const int16x8_t weights =
                    vmovl_s8(kind == DENSE ? vld1_s8((v += 8) - 8) : neon_eight(&v, (unsigned)(bits >> c % 64) & 255));
                for (int64_t t = 0; t < job->tokens; t++) {
                    const int16x8_t x = vld1q_s16((const int16_t *)job->x + t * columns + c);
                    low[t] = vmlal_s16(low[t], vget_low_s16(weights), vget_low_s16(x));
                    high[t] = vmlal_high_s16(high[t], weights, x);
                }
            }
            const float scale = job->group ? scale_at(job, r, first / span) : 1.0f;
            for (int64_t t = 0; t < job->tokens; t++) {
                sums[t] = vfmaq_n_f32(sums[t], vcvtq_f32_s32(low[t]), scale);
                sums[t] = vfmaq_n_f32(sums[t], vcvtq_f32_s32(high[t]), scale);
            }
        }
        const float scale = job->group ? 1.0f : scale_at(job, r, 0);
        for (int64_t t = 0; t < job->tokens; t++) put(job, t, r, vaddvq_f32(sums[t]) * scale * job->x_scales[t]);
    }
}

/* ---- NEON with dot products of four bytes ---- */

#if defined(__clang__)
#define DOT __attribute__((target("dotprod")))
#else
#define DOT __attribute__((target("arch=armv8.2-a+dotprod")))
#endif

/* sums + the products of four bytes each: as assembly, since older compilers hide the intrinsic where not all code may use it. */
DOT INLINE int32x4_t dotted(int32x4_t sums, int8x16_t x, int8x16_t levels) {
    __asm__("sdot %0.4s, %1.16b, %2.16b" : "+w"(sums) : "w"(x), "w"(levels));
    return sums;
}

/* A row of up to `tokens` tokens, which is 1, 2, 4 or 8; only those that there are get written. */
DOT INLINE void dot_row(const Quantised *job, int64_t r, const int kind, const int tokens) {
    const int64_t stride = bytes_a_token(job->words), span = (job->group ? job->group : PERIOD) / 16;
    const int8_t *v = (const int8_t *)job->values + row_start(job, r), *x = job->x;
    const uint8_t *places = (const uint8_t *)v;
    const int8x16_t table = kind == PLACES ? vld1q_s8(job->levels + r * job->stride) : vdupq_n_s8(0);
    int8_t word[72] = {0}; /* levels of the present word; 8 bytes are read at a time */
    int32x4_t high[FEW_TOKENS], low[FEW_TOKENS];
    float32x4_t sums[FEW_TOKENS];
    for (int t = 0; t < tokens; t++) high[t] = low[t] = vdupq_n_s32(0), sums[t] = vdupq_n_f32(0);
    int64_t left = span, group = 0;
    for (int64_t w = 0; w < job->words; w++, x += 128) {
        uint64_t bits = kind == DENSE ? 0 : row_bits(job, r, w);
        if (kind == PLACES) {
            neon_look_up(places, table, word);
            v = word;
            places += bytes_in(__builtin_popcountll(bits), kind);
        }
        for (int lane = 0; lane < 4; lane++, bits >>= 16) {
            int8x16_t levels;
            if (kind == DENSE) levels = vld1q_s8((v += 16) - 16);
            else {
                const int8x8_t first = neon_eight(&v, bits & 255), second = neon_eight(&v, bits >> 8 & 255);
                levels = vcombine_s8(first, second);
            }
            for (int t = 0; t < tokens; t++) {
                high[t] = dotted(high[t], vld1q_s8(x + t * stride + 16 * lane), levels);
                low[t] = dotted(low[t], vld1q_s8(x + t * stride + 16 * lane + 64), levels);
            }
            if (--left && (lane < 3 || w + 1 < job->words)) continue;
            const float scale = job->group ? scale_at(job, r, group) : 1.0f;
            for (int t = 0; t < tokens; t++) {
                const float32x4_t products = vfmaq_n_f32(vcvtq_f32_s32(low[t]), vcvtq_f32_s32(high[t]), 256);
                sums[t] = vfmaq_n_f32(sums[t], products, scale);
                high[t] = low[t] = vdupq_n_s32(0);
            }
            group++, left = span;
        }
    }
    const float scale = job->group ? 1.0f : scale_at(job, r, 0);
    for (int t = 0; t < tokens && t < job->tokens; t++)
        put(job, t, r, (vaddvq_f32(sums[t]) + 128 * job->sums[r]) * scale * job->x_scales[t]);
}

ROW_KERNELS(dot, DOT)

static int has_dot(void) {
#if defined(__ARM_FEATURE_DOTPROD)
    return 1;
#elif defined(__linux__)
    return getauxval(AT_HWCAP) >> 20 & 1; /* HWCAP_ASIMDDP */
#else
    return 0;
#endif
}
#endif

#if defined(__x86_64__)

ROUNDED_TYPES(avx2, AVX2)
BLOCKS_TYPES(avx2, AVX2)

static uint64_t places_of_8[10][256]; /* [first place][bits]: the place of each column's weight, 128 where it has none */

__attribute__((constructor)) static void fill_places_of_8(void) {
    for (int first = 0; first < 10; first++)
        for (int bits = 0; bits < 256; bits++)
            for (int c = 0, place = first; c < 8; c++)
                places_of_8[first][bits] |= (uint64_t)(bits >> c & 1 ? place++ : 128) << 8 * c;
}

/* The 16 levels of a row. */
AVX2 INLINE __m128i avx2_table(const Quantised *job, int64_t row, const int kind) {
    return kind == PLACES ? _mm_loadu_si128((const __m128i *)(job->levels + row * job->stride)) : _mm_setzero_si128();
}

/* The levels of 16 columns. Their weights begin at number `at` of v, which moves past them. */
AVX2 INLINE __m128i avx2_lane(const uint8_t *mask, const uint8_t *v, int64_t *at, __m128i table, const int kind) {
    if (kind == DENSE) return _mm_loadu_si128((const __m128i *)(v + (*at += 16) - 16));
    const int64_t odd = kind == PLACES ? *at & 1 : 0, behind = odd + __builtin_popcountll(mask[0]);
    const __m128i first = _mm_loadl_epi64((const __m128i *)(places_of_8[odd] + mask[0]));
    const __m64 *second = (const __m64 *)(places_of_8[behind] + mask[1]);
    const __m128i places = _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(first), second));
    const uint8_t *from = v + (kind == PLACES ? *at >> 1 : *at);
    const int64_t end = behind + __builtin_popcountll(mask[1]);
    *at += end - odd;
    if (kind == LEVELS) return _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)from), places);
    const __m128i pairs = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i *)from));
    const __m128i halves = _mm_and_si128(_mm_or_si128(pairs, _mm_slli_epi16(pairs, 4)), _mm_set1_epi8(15));
    __m128i levels = _mm_shuffle_epi8(_mm_shuffle_epi8(table, halves), places);
    if (end > 16) /* all are stored, and begin in the middle of a byte: the last one is in the ninth */
        levels = _mm_insert_epi8(levels, _mm_cvtsi128_si32(_mm_shuffle_epi8(table, _mm_cvtsi32_si128(from[8] & 15))), 15);
    return levels;
}

/* The levels of half a word. Its weights begin at number `at` of v, which moves past them. */
AVX2 INLINE __m256i avx2_bytes(const uint8_t *mask, const uint8_t *v, int64_t *at, __m128i table, const int kind, const int half) {
    if (kind == DENSE) return _mm256_loadu_si256((const __m256i *)(v + (*at += 32) - 32));
    const __m128i first = avx2_lane(mask + 4 * half, v, at, table, kind);
    return _mm256_set_m128i(avx2_lane(mask + 4 * half + 2, v, at, table, kind), first);
}

/* The same in 16 bits, columns by 16. */
typedef struct {
    __m256i lanes[2];
} Half;

AVX2 INLINE Half avx2_half(const uint8_t *mask, const uint8_t *v, int64_t *at, __m128i table, const int kind, const int half) {
    const __m128i first = avx2_lane(mask + 4 * half, v, at, table, kind);
    const __m128i second = avx2_lane(mask + 4 * half + 2, v, at, table, kind);
    return (Half){{_mm256_cvtepi8_epi16(first), _mm256_cvtepi8_epi16(second)}};
}

/* Scales of a row from group `first` on, widened; `count` is a multiple of 8. */
AVX2 INLINE void avx2_scales(const Quantised *job, int64_t row, int64_t first, int64_t count, float *to) {
    for (int64_t g = 0; g < count; g += 8) {
        const uint16_t *from = job->scales + row * job->groups + first + g;
        if (first + g + 8 <= job->groups) _mm256_storeu_ps(to + g, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)));
        else for (int64_t i = g; i < g + 8; i++) to[i] = avx2_scale(job, row, first + i);
    }
}

/* A row of up to `tokens` tokens, which is 1, 2, 4 or 8; only those that there are get written. `bytes`: x is of UNSIGNED_BYTES,
 * which AVX-VNNI takes for one token; more tokens have no registers for so many sums. `group`: 64 stands for 128 too. */
AVX2 INLINE void avx2_row_by(const Quantised *job, int64_t r, const int bytes, const int group, const int kind, const int tokens) {
    const int masked = kind != DENSE, period = bytes ? PERIOD / 4 : PERIOD;
    const int apart = bytes && !group && !masked; /* sums of half words: each waits for the one before */
    const int64_t stride = job->words * 64, span = (group ? job->group : period) / 64;
    const uint8_t *v = job->values + row_start(job, r), *mask = masked ? (const uint8_t *)(job->mask + r * job->words) : NULL;
    const int16_t *x = job->x;
    const __m128i table = avx2_table(job, r, kind);
    const __m256i none = _mm256_setzero_si256();
    float scales[2 * BLOCK];
    __m256i products[FEW_TOKENS], high[2] = {none, none}, low[2] = {none, none};
    __m256 sums[FEW_TOKENS];
    for (int t = 0; t < tokens; t++) products[t] = none, sums[t] = _mm256_setzero_ps();
    int64_t at = 0, left = span;
    for (int64_t block = 0; block < job->words; block += BLOCK) {
        const int64_t last = block + BLOCK < job->words ? block + BLOCK : job->words;
        const float *next = scales;
        if (group) avx2_scales(job, r, 64 * block / job->group, 64 * BLOCK / job->group, scales);
        for (int64_t w = block; w < last; w++, x += bytes * 64, mask += masked * 8) {
            _mm_prefetch((const char *)v + (at >> (kind == PLACES)) + 2048, _MM_HINT_T0);
            _Pragma("GCC unroll 2") for (int half = 0; half < 2; half++) {
                if (bytes) {
                    const __m256i *from = (const __m256i *)x + half, levels = avx2_bytes(mask, v, &at, table, kind, half);
                    high[apart * half] = avx_vnni_added(high[apart * half], _mm256_loadu_si256(from), levels);
                    low[apart * half] = avx_vnni_added(low[apart * half], _mm256_loadu_si256(from + 2), levels);
                } else {
                    const Half weights = avx2_half(mask, v, &at, table, kind, half);
                    for (int lane = 0; lane < 2; lane++, x += 16)
                        _Pragma("GCC unroll 8") for (int t = 0; t < tokens; t++) {
                            const __m256i inputs = _mm256_loadu_si256((const __m256i *)(x + t * stride));
                            products[t] = _mm256_add_epi32(products[t], _mm256_madd_epi16(weights.lanes[lane], inputs));
                            if (tokens > 2) __asm__("" : "+x"(products[t])); /* lest GCC add them later, and keep them in memory */
                        }
                }
                if (group != 32 && (half == 0 || (--left && w + 1 < job->words))) continue;
                if (apart) high[0] = _mm256_add_epi32(high[0], high[1]), low[0] = _mm256_add_epi32(low[0], low[1]);
                if (bytes) products[0] = _mm256_add_epi32(_mm256_slli_epi32(high[0], 8), low[0]);
                const __m256 scale = group ? _mm256_broadcast_ss(next++) : _mm256_set1_ps(1);
                _Pragma("GCC unroll 8") for (int t = 0; t < tokens; t++) {
                    sums[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products[t]), scale, sums[t]);
                    products[t] = none;
                }
                high[0] = high[1] = low[0] = low[1] = none;
                left = span;
            }
            if (kind == PLACES) at = (at + 1) & ~1ll; /* a word begins with a byte */
        }
    }
    const float scale = group ? 1.0f : avx2_scale(job, r, 0), more = bytes ? 32768 * job->sums[r] : 0;
    for (int t = 0; t < tokens && t < job->tokens; t++)
        put(job, t, r, (gblm_sum_256(sums[t]) - more) * scale * job->x_scales[t]);
}

AVX2 INLINE void avx2_row_of(const Quantised *job, int64_t r, const int bytes, const int kind, const int tokens) {
    if (job->group == 32) avx2_row_by(job, r, bytes, 32, kind, tokens);
    else if (job->group) avx2_row_by(job, r, bytes, 64, kind, tokens);
    else avx2_row_by(job, r, bytes, 0, kind, tokens);
}
AVX2 INLINE void avx2_row(const Quantised *job, int64_t r, const int kind, const int tokens) {
    if (HAS_AVX_VNNI && tokens == 1 && job->form == UNSIGNED_BYTES) avx2_row_of(job, r, 1, kind, 1);
    else avx2_row_of(job, r, 0, kind, tokens);
}

ROW_KERNELS(avx2, AVX2)

AVX2 INLINE void avx2_levels(const Quantised *job, int64_t row, int64_t first, int64_t last, int64_t *place, int8_t *to,
                             const int kind) {
    const uint8_t *v = job->values + row_start(job, row);
    const uint8_t *mask = (const uint8_t *)(job->mask + (kind == DENSE ? 0 : row * job->words + first));
    const __m128i table = avx2_table(job, row, kind);
    int64_t at = *place; /* a copy, since `to` may point to anything */
    for (int64_t w = first; w < last; w++, to += 64, mask += 8) {
        _mm_prefetch((const char *)v + (at >> (kind == PLACES)) + 256, _MM_HINT_T0);
        _Pragma("GCC unroll 4") for (int lane = 0; lane < 4; lane++)
            _mm_storeu_si128((__m128i *)(to + 16 * lane), avx2_lane(mask + 2 * lane, v, &at, table, kind));
        if (kind == PLACES) at = (at + 1) & ~1ll;
    }
    *place = at;
}

AVX2 void gblm_avx2_levels(const Quantised *job, int64_t row, int64_t first, int64_t last, int64_t *at, int8_t *to) {
    if (kind_of(job) == DENSE) avx2_levels(job, row, first, last, at, to, DENSE);
    else if (kind_of(job) == PLACES) avx2_levels(job, row, first, last, at, to, PLACES);
    else avx2_levels(job, row, first, last, at, to, LEVELS);
}

AVX2 static void avx2_restore(const Quantised *job, int64_t begin, int64_t end, void *dense) {
    int8_t levels[64 * MOST_WORDS] __attribute__((aligned(32)));
    for (int64_t r = begin; r < end; r++) {
        int64_t at = 0;
        gblm_avx2_levels(job, r, 0, job->words, &at, levels);
        for (int64_t column = 0; column < job->columns; column += 8) {
            const __m256 scale = _mm256_set1_ps(avx2_scale(job, r, job->group ? column / job->group : 0));
            const __m256i level = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(levels + column)));
            avx2_put(_mm256_mul_ps(_mm256_cvtepi32_ps(level), scale), dense, (r - begin) * job->columns + column,
                     job->columns - column, job->type);
        }
    }
}

/* ---- AVX-512 with VNNI: bytes are spread by VBMI2 or, without it, by a shuffle ---- */

#define STREAMS 4

ROUNDED_TYPES(avx512, VNNI)
BLOCKS_TYPES(avx512, VNNI)

/* Sums of four vectors. */
VNNI INLINE __m128 four_sums(const __m512 a[4]) {
    const __m512 low = _mm512_add_ps(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1])),
                 high = _mm512_add_ps(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
    const __m512d l = _mm512_castps_pd(low), h = _mm512_castps_pd(high);
    const __m512 all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(l, h)), _mm512_castpd_ps(_mm512_unpackhi_pd(l, h)));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/* Rows first + i·apart, i below `streams`: read side by side, as in bitmask.c. `tokens` is 1, 2, 4 or 8; only those that there
 * are get written. */
VNNI INLINE void vnni_rows(const Quantised *job, int64_t first, int64_t apart, const int vbmi2, const int kind,
                           const int group, const int tokens, const int streams) {
    enum { MOST = STREAMS > FEW_TOKENS ? STREAMS : FEW_TOKENS };
    const int64_t stride = job->words * 128;
    const uint8_t *v[STREAMS], *x = job->x;
    __m512i table[STREAMS], high[MOST], low[MOST];
    __m512 sums[MOST];
    float scales[STREAMS][2 * BLOCK] __attribute__((aligned(64)));
    for (int i = 0; i < streams; i++) {
        const int64_t row = first + i * apart;
        /* of a later row: so few bytes a row are too slow a stream for the CPU to see that it is one */
        if (group) _mm_prefetch((const char *)(job->scales + (row + 4) * job->groups), _MM_HINT_T0);
        v[i] = job->values + row_start(job, row);
        table[i] = vnni_table(job, row, kind);
        for (int t = 0; t < tokens; t++) {
            high[i * tokens + t] = low[i * tokens + t] = _mm512_setzero_si512();
            sums[i * tokens + t] = _mm512_setzero_ps();
        }
    }
    for (int64_t block = 0; block < job->words; block += BLOCK) {
        const int64_t last = block + BLOCK < job->words ? block + BLOCK : job->words;
        for (int i = 0; group && i < streams; i++)
            for (int64_t part = 0; part < 64 * BLOCK / group; part += 16) {
                const int64_t at = 64 * block / group + part, left = job->groups - at;
                const __mmask16 there = (__mmask16)(left >= 16 ? 0xffff : left > 0 ? (1 << left) - 1 : 0);
                const uint16_t *from = job->scales + (first + i * apart) * job->groups + at;
                _mm512_store_ps(scales[i] + part, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, from)));
            }
        const uint64_t *bits = kind == DENSE ? NULL : job->mask + first * job->words + block;
        for (int64_t in_block = 0; in_block < last - block; in_block++, x += 128, bits++) {
            int64_t words = apart * job->words;
            __asm__("" : "+r"(words)); /* lest GCC keep a register for each stream's mask */
            _Pragma("GCC unroll 4") for (int i = 0; i < streams; i++) {
                const __m512i levels = word_of(kind == DENSE ? 0 : bits[i * words], v + i, table[i], kind, vbmi2);
                __m512 scale = _mm512_setzero_ps();
                if (group == 32)
                    scale = _mm512_mask_broadcastss_ps(_mm512_set1_ps(scales[i][2 * in_block]), 0xff00,
                                                       _mm_load_ss(scales[i] + 2 * in_block + 1));
                else if (group) scale = _mm512_set1_ps(scales[i][64 * in_block / group]);
                _Pragma("GCC unroll 8") for (int t = 0; t < tokens; t++) {
                    const int s = i * tokens + t;
                    const __m512i upper = _mm512_loadu_si512(x + t * stride),
                                  lower = _mm512_loadu_si512(x + t * stride + 64);
                    if (!group) {
                        high[s] = added(high[s], upper, levels);
                        low[s] = added(low[s], lower, levels);
                        continue;
                    }
                    const __m512i products = added(_mm512_setzero_si512(), upper, levels);
                    sums[s] = _mm512_fmadd_ps(
                        _mm512_cvtepi32_ps(added(_mm512_slli_epi32(products, 8), lower, levels)), scale,
                        sums[s]);
                }
            }
        }
    }
    if (!group)
        for (int s = 0; s < streams * tokens; s++)
            sums[s] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high[s]), _mm512_set1_ps(256), _mm512_cvtepi32_ps(low[s]));
    for (int s = 0; s < streams * tokens; s += 4) {
        float totals[4];
        if (streams * tokens < 4)
            for (int j = 0; j < streams * tokens; j++) totals[j] = _mm512_reduce_add_ps(sums[j]);
        else _mm_storeu_ps(totals, four_sums(sums + s));
        for (int j = 0; j < 4 && s + j < streams * tokens; j++) {
            const int64_t r = first + (s + j) / tokens * apart, t = (s + j) % tokens;
            const float scale = group ? 1.0f : _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(job->scales[r])));
            if (t < job->tokens) put(job, t, r, (totals[j] - 32768 * job->sums[r]) * scale * job->x_scales[t]);
        }
    }
}

#define VNNI_TOKENS(VBMI2, KIND, GROUP, TOKENS)                                                                           \
    VNNI static void vnni_##VBMI2##_##KIND##_##GROUP##_##TOKENS(const Quantised *job, int64_t begin, int64_t end) {       \
        const int streams = TOKENS == 1 ? STREAMS : TOKENS == 2 ? 2 : 1;                                                  \
        const int64_t apart = (end - begin) / streams;                                                                    \
        for (int64_t r = begin; r < begin + apart; r++) vnni_rows(job, r, apart, VBMI2, KIND, GROUP, TOKENS, streams);    \
        for (int64_t r = begin + streams * apart; r < end; r++) vnni_rows(job, r, 0, VBMI2, KIND, GROUP, TOKENS, 1);      \
    }
#define VNNI_GROUP(VBMI2, KIND, GROUP)                                    \
    VNNI_TOKENS(VBMI2, KIND, GROUP, 1) VNNI_TOKENS(VBMI2, KIND, GROUP, 2) \
    VNNI_TOKENS(VBMI2, KIND, GROUP, 4) VNNI_TOKENS(VBMI2, KIND, GROUP, 8)
#define VNNI_KIND(VBMI2, KIND)                                  \
    VNNI_GROUP(VBMI2, KIND, 0) VNNI_GROUP(VBMI2, KIND, 32)      \
    VNNI_GROUP(VBMI2, KIND, 64) VNNI_GROUP(VBMI2, KIND, 128)
VNNI_KIND(0, LEVELS) VNNI_KIND(0, PLACES) VNNI_KIND(0, DENSE) VNNI_KIND(1, LEVELS) VNNI_KIND(1, PLACES)

#define BY_TOKENS(V, KIND, GROUP) \
    {vnni_##V##_##KIND##_##GROUP##_1, vnni_##V##_##KIND##_##GROUP##_2, vnni_##V##_##KIND##_##GROUP##_4, vnni_##V##_##KIND##_##GROUP##_8}
#define BY_GROUP(V, KIND) {BY_TOKENS(V, KIND, 0), BY_TOKENS(V, KIND, 32), BY_TOKENS(V, KIND, 64), BY_TOKENS(V, KIND, 128)}
static const Rows vnni[2][KINDS][4][4] = {{BY_GROUP(0, LEVELS), BY_GROUP(0, PLACES), BY_GROUP(0, DENSE)},
                                          {BY_GROUP(1, LEVELS), BY_GROUP(1, PLACES), BY_GROUP(0, DENSE)}};

static void vnni_any(const Quantised *job, int64_t begin, int64_t end) {
    const int group = job->group ? job->group / 32 : 0;
    vnni[job->path == AVX512_PATH][kind_of(job)][group > 2 ? 3 : group][by_tokens(job->tokens)](job, begin, end);
}

VNNI INLINE void restore_rows(const Quantised *job, int64_t begin, int64_t end, void *dense, const int kind,
                              const int vbmi2) {
    for (int64_t r = begin; r < end; r++) {
        const uint8_t *v = job->values + row_start(job, r);
        const __m512i table = vnni_table(job, r, kind);
        for (int64_t w = 0; w < job->words; w++) {
            const uint64_t bits = row_bits(job, r, w);
            int8_t levels[64] __attribute__((aligned(64)));
            _mm512_store_si512(levels, word_of(bits, &v, table, kind, vbmi2));
            for (int part = 0; part < 64 && 64 * w + part < job->columns; part += 16) {
                const int64_t column = 64 * w + part, left = job->columns - column;
                const __mmask16 there = (__mmask16)(left >= 16 ? 0xffff : (1 << left) - 1);
                const float scale = scale_at(job, r, job->group ? column / job->group : 0);
                const __m512 weight = _mm512_mul_ps(
                    _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_load_si128((const __m128i *)(levels + part)))),
                    _mm512_set1_ps(scale));
                const int64_t at = (r - begin) * job->columns + column;
                if (job->type == F32) {
                    _mm512_mask_storeu_ps((float *)dense + at, there, weight);
                    continue;
                }
                _mm256_mask_storeu_epi16((uint16_t *)dense + at, there, halves(weight, job->type));
            }
        }
    }
}

VNNI static void vnni_restore(const Quantised *job, int64_t begin, int64_t end, void *dense) {
    const int kind = kind_of(job), vbmi2 = job->path == AVX512_PATH;
    if (kind == DENSE) restore_rows(job, begin, end, dense, DENSE, 0);
    else if (kind == PLACES && vbmi2) restore_rows(job, begin, end, dense, PLACES, 1);
    else if (kind == PLACES) restore_rows(job, begin, end, dense, PLACES, 0);
    else if (vbmi2) restore_rows(job, begin, end, dense, LEVELS, 1);
    else restore_rows(job, begin, end, dense, LEVELS, 0);
}
#endif

/* ---- choice of path, and work shared by threads ---- */

#if defined(__x86_64__)
static int has_avx_vnni(void) {
    unsigned a, b, c, d;
    return HAS_AVX_VNNI && __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1;
}
#endif

/* Bit p of the result is set where the CPU can run path p. */
int gblm_quantised_paths(void) {
    int paths = 1 << PORTABLE_PATH;
#if defined(__aarch64__)
    paths |= 1 << NEON_PATH | has_dot() << DOT_PATH;
#elif defined(__x86_64__)
    __builtin_cpu_init();
    paths |= gblm_paths(F16_X32) & 1 << AVX2_PATH;
    if (paths >> AVX2_PATH & 1 && has_avx_vnni()) paths |= 1 << AVX_VNNI_PATH;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
        paths |= 1 << VNNI_PATH | (__builtin_cpu_supports("avx512vbmi2") ? 1 << AVX512_PATH : 0);
#endif
    return paths;
}

int gblm_spreads(int path, int processors, int places) {
    const int narrow = path == AVX2_PATH || path == AVX_VNNI_PATH;
    return places ? (narrow || path == VNNI_PATH) && processors <= 8 : narrow && processors <= 2;
}

static Rounding rounding_of(int path, int type) {
    static const Rounding portable[] = {portable_f32, portable_f16, portable_bf16};
#if defined(__x86_64__)
    static const Rounding narrow[] = {avx2_f32, avx2_f16, avx2_bf16}, wide[] = {avx512_f32, avx512_f16, avx512_bf16};
    if (path != PORTABLE_PATH) return (path >= VNNI_PATH ? wide : narrow)[type];
#endif
    (void)path;
    return portable[type];
}

typedef struct {
    const Quantised *job; /* to multiply, `count` of them */
    int count, parts;
    int64_t first;      /* row to restore */
    char *dense;        /* NULL: multiply */
    const char *inputs; /* x as it comes */
    float *x_scales;
} Share;

static int form_of(int path, int64_t tokens) {
    if (path >= VNNI_PATH || (path == AVX_VNNI_PATH && tokens == 1)) return UNSIGNED_BYTES;
    return path == DOT_PATH ? SIGNED_BYTES : WHOLE;
}

static void round_part(void *argument, int index) {
    const Share *work = argument;
    const Quantised *job = work->job;
    const int64_t from = job->columns * (job->type == F32 ? 4 : 2), to = bytes_a_token(job->words);
    const Rounding round = rounding_of(job->path, job->type);
    int64_t begin, end;
    gblm_share(job->tokens, work->parts, index, &begin, &end);
#if defined(__x86_64__)
    static const BlockRounding blocks[2][3] = {{avx2_blocks_f32, avx2_blocks_f16, avx2_blocks_bf16},
                                               {avx512_blocks_f32, avx512_blocks_f16, avx512_blocks_bf16}};
    if (gblm_by_tiles(job)) {
        for (int64_t t = begin; t < end; t++)
            blocks[job->path >= VNNI_PATH][job->type](work->inputs + t * from, job->columns, job->words, block_width(job->tokens),
                                                      (uint8_t *)block_of(job, t, 0));
        return;
    }
#endif
    for (int64_t t = begin; t < end; t++)
        work->x_scales[t] =
            round(work->inputs + t * from, job->columns, job->words, job->form, (char *)job->x + t * to);
}

static Rows rows_of(int path) {
#if defined(__x86_64__)
    if (path != PORTABLE_PATH) return path >= VNNI_PATH ? vnni_any : avx2_any;
#elif defined(__aarch64__)
    if (path != PORTABLE_PATH) return path == DOT_PATH ? dot_any : neon_rows;
#endif
    (void)path;
    return portable_rows;
}

/* Rows [begin, end) for all tokens, by eights. */
static void multiply_eights(Quantised job, int64_t begin, int64_t end) {
    for (int64_t left = job.tokens; left > 0; left -= FEW_TOKENS) {
        job.tokens = left < FEW_TOKENS ? left : FEW_TOKENS;
        rows_of(job.path)(&job, begin, end);
        job.x = (const char *)job.x + FEW_TOKENS * bytes_a_token(job.words);
        job.y = (char *)job.y + FEW_TOKENS * job.rows * (job.type == F32 ? 4 : 2);
        job.x_scales += FEW_TOKENS;
    }
}

/* For many tokens rows are spread once, and multiplied as those of a dense weight; in plain C that would take longer. */
static void multiply_rows(const Quantised *job, int64_t begin, int64_t end) {
#if defined(__x86_64__)
    if (gblm_by_tiles(job)) {
        (job->path >= VNNI_PATH ? gblm_quantised_many : gblm_quantised_many_avx2)(job, begin, end);
        return;
    }
#elif defined(__aarch64__)
    int8_t levels[64 * MOST_WORDS] __attribute__((aligned(64)));
    const int once = job->tokens > FEW_TOKENS && kind_of(job) != DENSE && job->path != PORTABLE_PATH;
    const int64_t columns = job->words * 64, most = (int64_t)sizeof levels / columns;
    for (int64_t count; once && begin < end; begin += count) {
        Quantised tile = *job;
        count = end - begin < most ? end - begin : most;
        for (int64_t i = 0; i < count; i++) spread(job, begin + i, levels + i * columns);
        tile.mask = NULL, tile.levels = NULL, tile.values = (const uint8_t *)levels;
        tile.scales += begin * job->groups, tile.sums += begin;
        tile.y = (char *)tile.y + begin * (job->type == F32 ? 4 : 2);
        multiply_eights(tile, 0, count);
    }
#endif
    multiply_eights(*job, begin, end);
}

static void multiply_part(void *argument, int index) {
    const Share *work = argument;
    int64_t begin, end;
    for (int i = 0; i < work->count; i++) {
        const Quantised *job = work->job + i;
        const int64_t together = !gblm_by_tiles(job) ? 1 : job->path >= VNNI_PATH ? GBLM_TILE : GBLM_NARROW_TILE;
        gblm_share((job->rows + together - 1) / together, work->parts, index, &begin, &end);
        multiply_rows(job, begin * together, end * together < job->rows ? end * together : job->rows);
    }
}

static void restore_part(void *argument, int index) {
    const Share *work = argument;
    const Quantised *job = work->job;
    int64_t begin, end;
    gblm_share(job->rows, work->parts, index, &begin, &end);
    char *dense = work->dense + begin * job->columns * (job->type == F32 ? 4 : 2);
#if defined(__x86_64__)
    if (job->path >= VNNI_PATH) {
        vnni_restore(job, work->first + begin, work->first + end, dense);
        return;
    }
    if (job->path >= AVX2_PATH) {
        avx2_restore(job, work->first + begin, work->first + end, dense);
        return;
    }
#endif
    portable_restore(job, work->first + begin, work->first + end, dense);
}

/* Whether numbers that choose code or size work are within their tables and what the CPU can run. */
static int can_run(const Quantised *job, int count) {
    const int path = job->path, group = job->group;
    return job->rows >= 0 && job->words > 0 && job->words <= MOST_WORDS && job->columns > (job->words - 1) * 64 &&
           job->columns <= job->words * 64 && count > 0 && path >= 0 && path < PATHS && job->type >= 0 && job->type <= BF16 &&
           (group == 0 || group == 32 || group == 64 || group == 128) && !job->mask == !job->starts &&
           kind_of(job) != SPREAD && (job->stride == 0 || job->stride == 16) && gblm_quantised_paths() >> path & 1;
}

static inline int64_t groups_of(int64_t columns, int group) { return group > 0 ? (columns + group - 1) / group : 1; }
static int64_t in_eights(int64_t tokens) { return (tokens + FEW_TOKENS - 1) / FEW_TOKENS * FEW_TOKENS; }

/* What gblm_quantised_linear needs as `rounded`. */
int64_t gblm_quantised_bytes(int64_t words, int64_t tokens) {
    return in_eights(tokens) * (bytes_a_token(words) + (int64_t)sizeof(float));
}

void gblm_quantised_run(Quantised *jobs, int count, const void *inputs, void *rounded, const Threads *threads) {
    const int64_t size = bytes_a_token(jobs->words), tokens = jobs->tokens, eights = in_eights(tokens);
    const int64_t last = gblm_by_tiles(jobs) ? tokens / BLOCK_TOKENS * jobs->words * WORD_BLOCKS * BLOCK_TOKENS * BLOCK_BYTES : tokens * size;
    if (tokens > 1) memset((char *)rounded + last, 0, (size_t)(eights * size - last)); /* kernels compute more tokens than there are */
    float *x_scales = (float *)((char *)rounded + eights * size);
    for (int i = 0; i < count; i++) jobs[i].x = rounded, jobs[i].x_scales = x_scales, jobs[i].form = form_of(jobs->path, tokens);
    Share work = {.job = jobs, .count = count, .parts = tokens > FEW_TOKENS ? threads->count : 1, .inputs = inputs,
                  .x_scales = x_scales};
    if (work.parts == 1) round_part(&work, 0); /* less work than a region of threads */
    else threads->run(threads->context, round_part, &work, threads->count);
    work.parts = threads->count;
    threads->run(threads->context, multiply_part, &work, threads->count);
}

/* y [tokens, rows] = x [tokens, columns] Wᵀ, x and y of `type`. Returns 0, and has done nothing, where a number is not one
 * that there is code for. */
EXPORT int gblm_quantised_linear(const void *mask, const void *values, const int64_t *starts, const void *levels,
                                 const void *scales, const float *sums, const void *x, void *y, void *rounded, int64_t rows,
                                 int64_t words, int64_t columns, int64_t tokens, int64_t stride, int group, int type, int path,
                                 int count) {
    Quantised job = {mask, values, starts, levels, scales, sums, rounded, NULL, y, rows, words, tokens, columns,
                     groups_of(columns, group), stride, group, type, path, 0, WHOLE};
    if (!can_run(&job, count) || tokens < 1) return 0;
    const Threads threads = gblm_threads(count);
    gblm_quantised_run(&job, 1, x, rounded, &threads);
    return 1;
}

/* Rows [first, first + rows) dense, [rows, columns] in `type`. Returns as gblm_quantised_linear. */
EXPORT int gblm_quantised_restore(const void *mask, const void *values, const int64_t *starts, const void *levels,
                                  const void *scales, void *dense, int64_t first, int64_t rows, int64_t words,
                                  int64_t columns, int64_t stride, int group, int type, int path, int count) {
    const Quantised job = {.mask = mask, .values = values, .starts = starts, .levels = levels, .scales = scales,
                           .rows = rows, .words = words, .columns = columns, .groups = groups_of(columns, group), .stride = stride,
                           .group = group, .type = type, .path = path};
    if (!can_run(&job, count) || first < 0) return 0;
    const Threads threads = gblm_threads(count);
    Share work = {.job = &job, .parts = threads.count, .first = first, .dense = dense};
    threads.run(threads.context, restore_part, &work, threads.count);
    return 1;
}
