/* Random calls of the CPU kernels, valid and hostile, for `make sanitize`: ./sanitize-kernels CASES [SEED]
 *
 * Compiled with -fsanitize=address,undefined. Compilers do not instrument masked vector instructions, so that each buffer also
 * ends at a page that cannot be touched, to the byte; what lies before it is poisoned, and must come out as it was.
 *
 * A case is one call of gblm_bitmask_linear, packed or dense, gblm_bitmask_expand, gblm_quantised_linear or
 * gblm_quantised_restore: every element type, every path that the CPU has, widths
 * that are no whole words, rows that are no whole blocks, empty and full rows, few tokens and many, any number of threads in
 * teams of any size. A product is held against a naive one in double, an expansion against the matrix bit for bit. Hostile are
 * numbers that there is no code for, which must be refused with nothing written; bits beyond the last column, which must not
 * be written; and values that are NaN or infinite. Masks that do not fit their values are not the kernels' to find: see
 * job.h.
 */
#include <math.h>
#include <pthread.h>
#include <sanitizer/asan_interface.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../gblm_compress/kernels/bitmask.h"
#include "../gblm_compress/kernels/many_tokens.h"
#include "../gblm_compress/kernels/quantised.h"

EXPORT void gblm_set_parallel(void *parallel, void *omp_get_thread_num, void *omp_get_num_threads);
EXPORT int gblm_bitmask_linear(const void *mask, const void *values, const int64_t *starts, const void *x, void *y, void *panels,
                               int64_t rows, int64_t words, int64_t tokens, int type, int path, int count);
EXPORT int gblm_bitmask_expand(const void *mask, const void *values, const int64_t *starts, void *dense, int64_t first,
                               int64_t rows, int64_t columns, int64_t words, int type, int path, int count);

EXPORT int gblm_quantised_linear(const void *mask, const void *values, const int64_t *starts, const void *levels,
                                 const void *scales, const float *sums, const void *x, void *y, void *rounded, int64_t rows,
                                 int64_t words, int64_t columns, int64_t tokens, int64_t stride, int group, int type, int path,
                                 int count);
EXPORT int gblm_quantised_restore(const void *mask, const void *values, const int64_t *starts, const void *levels,
                                  const void *scales, void *dense, int64_t first, int64_t rows, int64_t words,
                                  int64_t columns, int64_t stride, int group, int type, int path, int count);

enum { CANARY = 64, FILL = 0xa5, LARGEST = 32 << 20, POOL = 1 << 16 };

static const char *const PATH_NAMES[PATHS] = {"portable", "neon", "neon-dot", "avx2", "avx-vnni", "vnni", "avx512", "amx"};

static uint64_t state;
static uint64_t number(void) { /* xorshift64* */
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return state * 2685821657736338717ull;
}
static int64_t below(int64_t n) { return (int64_t)(number() >> 11) % n; }
static int64_t one_of(const int64_t *list, int64_t n) { return list[below(n)]; }
#define ONE_OF(...) one_of((const int64_t[]){__VA_ARGS__}, sizeof((int64_t[]){__VA_ARGS__}) / 8)

static void fail(const char *what) {
    fprintf(stderr, "sanitize: %s\n", what);
    abort();
}

/* ---- buffers that end at a page without access ---- */

typedef struct {
    char *end;
    size_t size, poisoned;
} Buffer;

static Buffer made(void) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    char *memory = mmap(NULL, LARGEST + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory + LARGEST, page, PROT_NONE)) fail("mmap");
    return (Buffer){memory + LARGEST, 0, 0};
}

static void *sized(Buffer *buffer, size_t size) {
    if (size > LARGEST - CANARY - 8) fail("a case is too large");
    ASAN_UNPOISON_MEMORY_REGION(buffer->end - buffer->poisoned, buffer->poisoned);
    buffer->size = size;
    buffer->poisoned = (size + 7) / 8 * 8 + CANARY; /* from here to the buffer */
    memset(buffer->end - buffer->poisoned, FILL, buffer->poisoned);
    ASAN_POISON_MEMORY_REGION(buffer->end - buffer->poisoned, buffer->poisoned - (size + 7) / 8 * 8);
    return buffer->end - size;
}

static void check_canary(Buffer *buffer) {
    ASAN_UNPOISON_MEMORY_REGION(buffer->end - buffer->poisoned, buffer->poisoned);
    for (char *at = buffer->end - buffer->poisoned; at < buffer->end - buffer->size; at++)
        if (*at != (char)FILL) fail("written before a buffer");
}

static int untouched(const Buffer *buffer) {
    for (char *at = buffer->end - buffer->size; at < buffer->end; at++)
        if (*at != (char)FILL) return 0;
    return 1;
}

/* ---- an OpenMP of our own: teams of any size, one thread after the other or side by side ---- */

static __thread int team_number, team_count = 1;
static int thread_number(void) { return team_number; }
static int team_size(void) { return team_count; }

typedef struct {
    void (*function)(void *);
    void *data;
    int number, count;
} Member;

static void *member(void *argument) {
    const Member *me = argument;
    team_number = me->number, team_count = me->count;
    me->function(me->data);
    team_number = 0, team_count = 1;
    return NULL;
}

static void parallel(void (*function)(void *), void *data, unsigned asked, unsigned flags) {
    (void)flags;
    Member members[16];
    pthread_t threads[16];
    const int count = 1 + (int)below(asked), side_by_side = below(200) == 0;
    for (int i = 0; i < count; i++) {
        members[i] = (Member){function, data, i, count};
        if (!side_by_side) member(members + i);
        else if (pthread_create(threads + i, NULL, member, members + i)) fail("pthread_create");
    }
    for (int i = 0; side_by_side && i < count; i++) pthread_join(threads[i], NULL);
}

/* ---- elements ---- */

static const int size_of[TYPES] = {4, 2, 2, 2};
static const double epsilon[TYPES] = {1.2e-7, 1e-3, 8e-3, 1.2e-7};
static char pool[TYPES][POOL * 4]; /* random elements */

static int type_of_x(int type) { return type == F16_X32 ? F32 : type; }

static float element(int type, const void *array, int64_t at) {
    if (type == F32) return ((const float *)array)[at];
    const uint16_t half = ((const uint16_t *)array)[at];
    return type == BF16 ? bf16_to_float(half) : f16_to_float(half);
}

static void put(int type, void *array, int64_t at, float value) {
    if (type == F32) ((float *)array)[at] = value;
    else ((uint16_t *)array)[at] = type == BF16 ? float_to_bf16(value) : float_to_f16(value);
}

static void fill_pools(void) {
    for (int type = 0; type < TYPES; type++)
        for (int64_t i = 0; i < POOL; i++) put(type, pool[type], i, (float)(below(2000001) - 1000000) / 500000);
}

static void take_elements(int type, void *array, int64_t count) {
    for (int64_t done = 0, some; done < count; done += some) {
        some = count - done < 4096 ? count - done : 4096;
        memcpy((char *)array + done * size_of[type], pool[type] + below(POOL - some) * size_of[type],
               (size_t)(some * size_of[type]));
    }
}

/* ---- a case ---- */

enum { MASK, VALUES, STARTS, X, Y, PANELS, BUFFERS };
static Buffer buffers[BUFFERS];

typedef struct {
    uint64_t *mask;
    char *values, *x;
    int64_t *starts;
    int64_t rows, columns, words, tokens;
    int type, path, threads, dense, odd; /* odd: with bits beyond the last column, or values that are no numbers */
} Case;

static Case case_of_any_kind(void) {
    Case c;
    c.type = (int)below(TYPES);
    do c.path = (int)below(PATHS);
    while (!(gblm_paths(c.type) >> c.path & 1));
    const int large = below(100) == 0;
    c.rows = below(4) ? 1 + below(12) : ONE_OF(1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 40);
    c.columns = below(3) ? 1 + below(130) : ONE_OF(1, 63, 64, 65, 127, 128, 129, 191, 256);
    if (large) c.rows = ONE_OF(64, 127, 128, 129, 200, 257), c.columns = ONE_OF(1, 65, 511, 512, 513, 700, 1100);
    c.tokens = 1 + below(FEW_TOKENS);
    if (gblm_has_many(c.type, c.path) && below(3) == 0) {
        const int long_text = below(50) == 0;
        c.tokens = long_text ? ONE_OF(127, 128, 129, 200, 257, 511, 512, 513, 600)
                             : ONE_OF(1, 8, 9, 15, 16, 17, 31, 33, 48, 63, 64, 65, 80, 97);
        if (long_text && c.rows > 40) c.rows = 1 + below(40);
    }
    c.words = (c.columns + 63) / 64;
    c.threads = 1 + (int)below(5);
    c.odd = below(8) == 0;
    c.dense = gblm_x32(c.type) && below(4) == 0;
    if (c.dense) c.columns = c.words * 64;
    c.mask = sized(&buffers[MASK], (size_t)(c.rows * c.words) * 8);
    c.starts = sized(&buffers[STARTS], (size_t)c.rows * 8);
    const int density = (int)below(5);
    const uint64_t last = c.columns % 64 ? (1ull << c.columns % 64) - 1 : ~0ull;
    int64_t bits = 0;
    for (int64_t r = 0; r < c.rows; r++) {
        c.starts[r] = bits;
        const int of_row = c.dense ? 1 : below(8) ? density : (int)below(5);
        for (int64_t w = 0; w < c.words; w++) {
            uint64_t word = of_row == 0 ? 0 : of_row == 1 ? ~0ull : of_row == 2 ? number() & number() & number() : number();
            if (w == c.words - 1 && !c.odd) word &= last;
            c.mask[r * c.words + w] = word;
            bits += __builtin_popcountll(word);
        }
    }
    const int64_t padding = c.dense ? 0 : 64;
    c.values = sized(&buffers[VALUES], (size_t)((bits + padding) * size_of[c.type]));
    take_elements(c.type, c.values, bits);
    for (int64_t i = 0; c.odd && i < bits; i += 1 + below(9)) put(c.type, c.values, i, below(2) ? NAN : INFINITY);
    memset(c.values + bits * size_of[c.type], 0, (size_t)(padding * size_of[c.type]));
    return c;
}

static int run(const Case *c, void *y, int64_t rows, int64_t words, int64_t tokens, int type, int path, int threads,
               void *panels) {
    return gblm_bitmask_linear(c->dense ? NULL : c->mask, c->values, c->dense ? NULL : c->starts, c->x, y, panels, rows, words, tokens, type, path, threads);
}

static void refuse_linear(const Case *c, void *y) {
    const int64_t edge = ONE_OF(INT64_MIN, -1, 0, 9, 64, INT64_MAX);
    const int small = (int)ONE_OF(INT32_MIN, -1, PATHS, PATHS + 1, 40, INT32_MAX);
    int done = 1;
    switch (below(6)) {
    case 0: done = run(c, y, edge < 0 ? edge : -1, c->words, c->tokens, c->type, c->path, c->threads, NULL); break;
    case 1: done = run(c, y, c->rows, edge <= 0 ? edge : 0, c->tokens, c->type, c->path, c->threads, NULL); break;
    case 2: done = run(c, y, c->rows, c->words, edge, c->type, c->path, c->threads, NULL); break;
    case 3: done = run(c, y, c->rows, c->words, c->tokens, small, c->path, c->threads, NULL); break;
    case 4: done = run(c, y, c->rows, c->words, c->tokens, c->type, small, c->threads, NULL); break;
    case 5: done = run(c, y, c->rows, c->words, c->tokens, c->type, c->path, small < 0 ? small : 0, NULL); break;
    }
    if (done || !untouched(&buffers[Y])) fail("a number out of range was taken");
}

static void linear(Case *c) {
    const int64_t stride = c->words * 64;
    const int many = c->tokens > FEW_TOKENS || (gblm_has_many(c->type, c->path) && below(4) == 0);
    const int x_type = type_of_x(c->type);
    const int64_t x_size = size_of[x_type];
    c->x = sized(&buffers[X], (size_t)(c->tokens * stride * x_size));
    take_elements(x_type, c->x, c->tokens * stride);
    for (int64_t t = 0; t < c->tokens; t++)
        memset(c->x + (t * stride + c->columns) * x_size, 0, (size_t)((stride - c->columns) * x_size));
    void *y = sized(&buffers[Y], (size_t)(c->tokens * c->rows * x_size));
    if (below(50) == 0) {
        refuse_linear(c, y);
        return;
    }
    void *panels = many ? sized(&buffers[PANELS], (size_t)gblm_panel_bytes(c->words, c->tokens, c->type)) : NULL;
    if (!run(c, y, c->rows, c->words, c->tokens, c->type, c->path, c->threads, panels)) fail("a valid product was refused");
    if (many) check_canary(&buffers[PANELS]);
    for (int64_t r = 0; !c->odd && r < c->rows; r++)
        for (int64_t t = 0; t < c->tokens; t++) {
            double sum = 0, scale = 0;
            int64_t v = c->starts[r];
            for (int64_t w = 0; w < c->words; w++)
                for (uint64_t bits = c->mask[r * c->words + w]; bits; bits &= bits - 1, v++) {
                    const double product = (double)element(c->type, c->values, v) *
                                           element(x_type, c->x, t * stride + w * 64 + __builtin_ctzll(bits));
                    sum += product;
                    scale += fabs(product);
                }
            if (!(fabs(element(x_type, y, t * c->rows + r) - sum) <= 1e-5 * scale + epsilon[c->type] * fabs(sum) + 1e-7))
                fail("a product is wrong");
        }
}

static int expand_rows(const Case *c, void *dense, int64_t first, int64_t count, int64_t columns) {
    return gblm_bitmask_expand(c->mask, c->values, c->starts, dense, first, count, columns, c->words, c->type, c->path,
                               c->threads);
}

static void expand(Case *c) {
    const int64_t first = below(c->rows), count = below(c->rows - first + 1), size = size_of[c->type];
    char *dense = sized(&buffers[Y], (size_t)(count * c->columns * size));
    if (below(50) == 0) {
        const int64_t columns = ONE_OF(INT64_MIN, -1, 0, (c->words - 1) * 64, c->words * 64 + 1, INT64_MAX);
        if (expand_rows(c, dense, first, count, columns) || !untouched(&buffers[Y]))
            fail("columns that are not the mask's were taken");
        return;
    }
    if (!expand_rows(c, dense, first, count, c->columns)) fail("a valid expansion was refused");
    for (int64_t r = 0; !c->odd && r < count; r++) {
        int64_t v = c->starts[first + r];
        for (int64_t column = 0; column < c->columns; column++) {
            const int alive = c->mask[(first + r) * c->words + column / 64] >> column % 64 & 1;
            const char *got = dense + (r * c->columns + column) * size;
            if (memcmp(got, alive ? c->values + v * size : (const char[4]){0}, (size_t)size)) fail("an expansion is wrong");
            v += alive;
        }
    }
}

/* ---- quantised weights ---- */

enum { Q_MASK, Q_VALUES, Q_STARTS, Q_LEVELS, Q_SCALES, Q_SUMS, Q_X, Q_Y, Q_ROUNDED, Q_SPREAD, Q_SPREAD_SCALES, Q_BUFFERS };
static Buffer quantised_buffers[Q_BUFFERS];
static double dense_weight[40][700];

static void quantised(long long *by_path) {
    Buffer *held = quantised_buffers;
    const int type = (int)below(3), kind = (int)below(3), size = type == F32 ? 4 : 2, threads = 1 + (int)below(5); /* kind: int8, int4, all */
    int path;
    do path = (int)below(PATHS);
    while (!(gblm_quantised_paths() >> path & 1));
    const int group = (int)ONE_OF(0, 32, 64, 128), density = (int)below(4);
    const int64_t rows = below(6) ? 1 + below(12) : 30 + below(11), tokens = below(4) ? 1 + below(8) : ONE_OF(9, 16, 30, 97);
    const int64_t columns = below(5) ? 1 + below(130) : ONE_OF(63, 64, 65, 128, 192, 511, 513, 700);
    const int64_t words = (columns + 63) / 64;
    const int64_t groups = group ? (columns + group - 1) / group : 1, stride = kind == 1 && below(2) ? 16 : 0;
    uint64_t *mask = sized(held + Q_MASK, (size_t)(rows * words * 8));
    int64_t *starts = sized(held + Q_STARTS, (size_t)rows * 8), bytes = 0;
    int8_t *levels = sized(held + Q_LEVELS, (size_t)(stride ? 16 * rows : 16));
    uint16_t *scales = sized(held + Q_SCALES, (size_t)(rows * groups * 2));
    float *sums = sized(held + Q_SUMS, (size_t)rows * 4);
    for (int64_t i = 0; i < (stride ? 16 * rows : 16); i++) levels[i] = (int8_t)(below(255) - 127);
    for (int64_t i = 0; i < rows * groups; i++) scales[i] = float_to_f16((float)below(1000) / 1000);
    for (int64_t r = 0; r < rows; r++) {
        starts[r] = bytes;
        for (int64_t w = 0; w < words; w++) {
            uint64_t word = density == 0 ? 0 : density == 1 ? ~0ull : density == 2 ? number() & number() : number();
            if (w == words - 1 && columns % 64) word &= (1ull << columns % 64) - 1;
            mask[r * words + w] = word;
            const int bits = __builtin_popcountll(word);
            bytes += kind == 2 ? 64 : kind == 1 ? (bits + 1) / 2 : bits;
        }
    }
    const int64_t padding = kind == 2 ? 0 : 64;
    uint8_t *values = sized(held + Q_VALUES, (size_t)(bytes + padding));
    for (int64_t i = 0; i < bytes; i++) {
        values[i] = (uint8_t)number();
        if (kind != 1 && values[i] == 128) values[i] = 129;
    }
    memset(values + bytes, 0, (size_t)padding);
    for (int64_t r = 0; r < rows; r++) { /* the oracle's matrix */
        const uint8_t *v = values + (kind == 2 ? r * words * 64 : starts[r]);
        double sum = 0;
        for (int64_t w = 0; w < words; w++) {
            int at = 0;
            for (int b = 0; b < 64; b++) {
                const int64_t c = 64 * w + b;
                const int stored = kind == 2 || (mask[r * words + w] >> b & 1);
                if (kind == 2 && c >= columns) ((uint8_t *)v)[at] = 0;
                const int level = !stored ? 0 : kind == 1 ? levels[r * stride + (v[at / 2] >> (at % 2 * 4) & 15)] : (int8_t)v[at];
                at += stored;
                if (c >= columns) continue;
                const double scale = f16_to_float(scales[r * groups + (group ? c / group : 0)]);
                dense_weight[r][c] = scale * level;
                sum += group ? scale * level : level;
            }
            v += kind == 2 ? 64 : kind == 1 ? (at + 1) / 2 : at;
        }
        sums[r] = (float)sum;
    }
    const int hostile = below(50) == 0;
    int fault[4] = {group, type, path, threads};
    if (hostile) fault[below(4)] = (int)ONE_OF(INT32_MIN, -1, PATHS, 33, INT32_MAX);
    const int refused = hostile && !(fault[3] > 0 && fault[0] == group && fault[1] == type && fault[2] == path);
    void *const starts_or_none = kind == 2 ? NULL : starts, *const mask_or_none = kind == 2 ? NULL : mask;
    void *const table = kind == 1 ? levels : NULL;
    if (fault[3] > 16) fault[3] = 16;
    const int spread = kind == 1 && !stride && !hostile && gblm_spreads(path, 1, 1) && below(2);
    if (below(3) == 0) {
        const int64_t first = below(rows), count = below(rows - first + 1);
        char *dense = sized(held + Q_Y, (size_t)(count * columns * size));
        const int done = gblm_quantised_restore(mask_or_none, values, starts_or_none, table, scales, dense, first, count, words,
                                                columns, stride, fault[0], fault[1], fault[2], fault[3]);
        if (done == refused || (refused && !untouched(held + Q_Y))) fail("a restoration was taken or refused wrongly");
        for (int64_t r = 0; done && r < count; r++)
            for (int64_t c = 0; c < columns; c++) {
                char expected[4];
                put(type, expected, 0, (float)dense_weight[first + r][c]);
                if (memcmp(expected, dense + (r * columns + c) * size, (size_t)size)) fail("a restored weight is wrong");
            }
    } else {
        char *x = sized(held + Q_X, (size_t)(tokens * columns * size)), *y = sized(held + Q_Y, (size_t)(tokens * rows * size));
        take_elements(type, x, tokens * columns);
        void *rounded = sized(held + Q_ROUNDED, (size_t)gblm_quantised_bytes(words, tokens));
        const int done = spread || gblm_quantised_linear(mask_or_none, values, starts_or_none, table, scales, sums, x, y, rounded,
                                                         rows, words, columns, tokens, stride, fault[0], fault[1], fault[2], fault[3]);
        if (spread) {
            Quantised job = {mask, values, starts, table, scales, sums, NULL, NULL, y, rows, words, tokens, columns, groups, 0,
                             group, type, path, 0, 0};
            uint8_t *spread_values = sized(held + Q_SPREAD, (size_t)gblm_spread_bytes(&job));
            uint16_t *spread_scales = sized(held + Q_SPREAD_SCALES, (size_t)gblm_spread_scales(&job) * 2);
            gblm_spread(&job, spread_values, spread_scales);
            job.values = spread_values, job.scales = spread_scales, job.mask = NULL, job.starts = NULL;
            const Threads team = gblm_threads(threads);
            gblm_quantised_run(&job, 1, x, rounded, &team);
        }
        if (done == refused || (refused && !untouched(held + Q_Y))) fail("a quantised product was taken or refused wrongly");
        const int eight = spread || (path >= AVX2_PATH && tokens > FEW_TOKENS); /* bits of the inputs; else 16 */
        const int64_t block = eight ? 32 : columns;
        for (int64_t r = 0; done && r < rows; r++)
            for (int64_t t = 0; t < tokens; t++) {
                double sum = 0, scale = 0, steps = 0;
                for (int64_t first = 0; first < columns; first += block) {
                    double weights = 0, most = 0;
                    for (int64_t c = first; c < first + block && c < columns; c++) {
                        const double input = element(type, x, t * columns + c), product = input * dense_weight[r][c];
                        sum += product, scale += fabs(product), weights += fabs(dense_weight[r][c]), most = fmax(most, fabs(input));
                    }
                    steps += most * weights / (eight ? 127 : 32767);
                }
                const double allowed = 0.51 * steps + 2e-5 * scale + epsilon[type] * fabs(sum) + 1e-7;
                if (!(fabs(element(type, y, t * rows + r) - sum) <= allowed)) fail("a quantised product is wrong");
            }
    }
    for (int i = 0; i < Q_BUFFERS; i++) check_canary(held + i);
    by_path[path]++;
}

int main(int count, char **arguments) {
    if (count < 2) fail("give the number of cases");
    const long long cases = atoll(arguments[1]);
    state = 88172645463325252ull + (count > 2 ? strtoull(arguments[2], NULL, 10) : 0);
    long long by_path[TYPES][PATHS] = {0};
    for (int i = 0; i < BUFFERS; i++) buffers[i] = made();
    long long quantised_by_path[PATHS] = {0};
    for (int i = 0; i < Q_BUFFERS; i++) quantised_buffers[i] = made();
    fill_pools();
    gblm_set_parallel((void *)parallel, (void *)thread_number, (void *)team_size);
    for (long long done = 0; done < cases; done++) {
        if (below(3) == 0) {
            quantised(quantised_by_path);
            continue;
        }
        Case c = case_of_any_kind();
        if (c.tokens > FEW_TOKENS || c.dense || below(3)) linear(&c);
        else expand(&c);
        for (int i = 0; i < PANELS; i++) check_canary(&buffers[i]);
        by_path[c.type][c.path]++;
    }
    printf("kernels: %lld cases, every result right\n", cases);
    for (int type = 0; type < TYPES; type++)
        for (int path = 0; path < PATHS; path++)
            if (by_path[type][path])
                printf("  %-12s %-9s %lld\n", (const char *[]){"float32", "float16", "bfloat16", "float16, x 32"}[type],
                       PATH_NAMES[path], by_path[type][path]);
    for (int path = 0; path < PATHS; path++)
        if (quantised_by_path[path]) printf("  %-12s %-9s %lld\n", "quantised", PATH_NAMES[path], quantised_by_path[path]);
    return 0;
}
