/* Kernels of quantised weights, for tokens by eights, and the restoration of rows.
 *
 * A weight is scale · level: scales are fp16, one for each `group` columns of a row or for a row, levels are int8. Masks and
 * starts are those of bitmask.h; what is stored for each bit is a level, or a place of 4 bits in a table of 16 levels. Places
 * are two to a byte, the first in the low half, and those of every word of the mask begin with a byte.
 *
 * x is rounded once for each call, to 16 bits with one scale a token: q = round(x · 32767 / largest). Its error is 1/65534 of
 * the largest input, so that outliers cost nothing. AVX-512 multiplies the two bytes of q + 32768 each (vpdpbusd takes
 * unsigned ones) and subtracts 32768 · (the row's sum of weights); AVX2 and NEON multiply q in 16 bits. Products are summed as
 * integers along a group, or along a row that has one scale.
 *
 * The caller guarantees what quantised.h says.
 */
#include <float.h>

#include "quantised.h"

enum { BLOCK = 16 /* words whose scales are widened at once */, PERIOD = 4096 /* columns summed in int32 */ };
enum { LEVELS, PLACES, DENSE, KINDS };

static inline int64_t row_start(const Quantised *job, int64_t row) {
    if (job->patterns) return row * (job->levels ? job->columns / 4 : job->columns / 2);
    return job->mask ? job->starts[row] : row * job->words * 64;
}

/* The 48 bits of the patterns of 64 columns. */
static inline uint64_t patterns_at(const Quantised *job, int64_t row, int64_t w) {
    const uint8_t *patterns = job->patterns + 6 * (row * job->words + w);
    uint32_t low;
    uint16_t high;
    memcpy(&low, patterns, 4);
    memcpy(&high, patterns + 4, 2);
    return low | (uint64_t)high << 32;
}

/* Three bits to each group of four, by halves. */
static inline uint64_t three_of_four(uint64_t bits) {
    bits = (bits & 0xffffff) | (bits & 0xffffff000000) << 8;
    bits = (bits & 0x00000fff00000fff) | (bits & 0x00fff00000fff000) << 4;
    bits = (bits & 0x003f003f003f003f) | (bits & 0x0fc00fc00fc00fc0) << 2;
    return (bits & 0x0707070707070707) | (bits & 0x3838383838383838) << 1;
}
static inline uint64_t with_parity(uint64_t bits) {
    const uint64_t parity = (bits ^ bits >> 1 ^ bits >> 2) & 0x1111111111111111;
    return bits | parity << 3;
}
static inline uint64_t row_bits(const Quantised *job, int64_t row, int64_t w) {
    if (job->patterns) return with_parity(three_of_four(patterns_at(job, row, w)));
    return job->mask ? job->mask[row * job->words + w] : ~0ull;
}
static inline int kind_of(const Quantised *job) {
    return !job->mask && !job->patterns ? DENSE : job->levels ? PLACES : LEVELS;
}
static inline float scale_at(const Quantised *job, int64_t row, int64_t group) {
    return group < job->groups ? f16_to_float(job->scales[row * job->groups + group]) : 0.0f;
}
static inline void put(const Quantised *job, int64_t token, int64_t row, float sum) {
    const int64_t at = token * job->rows + row;
    if (job->type == F32) ((float *)job->y)[at] = sum;
    else ((uint16_t *)job->y)[at] = job->type == BF16 ? float_to_bf16(sum) : float_to_f16(sum);
}

/* ---- x in 16 bits ---- */

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
    ATTRIBUTE static float NAME(const void *input, int64_t columns, int64_t words, int planes, void *output) { \
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
            if (planes) {                                                                                    \
                uint8_t *high = (uint8_t *)output + 128 * w, *low = high + 64;                               \
                for (int c = 0; c < 64; c++) high[c] = (uint8_t)((q[c] + 32768) >> 8);                       \
                for (int c = 0; c < 64; c++) low[c] = (uint8_t)q[c];                                         \
            } else {                                                                                         \
                int16_t *to = (int16_t *)output + 64 * w;                                                    \
                for (int c = 0; c < 64; c++) to[c] = (int16_t)q[c];                                          \
            }                                                                                                \
        }                                                                                                    \
        return most < 0x7f800000 ? (usable ? largest / 32767 : 0) : __builtin_nanf("");                      \
    }
#define ROUNDED_TYPES(NAME, ATTRIBUTE)                  \
    ROUNDED(NAME##_f32, ATTRIBUTE, uint32_t, bits_f32)  \
    ROUNDED(NAME##_f16, ATTRIBUTE, uint16_t, bits_f16)  \
    ROUNDED(NAME##_bf16, ATTRIBUTE, uint16_t, bits_bf16)
ROUNDED_TYPES(portable, )
typedef float (*Rounding)(const void *, int64_t, int64_t, int, void *);

/* The products of some rows, for up to FEW_TOKENS tokens. */
typedef void (*Rows)(const Quantised *, int64_t begin, int64_t end);

/* ---- portable ---- */

static inline int level_at(const Quantised *job, const uint8_t *values, const int8_t *levels, int64_t at) {
    return job->levels ? levels[values[at / 2] >> (at % 2 * 4) & 15] : (int8_t)values[at];
}
/* Bytes that so many weights of a word take. */
static inline int bytes_of(const Quantised *job, int count) { return job->levels ? (count + 1) / 2 : count; }

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
            v += bytes_of(job, __builtin_popcountll(all));
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
            v += bytes_of(job, __builtin_popcountll(bits));
        }
    }
}

#if defined(__x86_64__) || defined(__aarch64__)

/* ---- AVX2 and NEON: spread 8 bytes by a table of 256 shuffles; products in 16 bits ---- */

static uint8_t shuffles[256][8]; /* where byte i is taken from; 128 where there is none */

__attribute__((constructor)) static void fill_shuffles(void) {
    for (int mask = 0; mask < 256; mask++)
        for (int lane = 0, next = 0; lane < 8; lane++) shuffles[mask][lane] = mask >> lane & 1 ? (uint8_t)next++ : 128;
}
#endif

#if defined(__aarch64__)

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

/* 8 weights in 16 bits, and v moved past them. */
static inline int16x8_t neon_eight(const int8_t **v, unsigned bits) {
    const int8x8_t weights = vtbl1_s8(vld1_s8(*v), vld1_s8((const int8_t *)shuffles[bits]));
    *v += __builtin_popcount(bits);
    return vmovl_s8(weights);
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
                    places += bytes_of(job, __builtin_popcountll(bits));
                }
                const int16x8_t weights =
                    kind == DENSE ? vmovl_s8(vld1_s8((v += 8) - 8)) : neon_eight(&v, (unsigned)(bits >> c % 64) & 255);
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
#endif

#if defined(__x86_64__)

ROUNDED_TYPES(avx2, AVX2)

/* The levels of 64 places. */
AVX2 static inline void avx2_look_up(const uint8_t *places, __m256i table, int8_t *levels) {
    const __m256i packed = _mm256_loadu_si256((const __m256i *)places), low = _mm256_set1_epi8(15);
    const __m256i even = _mm256_shuffle_epi8(table, _mm256_and_si256(packed, low)),
                  odd = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(packed, 4), low));
    const __m256i first = _mm256_unpacklo_epi8(even, odd), second = _mm256_unpackhi_epi8(even, odd);
    _mm256_storeu_si256((__m256i *)levels, _mm256_permute2x128_si256(first, second, 0x20));
    _mm256_storeu_si256((__m256i *)(levels + 32), _mm256_permute2x128_si256(first, second, 0x31));
}

/* 16 weights in 16 bits, and v moved past them. */
AVX2 static inline __m256i avx2_sixteen(const int8_t **v, unsigned bits) {
    const __m128i first = _mm_shuffle_epi8(_mm_loadl_epi64((const __m128i *)*v),
                                           _mm_loadl_epi64((const __m128i *)shuffles[bits & 255]));
    *v += __builtin_popcount(bits & 255);
    const __m128i second = _mm_shuffle_epi8(_mm_loadl_epi64((const __m128i *)*v),
                                            _mm_loadl_epi64((const __m128i *)shuffles[bits >> 8]));
    *v += __builtin_popcount(bits >> 8);
    return _mm256_cvtepi8_epi16(_mm_unpacklo_epi64(first, second));
}

AVX2 static inline float avx2_sum(__m256 sums) {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
    const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
}

AVX2 static void avx2_rows(const Quantised *job, int64_t begin, int64_t end) {
    const int64_t columns = job->words * 64, span = job->group ? job->group : PERIOD;
    const int kind = kind_of(job);
    for (int64_t r = begin; r < end; r++) {
        const int8_t *v = (const int8_t *)job->values + row_start(job, r);
        const uint8_t *places = (const uint8_t *)v;
        int8_t word[72] = {0}; /* levels of the present word; 8 bytes are read at a time */
        __m256i table = _mm256_setzero_si256();
        if (kind == PLACES)
            table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(job->levels + r * job->stride)));
        __m256 sums[FEW_TOKENS];
        for (int64_t t = 0; t < job->tokens; t++) sums[t] = _mm256_setzero_ps();
        uint64_t bits = 0;
        for (int64_t first = 0; first < columns; first += span) {
            __m256i products[FEW_TOKENS];
            for (int64_t t = 0; t < job->tokens; t++) products[t] = _mm256_setzero_si256();
            for (int64_t c = first; c < first + span && c < columns; c += 16) {
                if (c % 64 == 0) {
                    bits = row_bits(job, r, c / 64);
                    _mm_prefetch((const char *)places + 1024, _MM_HINT_T0);
                    if (kind == PLACES) {
                        avx2_look_up(places, table, word);
                        v = word;
                    }
                    places += bytes_of(job, __builtin_popcountll(bits));
                }
                __m256i weights;
                if (kind == DENSE) weights = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)((v += 16) - 16)));
                else weights = avx2_sixteen(&v, (unsigned)(bits >> c % 64) & 0xffff);
                for (int64_t t = 0; t < job->tokens; t++) {
                    const int16_t *x = (const int16_t *)job->x + t * columns + c;
                    products[t] = _mm256_add_epi32(
                        products[t], _mm256_madd_epi16(weights, _mm256_loadu_si256((const __m256i *)x)));
                }
            }
            const __m256 scale = _mm256_set1_ps(job->group ? scale_at(job, r, first / span) : 1.0f);
            for (int64_t t = 0; t < job->tokens; t++)
                sums[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products[t]), scale, sums[t]);
        }
        const float scale = job->group ? 1.0f : scale_at(job, r, 0);
        for (int64_t t = 0; t < job->tokens; t++) put(job, t, r, avx2_sum(sums[t]) * scale * job->x_scales[t]);
    }
}

/* ---- AVX-512 with VBMI2 and VNNI ---- */

#define VNNI \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512vnni,fma,f16c,popcnt,bmi,bmi2")))
#define INLINE static inline __attribute__((always_inline))
#define STREAMS 4

ROUNDED_TYPES(avx512, VNNI)

VNNI INLINE uint64_t vnni_bits(const Quantised *job, int64_t row, int64_t w) {
    if (job->patterns) return with_parity(_pdep_u64(patterns_at(job, row, w), 0x7777777777777777));
    return row_bits(job, row, w);
}

/* The levels of a word's 64 columns, and v moved past them. */
VNNI INLINE __m512i word_of(uint64_t bits, const uint8_t **v, __m512i table, const int kind) {
    __m512i packed;
    _mm_prefetch((const char *)*v + (kind == DENSE ? 2048 : 1024), _MM_HINT_T0);
    if (kind == DENSE) return _mm512_loadu_si512((*v += 64) - 64);
    if (kind == LEVELS) {
        packed = _mm512_loadu_si512(*v);
        *v += __builtin_popcountll(bits);
    } else {
        const __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)*v));
        packed = _mm512_shuffle_epi8(
            table, _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi16(pairs, 4)), _mm512_set1_epi8(15)));
        *v += (__builtin_popcountll(bits) + 1) / 2;
    }
    __asm__("" : "+v"(packed)); /* a load of its own: see expand_ps in bitmask.h */
    return _mm512_maskz_expand_epi8(bits, packed);
}

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
VNNI INLINE void vnni_rows(const Quantised *job, int64_t first, int64_t apart, const int kind, const int group,
                           const int tokens, const int streams) {
    enum { MOST = STREAMS > FEW_TOKENS ? STREAMS : FEW_TOKENS };
    const int64_t stride = job->words * 128;
    const uint8_t *v[STREAMS], *x = job->x;
    __m512i table[STREAMS], high[MOST], low[MOST];
    __m512 sums[MOST];
    float scales[STREAMS][2 * BLOCK] __attribute__((aligned(64)));
    for (int i = 0; i < streams; i++) {
        v[i] = job->values + row_start(job, first + i * apart);
        table[i] = _mm512_setzero_si512();
        if (kind == PLACES)
            table[i] = _mm512_broadcast_i32x4(
                _mm_loadu_si128((const __m128i *)(job->levels + (first + i * apart) * job->stride)));
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
        for (int64_t w = block; w < last; w++, x += 128)
            _Pragma("GCC unroll 4") for (int i = 0; i < streams; i++) {
                const __m512i levels = word_of(vnni_bits(job, first + i * apart, w), v + i, table[i], kind);
                const int64_t in_block = w - block;
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
                        high[s] = _mm512_dpbusd_epi32(high[s], upper, levels);
                        low[s] = _mm512_dpbusd_epi32(low[s], lower, levels);
                        continue;
                    }
                    const __m512i products = _mm512_dpbusd_epi32(_mm512_setzero_si512(), upper, levels);
                    sums[s] = _mm512_fmadd_ps(
                        _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_slli_epi32(products, 8), lower, levels)), scale,
                        sums[s]);
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

#define VNNI_TOKENS(KIND, GROUP, TOKENS)                                                                      \
    VNNI static void vnni_##KIND##_##GROUP##_##TOKENS(const Quantised *job, int64_t begin, int64_t end) {     \
        const int streams = TOKENS == 1 ? STREAMS : 1;                                                        \
        const int64_t apart = (end - begin) / streams;                                                        \
        for (int64_t r = begin; r < begin + apart; r++) vnni_rows(job, r, apart, KIND, GROUP, TOKENS, streams); \
        for (int64_t r = begin + streams * apart; r < end; r++) vnni_rows(job, r, 0, KIND, GROUP, TOKENS, 1); \
    }
#define VNNI_GROUP(KIND, GROUP) \
    VNNI_TOKENS(KIND, GROUP, 1) VNNI_TOKENS(KIND, GROUP, 2) VNNI_TOKENS(KIND, GROUP, 4) VNNI_TOKENS(KIND, GROUP, 8)
#define VNNI_KIND(KIND) VNNI_GROUP(KIND, 0) VNNI_GROUP(KIND, 32) VNNI_GROUP(KIND, 64) VNNI_GROUP(KIND, 128)
VNNI_KIND(LEVELS) VNNI_KIND(PLACES) VNNI_KIND(DENSE)

#define BY_TOKENS(KIND, GROUP) \
    {vnni_##KIND##_##GROUP##_1, vnni_##KIND##_##GROUP##_2, vnni_##KIND##_##GROUP##_4, vnni_##KIND##_##GROUP##_8}
#define BY_GROUP(KIND) {BY_TOKENS(KIND, 0), BY_TOKENS(KIND, 32), BY_TOKENS(KIND, 64), BY_TOKENS(KIND, 128)}
static const Rows vnni[KINDS][4][4] = {BY_GROUP(LEVELS), BY_GROUP(PLACES), BY_GROUP(DENSE)};

static void vnni_any(const Quantised *job, int64_t begin, int64_t end) {
    const int group = job->group ? job->group / 32 : 0, tokens = (int)job->tokens;
    vnni[kind_of(job)][group > 2 ? 3 : group][tokens <= 2 ? tokens - 1 : tokens <= 4 ? 2 : 3](job, begin, end);
}

VNNI static void vnni_restore(const Quantised *job, int64_t begin, int64_t end, void *dense) {
    const int kind = kind_of(job);
    for (int64_t r = begin; r < end; r++) {
        const uint8_t *v = job->values + row_start(job, r);
        __m512i table = _mm512_setzero_si512();
        if (kind == PLACES)
            table = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(job->levels + r * job->stride)));
        for (int64_t w = 0; w < job->words; w++) {
            const uint64_t bits = row_bits(job, r, w);
            int8_t levels[64] __attribute__((aligned(64)));
            const __m512i word = kind == DENSE    ? word_of(bits, &v, table, DENSE)
                                 : kind == PLACES ? word_of(bits, &v, table, PLACES)
                                                  : word_of(bits, &v, table, LEVELS);
            _mm512_store_si512(levels, word);
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
                __m256i half = _mm512_cvtps_ph(weight, _MM_FROUND_TO_NEAREST_INT);
                if (job->type == BF16) {
                    const __m512i whole = _mm512_castps_si512(weight);
                    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(whole, 16), _mm512_set1_epi32(1));
                    half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(
                        _mm512_add_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(0x7fff)), odd), 16));
                }
                _mm256_mask_storeu_epi16((uint16_t *)dense + at, there, half);
            }
        }
    }
}
#endif

/* ---- choice of path, and work shared by threads ---- */

/* Bit p of the result is set where the CPU can run path p. */
int gblm_quantised_paths(void) {
    int paths = 1 << PORTABLE_PATH;
#if defined(__aarch64__)
    paths |= 1 << NEON_PATH;
#elif defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        paths |= 1 << AVX2_PATH;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni"))
        paths |= 1 << AVX512_PATH;
#endif
    return paths;
}

static Rounding rounding_of(int path, int type) {
    static const Rounding portable[] = {portable_f32, portable_f16, portable_bf16};
#if defined(__x86_64__)
    static const Rounding avx2[] = {avx2_f32, avx2_f16, avx2_bf16}, avx512[] = {avx512_f32, avx512_f16, avx512_bf16};
    if (path != PORTABLE_PATH) return (path == AVX512_PATH ? avx512 : avx2)[type];
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

static int64_t bytes_a_token(int64_t words) { return words * 128; }

static void round_part(void *argument, int index) {
    const Share *work = argument;
    const Quantised *job = work->job;
    const int64_t from = job->columns * (job->type == F32 ? 4 : 2), to = bytes_a_token(job->words);
    const Rounding round = rounding_of(job->path, job->type);
    int64_t begin, end;
    gblm_share(job->tokens, work->parts, index, &begin, &end);
    for (int64_t t = begin; t < end; t++)
        work->x_scales[t] =
            round(work->inputs + t * from, job->columns, job->words, job->path == AVX512_PATH, (char *)job->x + t * to);
}

static Rows rows_of(int path) {
#if defined(__x86_64__)
    if (path != PORTABLE_PATH) return path == AVX512_PATH ? vnni_any : avx2_rows;
#elif defined(__aarch64__)
    if (path == NEON_PATH) return neon_rows;
#endif
    (void)path;
    return portable_rows;
}

static void multiply_rows(Quantised job, int64_t begin, int64_t end) {
    for (int64_t left = job.tokens; left > 0; left -= FEW_TOKENS) {
        job.tokens = left < FEW_TOKENS ? left : FEW_TOKENS;
        rows_of(job.path)(&job, begin, end);
        job.x = (const char *)job.x + FEW_TOKENS * bytes_a_token(job.words);
        job.y = (char *)job.y + FEW_TOKENS * job.rows * (job.type == F32 ? 4 : 2);
        job.x_scales += FEW_TOKENS;
    }
}

static void multiply_part(void *argument, int index) {
    const Share *work = argument;
    int64_t begin, end;
    for (int i = 0; i < work->count; i++) {
        gblm_share(work->job[i].rows, work->parts, index, &begin, &end);
        multiply_rows(work->job[i], begin, end);
    }
}

static void restore_part(void *argument, int index) {
    const Share *work = argument;
    const Quantised *job = work->job;
    int64_t begin, end;
    gblm_share(job->rows, work->parts, index, &begin, &end);
    char *dense = work->dense + begin * job->columns * (job->type == F32 ? 4 : 2);
#if defined(__x86_64__)
    if (job->path == AVX512_PATH) {
        vnni_restore(job, work->first + begin, work->first + end, dense);
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
           !(job->patterns && (job->mask || job->columns % 4)) && !(job->levels && kind_of(job) == DENSE) &&
           (job->stride == 0 || job->stride == 16) && gblm_quantised_paths() >> path & 1;
}

static inline int64_t groups_of(int64_t columns, int group) { return group > 0 ? (columns + group - 1) / group : 1; }
static int64_t in_eights(int64_t tokens) { return (tokens + FEW_TOKENS - 1) / FEW_TOKENS * FEW_TOKENS; }

/* What gblm_quantised_linear needs as `rounded`. */
int64_t gblm_quantised_bytes(int64_t words, int64_t tokens) {
    return in_eights(tokens) * (bytes_a_token(words) + (int64_t)sizeof(float));
}

void gblm_quantised_run(Quantised *jobs, int count, const void *inputs, void *rounded, const Threads *threads) {
    const int64_t size = bytes_a_token(jobs->words), tokens = jobs->tokens, eights = in_eights(tokens);
    memset((char *)rounded + tokens * size, 0, (size_t)((eights - tokens) * size)); /* kernels compute up to 8 tokens */
    float *x_scales = (float *)((char *)rounded + eights * size);
    for (int i = 0; i < count; i++) jobs[i].x = rounded, jobs[i].x_scales = x_scales;
    Share work = {.job = jobs, .count = count, .parts = tokens > FEW_TOKENS ? threads->count : 1, .inputs = inputs,
                  .x_scales = x_scales};
    if (work.parts == 1) round_part(&work, 0); /* less work than a region of threads */
    else threads->run(threads->context, round_part, &work, threads->count);
    work.parts = threads->count;
    threads->run(threads->context, multiply_part, &work, threads->count);
}

/* y [tokens, rows] = x [tokens, columns] Wᵀ, x and y of `type`. Returns 0, and has done nothing, where a number is not one
 * that there is code for. */
EXPORT int gblm_quantised_linear(const void *mask, const void *patterns, const void *values, const int64_t *starts,
                                 const void *levels, const void *scales, const float *sums, const void *x, void *y,
                                 void *rounded, int64_t rows, int64_t words, int64_t columns, int64_t tokens, int64_t stride,
                                 int group, int type, int path, int count) {
    Quantised job = {mask, patterns, values, starts, levels, scales, sums, rounded, NULL, y, rows, words, tokens, columns,
                     groups_of(columns, group), stride, group, type, path};
    if (!can_run(&job, count) || tokens < 1) return 0;
    const Threads threads = gblm_threads(count);
    gblm_quantised_run(&job, 1, x, rounded, &threads);
    return 1;
}

/* Rows [first, first + rows) dense, [rows, columns] in `type`. Returns as gblm_quantised_linear. */
EXPORT int gblm_quantised_restore(const void *mask, const void *patterns, const void *values, const int64_t *starts,
                                  const void *levels, const void *scales, void *dense, int64_t first, int64_t rows,
                                  int64_t words, int64_t columns, int64_t stride, int group, int type, int path, int count) {
    const Quantised job = {.mask = mask, .patterns = patterns, .values = values, .starts = starts, .levels = levels, .scales = scales, .rows = rows,
                           .words = words, .columns = columns, .groups = groups_of(columns, group), .stride = stride,
                           .group = group, .type = type, .path = path};
    if (!can_run(&job, count) || first < 0) return 0;
    const Threads threads = gblm_threads(count);
    Share work = {.job = &job, .parts = threads.count, .first = first, .dense = dense};
    threads.run(threads.context, restore_part, &work, threads.count);
    return 1;
}
