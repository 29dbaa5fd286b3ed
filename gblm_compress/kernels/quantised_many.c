/* Products of quantised weights with many tokens: 16 or 32 rows are spread once for 96 tokens. First for AVX-512 with VNNI.
 *
 * Levels of 16 rows are turned so that four columns of each are one vector: `vpdpbusd` adds their products with four inputs of a
 * token, and sums of 16 rows lie in a register. The two bytes of an input are multiplied one after the other, as in quantised.c.
 * Groups end after as many columns in all rows, so that their scales are applied to 16 rows at once.
 */
#include "quantised_words.h"

#if defined(__x86_64__)

int8_t gblm_to_places[8][64] __attribute__((aligned(64)));

__attribute__((constructor)) static void fill_to_places(void) {
    for (int odd = 0; odd < 8; odd++)
        for (int c = 0; c < 64; c++) gblm_to_places[odd][c] = (int8_t)((2 * odd >> c / 16 & 1) - 1);
}

enum { TILE = GBLM_TILE, AT_ONCE = 96 /* tokens */, DEEP = 8 /* words of 32 rows that are spread */, MOST_GROUPS = DEEP * 2 };

/* Part of 32 rows: of each 4 columns those of rows 0 to 15, then those of rows 16 to 31; and the scales of the groups. */
typedef struct {
    __m512i levels[DEEP * 16][2];
    __m512 scales[MOST_GROUPS][2];
} Tile;

/* 16 rows of 64 levels, four columns of all rows together. */
VNNI INLINE void turn(const __m512i rows[16], __m512i (*columns)[2], const int half) {
    __m512i pairs[16], fours[16], lanes[16];
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            fours[i + 2 * j] = _mm512_unpacklo_epi64(pairs[i + j], pairs[i + 2 + j]);
            fours[i + 2 * j + 1] = _mm512_unpackhi_epi64(pairs[i + j], pairs[i + 2 + j]);
        }
    for (int j = 0; j < 4; j++)
        for (int i = 0; i < 16; i += 8) {
            lanes[i + j] = _mm512_shuffle_i32x4(fours[i + j], fours[i + 4 + j], 0x88);
            lanes[i + 4 + j] = _mm512_shuffle_i32x4(fours[i + j], fours[i + 4 + j], 0xdd);
        }
    for (int j = 0; j < 4; j++)
        for (int odd = 0; odd < 2; odd++) {
            columns[4 * odd + j][half] = _mm512_shuffle_i32x4(lanes[4 * odd + j], lanes[8 + 4 * odd + j], 0x88);
            columns[8 + 4 * odd + j][half] = _mm512_shuffle_i32x4(lanes[4 * odd + j], lanes[8 + 4 * odd + j], 0xdd);
        }
}

/* Words [block, last) of `count` rows from `first` on; v moves past them. What the next rows have there is fetched meanwhile:
 * the pieces of 32 rows are too short for the CPU to see them as streams. */
VNNI INLINE void fill(const Quantised *job, int64_t first, int count, int64_t block, int64_t last, const uint8_t **v,
                      Tile *tile, const int kind, const int vbmi2) {
    const int64_t ahead = first + TILE < job->rows ? row_start(job, first + TILE) - row_start(job, first) : 0;
    for (int half = 0; half < 2; half++)
        for (int64_t w = block; w < last; w++) {
            __m512i rows[16];
            for (int i = 0; i < 16; i++) {
                const int64_t row = first + 16 * half + i;
                rows[i] = _mm512_setzero_si512();
                if (16 * half + i >= count) continue;
                const uint64_t bits = kind == DENSE ? 0 : job->mask[row * job->words + w];
                _mm_prefetch((const char *)v[16 * half + i] + ahead, _MM_HINT_T1);
                if (kind != DENSE && w == block)
                    _mm_prefetch((const char *)(job->mask + (row + TILE) * job->words + w), _MM_HINT_T1);
                rows[i] = word_of(bits, v + 16 * half + i, vnni_table(job, row, kind), kind, vbmi2);
            }
            turn(rows, tile->levels + 16 * (w - block), half);
        }
    if (!job->group) return;
    const int64_t from = 64 * block / job->group, left = job->groups - from, most = 64 * DEEP / job->group;
    const __mmask16 there = (__mmask16)(left >= most ? (1 << most) - 1 : (1 << left) - 1);
    float scales[TILE][16] __attribute__((aligned(64)));
    for (int i = 0; i < TILE; i++)
        _mm512_store_ps(scales[i], i >= count ? _mm512_setzero_ps()
                                              : _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(
                                                    there, job->scales + (first + i) * job->groups + from)));
    const __m512i sixteens = _mm512_slli_epi32(
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), 4);
    for (int g = 0; g < most; g++)
        for (int half = 0; half < 2; half++)
            tile->scales[g][half] = _mm512_i32gather_ps(sixteens, scales[16 * half] + g, 4);
}

/* sums += the products of a tile's first words and `tokens` tokens of x. */
VNNI INLINE void multiply(const Tile *tile, int64_t words, int group, const uint8_t *x, int64_t stride, float (*sums)[TILE],
                          const int tokens) {
    const int64_t span = group ? group / 4 : 16 * words;
    for (int64_t c = 0, g = 0; c < 16 * words; g++) {
        __m512i high[6][2], low[6][2];
        for (int t = 0; t < tokens; t++)
            for (int half = 0; half < 2; half++) high[t][half] = low[t][half] = _mm512_setzero_si512();
        for (const int64_t end = c + span < 16 * words ? c + span : 16 * words; c < end; c++) {
            const uint8_t *from = x + (c >> 4) * 128 + (c & 15) * 4;
            const __m512i first = tile->levels[c][0], second = tile->levels[c][1];
            _Pragma("GCC unroll 6") for (int t = 0; t < tokens; t++) {
                int32_t upper, lower;
                memcpy(&upper, from + t * stride, 4);
                memcpy(&lower, from + t * stride + 64, 4);
                const __m512i uppers = _mm512_set1_epi32(upper), lowers = _mm512_set1_epi32(lower);
                high[t][0] = added(high[t][0], uppers, first);
                high[t][1] = added(high[t][1], uppers, second);
                low[t][0] = added(low[t][0], lowers, first);
                low[t][1] = added(low[t][1], lowers, second);
            }
        }
        _Pragma("GCC unroll 6") for (int t = 0; t < tokens; t++)
            for (int half = 0; half < 2; half++) {
                const __m512 scale = group ? tile->scales[g][half] : _mm512_set1_ps(1),
                             products = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high[t][half]), _mm512_set1_ps(256),
                                                        _mm512_cvtepi32_ps(low[t][half]));
                _mm512_store_ps(sums[t] + 16 * half,
                                _mm512_fmadd_ps(products, scale, _mm512_load_ps(sums[t] + 16 * half)));
            }
    }
}

VNNI static void multiply_6(const Tile *tile, int64_t words, int group, const uint8_t *x, int64_t stride, float (*sums)[TILE]) {
    multiply(tile, words, group, x, stride, sums, 6);
}
VNNI static void multiply_3(const Tile *tile, int64_t words, int group, const uint8_t *x, int64_t stride, float (*sums)[TILE]) {
    multiply(tile, words, group, x, stride, sums, 3);
}
VNNI static void multiply_1(const Tile *tile, int64_t words, int group, const uint8_t *x, int64_t stride, float (*sums)[TILE]) {
    multiply(tile, words, group, x, stride, sums, 1);
}

/* What the sums of `count` rows are as outputs of tokens [begin, end). */
VNNI static void put_tile(const Quantised *job, int64_t first, int count, int64_t begin, int64_t end, float (*sums)[TILE]) {
    for (int half = 0; half < 2; half++) {
        const int64_t row = first + 16 * half, left = count - 16 * half;
        const __mmask16 there = (__mmask16)(left >= 16 ? 0xffff : left > 0 ? (1 << left) - 1 : 0);
        const __m512 too_much = _mm512_mul_ps(_mm512_maskz_loadu_ps(there, job->sums + row), _mm512_set1_ps(32768));
        const __m512 scale =
            job->group ? _mm512_set1_ps(1) : _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, job->scales + row));
        for (int64_t t = begin; t < end; t++) {
            const __m512 total = _mm512_mul_ps(
                _mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(sums[t - begin] + 16 * half), too_much), scale),
                _mm512_set1_ps(job->x_scales[t]));
            const int64_t at = t * job->rows + row;
            if (job->type == F32) _mm512_mask_storeu_ps((float *)job->y + at, there, total);
            else _mm256_mask_storeu_epi16((uint16_t *)job->y + at, there, halves(total, job->type));
        }
    }
}

VNNI INLINE void tiles(const Quantised *job, int64_t begin, int64_t end, const int kind, const int vbmi2) {
    const int64_t stride = bytes_a_token(job->words);
    for (int64_t first = begin; first < end; first += TILE)
        for (int64_t t = 0; t < job->tokens; t += AT_ONCE) {
            const int count = end - first < TILE ? (int)(end - first) : TILE;
            const int64_t until = t + AT_ONCE < job->tokens ? t + AT_ONCE : job->tokens;
            float sums[AT_ONCE][TILE] __attribute__((aligned(64)));
            memset(sums, 0, sizeof sums);
            const uint8_t *v[TILE];
            for (int i = 0; i < count; i++) v[i] = job->values + row_start(job, first + i);
            for (int64_t block = 0; block < job->words; block += DEEP) {
                Tile tile;
                const int64_t last = block + DEEP < job->words ? block + DEEP : job->words;
                fill(job, first, count, block, last, v, &tile, kind, vbmi2);
                for (int64_t at = t, some; at < until; at += some) {
                    const uint8_t *x = (const uint8_t *)job->x + at * stride + block * 128;
                    some = until - at >= 6 ? 6 : until - at >= 3 ? 3 : 1;
                    (some == 6 ? multiply_6 : some == 3 ? multiply_3 : multiply_1)(&tile, last - block, job->group, x, stride,
                                                                                  sums + (at - t));
                }
            }
            put_tile(job, first, count, t, until, sums);
        }
}

VNNI void gblm_quantised_many(const Quantised *job, int64_t begin, int64_t end) {
    const int kind = kind_of(job), vbmi2 = job->path == AVX512_PATH;
    if (kind == DENSE) tiles(job, begin, end, DENSE, 0);
    else if (kind == PLACES && vbmi2) tiles(job, begin, end, PLACES, 1);
    else if (kind == PLACES) tiles(job, begin, end, PLACES, 0);
    else if (vbmi2) tiles(job, begin, end, LEVELS, 1);
    else tiles(job, begin, end, LEVELS, 0);
}

/* ---- AVX2 and AVX-VNNI: sums of 8 rows lie in a register, and two columns are multiplied at a time in 16 bits ---- */

enum { NARROW = 16 /* rows */, PAIRS = DEEP * 32 /* of columns; as many products as an int32 holds */ };

/* Part of 16 rows: of each 2 columns those of rows 0 to 7, then those of rows 8 to 15, in 16 bits. */
typedef struct {
    __m256i levels[PAIRS][2];
    float scales[MOST_GROUPS][NARROW] __attribute__((aligned(32)));
} NarrowTile;

/* 8 rows of 16 levels, two columns of all rows together. */
AVX2 INLINE void turn_narrow(const int8_t (*rows)[DEEP * 64], __m256i (*columns)[2], const int half) {
    __m128i a[8], b[8];
    for (int i = 0; i < 8; i++) a[i] = _mm_load_si128((const __m128i *)rows[i]);
    for (int i = 0; i < 8; i += 2) b[i] = _mm_unpacklo_epi16(a[i], a[i + 1]), b[i + 1] = _mm_unpackhi_epi16(a[i], a[i + 1]);
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm_unpacklo_epi32(b[i + j], b[i + 2 + j]);
            a[i + 2 * j + 1] = _mm_unpackhi_epi32(b[i + j], b[i + 2 + j]);
        }
    for (int i = 0; i < 4; i++) {
        columns[2 * i][half] = _mm256_cvtepi8_epi16(_mm_unpacklo_epi64(a[i], a[4 + i]));
        columns[2 * i + 1][half] = _mm256_cvtepi8_epi16(_mm_unpackhi_epi64(a[i], a[4 + i]));
    }
}

/* Words [block, last) of `count` rows from `first` on, which `at` moves past. */
AVX2 static void fill_narrow(const Quantised *job, int64_t first, int count, int64_t block, int64_t last, int64_t *at,
                             NarrowTile *tile) {
    int8_t rows[NARROW][DEEP * 64] __attribute__((aligned(32)));
    for (int i = 0; i < NARROW; i++)
        if (i < count) gblm_avx2_levels(job, first + i, block, last, at + i, rows[i]);
        else memset(rows[i], 0, sizeof rows[i]);
    for (int half = 0; half < 2; half++)
        for (int64_t c = 0; c < 64 * (last - block); c += 16)
            turn_narrow((const int8_t(*)[DEEP * 64])(rows[8 * half] + c), tile->levels + c / 2, half);
    for (int64_t g = 0; job->group && g < 64 * DEEP / job->group; g++)
        for (int i = 0; i < NARROW; i++)
            tile->scales[g][i] = i < count ? avx2_scale(job, first + i, 64 * block / job->group + g) : 0;
}

/* sums + the products of two 16-bit numbers each; in one instruction with AVX-VNNI, which `vnni` says. */
AVX2 INLINE __m256i avx2_added(__m256i sums, __m256i x, __m256i levels, const int vnni) {
    if (vnni) __asm__("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sums) : "x"(x), "x"(levels));
    else __asm__("vpaddd %1, %0, %0" : "+x"(sums) : "x"(_mm256_madd_epi16(x, levels)));
    return sums;
}

/* sums += the products of a tile's first words and `tokens` tokens of x. */
AVX2 INLINE void multiply_narrow(const NarrowTile *tile, int64_t words, int group, const int16_t *x, int64_t stride,
                                 float (*sums)[NARROW], const int tokens, const int vnni) {
    const int64_t span = group ? group / 2 : 32 * words;
    for (int64_t c = 0, g = 0; c < 32 * words; g++) {
        __m256i products[6][2];
        for (int t = 0; t < tokens; t++) products[t][0] = products[t][1] = _mm256_setzero_si256();
        for (const int64_t end = c + span < 32 * words ? c + span : 32 * words; c < end; c++) {
            const __m256i first = tile->levels[c][0], second = tile->levels[c][1];
            _Pragma("GCC unroll 6") for (int t = 0; t < tokens; t++) {
                int32_t pair;
                memcpy(&pair, x + t * stride + 2 * c, 4);
                products[t][0] = avx2_added(products[t][0], _mm256_set1_epi32(pair), first, vnni);
                products[t][1] = avx2_added(products[t][1], _mm256_set1_epi32(pair), second, vnni);
            }
        }
        _Pragma("GCC unroll 6") for (int t = 0; t < tokens; t++)
            for (int half = 0; half < 2; half++) {
                const __m256 scale = group ? _mm256_load_ps(tile->scales[g] + 8 * half) : _mm256_set1_ps(1);
                _mm256_storeu_ps(sums[t] + 8 * half, _mm256_fmadd_ps(_mm256_cvtepi32_ps(products[t][half]), scale,
                                                                     _mm256_loadu_ps(sums[t] + 8 * half)));
            }
    }
}

#define NARROW_TOKENS(NAME, ATTRIBUTE, VNNI_TOO, TOKENS)                                                                 \
    ATTRIBUTE static void NAME##_##TOKENS(const NarrowTile *tile, int64_t words, int group, const int16_t *x,           \
                                          int64_t stride, float (*sums)[NARROW]) {                                      \
        multiply_narrow(tile, words, group, x, stride, sums, TOKENS, VNNI_TOO);                                         \
    }
#define NARROW_KERNEL(...) NARROW_TOKENS(__VA_ARGS__, 1) NARROW_TOKENS(__VA_ARGS__, 3) NARROW_TOKENS(__VA_ARGS__, 6)
NARROW_TOKENS(multiply_avx2, AVX2, 0, 1) NARROW_TOKENS(multiply_avx2, AVX2, 0, 2) NARROW_TOKENS(multiply_avx2, AVX2, 0, 4)
#if HAS_AVX_VNNI
NARROW_KERNEL(multiply_avx_vnni, AVX_VNNI, 1)
#else
NARROW_KERNEL(multiply_avx_vnni, AVX2, 0)
#endif

/* What the sums of up to 16 rows are as outputs of tokens [begin, end). */
AVX2 static void put_narrow(const Quantised *job, int64_t first, int count, int64_t begin, int64_t end, float (*sums)[NARROW]) {
    for (int half = 0; 8 * half < count; half++) {
        float scales[8];
        for (int i = 0; i < 8; i++)
            scales[i] = job->group || 8 * half + i >= count ? 1 : avx2_scale(job, first + 8 * half + i, 0);
        for (int64_t t = begin; t < end; t++) {
            const __m256 scale = _mm256_mul_ps(_mm256_loadu_ps(scales), _mm256_set1_ps(job->x_scales[t]));
            avx2_put(_mm256_mul_ps(_mm256_loadu_ps(sums[t - begin] + 8 * half), scale), job->y,
                     t * job->rows + first + 8 * half, count - 8 * half, job->type);
        }
    }
}

AVX2 void gblm_quantised_many_avx2(const Quantised *job, int64_t begin, int64_t end) {
    typedef void (*Multiply)(const NarrowTile *, int64_t, int, const int16_t *, int64_t, float (*)[NARROW]);
    static const Multiply kernels[2][3] = {{multiply_avx2_1, multiply_avx2_2, multiply_avx2_4},
                                           {multiply_avx_vnni_1, multiply_avx_vnni_3, multiply_avx_vnni_6}};
    const int vnni = job->path == AVX_VNNI_PATH, most = vnni ? 6 : 4; /* tokens that have registers for their sums */
    const int64_t stride = job->words * 64;
    for (int64_t first = begin; first < end; first += NARROW)
        for (int64_t t = 0; t < job->tokens; t += AT_ONCE) {
            const int count = end - first < NARROW ? (int)(end - first) : NARROW;
            const int64_t until = t + AT_ONCE < job->tokens ? t + AT_ONCE : job->tokens;
            float sums[AT_ONCE][NARROW];
            int64_t places[NARROW] = {0};
            memset(sums, 0, sizeof sums);
            for (int64_t block = 0; block < job->words; block += DEEP) {
                NarrowTile tile;
                const int64_t last = block + DEEP < job->words ? block + DEEP : job->words;
                fill_narrow(job, first, count, block, last, places, &tile);
                for (int64_t at = t, some; at < until; at += some) {
                    const int16_t *x = (const int16_t *)job->x + at * stride + block * 64;
                    some = until - at >= most ? most : until - at >= most / 2 ? most / 2 : 1;
                    kernels[vnni][some == most ? 2 : some > 1](&tile, last - block, job->group, x, stride, sums + (at - t));
                }
            }
            put_narrow(job, first, count, t, until, sums);
        }
}
#endif
