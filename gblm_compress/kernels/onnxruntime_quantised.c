/* The custom operator gblm.QuantisedLinear of ONNX Runtime, since version 3 of the domain. y = x Wᵀ with x and y in fp32:
 *
 *     QuantisedLinear(x [..., columns] float; columns is a multiple of 64, at most 65,536
 *                     mask [rows, columns/64] int64, values [stored + 64] int8 or uint8,
 *                     scales [rows, groups] float16, levels [0] or [16] or [rows·16] int8,
 *                     … of up to 7 more weights of the same columns)
 *         -> y [..., rows] float, … of the next weight
 *
 * A weight is scale · level. Values of int8 are levels, one for each bit of the mask; levels has no element then. Values of
 * uint8 are places in levels, two to a byte, the first in its low half, and those of each word of the mask begin with a
 * byte. Without a mask, [0, 0], all weights are stored: values are int8 [rows, columns]. A scale is shared by all columns
 * of a row or by 32, 64 or 128. x is rounded once for all the weights of a node, as quantised.c says. The attribute
 * accuracy_level 0 keeps 16 bits for any number of tokens, as that of MatMulNBits keeps float32.
 *
 * What decides where a kernel reads is checked when a session is made, and kept as a copy: see onnxruntime_op.c.
 */
#include "onnxruntime_op.h"

#include "quantised.h"

#define ort gblm_ort
static const char operator_name[] = "QuantisedLinear";

enum { OWNED = 6 };
typedef struct {
    int count;
    Quantised jobs[MAX_WEIGHTS];
    void *owned[MAX_WEIGHTS][OWNED];
} Linear;

static OrtStatusPtr copied(const void *data, size_t bytes, void **owned) {
    if (!(*owned = malloc(bytes ? bytes : 1))) return gblm_out_of_memory();
    memcpy(*owned, data, bytes);
    return NULL;
}

static int bytes_of(const Quantised *job, uint64_t word) {
    const int count = __builtin_popcountll(word);
    return job->levels ? (count + 1) / 2 : count;
}

/* Where rows begin, and how many bytes all of them take. */
static int64_t fill_starts(const Quantised *job, int64_t *starts) {
    int64_t bytes = 0;
    for (int64_t row = 0; row < job->rows; row++) {
        starts[row] = bytes;
        for (int64_t word = 0; word < job->words; word++) bytes += bytes_of(job, job->mask[row * job->words + word]);
    }
    return bytes;
}

/* What kernels subtract: see `sums` in quantised.h. */
static void fill_sums(const Quantised *job, float *sums) {
    for (int64_t row = 0; row < job->rows; row++) {
        const uint8_t *v = job->values + (job->mask ? job->starts[row] : row * job->columns);
        const int8_t *levels = job->levels + row * job->stride;
        double sum = 0;
        for (int64_t word = 0; word < job->words; word++) {
            const uint64_t bits = job->mask ? job->mask[row * job->words + word] : ~0ull;
            int at = 0;
            for (uint64_t left = bits; left; left &= left - 1, at++) {
                const int level = job->levels ? levels[v[at / 2] >> (at % 2 * 4) & 15] : (int8_t)v[at];
                const int64_t group = job->group ? (64 * word + __builtin_ctzll(left)) / job->group : 0;
                sum += job->group ? (double)f16_to_float(job->scales[row * job->groups + group]) * level : level;
            }
            v += bytes_of(job, bits);
        }
        sums[row] = (float)sum;
    }
}

/* From now on the weight is a spread one, see gblm_spreads, and has neither mask nor starts. */
static OrtStatusPtr spread(Quantised *job, void *owned[OWNED]) {
    uint16_t *scales = NULL;
    if (!(owned[5] = aligned_alloc(64, (size_t)(gblm_spread_bytes(job) + 63) / 64 * 64))) return gblm_out_of_memory();
    if (job->levels && !(scales = malloc((size_t)gblm_spread_scales(job) * sizeof *scales))) return gblm_out_of_memory();
    gblm_spread(job, owned[5], scales);
    job->values = owned[5];
    free(owned[0]), free(owned[2]);
    owned[0] = owned[2] = NULL;
    job->mask = NULL, job->starts = NULL;
    if (!scales) return NULL;
    free(owned[3]);
    job->scales = owned[3] = scales;
    return NULL;
}

/* Spread the weights of a node: places of all or none, since all multiply the same x. */
static OrtStatusPtr spread_all(Linear *linear) {
    int places = 1;
    for (int i = 0; i < linear->count; i++) {
        const Quantised *job = linear->jobs + i;
        places &= job->levels && !job->stride && !job->exact;
    }
    for (int i = 0; i < linear->count; i++) {
        Quantised *job = linear->jobs + i;
        const int fits = job->mask && (places || !job->levels);
        if (fits && gblm_spreads(job->path, gblm_parts, places)) TRY(spread(job, linear->owned[i]));
    }
    return NULL;
}

static OrtStatusPtr weight_at(const OrtKernelInfo *info, size_t input, Quantised *job, void *owned[OWNED]) {
    char name[200];
    const void *data;
    Form mask, values, scales, levels;
    job->type = F32;
    TRY(gblm_choose_path(operator_name, gblm_quantised_paths(), &job->path));
    TRY(gblm_constant(info, operator_name, input, "mask", "int64", 2, name, &mask, &data));
    const int dense = mask.shape[0] == 0 && mask.shape[1] == 0;
    if (!dense) {
        if (mask.shape[0] < 1 || mask.shape[1] < 1 || mask.shape[1] > MOST_WORDS)
            return gblm_invalid("%s: mask '%s' has shape [%lld, %lld]; it needs at least one row, and 1 to %d words",
                                operator_name, name, (long long)mask.shape[0], (long long)mask.shape[1], (int)MOST_WORDS);
        TRY(copied(data, (size_t)(mask.shape[0] * mask.shape[1]) * sizeof *job->mask, &owned[0]));
        job->mask = owned[0];
        job->rows = mask.shape[0];
        job->words = mask.shape[1];
    }
    TRY(gblm_constant(info, operator_name, input + 1, "values", dense ? "int8" : "int8 or uint8", dense ? 2 : 1, name,
                      &values, &data));
    job->values = data;
    if (dense) {
        job->rows = values.shape[0];
        job->words = values.shape[1] / 64;
        if (job->rows < 1 || job->words < 1 || job->words > MOST_WORDS || values.shape[1] % 64)
            return gblm_invalid("%s: values '%s' have shape [%lld, %lld]; they need rows, and columns in multiples of 64, at most "
                                "%d",
                                operator_name, name, (long long)values.shape[0], (long long)values.shape[1],
                                (int)MOST_WORDS * 64);
    }
    job->columns = job->words * 64;
    const int places = values.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
    TRY(gblm_constant(info, operator_name, input + 3, "levels", "int8", 1, name, &levels, &data));
    if (places ? levels.shape[0] != 16 && levels.shape[0] != 16 * job->rows : levels.shape[0] != 0)
        return gblm_invalid("%s: levels '%s' have %lld elements; values of int8 need none, of uint8 16 or 16 for each row",
                            operator_name, name, (long long)levels.shape[0]);
    if (places) {
        TRY(copied(data, (size_t)levels.shape[0], &owned[1]));
        job->levels = owned[1];
        job->stride = levels.shape[0] == 16 ? 0 : 16;
    }
    if (!dense) {
        if (!(owned[2] = malloc((size_t)job->rows * sizeof *job->starts))) return gblm_out_of_memory();
        const int64_t stored = fill_starts(job, owned[2]);
        job->starts = owned[2];
        if (values.shape[0] != stored + PADDING)
            return gblm_invalid("%s: the values beside levels '%s' have %lld elements; the mask takes %lld with %d of padding",
                                operator_name, name, (long long)values.shape[0], (long long)stored + PADDING, (int)PADDING);
    }
    TRY(gblm_constant(info, operator_name, input + 2, "scales", "float16", 2, name, &scales, &data));
    job->groups = scales.shape[1];
    job->group = 0; /* of all columns; the last group of a row may be short */
    for (int group = 32; group <= 128 && job->groups > 1; group *= 2)
        if (job->groups == (job->columns + group - 1) / group) job->group = group;
    const int known = job->groups == 1 || job->group;
    if (scales.shape[0] != job->rows || !known)
        return gblm_invalid("%s: scales '%s' have shape [%lld, %lld]; %lld rows of %lld columns need one for each row, or for each "
                            "32, 64 or 128 columns",
                            operator_name, name, (long long)scales.shape[0], (long long)job->groups, (long long)job->rows,
                            (long long)job->columns);
    TRY(copied(data, (size_t)(job->rows * job->groups) * sizeof *job->scales, &owned[3]));
    job->scales = owned[3];
    if (!(owned[4] = malloc((size_t)job->rows * sizeof *job->sums))) return gblm_out_of_memory();
    fill_sums(job, owned[4]);
    job->sums = owned[4];
    return NULL;
}

/* The attribute accuracy_level, or -1. */
static int64_t accuracy_level(const OrtKernelInfo *info) {
    int64_t level;
    OrtStatusPtr status = ort->KernelInfoGetAttribute_int64(info, "accuracy_level", &level);
    if (!status) return level;
    ort->ReleaseStatus(status);
    return -1;
}

static OrtStatusPtr weights_of(const OrtKernelInfo *info, Linear *linear) {
    const int exact = accuracy_level(info) == 0;
    size_t inputs, outputs;
    TRY(ort->KernelInfo_GetInputCount(info, &inputs));
    TRY(ort->KernelInfo_GetOutputCount(info, &outputs));
    const size_t count = inputs / 4;
    if (inputs % 4 != 1 || count < 1 || count > MAX_WEIGHTS || outputs != count)
        return gblm_invalid("%s: needs x, then mask, values, scales and levels of 1 to %d weights, and an output for each; it has "
                            "%zu inputs and %zu outputs",
                            operator_name, (int)MAX_WEIGHTS, inputs, outputs);
    linear->count = (int)count;
    for (size_t i = 0; i < count; i++) {
        TRY(weight_at(info, 4 * i + 1, linear->jobs + i, linear->owned[i]));
        linear->jobs[i].exact = exact;
        if (linear->jobs[i].words != linear->jobs->words)
            return gblm_invalid("%s: the weights have %lld and %lld columns; all multiply the same x", operator_name,
                                (long long)linear->jobs->columns, (long long)linear->jobs[i].columns);
    }
    return spread_all(linear);
}

static void ORT_API_CALL destroy(void *kernel) {
    Linear *linear = kernel;
    for (int i = 0; i < MAX_WEIGHTS; i++)
        for (int j = 0; j < OWNED; j++) free(linear->owned[i][j]);
    free(linear);
}

static OrtStatusPtr ORT_API_CALL create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **kernel) {
    (void)op, (void)api;
    Linear *linear = calloc(1, sizeof *linear);
    if (!linear) return gblm_out_of_memory();
    OrtStatusPtr status = weights_of(info, linear);
    if (status) destroy(linear);
    else *kernel = linear;
    return status;
}

static OrtStatusPtr ORT_API_CALL compute(void *kernel, OrtKernelContext *context) {
    const Linear *linear = kernel;
    Quantised jobs[MAX_WEIGHTS];
    Form form;
    const void *x;
    int64_t tokens, bytes;
    TRY(gblm_take_x(context, operator_name, linear->jobs->columns, &form, &x, &tokens));
    memcpy(jobs, linear->jobs, sizeof jobs);
    for (int i = 0; i < linear->count; i++) {
        TRY(gblm_take_y(context, operator_name, i, &form, jobs[i].rows, &jobs[i].y));
        jobs[i].tokens = tokens;
    }
    if (tokens == 0) return NULL;
    bytes = gblm_quantised_bytes(jobs->words, tokens);
    void *rounded = aligned_alloc(64, (size_t)(bytes + 63) / 64 * 64);
    if (!rounded) return gblm_out_of_memory();
    const Threads threads = {gblm_run_session, context, gblm_parts};
    gblm_quantised_run(jobs, linear->count, x, rounded, &threads);
    free(rounded);
    return NULL;
}

static const char *ORT_API_CALL name(const OrtCustomOp *op) {
    (void)op;
    return operator_name;
}

void gblm_make_quantised(OrtCustomOp *operation) {
    operation->GetName = name;
    operation->CreateKernelV2 = create;
    operation->KernelDestroy = destroy;
    operation->KernelComputeV2 = compute;
}
