/* Kernels of the bitmask layout for many tokens: prompts and large batches. See job.h.
 *
 * x is first packed, for the whole call, into panels of up to PANEL tokens in which the tokens of one column lie side by
 * side: [columns][tokens]. Then
 *
 * fp32 x (AVX-512, AVX2, NEON): a vector holds one column of many tokens, and every stored weight is one multiply-add to it.
 * Zeros cost nothing, so that half the weights are half the arithmetic of a dense product. A mask word selects 64 columns,
 * whose part of the panel stays in the L1 cache while a block of rows passes over it. For up to 48 tokens, the columns of
 * several words are listed first. For a dense weight, the sums of some rows and tokens stay in registers while the columns
 * pass.
 *
 * bf16 (AMX, AVX-512): instructions that multiply several columns at once cannot leave out single zeros; a strip of 32 rows is
 * expanded in the L1 cache and multiplied from there, so that the dense weight never exists in memory. AMX multiplies tiles
 * of 16 rows × 32 columns, AVX-512 pairs of columns.
 */
#include "many_tokens.h"

#if defined(__x86_64__) || defined(__aarch64__)

enum {
    PANEL = 128, /* tokens at most, as many as the sums of a row have registers for */
    NARROW_PANEL = 96,
    ROWS = 128, /* that pass over a panel together */
    TILE = 128, /* columns of a panel that stay in the L1 cache while dense rows pass */
    VISIT = 12, /* words of a row that are listed together, if a panel has 16 tokens; their columns fit in 48 KiB */
    STRIP = 32,
    STRIP_WORDS = 8,
    PANELS = 4 /* that share an expansion */
};

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t rounded(int64_t tokens) { return (tokens + 15) / 16 * 16; }

/* Columns of a panel, in units of 4 bytes: one fp32 x, or a pair of bf16. */
static int64_t units(int64_t words, int type) { return words * (gblm_x32(type) ? 64 : 32); }

EXPORT int64_t gblm_panel_bytes(int64_t words, int64_t tokens, int type) {
    return units(words, type) * 4 * rounded(tokens);
}

EXPORT int gblm_has_many(int type, int path) {
    return path >= AVX512_PATH ? type != F16 : (path == AVX2_PATH || path == NEON_PATH) && gblm_x32(type);
}

/* ---- x into panels ---- */

typedef struct {
    const Job *jobs;
    int count, parts;
    int64_t panel; /* tokens of a full one */
} Work;

/* Panel `first`, which holds tokens first … first + width - 1; the last ones may be padding. */
static float *panel_at(const Work *work, int64_t first, int64_t *width) {
    const Job *job = work->jobs;
    *width = least(work->panel, rounded(job->tokens - first));
    return (float *)job->panels + first * units(job->words, job->type);
}

#define PACK_PART(WIDE, ATTRIBUTE, VECTOR, LANES, P)                                                                  \
    ATTRIBUTE static void pack_part_##WIDE(void *argument, int index) {                                               \
        const Work *work = argument;                                                                                  \
        const Job *job = work->jobs;                                                                                  \
        const int64_t columns = units(job->words, job->type);                                                         \
        int64_t begin, end, width;                                                                                    \
        gblm_share(columns / LANES, work->parts, index, &begin, &end);                                                \
        for (int64_t first = 0; first < job->tokens; first += work->panel) {                                          \
            float *panel = panel_at(work, first, &width);                                                             \
            for (int64_t column = begin * LANES; column < end * LANES; column += LANES)                               \
                for (int64_t t = 0; t < width; t += LANES) {                                                          \
                    VECTOR block[LANES];                                                                              \
                    for (int i = 0; i < LANES; i++) {                                                                 \
                        const int64_t token = first + t + i;                                                          \
                        block[i] = token < job->tokens ? P(loadu_ps)((const float *)job->x + token * columns + column)\
                                                       : P(setzero_ps)();                                             \
                    }                                                                                                 \
                    transpose_##WIDE(block);                                                                          \
                    for (int i = 0; i < LANES; i++) P(storeu_ps)(panel + (column + i) * width + t, block[i]);         \
                }                                                                                                     \
        }                                                                                                             \
    }

/* ---- sums back into y ---- */

/* Sums [rows][width] of `rows` rows from `row` on and the tokens from `first` on; rows up to a multiple of 16 are readable. */
#define STORE(WIDE, ATTRIBUTE, VECTOR, LANES, P)                                                                      \
    ATTRIBUTE static void store_##WIDE(const Job *job, const float *sums, int64_t width, int64_t row, int64_t rows,   \
                                       int64_t first) {                                                               \
        const int64_t tokens = least(width, job->tokens - first);                                                     \
        for (int64_t t = 0; t < tokens; t += LANES)                                                                   \
            for (int64_t r = 0; r < rows; r += LANES) {                                                               \
                VECTOR block[LANES];                                                                                  \
                for (int i = 0; i < LANES; i++) block[i] = P(loadu_ps)(sums + (r + i) * width + t);                   \
                transpose_##WIDE(block);                                                                              \
                for (int i = 0; i < LANES && t + i < tokens; i++) {                                                   \
                    float *y = (float *)job->y + (first + t + i) * job->rows + row + r;                               \
                    if (rows - r >= LANES) P(storeu_ps)(y, block[i]);                                                 \
                    else memcpy(y, block + i, (size_t)(rows - r) * sizeof *y);                                        \
                }                                                                                                     \
            }                                                                                                         \
    }

/* ---- fp32 x: one multiply-add of a vector of tokens for each stored weight ---- */

/* The sums of row i in registers: SETS sets of N vectors. Where N is small, several weights are taken at a time, each with a
 * set of its own: a sum that waits for its predecessor would wait longer than the arithmetic takes. */
#define LOAD_SUMS(P, VECTOR)                                                                                          \
    VECTOR set[SETS][N];                                                                                              \
    for (int j = 0; j < N; j++) {                                                                                     \
        set[0][j] = w ? P(loadu_ps)(sums + i * WIDTH + j * (WIDTH / N)) : P(setzero_ps)();                            \
        for (int s = 1; s < SETS; s++) set[s][j] = P(setzero_ps)();                                                   \
    }
#define MULTIPLY(P, VECTOR, SET, WEIGHT, X)                                                                           \
    {                                                                                                                 \
        const float *x = X;                                                                                           \
        const VECTOR weight = WEIGHT;                                                                                 \
        for (int j = 0; j < N; j++) set[SET][j] = P(fmadd_ps)(weight, P(loadu_ps)(x + j * (WIDTH / N)), set[SET][j]); \
    }
#define STORE_SUMS(P)                                                                                                 \
    for (int j = 0; j < N; j++) {                                                                                     \
        for (int s = 1; s < SETS; s++) set[0][j] = P(add_ps)(set[0][j], set[s][j]);                                   \
        P(storeu_ps)(sums + i * WIDTH + j * (WIDTH / N), set[0][j]);                                                  \
    }

/* A panel of VECTORS vectors of tokens. Memory is not waited for: a word's values are fetched while the word before is
 * multiplied, and those of the first word some rows ahead. */
#define SPARSE_PANEL(NAME, ATTRIBUTE, VECTOR, LANES, P, TYPE, WEIGHT, VECTORS)                                        \
    ATTRIBUTE static void NAME##_##VECTORS(const Job *job, const float *panel, float *sums, int64_t row, int rows) {  \
        enum { N = VECTORS, WIDTH = N * LANES, SETS = N > 4 ? 1 : 8 / N, AHEAD = 8 };                                 \
        const TYPE *values[ROWS + AHEAD];                                                                             \
        for (int i = 0; i < rows + AHEAD; i++)                                                                        \
            values[i] = (const TYPE *)job->values + gblm_start(job, row + (i < rows ? i : rows - 1));                 \
        for (int64_t w = 0; w < job->words; w++, panel += 64 * WIDTH)                                                 \
            for (int i = 0; i < rows; i++) {                                                                          \
                uint64_t mask = gblm_bits(job, row + i, w);                                                           \
                const TYPE *v = values[i], *next = v + __builtin_popcountll(mask), *first = values[i + AHEAD];        \
                LOAD_SUMS(P, VECTOR)                                                                                  \
                __builtin_prefetch(next + 16);                                                                        \
                __builtin_prefetch(next + 32);                                                                        \
                for (int line = 0; w == 0 && line < 3; line++)                                                        \
                    __builtin_prefetch(first + 16 * line);                                                            \
                while (v + SETS <= next)                                                                              \
                    for (int s = 0; s < SETS; s++, v++, mask &= mask - 1)                                             \
                        MULTIPLY(P, VECTOR, s, WEIGHT(*v), panel + __builtin_ctzll(mask) * WIDTH)                     \
                for (; SETS > 1 && v < next; v++, mask &= mask - 1)                                                   \
                    MULTIPLY(P, VECTOR, 0, WEIGHT(*v), panel + __builtin_ctzll(mask) * WIDTH)                         \
                STORE_SUMS(P)                                                                                         \
                values[i] = next;                                                                                     \
            }                                                                                                         \
    }

static inline const float *column_at(const float *panel, int64_t bytes) {
    return (const float *)((const char *)panel + bytes);
}

/* The same for so few tokens that to find a weight's column takes as long as to multiply. The places of several words' weights
 * are listed first: one loop then takes all of them, and its end is mispredicted once for all words. LIST writes each column
 * 64-fold as 16 bits, and may write up to 16 more. A panel of 16 tokens has 64 bytes for a column. */
#define LISTED_PANEL(NAME, ATTRIBUTE, VECTOR, LANES, P, TYPE, WEIGHT, LIST, VECTORS)                                  \
    ATTRIBUTE static void NAME##_##VECTORS(const Job *job, const float *panel, float *sums, int64_t row, int rows) {  \
        enum { N = VECTORS, WIDTH = N * LANES, UNITS = WIDTH / 16, SETS = 8 / N, AHEAD = 4 };                         \
        const int64_t visits = (job->words * UNITS + VISIT - 1) / VISIT;                                              \
        const TYPE *values[ROWS + AHEAD];                                                                             \
        const uint64_t *masks[ROWS + AHEAD];                                                                          \
        uint16_t places[VISIT * 64 + 16];                                                                             \
        for (int i = 0; i < rows + AHEAD; i++) {                                                                      \
            const int64_t at = row + (i < rows ? i : rows - 1);                                                       \
            values[i] = (const TYPE *)job->values + gblm_start(job, at);                                              \
            masks[i] = job->mask + at * job->words;                                                                   \
        }                                                                                                             \
        for (int64_t visit = 0, w = 0; visit < visits; visit++) {                                                     \
            const int words = (int)(job->words * (visit + 1) / visits - w);                                           \
            for (int i = 0; i < rows; i++) {                                                                          \
                const int64_t count = LIST(masks[i] + w, words, places);                                              \
                const TYPE *v = values[i];                                                                            \
                LOAD_SUMS(P, VECTOR)                                                                                  \
                __builtin_prefetch(masks[i + AHEAD] + w);                                                             \
                __builtin_prefetch(masks[i + AHEAD] + w + words - 1);                                                 \
                for (int line = 0; line < words * (int)sizeof(TYPE) / 2; line++) /* half of the columns */            \
                    __builtin_prefetch((const char *)values[i + AHEAD] + 64 * line);                                  \
                int64_t k = 0;                                                                                        \
                for (; k + SETS <= count; k += SETS)                                                                  \
                    for (int s = 0; s < SETS; s++)                                                                    \
                        MULTIPLY(P, VECTOR, s, WEIGHT(v[k + s]), column_at(panel, places[k + s] * UNITS))             \
                for (; k < count; k++) MULTIPLY(P, VECTOR, 0, WEIGHT(v[k]), column_at(panel, places[k] * UNITS))      \
                STORE_SUMS(P)                                                                                         \
                values[i] = v + count;                                                                                \
            }                                                                                                         \
            w += words;                                                                                               \
            panel += words * 64 * WIDTH;                                                                              \
        }                                                                                                             \
    }

/* ---- fp32 x, dense weights: the sums of several rows and vectors of tokens stay in registers ---- */

/* Add `columns` columns of TAKEN rows times VECTORS vectors of tokens to their sums [TAKEN][width]. */
#define DENSE_TILE(NAME, ATTRIBUTE, VECTOR, LANES, P, TAKEN, VECTORS)                                                 \
    ATTRIBUTE static void NAME##_##VECTORS(const float *weights, int64_t stride, const float *panel, int64_t width,   \
                                           int columns, float *sums, int first) {                                     \
        VECTOR set[TAKEN][VECTORS];                                                                                   \
        for (int r = 0; r < TAKEN; r++)                                                                               \
            for (int j = 0; j < VECTORS; j++)                                                                         \
                set[r][j] = first ? P(setzero_ps)() : P(loadu_ps)(sums + r * width + j * LANES);                      \
        for (int column = 0; column < columns; column++, panel += width) {                                            \
            VECTOR x[VECTORS];                                                                                        \
            for (int j = 0; j < VECTORS; j++) x[j] = P(loadu_ps)(panel + j * LANES);                                  \
            for (int r = 0; r < TAKEN; r++)                                                                           \
                for (int j = 0; j < VECTORS; j++)                                                                     \
                    set[r][j] = P(fmadd_ps)(P(set1_ps)(weights[r * stride + column]), x[j], set[r][j]);               \
        }                                                                                                             \
        for (int r = 0; r < TAKEN; r++)                                                                               \
            for (int j = 0; j < VECTORS; j++) P(storeu_ps)(sums + r * width + j * LANES, set[r][j]);                  \
    }

/* ---- the same for each instruction set ---- */

typedef void (*SparsePanel)(const Job *, const float *panel, float *sums, int64_t row, int rows);
typedef struct {
    void (*add)(const float *weights, int64_t stride, const float *panel, int64_t width, int columns, float *sums, int first);
    int rows, tokens;
} Tile;

/* What multiplies fp32 x: panels by their number of 16 tokens, for fp32 and fp16 values; and the tile for so many tokens. */
typedef struct {
    int most; /* tokens of a panel */
    void (*pack)(void *argument, int index);
    void (*store)(const Job *, const float *sums, int64_t width, int64_t row, int64_t rows, int64_t first);
    SparsePanel sparse[2][PANEL / 16];
    Tile (*tile)(int64_t tokens);
} Fp32;

#if defined(__x86_64__)
/* Transpose 16 × 16 elements of 4 bytes in registers. */
AVX512 static inline void transpose_512(__m512 a[16]) {
    __m512 b[16];
    for (int i = 0; i < 8; i++) {
        b[2 * i] = _mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++) {
            const __m512d even = _mm512_castps_pd(b[4 * i + j]), odd = _mm512_castps_pd(b[4 * i + 2 + j]);
            a[4 * i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(even, odd));
            a[4 * i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd));
        }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 16; j += 8) {
            b[j + i] = _mm512_shuffle_f32x4(a[j + i], a[j + 4 + i], 0x88);
            b[j + 4 + i] = _mm512_shuffle_f32x4(a[j + i], a[j + 4 + i], 0xdd);
        }
    for (int i = 0; i < 8; i++) {
        a[i] = _mm512_shuffle_f32x4(b[i], b[8 + i], 0x88);
        a[8 + i] = _mm512_shuffle_f32x4(b[i], b[8 + i], 0xdd);
    }
}

/* The same of 8 × 8. */
AVX2 static inline void transpose_256(__m256 a[8]) {
    __m256 b[8];
    for (int i = 0; i < 4; i++) {
        b[2 * i] = _mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 2; j++) {
            const __m256d even = _mm256_castps_pd(b[4 * i + j]), odd = _mm256_castps_pd(b[4 * i + 2 + j]);
            a[4 * i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(even, odd));
            a[4 * i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(even, odd));
        }
    for (int i = 0; i < 4; i++) {
        b[i] = _mm256_permute2f128_ps(a[i], a[4 + i], 0x20);
        b[4 + i] = _mm256_permute2f128_ps(a[i], a[4 + i], 0x31);
    }
    memcpy(a, b, sizeof b);
}

PACK_PART(512, AVX512, __m512, 16, OF_512)
STORE(512, AVX512, __m512, 16, OF_512)
PACK_PART(256, AVX2, __m256, 8, OF_256)
STORE(256, AVX2, __m256, 8, OF_256)

/* For LISTED_PANEL; they return how many weights there are. */
AVX512 static inline int64_t list_512(const uint64_t *masks, int words, uint16_t *places) {
    const __m512i columns = _mm512_slli_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), 6);
    uint16_t *next = places;
    for (int w = 0; w < words; w++)
        for (int column = 0; column < 64; column += 16) {
            const __mmask16 bits = (__mmask16)(masks[w] >> column);
            const __m512i all = _mm512_add_epi32(columns, _mm512_set1_epi32(64 * (64 * w + column)));
            _mm256_storeu_si256((__m256i *)next, _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(bits, all)));
            next += __builtin_popcount(bits);
        }
    return next - places;
}

static uint16_t places_of[256][8]; /* of the bits of a byte */
__attribute__((constructor)) static void fill_places(void) {
    for (int bits = 0; bits < 256; bits++)
        for (int bit = 0, n = 0; bit < 8; bit++)
            if (bits >> bit & 1) places_of[bits][n++] = (uint16_t)(64 * bit);
}
AVX2 static inline int64_t list_256(const uint64_t *masks, int words, uint16_t *places) {
    uint16_t *next = places;
    for (int w = 0; w < words; w++)
        for (int column = 0; column < 64; column += 8) {
            const uint8_t bits = (uint8_t)(masks[w] >> column);
            const __m128i found = _mm_loadu_si128((const __m128i *)places_of[bits]);
            _mm_storeu_si128((__m128i *)next, _mm_add_epi16(found, _mm_set1_epi16((short)(64 * (64 * w + column)))));
            next += __builtin_popcount(bits);
        }
    return next - places;
}

#define HALF_512(H) _mm512_cvtph_ps(_mm256_set1_epi16((short)(H)))
#define HALF_256(H) _mm256_cvtph_ps(_mm_set1_epi16((short)(H)))
#define SPARSE_PANEL_512(V)                                                                           \
    SPARSE_PANEL(sparse_512, AVX512, __m512, 16, OF_512, float, _mm512_set1_ps, V)                     \
    SPARSE_PANEL(half_512, AVX512_16, __m512, 16, OF_512, uint16_t, HALF_512, V)
#define SPARSE_PANEL_256(V)                                                                           \
    SPARSE_PANEL(sparse_256, AVX2, __m256, 8, OF_256, float, _mm256_set1_ps, V)                        \
    SPARSE_PANEL(half_256, AVX2, __m256, 8, OF_256, uint16_t, HALF_256, V)
#define LISTED_PANEL_512(V)                                                                           \
    LISTED_PANEL(sparse_512, AVX512, __m512, 16, OF_512, float, _mm512_set1_ps, list_512, V)           \
    LISTED_PANEL(half_512, AVX512_16, __m512, 16, OF_512, uint16_t, HALF_512, list_512, V)
LISTED_PANEL_512(1) LISTED_PANEL_512(2) LISTED_PANEL_512(3) SPARSE_PANEL_512(4)
SPARSE_PANEL_512(5) SPARSE_PANEL_512(6) SPARSE_PANEL_512(7) SPARSE_PANEL_512(8)
LISTED_PANEL(sparse_256, AVX2, __m256, 8, OF_256, float, _mm256_set1_ps, list_256, 2)
LISTED_PANEL(half_256, AVX2, __m256, 8, OF_256, uint16_t, HALF_256, list_256, 2)
SPARSE_PANEL_256(4) SPARSE_PANEL_256(6) SPARSE_PANEL_256(8)
SPARSE_PANEL_256(10) SPARSE_PANEL_256(12)

DENSE_TILE(dense_512, AVX512, __m512, 16, OF_512, 8, 1)
DENSE_TILE(dense_512, AVX512, __m512, 16, OF_512, 8, 2)
DENSE_TILE(dense_512, AVX512, __m512, 16, OF_512, 4, 3)
DENSE_TILE(dense_512, AVX512, __m512, 16, OF_512, 4, 4)
DENSE_TILE(dense_256, AVX2, __m256, 8, OF_256, 4, 2)
DENSE_TILE(dense_256, AVX2, __m256, 8, OF_256, 4, 3)

static Tile tile_512(int64_t tokens) {
    static const Tile tiles[] = {{dense_512_1, 8, 16}, {dense_512_2, 8, 32}, {dense_512_3, 4, 48}, {dense_512_4, 4, 64}};
    return tiles[least(tokens, 64) / 16 - 1];
}
static Tile tile_256(int64_t tokens) {
    return tokens == 16 || tokens == 32 ? (Tile){dense_256_2, 4, 16} : (Tile){dense_256_3, 4, 24};
}

#define BY_VECTORS_512(NAME) {NAME##_1, NAME##_2, NAME##_3, NAME##_4, NAME##_5, NAME##_6, NAME##_7, NAME##_8}
#define BY_VECTORS_256(NAME) {NAME##_2, NAME##_4, NAME##_6, NAME##_8, NAME##_10, NAME##_12}
static const Fp32 of_512 = {PANEL, pack_part_512, store_512, {BY_VECTORS_512(sparse_512), BY_VECTORS_512(half_512)}, tile_512},
                  of_256 = {NARROW_PANEL, pack_part_256, store_256, {BY_VECTORS_256(sparse_256), BY_VECTORS_256(half_256)},
                            tile_256};
static const Fp32 *fp32_of(int path) { return path == AVX2_PATH ? &of_256 : &of_512; }

/* Numbers as fp32; a multiple of 8. */
AVX2 static void widen(const uint16_t *halves, int64_t count, float *to) {
    for (int64_t i = 0; i < count; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(halves + i))));
}
#else
static inline void transpose_128(float32x4_t a[4]) {
    const float32x4x2_t low = vtrnq_f32(a[0], a[1]), high = vtrnq_f32(a[2], a[3]);
    for (int i = 0; i < 2; i++) {
        a[i] = vcombine_f32(vget_low_f32(low.val[i]), vget_low_f32(high.val[i]));
        a[2 + i] = vcombine_f32(vget_high_f32(low.val[i]), vget_high_f32(high.val[i]));
    }
}

PACK_PART(128, NEON, float32x4_t, 4, OF_NEON)
STORE(128, NEON, float32x4_t, 4, OF_NEON)

#define HALF_128(H) vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(H)))
#define SPARSE_PANEL_128(V)                                                       \
    SPARSE_PANEL(sparse_128, NEON, float32x4_t, 4, OF_NEON, float, vdupq_n_f32, V) \
    SPARSE_PANEL(half_128, NEON, float32x4_t, 4, OF_NEON, uint16_t, HALF_128, V)
SPARSE_PANEL_128(4) SPARSE_PANEL_128(8) SPARSE_PANEL_128(12)
SPARSE_PANEL_128(16) SPARSE_PANEL_128(20) SPARSE_PANEL_128(24)
DENSE_TILE(dense_128, NEON, float32x4_t, 4, OF_NEON, 4, 4)

static Tile tile_128(int64_t tokens) {
    (void)tokens;
    return (Tile){dense_128_4, 4, 16};
}

#define BY_VECTORS_128(NAME) {NAME##_4, NAME##_8, NAME##_12, NAME##_16, NAME##_20, NAME##_24}
static const Fp32 of_128 = {NARROW_PANEL, pack_part_128, store_128, {BY_VECTORS_128(sparse_128), BY_VECTORS_128(half_128)},
                            tile_128};
static const Fp32 *fp32_of(int path) {
    (void)path;
    return &of_128;
}

/* Numbers as fp32; a multiple of 8. */
static void widen(const uint16_t *halves, int64_t count, float *to) {
    for (int64_t i = 0; i < count; i += 4) vst1q_f32(to + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(halves + i))));
}
#endif

/* ---- rows of a weight ---- */

/* `rows` rows of a dense weight from `row` on, in fp32 with zeros below to `taken` rows: in place, or a copy. */
static const float *dense_at(const Job *job, int64_t row, int64_t rows, int taken, int64_t column, int64_t *stride,
                             float *copy) {
    const int64_t columns = job->words * 64, count = least(TILE, columns - column), start = row * columns + column;
    if (job->type == F32 && rows >= taken) {
        *stride = columns;
        return (const float *)job->values + start;
    }
    *stride = TILE;
    if (rows < taken) memset(copy, 0, (size_t)taken * TILE * sizeof *copy);
    for (int64_t r = 0, at = start; r < least(rows, taken); r++, at += columns)
        if (job->type == F32) memcpy(copy + r * TILE, (const float *)job->values + at, (size_t)count * sizeof *copy);
        else widen((const uint16_t *)job->values + at, count, copy + r * TILE);
    return copy;
}

static void dense_panel(const Job *job, const float *panel, int64_t width, float *sums, int64_t row, int64_t rows) {
    float copy[8 * TILE];
    int64_t stride;
    for (int64_t column = 0; column < job->words * 64; column += TILE)
        for (int64_t t = 0; t < width;) {
            const Tile tile = fp32_of(job->path)->tile(width - t);
            for (int64_t r = 0; r < rows; r += tile.rows) {
                const float *weights = dense_at(job, row + r, rows - r, tile.rows, column, &stride, copy);
                tile.add(weights, stride, panel + column * width + t, width, (int)least(TILE, job->words * 64 - column),
                         sums + r * width + t, column == 0);
            }
            t += tile.tokens;
        }
}

static void fp32_rows(const Work *work, const Job *job, int index) {
    const Fp32 *fp32 = fp32_of(job->path);
    float sums[ROWS * PANEL] __attribute__((aligned(64)));
    int64_t begin, end, width;
    gblm_share(job->rows, work->parts, index, &begin, &end);
    for (int64_t first = 0; first < job->tokens; first += work->panel) {
        const float *panel = panel_at(work, first, &width);
        for (int64_t row = begin; row < end; row += ROWS) {
            const int rows = (int)least(ROWS, end - row);
            if (job->mask) fp32->sparse[job->type == F16_X32][width / 16 - 1](job, panel, sums, row, rows);
            else dense_panel(job, panel, width, sums, row, rows);
            fp32->store(job, sums, width, row, rows, first);
        }
    }
}

#if defined(__x86_64__)
AVX512_BF16 static void store_bf16(const Job *job, const float *sums, int64_t width, int64_t row, int64_t rows, int64_t first) {
    const int64_t tokens = least(width, job->tokens - first);
    for (int64_t t = 0; t < tokens; t += 16)
        for (int64_t r = 0; r < rows; r += 16) {
            const __mmask16 valid = (__mmask16)(rows - r >= 16 ? 0xffff : (1 << (rows - r)) - 1);
            __m512 block[16];
            for (int i = 0; i < 16; i++) block[i] = _mm512_loadu_ps(sums + (r + i) * width + t);
            transpose_512(block);
            for (int i = 0; i < 16 && t + i < tokens; i++)
                _mm256_mask_storeu_epi16((uint16_t *)job->y + (first + t + i) * job->rows + row + r, valid,
                                         (__m256i)_mm512_cvtneps_pbh(block[i]));
        }
}

/* ---- bf16: strips of rows, expanded and multiplied ---- */

/* Expand a row's words into `dense`, 64 elements a word; returns where the next word's values begin. */
AVX512_BF16 static const uint16_t *expand_words(const uint64_t *mask, int words, const uint16_t *v, uint16_t *dense) {
    for (int w = 0; w < words; w++, dense += 64) {
        const int half = __builtin_popcountll(mask[w] & 0xffffffff);
        _mm512_store_si512(dense, expand_epi16((__mmask32)mask[w], v));
        _mm512_store_si512(dense + 32, expand_epi16((__mmask32)(mask[w] >> 32), v + half));
        v += __builtin_popcountll(mask[w]);
    }
    _mm_prefetch((const char *)(v + 512), _MM_HINT_T0);
    return v;
}

/* Add 2 × 16 rows times 16 or 32 tokens to their sums [rows][width]. */
AMX static inline void multiply_tiles(const uint16_t *low_rows, const uint16_t *high_rows, int row_bytes,
                                      const uint32_t *inputs, int words, int64_t width, float *sums, int first, int two) {
    const int stride = (int)width * 4;
    float *low = sums, *high = sums + 16 * width;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (!first) {
        _tile_loadd(0, low, stride);
        _tile_loadd(1, high, stride);
    }
    if (!first && two) {
        _tile_loadd(2, low + 16, stride);
        _tile_loadd(3, high + 16, stride);
    }
    for (int step = 0; step < 2 * words; step++, inputs += 16 * width) {
        _tile_loadd(4, low_rows + 32 * step, row_bytes);
        _tile_loadd(5, high_rows + 32 * step, row_bytes);
        _tile_loadd(6, inputs, stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if (two) {
            _tile_loadd(7, inputs + 16, stride);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, low, stride);
    _tile_stored(1, high, stride);
    if (two) {
        _tile_stored(2, low + 16, stride);
        _tile_stored(3, high + 16, stride);
    }
}

/* rows a cache line further apart than a power of two, lest they share cache sets */
typedef uint16_t StripRow[STRIP_WORDS * 64 + 32];

/* Add a strip's words times a panel's tokens to the sums [STRIP][width]. */
AMX static void multiply_amx(const StripRow *strip, const uint32_t *inputs, int words, int64_t width, float *sums, int first) {
    for (int64_t t = 0; t < width; t += 32)
        multiply_tiles(strip[0], strip[16], sizeof *strip, inputs + t, words, width, sums + t, first, t + 16 < width);
}

/* The same of `rows` rows times `vectors` vectors of tokens, whose sums stay in registers: enough of them that none waits for
 * its predecessor. */
AVX512_BF16 static inline __attribute__((always_inline)) void multiply_block(const StripRow *strip, const uint32_t *inputs,
                                                                             int words, int64_t width, float *sums,
                                                                             int first, const int rows, const int vectors) {
    for (int row = 0; row < STRIP; row += rows, strip += rows, sums += rows * width) {
        const uint32_t *next = inputs;
        __m512 set[16][4];
        for (int r = 0; r < rows; r++)
            for (int j = 0; j < vectors; j++)
                set[r][j] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + r * width + 16 * j);
        for (int pair = 0; pair < 32 * words; pair++, next += width) {
            __m512bh x[4];
            for (int j = 0; j < vectors; j++) x[j] = (__m512bh)_mm512_loadu_si512(next + 16 * j);
            for (int r = 0; r < rows; r++) {
                uint32_t weights;
                memcpy(&weights, strip[r] + 2 * pair, sizeof weights);
                for (int j = 0; j < vectors; j++)
                    set[r][j] = _mm512_dpbf16_ps(set[r][j], (__m512bh)_mm512_set1_epi32((int)weights), x[j]);
            }
        }
        for (int r = 0; r < rows; r++)
            for (int j = 0; j < vectors; j++) _mm512_storeu_ps(sums + r * width + 16 * j, set[r][j]);
    }
}

AVX512_BF16 static void multiply_avx512(const StripRow *strip, const uint32_t *inputs, int words, int64_t width, float *sums,
                                        int first) {
    for (int64_t t = 0; t < width; t += 64)
        switch (least(width - t, 64) / 16) {
        case 1: multiply_block(strip, inputs + t, words, width, sums + t, first, 16, 1); break;
        case 2: multiply_block(strip, inputs + t, words, width, sums + t, first, 8, 2); break;
        case 3: multiply_block(strip, inputs + t, words, width, sums + t, first, 4, 3); break;
        default: multiply_block(strip, inputs + t, words, width, sums + t, first, 4, 4);
        }
}

AVX512_BF16 static void strip_rows(const Work *work, const Job *job, int index) {
    StripRow strip[STRIP] __attribute__((aligned(64)));
    float sums[PANELS][STRIP * PANEL] __attribute__((aligned(64)));
    const uint16_t *values[STRIP];
    void (*multiply)(const StripRow *, const uint32_t *, int, int64_t, float *, int) =
        job->path == AMX_PATH ? multiply_amx : multiply_avx512;
    int64_t begin, end, width;
    gblm_share((job->rows + STRIP - 1) / STRIP, work->parts, index, &begin, &end);
    begin *= STRIP;
    end = least(end * STRIP, job->rows);
    for (int64_t group = 0; group < job->tokens; group += PANELS * work->panel)
        for (int64_t row = begin; row < end; row += STRIP) {
            const int rows = (int)least(STRIP, end - row);
            const int64_t last = least(job->tokens, group + PANELS * work->panel);
            for (int i = 0; i < rows; i++) values[i] = (const uint16_t *)job->values + job->starts[row + i];
            for (int64_t word = 0; word < job->words; word += STRIP_WORDS) {
                const int words = (int)least(STRIP_WORDS, job->words - word);
                for (int i = 0; i < rows; i++)
                    values[i] = expand_words(job->mask + (row + i) * job->words + word, words, values[i], strip[i]);
                for (int i = rows; i < STRIP; i++) memset(strip[i], 0, sizeof strip[i]);
                for (int64_t first = group; first < last; first += work->panel) {
                    const uint32_t *panel = (const uint32_t *)panel_at(work, first, &width);
                    multiply(strip, panel + word * 32 * width, words, width, sums[(first - group) / work->panel], word == 0);
                }
            }
            for (int64_t first = group; first < last; first += work->panel) {
                panel_at(work, first, &width);
                store_bf16(job, sums[(first - group) / work->panel], width, row, rows, first);
            }
        }
}

AMX static void amx_rows(const Work *work, const Job *job, int index) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes_a_row[16];
        uint8_t rows[16];
    } __attribute__((packed)) tiles = {.palette = 1};
    for (int i = 0; i < 8; i++) tiles.bytes_a_row[i] = 64, tiles.rows[i] = 16;
    _tile_loadconfig(&tiles);
    strip_rows(work, job, index);
    _tile_release();
}
#endif

static void product_part(void *argument, int index) {
    const Work *work = argument;
    void (*rows)(const Work *, const Job *, int) = fp32_rows;
#if defined(__x86_64__)
    if (!gblm_x32(work->jobs->type)) rows = work->jobs->path == AMX_PATH ? amx_rows : strip_rows;
#endif
    for (int i = 0; i < work->count; i++) rows(work, work->jobs + i, index);
}

void gblm_many_tokens(const Job *jobs, int count, const Threads *threads) {
    const Fp32 *fp32 = fp32_of(jobs->path);
    const int64_t panels = (jobs->tokens + fp32->most - 1) / fp32->most;
    Work work = {jobs, count, threads->count, rounded((jobs->tokens + panels - 1) / panels)};
    threads->run(threads->context, fp32->pack, &work, threads->count);
    threads->run(threads->context, product_part, &work, threads->count);
}

#else
EXPORT int64_t gblm_panel_bytes(int64_t words, int64_t tokens, int type) {
    (void)words, (void)tokens, (void)type;
    return 0;
}

EXPORT int gblm_has_many(int type, int path) {
    (void)type, (void)path;
    return 0;
}

void gblm_many_tokens(const Job *jobs, int count, const Threads *threads) { (void)jobs, (void)count, (void)threads; }
#endif
