/* How kernels read the rows of a quantised weight: words of 64 columns, and with AVX-512 their levels in a register. */
#ifndef GBLM_QUANTISED_WORDS_H
#define GBLM_QUANTISED_WORDS_H

#include "quantised.h"

#define INLINE static inline __attribute__((always_inline))
#define GBLM_TILE 32 /* rows that are multiplied together by tiles, with AVX-512 */
#define GBLM_NARROW_TILE 16 /* with AVX2 and AVX-VNNI */

enum { LEVELS, PLACES, DENSE, KINDS, SPREAD };

static inline int64_t row_start(const Quantised *job, int64_t row) {
    return job->mask ? job->starts[row] : row * job->words * 64;
}

static inline uint64_t row_bits(const Quantised *job, int64_t row, int64_t w) {
    return job->mask ? job->mask[row * job->words + w] : ~0ull;
}
static inline int kind_of(const Quantised *job) {
    if (job->mask) return job->levels ? PLACES : LEVELS;
    return job->levels ? SPREAD : DENSE;
}
/* Bytes that so many weights of a word take. */
static inline int bytes_in(int count, int kind) { return kind == PLACES ? (count + 1) / 2 : count; }

/* Of x, rounded to 16 bits. */
static inline int64_t bytes_a_token(int64_t words) { return words * 128; }

/* A tile's x has 8 bits, in blocks of 32 columns. A block has 4 columns of each of its tokens, the next 4 columns of each, and so
 * on; then a scale of each token; then of each -128 · the sum of its levels: products of weights + 128, which `vpdpbusd` takes,
 * begin with it. Blocks of the same tokens follow each other. Offsets are for a block of one token. */
enum { BLOCK_COLUMNS = 32, WORD_BLOCKS = 2, BLOCK_TOKENS = 12, BLOCK_SCALES = 32, BLOCK_OFFSETS = 36, BLOCK_BYTES = 40 };

/* Tokens of a block. */
static inline int block_width(int64_t tokens) { return tokens == 1 ? 1 : BLOCK_TOKENS; }

/* A token in the first block of a word. */
static inline const uint8_t *block_of(const Quantised *job, int64_t token, int64_t word) {
    const int64_t width = block_width(job->tokens);
    return (const uint8_t *)job->x + (token / width * job->words + word) * WORD_BLOCKS * BLOCK_BYTES * width + token % width * 4;
}

/* Whether rows are multiplied by tiles, by the functions below. */
static inline int gblm_by_tiles(const Quantised *job) {
    return job->path >= AVX2_PATH && (kind_of(job) == SPREAD || (job->tokens > FEW_TOKENS && !job->exact));
}

/* Rows [begin, end) of y for all tokens; begin is a whole number of tiles. With AVX-512, and with AVX2 or AVX-VNNI. */
void gblm_quantised_many(const Quantised *job, int64_t begin, int64_t end);
void gblm_quantised_many_avx2(const Quantised *job, int64_t begin, int64_t end);

#if defined(__x86_64__)

/* ---- AVX2 ---- */

/* The levels of words [first, last) of a row. Their weights begin at number `at` of the row, which moves past them. */
void gblm_avx2_levels(const Quantised *job, int64_t row, int64_t first, int64_t last, int64_t *at, int8_t *to);

AVX2 INLINE float avx2_scale(const Quantised *job, int64_t row, int64_t group) {
    return group < job->groups ? _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(job->scales[row * job->groups + group]))) : 0;
}

/* sums + the products of four bytes each. As assembly, for functions whose attribute is AVX2. */
AVX2 INLINE __m256i avx_vnni_added(__m256i sums, __m256i of_unsigned, __m256i of_signed) {
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(of_unsigned), "x"(of_signed));
    return sums;
}

/* The first `count` of 8 numbers to place `at` of an array of `type`. */
AVX2 INLINE void avx2_put(__m256 numbers, void *to, int64_t at, int64_t count, int type) {
    uint16_t halves[8];
    float whole[8];
    if (type == F32) {
        if (count >= 8) _mm256_storeu_ps((float *)to + at, numbers);
        else _mm256_storeu_ps(whole, numbers), memcpy((float *)to + at, whole, (size_t)count * 4);
        return;
    }
    __m128i half = _mm256_cvtps_ph(numbers, _MM_FROUND_TO_NEAREST_INT);
    if (type == BF16) {
        const __m256i bits = _mm256_castps_si256(numbers), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i upper =
            _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
        half = _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
    }
    if (count >= 8) _mm_storeu_si128((__m128i *)((uint16_t *)to + at), half);
    else _mm_storeu_si128((__m128i *)halves, half), memcpy((uint16_t *)to + at, halves, (size_t)count * 2);
}

/* AVX-512 without VBMI2 spreads bytes by a shuffle within each sixteen columns, which are one lane. A bit's place
 * is the number of the lane's bits below it; where 4 bits are stored and a lane begins in the middle of a byte, one more.
 * [which of a word's lanes but the first do so]: what turns a count of the bits up to each one into places. */
extern int8_t gblm_to_places[8][64];

/* Where the lanes of a word begin: weights behind the first. */
typedef struct {
    int64_t second, third, fourth;
} Lanes;

INLINE Lanes lanes_of(uint64_t bits) {
    return (Lanes){__builtin_popcountll(bits & 0xffff), __builtin_popcountll((uint32_t)bits), __builtin_popcountll(bits << 16)};
}
INLINE const int8_t *places_of(Lanes lanes) {
    return gblm_to_places[(lanes.second & 1) | (lanes.third & 1) << 1 | (lanes.fourth & 1) << 2];
}

/* ---- AVX-512 with VNNI: bytes are spread by VBMI2 or, without it, by a shuffle ---- */

#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c,popcnt,bmi,bmi2")))

VNNI INLINE __m512i vnni_table(const Quantised *job, int64_t row, const int kind) {
    if (kind != PLACES) return _mm512_setzero_si512();
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(job->levels + row * job->stride)));
}

/* The levels of a word without VBMI2. Bits are counted within eights by a product, which is +1 each. */
VNNI INLINE __m512i shuffled(uint64_t bits, const uint8_t *v, __m512i table, const int kind) {
    const Lanes at = lanes_of(bits);
    const __m512i ones = _mm512_maskz_mov_epi8(bits, _mm512_set1_epi8(1)),
                  eights = _mm512_mullo_epi64(ones, _mm512_set1_epi64(0x0101010101010101)),
                  to_second = _mm512_set4_epi32(0x07070707, 0x07070707, -1, -1);
    const __m512i counts = _mm512_add_epi8(eights, _mm512_shuffle_epi8(eights, to_second));
    const __m512i places = _mm512_add_epi8(counts, kind == LEVELS ? _mm512_set1_epi8(-1) : _mm512_load_si512(places_of(at)));
    const int shift = kind == PLACES;
    __m512i lanes = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)v));
    lanes = _mm512_inserti32x4(lanes, _mm_loadu_si128((const __m128i *)(v + (at.second >> shift))), 1);
    lanes = _mm512_inserti32x4(lanes, _mm_loadu_si128((const __m128i *)(v + (at.third >> shift))), 2);
    lanes = _mm512_inserti32x4(lanes, _mm_loadu_si128((const __m128i *)(v + (at.fourth >> shift))), 3);
    if (kind == LEVELS) return _mm512_maskz_shuffle_epi8(bits, lanes, places);
    const __m512i low = _mm512_set1_epi8(15);
    const __m512i pairs = _mm512_shuffle_epi8(lanes, _mm512_and_si512(_mm512_srli_epi16(places, 1), low));
    const __m512i halves = _mm512_mask_mov_epi8(pairs, _mm512_test_epi8_mask(places, _mm512_set1_epi8(1)),
                                                _mm512_srli_epi16(pairs, 4));
    return _mm512_maskz_shuffle_epi8(bits, table, _mm512_and_si512(halves, low));
}

/* The levels of a word's 64 columns, and v moved past them. */
VNNI INLINE __m512i word_of(uint64_t bits, const uint8_t **v, __m512i table, const int kind, const int vbmi2) {
    __m512i packed;
    const uint8_t *from = *v;
    _mm_prefetch((const char *)from + (kind == PLACES ? 1024 : 2048), _MM_HINT_T0);
    if (kind == DENSE) return _mm512_loadu_si512((*v += 64) - 64);
    const int bytes = bytes_in(__builtin_popcountll(bits), kind);
    if (!vbmi2) {
        *v += bytes;
        return shuffled(bits, from, table, kind);
    }
    if (kind == LEVELS) {
        packed = _mm512_loadu_si512(from);
        *v = from + bytes;
    } else {
        __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)from));
        __asm__("" : "+v"(pairs), "+r"(from)); /* loaded before v moves: else GCC needs a register for both places */
        *v = from + bytes;
        packed = _mm512_shuffle_epi8(
            table, _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi16(pairs, 4)), _mm512_set1_epi8(15)));
    }
    /* as assembly, so that one function serves both; see expand_ps in job.h too */
    __asm__("vpexpandb %0, %0 %{%1%}%{z%}" : "+v"(packed) : "Yk"((__mmask64)bits));
    return packed;
}

/* sums + the products of four bytes each: as assembly, since GCC copies the sums of the intrinsic to and fro. */
VNNI INLINE __m512i added(__m512i sums, __m512i x, __m512i levels) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(x), "v"(levels));
    return sums;
}

/* 16 numbers in float16 or bfloat16. */
VNNI INLINE __m256i halves(__m512 numbers, int type) {
    if (type == F16) return _mm512_cvtps_ph(numbers, _MM_FROUND_TO_NEAREST_INT);
    const __m512i whole = _mm512_castps_si512(numbers);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(whole, 16), _mm512_set1_epi32(1)),
                  rounded = _mm512_add_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(0x7fff)), odd);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
#endif

#endif
