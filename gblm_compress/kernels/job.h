/* What all kernels share: a product as a job, threads, element types, instruction sets.
 *
 * Rows of the mask are whole 64-bit words; bit b of word w is column 64·w + b, and bits beyond the last column are
 * zero. A row's nonzeros are contiguous; row r begins at starts[r], the number of bits in the rows before it. `values`
 * is readable for 64 elements past the last nonzero.
 *
 * All of this is the caller's to guarantee, for no kernel could check it without reading the mask twice. Two places do,
 * once for each weight: the layout's `check` in Python, when a layer is filled, and `create` in onnxruntime_op.c, when a
 * session is made. The functions for Python check their numbers, whose cost is nothing.
 */
#ifndef GBLM_JOB_H
#define GBLM_JOB_H

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define EXPORT __attribute__((visibility("default")))
#define FEW_TOKENS 8 /* the most that the kernels for decoding take */

enum { F32, F16, BF16, F16_X32 /* fp16 values, fp32 x and y */, TYPES };
enum { PORTABLE_PATH, NEON_PATH, DOT_PATH /* NEON with sdot */, AVX2_PATH, AVX_VNNI_PATH, VNNI_PATH, AVX512_PATH, AMX_PATH, PATHS };

typedef struct {
    const uint64_t *mask; /* NULL: a dense weight, rows × words·64 values, of type F32 or F16_X32; starts is NULL too */
    const void *values;
    const int64_t *starts;
    const void *x; /* tokens × words·64 elements; columns past the last are zeros */
    void *y;       /* tokens × rows, in the type of x */
    int64_t rows, words, tokens;
    int type, path;
    void *panels; /* for many tokens: scratch of gblm_panel_bytes */
} Job;

/* Threads are the caller's: `run` calls part(work, 0 … count - 1), each once, side by side where it can. */
typedef struct {
    void (*run)(void *context, void (*part)(void *work, int index), void *work, int count);
    void *context;
    int count;
} Threads;

static inline void gblm_share(int64_t count, int parts, int index, int64_t *begin, int64_t *end) {
    *begin = count * index / parts;
    *end = count * (index + 1) / parts;
}

static inline int gblm_x32(int type) { return type == F32 || type == F16_X32; }

/* Where a row's values begin, and the columns of its word w that have one. */
static inline int64_t gblm_start(const Job *job, int64_t row) {
    return job->starts ? job->starts[row] : row * job->words * 64;
}
static inline uint64_t gblm_bits(const Job *job, int64_t row, int64_t w) {
    return job->mask ? job->mask[row * job->words + w] : ~0ull;
}

/* ---- element types, portable ---- */

static inline float bf16_to_float(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline float f16_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023, bits;
    float f;
    if (exponent == 31) bits = sign | 0x7f800000u | fraction << 13;
    else if (exponent) bits = sign | (exponent + 112) << 23 | fraction << 13;
    else {
        f = (float)fraction * (1.0f / 16777216.0f);
        memcpy(&bits, &f, 4);
        bits |= sign;
    }
    memcpy(&f, &bits, 4);
    return f;
}

static inline float f32_to_float(float f) { return f; }

/* Round to nearest, ties to even. */
static inline uint16_t float_to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline uint16_t float_to_f16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return sign | 0x7e00;
    if (bits >= 0x477ff000u) return sign | 0x7c00; /* rounds beyond the largest half */
    if (bits < 0x38800000u) {                      /* subnormal: let the addition of 0.5 do the rounding */
        float shifted;
        memcpy(&shifted, &bits, 4);
        shifted += 0.5f;
        memcpy(&bits, &shifted, 4);
        return (uint16_t)(sign | (bits - 0x3f000000u));
    }
    return (uint16_t)(sign | ((bits - 0x38000000u + 0xfff + (bits >> 13 & 1)) >> 13));
}

static inline void gblm_put(const Job *job, int64_t token, int64_t row, float sum) {
    const int64_t at = token * job->rows + row;
    if (gblm_x32(job->type)) ((float *)job->y)[at] = sum;
    else ((uint16_t *)job->y)[at] = job->type == BF16 ? float_to_bf16(sum) : float_to_f16(sum);
}

#if defined(__x86_64__)
/* ---- instruction sets, chosen function by function ---- */

#define AVX2 __attribute__((target("avx2,fma,f16c,popcnt,bmi,bmi2")))
#define AVX_VNNI __attribute__((target("avx2,avxvnni,fma,f16c,popcnt,bmi,bmi2"))) /* for a compiler that knows it */
#if defined(__clang__) || __GNUC__ >= 11
#define HAS_AVX_VNNI 1
#else
#define HAS_AVX_VNNI 0
#endif
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,popcnt,bmi,bmi2")))
/* Part of both that follow, so that what has it can be inlined into them. */
#define EXPAND_16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2")))
#define AVX512_16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,fma,f16c,popcnt,bmi,bmi2")))
#define AVX512_BF16 \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512bf16,fma,popcnt,bmi,bmi2")))
#define AMX                                                                                                          \
    __attribute__((target(                                                                                           \
        "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512bf16,amx-tile,amx-bf16,fma,popcnt,bmi,bmi2")))

#define OF_512(OPERATION) _mm512_##OPERATION
#define OF_256(OPERATION) _mm256_##OPERATION

AVX2 static inline float gblm_sum_256(__m256 numbers) {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(numbers), _mm256_extractf128_ps(numbers, 1));
    const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
}

/* The values at v, spread to the set bits. As assembly: Zen waits for what was in the register that an expansion writes,
 * zeroed or not, and has nothing to wait for where that is the register it reads. A load folded into it waits as well. */
AVX512 static inline __m512 expand_ps(__mmask16 mask, const float *v) {
    __m512 values = _mm512_loadu_ps(v);
    __asm__("vexpandps %0, %0 %{%1%}%{z%}" : "+v"(values) : "Yk"(mask));
    return values;
}

/* The same with 16 bits each. */
EXPAND_16 static inline __m512i expand_epi16(__mmask32 mask, const void *v) {
    __m512i values = _mm512_loadu_si512(v);
    __asm__("vpexpandw %0, %0 %{%1%}%{z%}" : "+v"(values) : "Yk"(mask));
    return values;
}
#endif

#if defined(__aarch64__)
/* NEON is always there; its operations by the names that the kernels use. */
#define NEON
#define OF_NEON(OPERATION) neon_##OPERATION

static inline float32x4_t neon_setzero_ps(void) { return vdupq_n_f32(0); }
static inline float32x4_t neon_set1_ps(float number) { return vdupq_n_f32(number); }
static inline float32x4_t neon_loadu_ps(const float *from) { return vld1q_f32(from); }
static inline void neon_storeu_ps(float *to, float32x4_t numbers) { vst1q_f32(to, numbers); }
static inline float32x4_t neon_add_ps(float32x4_t a, float32x4_t b) { return vaddq_f32(a, b); }
static inline float32x4_t neon_fmadd_ps(float32x4_t a, float32x4_t b, float32x4_t c) { return vfmaq_f32(c, a, b); }
#endif

#endif
