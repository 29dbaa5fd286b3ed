/* Products of quantised weights with many tokens: 16 or 32 rows are spread once for 96 tokens. First for AVX-512 with VNNI.
 *
 * Levels of the rows are turned so that four columns of 16 rows are one vector, or of 8 rows with AVX2: an instruction adds their
 * products with four inputs of a token, and sums of as many rows lie in a register. Decoding is bound by the bytes of the
 * weight, and takes inputs of 16 bits at no cost. Here arithmetic is the limit, and inputs have 8 bits with a scale for 32
 * columns, as those of ONNX Runtime and llama.cpp.
 */
#include "quantised_words.h"

#if defined(__x86_64__)

int8_t gblm_to_places[8][64] __attribute__((aligned(64)));

__attribute__((constructor)) static void fill_to_places(void) {
    for (int odd = 0; odd < 8; odd++)
        for (int c = 0; c < 64; c++) gblm_to_places[odd][c] = (int8_t)((2 * odd >> c / 16 & 1) - 1);
}

enum { TILE = GBLM_TILE, AT_ONCE = 96 /* tokens */, DEEP = 8 /* words that are spread */, MOST_GROUPS = DEEP * 2 };
enum { WIDE = 6 /* tokens whose sums have registers */ };

/* Part of 32 rows: of each 4 columns those of rows 0 to 15, then those of rows 16 to 31, as level + 128; and scales of groups. */
typedef struct {
    __m512i levels[DEEP * 16][2];
    __m512 scales[MOST_GROUPS][2];
} Tile;

INLINE const Block *blocks_at(const Quantised *job, int64_t token, int64_t word) {
    return (const Block *)job->x + (token / BLOCK_TOKENS * job->words + word) * WORD_BLOCKS;
}

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
    const __m512i unsign = _mm512_set1_epi8(-128);
    for (int j = 0; j < 4; j++)
        for (int odd = 0; odd < 2; odd++) {
            const __m512i a = lanes[4 * odd + j], b = lanes[8 + 4 * odd + j];
            columns[4 * odd + j][half] = _mm512_xor_si512(_mm512_shuffle_i32x4(a, b, 0x88), unsign);
            columns[8 + 4 * odd + j][half] = _mm512_xor_si512(_mm512_shuffle_i32x4(a, b, 0xdd), unsign);
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

/* sums += the products of a tile's first blocks and `tokens` tokens of x from `token` on. A scale is for `group` blocks; 0: none. */
VNNI INLINE void multiply(const Tile *tile, int64_t blocks, int64_t group, const Block *x, int token, float (*sums)[TILE],
                          const int tokens, const int grouped) {
    __m512 totals[WIDE][2];
    for (int t = 0; t < tokens; t++)
        for (int half = 0; half < 2; half++) totals[t][half] = _mm512_load_ps(sums[t] + 16 * half);
    for (int64_t b = 0; b < blocks; b++, x++) {
        __m512i products[WIDE][2];
        _Pragma("GCC unroll 6") for (int t = 0; t < tokens; t++)
            products[t][0] = products[t][1] = _mm512_set1_epi32(x->offsets[token + t]);
        for (int64_t c = 0; c < 8; c++) {
            const __m512i first = tile->levels[8 * b + c][0], second = tile->levels[8 * b + c][1];
            _Pragma("GCC unroll 6") for (int t = 0; t < tokens; t++) {
                int32_t four;
                memcpy(&four, x->levels[c][token + t], 4);
                const __m512i inputs = _mm512_set1_epi32(four);
                products[t][0] = added(products[t][0], first, inputs);
                products[t][1] = added(products[t][1], second, inputs);
            }
        }
        const __m512 *scales = tile->scales[grouped ? b / group : 0];
        _Pragma("GCC unroll 6") for (int t = 0; t < tokens; t++)
            for (int half = 0; half < 2; half++) {
                const __m512 step = _mm512_set1_ps(x->scales[token + t]),
                             scale = grouped ? _mm512_mul_ps(step, scales[half]) : step;
                totals[t][half] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products[t][half]), scale, totals[t][half]);
            }
    }
    for (int t = 0; t < tokens; t++)
        for (int half = 0; half < 2; half++) _mm512_store_ps(sums[t] + 16 * half, totals[t][half]);
}

typedef void (*Multiply)(const Tile *, int64_t blocks, int64_t group, const Block *, int token, float (*sums)[TILE]);
#define TOKENS_AT_ONCE(COUNT)                                                                                               \
    VNNI static void multiply_##COUNT(const Tile *tile, int64_t blocks, int64_t group, const Block *x, int token,           \
                                      float (*sums)[TILE]) {                                                               \
        if (group) multiply(tile, blocks, group, x, token, sums, COUNT, 1);                                                \
        else multiply(tile, blocks, 1, x, token, sums, COUNT, 0);                                                          \
    }
TOKENS_AT_ONCE(2) TOKENS_AT_ONCE(4) TOKENS_AT_ONCE(6)

/* What the sums of `count` rows are as outputs of tokens [begin, end). */
VNNI static void put_tile(const Quantised *job, int64_t first, int count, int64_t begin, int64_t end, float (*sums)[TILE]) {
    for (int half = 0; half < 2; half++) {
        const int64_t row = first + 16 * half, left = count - 16 * half;
        const __mmask16 there = (__mmask16)(left >= 16 ? 0xffff : left > 0 ? (1 << left) - 1 : 0);
        const __m512 scale =
            job->group ? _mm512_set1_ps(1) : _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, job->scales + row));
        for (int64_t t = begin; t < end; t++) {
            const __m512 total = _mm512_mul_ps(_mm512_load_ps(sums[t - begin] + 16 * half), scale);
            const int64_t at = t * job->rows + row;
            if (job->type == F32) _mm512_mask_storeu_ps((float *)job->y + at, there, total);
            else _mm256_mask_storeu_epi16((uint16_t *)job->y + at, there, halves(total, job->type));
        }
    }
}

VNNI INLINE void tiles(const Quantised *job, int64_t begin, int64_t end, const int kind, const int vbmi2) {
    static const Multiply kernels[] = {multiply_2, multiply_4, multiply_6};
    const int64_t group = job->group / BLOCK_COLUMNS;
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
                for (int64_t at = t; at < until; at += WIDE) {
                    const int64_t left = until - at < WIDE ? until - at : WIDE;
                    kernels[(left - 1) / 2](&tile, (last - block) * WORD_BLOCKS, group, blocks_at(job, at, block),
                                            (int)(at % BLOCK_TOKENS), sums + (at - t));
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

/* ---- AVX2 and AVX-VNNI: sums of 8 rows lie in a register ---- */

enum { NARROW = 16 /* rows */ };

/* Part of 16 rows: of each 4 columns those of rows 0 to 7, then those of rows 8 to 15; for AVX-VNNI as level + 128. */
typedef struct {
    __m256i levels[DEEP * 16][2];
    float scales[MOST_GROUPS][NARROW] __attribute__((aligned(32)));
} NarrowTile;

/* 8 rows of 16 levels, four columns of all rows together. */
AVX2 INLINE void turn_narrow(const int8_t (*rows)[DEEP * 64], __m256i (*columns)[2], const int half, __m256i unsign) {
    __m256i a[4], b[4];
    for (int i = 0; i < 4; i++)
        a[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_load_si128((const __m128i *)rows[i])),
                                       _mm_load_si128((const __m128i *)rows[4 + i]), 1);
    for (int i = 0; i < 4; i += 2) {
        b[i] = _mm256_xor_si256(_mm256_unpacklo_epi32(a[i], a[i + 1]), unsign);
        b[i + 1] = _mm256_xor_si256(_mm256_unpackhi_epi32(a[i], a[i + 1]), unsign);
    }
    for (int i = 0; i < 2; i++) {
        columns[2 * i][half] = _mm256_unpacklo_epi64(b[i], b[2 + i]);
        columns[2 * i + 1][half] = _mm256_unpackhi_epi64(b[i], b[2 + i]);
    }
}

/* Words [block, last) of `count` rows from `first` on, which `at` moves past. */
AVX2 static void fill_narrow(const Quantised *job, int64_t first, int count, int64_t block, int64_t last, int64_t *at,
                             NarrowTile *tile) {
    int8_t rows[NARROW][DEEP * 64] __attribute__((aligned(32)));
    for (int i = 0; i < NARROW; i++)
        if (i < count) gblm_avx2_levels(job, first + i, block, last, at + i, rows[i]);
        else memset(rows[i], 0, sizeof rows[i]);
    const __m256i unsign = _mm256_set1_epi8(job->path == AVX_VNNI_PATH ? -128 : 0);
    for (int half = 0; half < 2; half++)
        for (int64_t c = 0; c < 64 * (last - block); c += 16)
            turn_narrow((const int8_t(*)[DEEP * 64])(rows[8 * half] + c), tile->levels + c / 4, half, unsign);
    for (int64_t g = 0; job->group && g < 64 * DEEP / job->group; g++)
        for (int i = 0; i < NARROW; i++)
            tile->scales[g][i] = i < count ? avx2_scale(job, first + i, 64 * block / job->group + g) : 0;
}

/* sums + the products of four bytes each. Both instructions take one side unsigned. With AVX-VNNI, which `vnni` says, the levels
 * are larger by 128, and the sums began with what that adds. Else x takes the sign of the levels; no pair exceeds 16 bits. */
AVX2 INLINE __m256i avx2_added(__m256i sums, __m256i levels, __m256i x, const int vnni) {
    if (vnni) return avx_vnni_added(sums, levels, x);
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(levels), _mm256_sign_epi8(x, levels));
    __asm__("vpaddd %1, %0, %0" : "+x"(sums) : "x"(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))); /* lest GCC copy the sums */
    return sums;
}

/* As `multiply`. */
AVX2 INLINE void multiply_narrow(const NarrowTile *tile, int64_t blocks, int64_t group, const Block *x, int token,
                                 float (*sums)[NARROW], const int tokens, const int vnni) {
    for (int64_t b = 0; b < blocks; b++, x++) {
        __m256i products[6][2];
        _Pragma("GCC unroll 6") for (int t = 0; t < tokens; t++)
            products[t][0] = products[t][1] = vnni ? _mm256_set1_epi32(x->offsets[token + t]) : _mm256_setzero_si256();
        for (int64_t c = 0; c < 8; c++) {
            const __m256i first = tile->levels[8 * b + c][0], second = tile->levels[8 * b + c][1];
            _Pragma("GCC unroll 6") for (int t = 0; t < tokens; t++) {
                int32_t four;
                memcpy(&four, x->levels[c][token + t], 4);
                const __m256i inputs = _mm256_set1_epi32(four);
                products[t][0] = avx2_added(products[t][0], first, inputs, vnni);
                products[t][1] = avx2_added(products[t][1], second, inputs, vnni);
            }
        }
        const float *scales = tile->scales[group ? b / group : 0];
        __asm__("" ::: "memory");
        _Pragma("GCC unroll 6") for (int t = 0; t < tokens; t++)
            for (int half = 0; half < 2; half++) {
                const __m256 step = _mm256_set1_ps(x->scales[token + t]),
                             scale = group ? _mm256_mul_ps(step, _mm256_load_ps(scales + 8 * half)) : step;
                _mm256_storeu_ps(sums[t] + 8 * half, _mm256_fmadd_ps(_mm256_cvtepi32_ps(products[t][half]), scale,
                                                                     _mm256_loadu_ps(sums[t] + 8 * half)));
            }
    }
}

#define NARROW_KERNEL(NAME, ATTRIBUTE, VNNI_TOO, TOKENS)                                                                    \
    ATTRIBUTE static void NAME##_##TOKENS(const NarrowTile *tile, int64_t blocks, int64_t group, const Block *x, int token, \
                                          float (*sums)[NARROW]) {                                                         \
        multiply_narrow(tile, blocks, group, x, token, sums, TOKENS, VNNI_TOO);                                            \
    }
NARROW_KERNEL(multiply_avx2, AVX2, 0, 4)
NARROW_KERNEL(multiply_avx2, AVX2, 0, 2)
#if HAS_AVX_VNNI
NARROW_KERNEL(multiply_avx_vnni, AVX_VNNI, 1, 6)
NARROW_KERNEL(multiply_avx_vnni, AVX_VNNI, 1, 2)
#endif

/* What the sums of up to 16 rows are as outputs of tokens [begin, end). */
AVX2 static void put_narrow(const Quantised *job, int64_t first, int count, int64_t begin, int64_t end, float (*sums)[NARROW]) {
    for (int half = 0; 8 * half < count; half++) {
        float scales[8];
        for (int i = 0; i < 8; i++)
            scales[i] = job->group || 8 * half + i >= count ? 1 : avx2_scale(job, first + 8 * half + i, 0);
        for (int64_t t = begin; t < end; t++)
            avx2_put(_mm256_mul_ps(_mm256_loadu_ps(sums[t - begin] + 8 * half), _mm256_loadu_ps(scales)), job->y,
                     t * job->rows + first + 8 * half, count - 8 * half, job->type);
    }
}

AVX2 void gblm_quantised_many_avx2(const Quantised *job, int64_t begin, int64_t end) {
    typedef void (*Multiply)(const NarrowTile *, int64_t, int64_t, const Block *, int, float (*)[NARROW]);
    static const Multiply kernels[1 + HAS_AVX_VNNI][2] = {
        {multiply_avx2_2, multiply_avx2_4},
#if HAS_AVX_VNNI
        {multiply_avx_vnni_2, multiply_avx_vnni_6},
#endif
    };
    const int vnni = job->path == AVX_VNNI_PATH, most = vnni ? 6 : 4; /* tokens that have registers for their sums */
    const int64_t group = job->group / BLOCK_COLUMNS;
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
                    some = until - at > 2 ? most : 2;
                    kernels[vnni][some > 2](&tile, (last - block) * WORD_BLOCKS, group, blocks_at(job, at, block),
                                            (int)(at % BLOCK_TOKENS), sums + (at - t));
                }
            }
            put_narrow(job, first, count, t, until, sums);
        }
}
#endif
