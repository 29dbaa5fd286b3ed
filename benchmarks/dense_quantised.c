/* The yardsticks of `cpu_decode.py --quantised`: dense matrix-vector products in 8 and 4 bits, of the same care as the packed
 * kernels (four streams of rows, prefetch ahead, x in L1, vpdpbusd), with the cheapest input that int8 inference knows:
 * 8 bits with one scale. Weights are -127 … 127, or two nibbles a byte: of each 128 columns the first 64 in the low halves. */
#include <immintrin.h>
#include <stdint.h>

#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")))
#define INLINE static inline __attribute__((always_inline))
enum { STREAMS = 4, BLOCK = 16 };

/* x: columns + 128 as bytes; sums: what 128 (or, in 4 bits, x) adds too much; scales fp16, for each group or for a row. */
VNNI INLINE void product(const uint8_t *w, const uint16_t *scales, const float *sums, const uint8_t *x, float *y, int64_t rows,
                         int64_t columns, const int bits, const int group) {
    const int64_t apart = rows / STREAMS, bytes = columns * bits / 8, groups = group ? columns / group : 1;
    const __m512i low = _mm512_set1_epi8(15);
    for (int64_t r = 0; r < apart; r++) {
        __m512 acc[STREAMS];
        __m512i whole[STREAMS][2];
        float widened[STREAMS][BLOCK] __attribute__((aligned(64)));
        for (int i = 0; i < STREAMS; i++)
            acc[i] = _mm512_setzero_ps(), whole[i][0] = whole[i][1] = _mm512_setzero_si512();
        for (int64_t block = 0; block < columns; block += 64 * BLOCK) {
            for (int i = 0; group && i < STREAMS; i++)
                _mm512_store_ps(widened[i], _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(
                                                scales + (r + i * apart) * groups + block / 64))));
            for (int64_t c = 0; c < 64 * BLOCK; c += 128)
                _Pragma("GCC unroll 4") for (int i = 0; i < STREAMS; i++) {
                    const uint8_t *from = w + (r + i * apart) * bytes + (block + c) * bits / 8;
                    _mm_prefetch((const char *)from + 2048, _MM_HINT_T0);
                    if (bits == 8) _mm_prefetch((const char *)from + 2112, _MM_HINT_T0);
                    const __m512i one = _mm512_loadu_si512(from),
                                  first = _mm512_loadu_si512(x + block + c), second = _mm512_loadu_si512(x + block + c + 64);
                    const __m512i none = _mm512_setzero_si512();
                    __m512i a, b;
                    if (bits == 8) {
                        a = _mm512_dpbusd_epi32(group ? none : whole[i][0], first, one);
                        b = _mm512_dpbusd_epi32(group ? none : whole[i][1], second, _mm512_loadu_si512(from + 64));
                    } else { /* x is signed here */
                        a = _mm512_dpbusd_epi32(group ? none : whole[i][0], _mm512_and_si512(one, low), first);
                        b = _mm512_dpbusd_epi32(group ? none : whole[i][1],
                                                _mm512_and_si512(_mm512_srli_epi16(one, 4), low), second);
                    }
                    if (!group) {
                        whole[i][0] = a, whole[i][1] = b;
                        continue;
                    }
                    acc[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a), _mm512_set1_ps(widened[i][c / 64]), acc[i]);
                    acc[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(b), _mm512_set1_ps(widened[i][c / 64 + 1]), acc[i]);
                }
        }
        for (int i = 0; i < STREAMS; i++) {
            const int64_t row = r + i * apart;
            const float scale = group ? 1.0f : _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(scales[row])));
            if (!group) acc[i] = _mm512_cvtepi32_ps(_mm512_add_epi32(whole[i][0], whole[i][1]));
            y[row] = (_mm512_reduce_add_ps(acc[i]) - sums[row]) * scale;
        }
    }
}

/* columns: a multiple of 1024; rows: of 4; group: 0 for rows, or 64. */
VNNI void dense_quantised(const uint8_t *w, const uint16_t *scales, const float *sums, const uint8_t *x, float *y, int64_t rows,
                          int64_t columns, int bits, int group) {
    if (bits == 8 && group) product(w, scales, sums, x, y, rows, columns, 8, 64);
    else if (bits == 8) product(w, scales, sums, x, y, rows, columns, 8, 0);
    else if (group) product(w, scales, sums, x, y, rows, columns, 4, 64);
    else product(w, scales, sums, x, y, rows, columns, 4, 0);
}
