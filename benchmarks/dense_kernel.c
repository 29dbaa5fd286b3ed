/* The yardstick of cpu_decode.py: a dense matrix-vector product written with the same care as the sparse kernels
 * (four accumulators, prefetch 4 KB ahead, one contiguous share of rows for each thread). */
#include <immintrin.h>
#include <stdint.h>

__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))) void dense_f32(const float *w, const float *x, float *y,
                                                                             int64_t begin, int64_t end, int64_t k) {
    for (int64_t r = begin; r < end; r++) {
        const float *row = w + r * k;
        __m512 a = _mm512_setzero_ps(), b = a, c = a, d = a;
        for (int64_t i = 0; i < k; i += 64) {
            for (int line = 0; line < 4; line++) _mm_prefetch((const char *)(row + i + 1024 + 16 * line), _MM_HINT_T0);
            a = _mm512_fmadd_ps(_mm512_loadu_ps(row + i), _mm512_loadu_ps(x + i), a);
            b = _mm512_fmadd_ps(_mm512_loadu_ps(row + i + 16), _mm512_loadu_ps(x + i + 16), b);
            c = _mm512_fmadd_ps(_mm512_loadu_ps(row + i + 32), _mm512_loadu_ps(x + i + 32), c);
            d = _mm512_fmadd_ps(_mm512_loadu_ps(row + i + 48), _mm512_loadu_ps(x + i + 48), d);
        }
        y[r] = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d)));
    }
}

__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"))) void dense_bf16(
    const uint16_t *w, const uint16_t *x, float *y, int64_t begin, int64_t end, int64_t k) {
    for (int64_t r = begin; r < end; r++) {
        const uint16_t *row = w + r * k;
        __m512 s[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int64_t i = 0; i < k; i += 128)
            for (int part = 0; part < 4; part++) {
                _mm_prefetch((const char *)(row + i + 2048 + 32 * part), _MM_HINT_T0);
                s[part] = _mm512_dpbf16_ps(s[part], (__m512bh)_mm512_loadu_si512(row + i + 32 * part),
                                           (__m512bh)_mm512_loadu_si512(x + i + 32 * part));
            }
        y[r] = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(s[0], s[1]), _mm512_add_ps(s[2], s[3])));
    }
}

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
    Work work = {(Kernel)(bf16 ? (void *)dense_bf16 : (void *)dense_f32), w, x, y, rows, k, threads, thread_number};
    if (threads > 1) parallel(part, &work, (unsigned)threads, 0);
    else part(&work);
}
