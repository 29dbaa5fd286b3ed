/* Products of quantised weights with many tokens, on AVX-512 with VNNI: 32 rows are spread once for 96 tokens.
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
                const uint64_t bits = kind == DENSE ? 0 : vnni_bits(job, row, w);
                _mm_prefetch((const char *)v[16 * half + i] + ahead, _MM_HINT_T1);
                if (kind != DENSE && w == block && job->mask)
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
#endif
