/* Products of quantised weights by tiles of 16 or 32 rows. With many tokens a tile is spread once for 96 tokens; places that were
 * spread when they were loaded take few tokens too. First for AVX-512 with VNNI.
 *
 * Levels of the rows are turned so that four columns of 16 rows are one vector, or of 8 rows with AVX2: an instruction adds their
 * products with four inputs of a token, and sums of as many rows lie in a register. Decoding is bound by the bytes of the
 * weight, and takes inputs of 16 bits at no cost. Here arithmetic is the limit, and inputs have 8 bits with a scale for 32
 * columns, as those of ONNX Runtime and llama.cpp.
 */
#include "quantised_words.h"

/* ---- weights without a mask: levels for AVX2 and AVX-VNNI, places also for AVX-512 without VBMI2 ---- */

enum { NARROW = GBLM_NARROW_TILE /* rows */ };

/* Places of 8 rows × 32 columns, spread. Byte i of 32 is for row i / 4, column i % 4 of four columns. Its bits in pairs[p]: 0 to 3
 * are the place in the columns 8p …, 7 tells that nothing is stored there, and 4 to 6 begin the place in the columns 8p + 4 ….
 * pairs[p] as numbers of 16 bits, shifted right by 4, are that place but for bits 3 and 7, which differ where bits p and p + 4 of
 * `rest` are set. Bits 4 to 6 of an index of vpshufb say nothing. */
typedef struct {
    uint8_t pairs[4][32], rest[32];
} Spread;

/* Spread places of a tile from a word on: for each 32 columns those of rows 0 to 7, then those of rows 8 to 15. */
INLINE const Spread *spread_at(const Quantised *job, int64_t first, int64_t word) {
    return (const Spread *)job->values + (first / NARROW * job->words + word) * WORD_BLOCKS * 2;
}

int64_t gblm_spread_bytes(const Quantised *job) {
    if (!job->levels) return job->rows * job->words * 64;
    return (job->rows + NARROW - 1) / NARROW * job->words * WORD_BLOCKS * 2 * (int64_t)sizeof(Spread);
}
int64_t gblm_spread_scales(const Quantised *job) { return (job->rows + NARROW - 1) / NARROW * job->groups * NARROW; }

enum { NOTHING = 128 };

/* `places`: [four columns][byte], with NOTHING where nothing is stored. */
static void spread_places(const uint8_t places[8][32], Spread *to) {
    memset(to->rest, 0, sizeof to->rest);
    for (int p = 0; p < 4; p++) {
        const uint8_t *first = places[2 * p], *second = places[2 * p + 1];
        for (int i = 0; i < 32; i++) to->pairs[p][i] = (uint8_t)(first[i] | (second[i] & 7) << 4);
        for (int i = 0; i < 32; i++) {
            const int shifted = to->pairs[p][i] >> 4 | (i % 2 ? 0 : to->pairs[p][i + 1] << 4), differ = shifted ^ second[i];
            to->rest[i] |= (uint8_t)((differ >> 3 & 1) << p | (differ >> 7 & 1) << (p + 4));
        }
    }
}

void gblm_spread(const Quantised *job, uint8_t *to, uint16_t *scales) {
    memset(to, 0, job->levels ? 0 : (size_t)gblm_spread_bytes(job));
    for (int64_t row = 0; !job->levels && row < job->rows; row++) {
        const uint8_t *v = job->values + row_start(job, row);
        for (int64_t w = 0; w < job->words; w++, to += 64)
            for (uint64_t left = row_bits(job, row, w); left; left &= left - 1) to[__builtin_ctzll(left)] = *v++;
    }
    Spread *spread = (Spread *)to;
    for (int64_t first = 0; job->levels && first < job->rows; first += NARROW) {
        const int64_t rows = job->rows - first < NARROW ? job->rows - first : NARROW;
        const uint8_t *v[NARROW];
        for (int64_t i = 0; i < rows; i++) v[i] = job->values + row_start(job, first + i);
        for (int64_t w = 0; w < job->words; w++) {
            uint8_t places[WORD_BLOCKS][2][8][32]; /* [block][half of the rows] */
            memset(places, NOTHING, sizeof places);
            for (int64_t i = 0; i < rows; i++) {
                int at = 0;
                for (uint64_t left = row_bits(job, first + i, w); left; left &= left - 1, at++) {
                    const int c = __builtin_ctzll(left);
                    places[c / 32][i / 8][c % 32 / 4][i % 8 * 4 + c % 4] = v[i][at / 2] >> (at % 2 * 4) & 15;
                }
                v[i] += bytes_in(at, PLACES);
            }
            for (int b = 0; b < WORD_BLOCKS; b++)
                for (int half = 0; half < 2; half++) spread_places((const uint8_t(*)[32])places[b][half], spread++);
        }
        for (int64_t g = 0; g < job->groups; g++)
            for (int64_t i = 0; i < NARROW; i++)
                *scales++ = i < rows ? job->scales[(first + i) * job->groups + g] : 0;
    }
}

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

VNNI INLINE __m512i both_halves(const uint8_t *first, const uint8_t *second) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)first)),
                              _mm256_loadu_si256((const __m256i *)second), 1);
}

/* The same of spread places, of which four columns of 16 rows lie together already. */
VNNI INLINE void fill_spread(const Quantised *job, int64_t first, int count, int64_t block, int64_t last, Tile *tile) {
    const __m512i table = vnni_table(job, 0, PLACES), unsign = _mm512_set1_epi8(-128);
    const int64_t groups = job->group ? 64 * DEEP / job->group : 0, from = job->group ? 64 * block / job->group : 0;
    if (count <= 16) memset(tile, 0, sizeof *tile); /* there is no second half */
    for (int half = 0; 16 * half < count; half++) {
        const Spread *spread = spread_at(job, first + 16 * half, block);
        for (int64_t b = 0; b < WORD_BLOCKS * (last - block); b++, spread += 2) {
            const char *const next = (const char *)(spread + WORD_BLOCKS * 2 * DEEP); /* the next part of the tile */
            for (size_t at = 0; at < 2 * sizeof *spread; at += 64) _mm_prefetch(next + at, _MM_HINT_T0);
            const __m512i rest = both_halves(spread[0].rest, spread[1].rest);
            _Pragma("GCC unroll 4") for (int p = 0; p < 4; p++) {
                const __m512i pairs = both_halves(spread[0].pairs[p], spread[1].pairs[p]);
                const __m512i differ = _mm512_and_si512(_mm512_slli_epi16(rest, (unsigned)(3 - p)), _mm512_set1_epi8(-0x78));
                const __m512i second = _mm512_xor_si512(_mm512_srli_epi16(pairs, 4), differ);
                tile->levels[8 * b + 2 * p][half] = _mm512_xor_si512(_mm512_shuffle_epi8(table, pairs), unsign);
                tile->levels[8 * b + 2 * p + 1][half] = _mm512_xor_si512(_mm512_shuffle_epi8(table, second), unsign);
            }
        }
        const uint16_t *scales = job->scales + (first + 16 * half) * job->groups + from * NARROW;
        for (int64_t g = 0; g < groups; g++)
            tile->scales[g][half] = from + g < job->groups
                                        ? _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(scales + g * NARROW)))
                                        : _mm512_setzero_ps();
    }
}

/* A number of the t-th token from x on, in a part of its block. */
INLINE int32_t number_of(const uint8_t *x, int part, int width, int t) {
    int32_t number;
    memcpy(&number, x + part * width + 4 * t, 4);
    return number;
}
INLINE float scale_of(const uint8_t *x, int width, int t) {
    float scale;
    memcpy(&scale, x + BLOCK_SCALES * width + 4 * t, 4);
    return scale;
}

/* sums += the products of a tile's first blocks and `tokens` tokens of x, in blocks of `width`. A scale is for
 * `group` blocks; 0: none. */
VNNI INLINE void multiply(const Tile *tile, int64_t blocks, int64_t group, const uint8_t *x, float (*sums)[TILE], const int tokens,
                          const int width, const int grouped) {
    __m512 totals[WIDE][2];
    for (int t = 0; t < tokens; t++)
        for (int half = 0; half < 2; half++) totals[t][half] = _mm512_load_ps(sums[t] + 16 * half);
    for (int64_t b = 0; b < blocks; b++, x += BLOCK_BYTES * width) {
        __m512i products[WIDE][2];
        _Pragma("GCC unroll 6") for (int t = 0; t < tokens; t++)
            products[t][0] = products[t][1] = _mm512_set1_epi32(number_of(x, BLOCK_OFFSETS, width, t));
        for (int c = 0; c < 8; c++) {
            const __m512i first = tile->levels[8 * b + c][0], second = tile->levels[8 * b + c][1];
            _Pragma("GCC unroll 6") for (int t = 0; t < tokens; t++) {
                const __m512i inputs = _mm512_set1_epi32(number_of(x, 4 * c, width, t));
                products[t][0] = added(products[t][0], first, inputs);
                products[t][1] = added(products[t][1], second, inputs);
            }
        }
        const __m512 *scales = tile->scales[grouped ? b / group : 0];
        _Pragma("GCC unroll 6") for (int t = 0; t < tokens; t++)
            for (int half = 0; half < 2; half++) {
                const __m512 step = _mm512_set1_ps(scale_of(x, width, t)),
                             scale = grouped ? _mm512_mul_ps(step, scales[half]) : step;
                totals[t][half] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products[t][half]), scale, totals[t][half]);
            }
    }
    for (int t = 0; t < tokens; t++)
        for (int half = 0; half < 2; half++) _mm512_store_ps(sums[t] + 16 * half, totals[t][half]);
}

typedef void (*Multiply)(const Tile *, int64_t blocks, int64_t group, const uint8_t *x, float (*sums)[TILE]);
#define TOKENS_AT_ONCE(COUNT)                                                                                               \
    VNNI static void multiply_##COUNT(const Tile *tile, int64_t blocks, int64_t group, const uint8_t *x, float (*sums)[TILE]) { \
        const int width = COUNT == 1 ? 1 : BLOCK_TOKENS;                                                                        \
        if (group) multiply(tile, blocks, group, x, sums, COUNT, width, 1);                                                     \
        else multiply(tile, blocks, 1, x, sums, COUNT, width, 0);                                                               \
    }
TOKENS_AT_ONCE(1) TOKENS_AT_ONCE(2) TOKENS_AT_ONCE(4) TOKENS_AT_ONCE(6)

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
    static const Multiply kernels[] = {multiply_1, multiply_2, multiply_4, multiply_6};
    const int64_t group = job->group / BLOCK_COLUMNS;
    for (int64_t first = begin; first < end; first += TILE)
        for (int64_t t = 0; t < job->tokens; t += AT_ONCE) {
            const int count = end - first < TILE ? (int)(end - first) : TILE;
            const int64_t until = t + AT_ONCE < job->tokens ? t + AT_ONCE : job->tokens;
            float sums[AT_ONCE][TILE] __attribute__((aligned(64)));
            memset(sums, 0, job->tokens <= FEW_TOKENS ? FEW_TOKENS * sizeof *sums : sizeof sums);
            const uint8_t *v[TILE];
            for (int i = 0; kind != SPREAD && i < count; i++) v[i] = job->values + row_start(job, first + i);
            for (int64_t block = 0; block < job->words; block += DEEP) {
                Tile tile;
                const int64_t last = block + DEEP < job->words ? block + DEEP : job->words;
                if (kind == SPREAD) fill_spread(job, first, count, block, last, &tile);
                else fill(job, first, count, block, last, v, &tile, kind, vbmi2);
                for (int64_t at = t; at < until; at += WIDE) {
                    const int64_t left = until - at < WIDE ? until - at : WIDE;
                    kernels[job->tokens == 1 ? 0 : (left + 1) / 2](&tile, (last - block) * WORD_BLOCKS, group,
                                                                   block_of(job, at, block), sums + (at - t));
                }
            }
            put_tile(job, first, count, t, until, sums);
        }
}

VNNI void gblm_quantised_many(const Quantised *job, int64_t begin, int64_t end) {
    const int kind = kind_of(job), vbmi2 = job->path == AVX512_PATH;
    if (kind == DENSE) tiles(job, begin, end, DENSE, 0);
    else if (kind == SPREAD) tiles(job, begin, end, SPREAD, 0);
    else if (kind == PLACES && vbmi2) tiles(job, begin, end, PLACES, 1);
    else if (kind == PLACES) tiles(job, begin, end, PLACES, 0);
    else if (vbmi2) tiles(job, begin, end, LEVELS, 1);
    else tiles(job, begin, end, LEVELS, 0);
}

/* ---- AVX2 and AVX-VNNI: sums of 8 rows lie in a register ---- */

/* Part of 16 rows: of each 4 columns those of rows 0 to 7, then those of rows 8 to 15, for AVX-VNNI as level + 128; and scales of
 * groups. With few tokens levels are read from spread places instead. */
typedef struct {
    __m256i levels[DEEP * 16][2];
    float scales[MOST_GROUPS][NARROW] __attribute__((aligned(32)));
    const Spread *spread;
    const int8_t *table;
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

/* The levels of 8 columns from 8p on, by fours. */
AVX2 INLINE void spread_levels(const Spread *from, __m256i table, __m256i unsign, const int p, __m256i levels[2]) {
    const __m256i pairs = _mm256_loadu_si256((const __m256i *)from->pairs[p]);
    const __m256i rest = _mm256_slli_epi16(_mm256_loadu_si256((const __m256i *)from->rest), 3 - p);
    const __m256i second = _mm256_xor_si256(_mm256_srli_epi16(pairs, 4), _mm256_and_si256(rest, _mm256_set1_epi8(-0x78)));
    levels[0] = _mm256_xor_si256(_mm256_shuffle_epi8(table, pairs), unsign);
    levels[1] = _mm256_xor_si256(_mm256_shuffle_epi8(table, second), unsign);
}

AVX2 INLINE __m256i spread_table(const int8_t *levels) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)levels));
}

/* Scales of words [block, block + DEEP) of `count` rows from `first` on. */
AVX2 static void fill_scales(const Quantised *job, int64_t first, int count, int64_t block, NarrowTile *tile) {
    const int64_t from = job->group ? 64 * block / job->group : 0;
    for (int64_t g = 0; job->group && g < 64 * DEEP / job->group; g++)
        for (int i = 0; i < NARROW; i += 8)
            if (kind_of(job) == SPREAD && from + g < job->groups) {
                const uint16_t *scales = job->scales + (first * job->groups + (from + g) * NARROW + i);
                _mm256_store_ps(tile->scales[g] + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)scales)));
            } else
                for (int row = i; row < i + 8; row++)
                    tile->scales[g][row] = row < count && kind_of(job) != SPREAD ? avx2_scale(job, first + row, from + g) : 0;
}

/* Words [block, last) of `count` rows from `first` on, which `at` moves past. */
AVX2 static void fill_narrow(const Quantised *job, int64_t first, int count, int64_t block, int64_t last, int64_t *at,
                             NarrowTile *tile) {
    const __m256i unsign = _mm256_set1_epi8(job->path == AVX_VNNI_PATH ? -128 : 0);
    if (kind_of(job) == SPREAD) {
        const Spread *spread = spread_at(job, first, block);
        const __m256i table = spread_table(job->levels);
        for (int64_t b = 0; b < WORD_BLOCKS * (last - block); b++)
            for (int half = 0; half < 2; half++, spread++)
                _Pragma("GCC unroll 4") for (int p = 0; p < 4; p++) {
                    __m256i levels[2];
                    spread_levels(spread, table, unsign, p, levels);
                    for (int i = 0; i < 2; i++) tile->levels[8 * b + 2 * p + i][half] = levels[i];
                }
        return;
    }
    int8_t rows[NARROW][DEEP * 64] __attribute__((aligned(32)));
    for (int i = 0; i < NARROW; i++)
        if (i < count) gblm_avx2_levels(job, first + i, block, last, at + i, rows[i]);
        else memset(rows[i], 0, sizeof rows[i]);
    for (int half = 0; half < 2; half++)
        for (int64_t c = 0; c < 64 * (last - block); c += 16)
            turn_narrow((const int8_t(*)[DEEP * 64])(rows[8 * half] + c), tile->levels + c / 4, half, unsign);
}

/* sums + the products of four bytes each. Both instructions take one side unsigned. With AVX-VNNI, which `vnni` says, the levels
 * are larger by 128, and the sums began with what that adds. Else x takes the sign of the levels; no pair exceeds 16 bits. */
AVX2 INLINE __m256i avx2_added(__m256i sums, __m256i levels, __m256i x, const int vnni) {
    if (vnni) return avx_vnni_added(sums, levels, x);
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(levels), _mm256_sign_epi8(x, levels));
    __asm__("vpaddd %1, %0, %0" : "+x"(sums) : "x"(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))); /* lest GCC copy the sums */
    return sums;
}

/* As `multiply`; x is in blocks of `width` tokens, `few` says where levels are. */
AVX2 INLINE void multiply_narrow(const NarrowTile *tile, int64_t blocks, int64_t group, const uint8_t *x, float (*sums)[NARROW],
                                 const int tokens, const int width, const int few, const int vnni) {
    const __m256i unsign = _mm256_set1_epi8(vnni ? -128 : 0);
    const __m256i table = few ? spread_table(tile->table) : unsign;
    const Spread *spread = tile->spread;
    const int shift = group ? __builtin_ctzll((uint64_t)group) : 63;
    for (int64_t b = 0; b < blocks; b++, x += BLOCK_BYTES * width, spread += 2) {
        __m256i products[6][2];
        _Pragma("GCC unroll 6") for (int t = 0; t < tokens; t++)
            products[t][0] = products[t][1] =
                vnni ? _mm256_set1_epi32(number_of(x, BLOCK_OFFSETS, width, t)) : _mm256_setzero_si256();
        _Pragma("GCC unroll 4") for (int p = 0; p < 4; p++) {
            __m256i levels[2][2]; /* [half][four columns] */
            for (int half = 0; half < 2; half++)
                if (few) spread_levels(spread + half, table, unsign, p, levels[half]);
                else for (int i = 0; i < 2; i++) levels[half][i] = tile->levels[8 * b + 2 * p + i][half];
            for (int i = 0; i < 2; i++)
                _Pragma("GCC unroll 6") for (int t = 0; t < tokens; t++) {
                    const __m256i inputs = _mm256_set1_epi32(number_of(x, 8 * p + 4 * i, width, t));
                    for (int half = 0; half < 2; half++)
                        products[t][half] = avx2_added(products[t][half], levels[half][i], inputs, vnni);
                }
        }
        const float *scales = tile->scales[b >> shift];
        __asm__("" ::: "memory");
        _Pragma("GCC unroll 6") for (int t = 0; t < tokens; t++)
            for (int half = 0; half < 2; half++) {
                const __m256 step = _mm256_set1_ps(scale_of(x, width, t)),
                             scale = group ? _mm256_mul_ps(step, _mm256_load_ps(scales + 8 * half)) : step;
                _mm256_storeu_ps(sums[t] + 8 * half, _mm256_fmadd_ps(_mm256_cvtepi32_ps(products[t][half]), scale,
                                                                     _mm256_loadu_ps(sums[t] + 8 * half)));
            }
    }
}

#define NARROW_KERNEL(NAME, ATTRIBUTE, TOKENS, WIDTH, FEW, VNNI_TOO)                                                             \
    ATTRIBUTE static void NAME##_##TOKENS(const NarrowTile *tile, int64_t blocks, int64_t group, const uint8_t *x,         \
                                          float (*sums)[NARROW]) {                                                         \
        multiply_narrow(tile, blocks, group, x, sums, TOKENS, WIDTH, FEW, VNNI_TOO);                                       \
    }
#define NARROW_KERNELS(NAME, ATTRIBUTE, MOST, VNNI_TOO)                                                                        \
    NARROW_KERNEL(many_##NAME, ATTRIBUTE, MOST, BLOCK_TOKENS, 0, VNNI_TOO)                                                     \
    NARROW_KERNEL(many_##NAME, ATTRIBUTE, 2, BLOCK_TOKENS, 0, VNNI_TOO)                                                        \
    NARROW_KERNEL(few_##NAME, ATTRIBUTE, 4, BLOCK_TOKENS, 1, VNNI_TOO)                                                         \
    NARROW_KERNEL(few_##NAME, ATTRIBUTE, 2, BLOCK_TOKENS, 1, VNNI_TOO)                                                         \
    NARROW_KERNEL(few_##NAME, ATTRIBUTE, 1, 1, 1, VNNI_TOO)
NARROW_KERNELS(avx2, AVX2, 4, 0)
#if HAS_AVX_VNNI
NARROW_KERNELS(avx_vnni, AVX_VNNI, 6, 1)
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
    typedef void (*Multiply)(const NarrowTile *, int64_t, int64_t, const uint8_t *, float (*)[NARROW]);
    static const Multiply kernels[1 + HAS_AVX_VNNI][2][3] = { /* of 1, 2 and more tokens */
        {{NULL, many_avx2_2, many_avx2_4}, {few_avx2_1, few_avx2_2, few_avx2_4}},
#if HAS_AVX_VNNI
        {{NULL, many_avx_vnni_2, many_avx_vnni_6}, {few_avx_vnni_1, few_avx_vnni_2, few_avx_vnni_4}},
#endif
    };
    const int vnni = job->path == AVX_VNNI_PATH, few = job->tokens <= FEW_TOKENS; /* few: the weight is spread */
    const int most = vnni && !few ? 6 : 4;                                        /* tokens that have registers for their sums */
    const int64_t group = job->group / BLOCK_COLUMNS;
    for (int64_t first = begin; first < end; first += NARROW)
        for (int64_t t = 0; t < job->tokens; t += AT_ONCE) {
            const int count = end - first < NARROW ? (int)(end - first) : NARROW;
            const int64_t until = t + AT_ONCE < job->tokens ? t + AT_ONCE : job->tokens;
            float sums[AT_ONCE][NARROW];
            int64_t places[NARROW] = {0};
            memset(sums, 0, few ? FEW_TOKENS * sizeof *sums : sizeof sums);
            for (int64_t block = 0; block < job->words; block += DEEP) {
                NarrowTile tile;
                const int64_t last = block + DEEP < job->words ? block + DEEP : job->words;
                tile.spread = few ? spread_at(job, first, block) : NULL, tile.table = job->levels;
                if (!few) fill_narrow(job, first, count, block, last, places, &tile);
                fill_scales(job, first, count, block, &tile);
                for (int64_t at = t, some; at < until; at += some) {
                    some = job->tokens == 1 ? 1 : until - at > 2 ? most : 2;
                    kernels[vnni][few][some > 2 ? 2 : some - 1](&tile, (last - block) * WORD_BLOCKS, group,
                                                                block_of(job, at, block), sums + (at - t));
                }
            }
            put_narrow(job, first, count, t, until, sums);
        }
}
#endif
