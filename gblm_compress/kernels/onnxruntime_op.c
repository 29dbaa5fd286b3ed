/* The custom operator gblm.BitmaskLinear of ONNX Runtime: y = x Wᵀ in fp32, W in the bitmask layout, for one or more weights
 * that multiply the same x: fewer calls, one meeting of the threads, and x is packed once.
 *
 *     BitmaskLinear(x [..., words·64] float,
 *                   mask [rows, words] int64, values [nonzeros + 64] float, starts [rows] int64, … of the next weight)
 *         -> y [..., rows] float, … of the next weight
 *
 * ONNX Runtime loads this library by its path and calls RegisterCustomOps. Compiled without ONNX Runtime's C header
 * (Debian: libonnxruntime-dev) it has no such function, and the rest of the library is the same.
 */
#ifdef __has_include
#if __has_include(<onnxruntime/onnxruntime_c_api.h>)
#define GBLM_HEADER <onnxruntime/onnxruntime_c_api.h>
#elif __has_include(<onnxruntime_c_api.h>)
#define GBLM_HEADER <onnxruntime_c_api.h>
#endif
#endif

#ifdef GBLM_HEADER
#include GBLM_HEADER
#include <stdlib.h>
#include <unistd.h>

#include "bitmask.h"

enum { MAX_RANK = 8, MAX_WEIGHTS = 8, PARALLEL_FOR_SINCE = 17 };
static const OrtApi *ort;
static int path, parts;

#define TRY(CALL)                               \
    do {                                        \
        OrtStatusPtr status = (CALL);           \
        if (status) return status;              \
    } while (0)

static OrtStatusPtr invalid(const char *message) { return ort->CreateStatus(ORT_INVALID_ARGUMENT, message); }

static OrtStatusPtr shape_of(const OrtValue *value, int64_t shape[MAX_RANK], size_t *rank) {
    OrtTensorTypeAndShapeInfo *info;
    TRY(ort->GetTensorTypeAndShape(value, &info));
    OrtStatusPtr status = ort->GetDimensionsCount(info, rank);
    if (!status && *rank > MAX_RANK) status = invalid("BitmaskLinear: more than 8 dimensions");
    if (!status) status = ort->GetDimensions(info, shape, *rank);
    ort->ReleaseTensorTypeAndShapeInfo(info);
    return status;
}

typedef struct {
    void (*part)(void *, int);
    void *work;
} Region;

static void region_part(void *argument, size_t index) {
    const Region *region = argument;
    region->part(region->work, (int)index);
}

/* On the threads of the session. */
static void run_session(void *context, void (*part)(void *, int), void *work, int count) {
    Region region = {part, work};
    OrtStatusPtr status = ort->KernelContext_ParallelFor(context, region_part, (size_t)count, 0, &region);
    if (!status) return;
    ort->ReleaseStatus(status);
    for (int i = 0; i < count; i++) part(work, i);
}

static OrtStatusPtr data_of(OrtKernelContext *context, size_t index, const OrtValue **value, const void **data) {
    TRY(ort->KernelContext_GetInput(context, index, value));
    return ort->GetTensorMutableData((OrtValue *)*value, (void **)data);
}

static OrtStatusPtr ORT_API_CALL compute(void *kernel, OrtKernelContext *context) {
    (void)kernel;
    Job jobs[MAX_WEIGHTS] = {0};
    const OrtValue *value;
    const void *x;
    int64_t shape[MAX_RANK], packed[MAX_RANK], tokens = 1;
    size_t rank, packed_rank, inputs;
    TRY(ort->KernelContext_GetInputCount(context, &inputs));
    const int count = (int)(inputs / 3);
    if (inputs % 3 != 1 || count < 1 || count > MAX_WEIGHTS)
        return invalid("BitmaskLinear: needs x, then mask, values and starts of 1 to 8 weights");
    TRY(data_of(context, 0, &value, &x));
    TRY(shape_of(value, shape, &rank));
    for (size_t i = 0; i + 1 < rank; i++) tokens *= shape[i];
    const int64_t columns = rank ? shape[rank - 1] : 0;
    for (int i = 0; i < count; i++) {
        Job *job = jobs + i;
        TRY(data_of(context, 3 * i + 2, &value, &job->values));
        TRY(data_of(context, 3 * i + 3, &value, (const void **)&job->starts));
        TRY(data_of(context, 3 * i + 1, &value, (const void **)&job->mask));
        TRY(shape_of(value, packed, &packed_rank));
        if (packed_rank != 2 || columns != packed[1] * 64)
            return invalid("BitmaskLinear: the last dimension of x must be 64 times the words in a row of each mask");
        OrtValue *output;
        shape[rank - 1] = job->rows = packed[0];
        TRY(ort->KernelContext_GetOutput(context, i, shape, rank, &output));
        TRY(ort->GetTensorMutableData(output, &job->y));
        job->words = packed[1];
        job->x = x;
        job->tokens = tokens;
        job->type = F32;
        job->path = path;
    }
    if (tokens == 0) return NULL;
    const Threads threads = {run_session, context, parts};
    if (tokens > FEW_TOKENS && gblm_has_many(F32, path)) {
        void *panels = aligned_alloc(64, (size_t)gblm_panel_bytes(jobs->words, tokens, F32));
        if (!panels) return ort->CreateStatus(ORT_FAIL, "BitmaskLinear: out of memory");
        for (int i = 0; i < count; i++) jobs[i].panels = panels;
        gblm_many_tokens(jobs, count, &threads);
        free(panels);
        return NULL;
    }
    for (int64_t first = 0; first < tokens; first += FEW_TOKENS) {
        for (int i = 0; i < count; i++)
            jobs[i].tokens = tokens - first < FEW_TOKENS ? tokens - first : FEW_TOKENS;
        gblm_few_tokens(jobs, count, &threads);
        for (int i = 0; i < count; i++) {
            jobs[i].x = (const float *)jobs[i].x + FEW_TOKENS * columns;
            jobs[i].y = (float *)jobs[i].y + FEW_TOKENS * jobs[i].rows;
        }
    }
    return NULL;
}

static OrtStatusPtr ORT_API_CALL create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **kernel) {
    (void)api, (void)info;
    *kernel = (void *)op; /* it has no state */
    return NULL;
}

static void ORT_API_CALL destroy(void *kernel) { (void)kernel; }

static const char *ORT_API_CALL name(const OrtCustomOp *op) {
    (void)op;
    return "BitmaskLinear";
}

static const char *ORT_API_CALL provider(const OrtCustomOp *op) {
    (void)op;
    return "CPUExecutionProvider";
}

/* x, and as many tensors as there are. */
static size_t ORT_API_CALL input_count(const OrtCustomOp *op) {
    (void)op;
    return 2;
}

static size_t ORT_API_CALL output_count(const OrtCustomOp *op) {
    (void)op;
    return 1;
}

static ONNXTensorElementDataType ORT_API_CALL input_type(const OrtCustomOp *op, size_t index) {
    (void)op;
    return index ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}

static ONNXTensorElementDataType ORT_API_CALL output_type(const OrtCustomOp *op, size_t index) {
    (void)op, (void)index;
    return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}

static OrtCustomOpInputOutputCharacteristic ORT_API_CALL input_characteristic(const OrtCustomOp *op, size_t index) {
    (void)op;
    return index ? INPUT_OUTPUT_VARIADIC : INPUT_OUTPUT_REQUIRED;
}

static OrtCustomOpInputOutputCharacteristic ORT_API_CALL output_characteristic(const OrtCustomOp *op, size_t index) {
    (void)op, (void)index;
    return INPUT_OUTPUT_VARIADIC;
}

static int ORT_API_CALL one(const OrtCustomOp *op) {
    (void)op;
    return 1;
}

static int ORT_API_CALL none(const OrtCustomOp *op) {
    (void)op;
    return 0;
}

static OrtMemType ORT_API_CALL memory(const OrtCustomOp *op, size_t index) {
    (void)op, (void)index;
    return OrtMemTypeDefault;
}

static int ORT_API_CALL end_version(const OrtCustomOp *op) {
    (void)op;
    return INT32_MAX;
}

static OrtCustomOp operation = {
    .GetName = name,
    .GetExecutionProviderType = provider,
    .GetInputType = input_type,
    .GetInputTypeCount = input_count,
    .GetOutputType = output_type,
    .GetOutputTypeCount = output_count,
    .KernelDestroy = destroy,
    .GetInputCharacteristic = input_characteristic,
    .GetOutputCharacteristic = output_characteristic,
    .GetVariadicInputMinArity = one,
    .GetVariadicInputHomogeneity = none, /* masks and starts are int64, values float */
    .GetVariadicOutputMinArity = one,
    .GetVariadicOutputHomogeneity = one,
    .GetInputMemoryType = memory,
    .CreateKernelV2 = create,
    .KernelComputeV2 = compute,
    .GetStartVersion = one,
    .GetEndVersion = end_version,
};

/* Called by ONNX Runtime for every session that asks for this library. The domain lives as long as the process. */
EXPORT OrtStatusPtr ORT_API_CALL RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
    static OrtCustomOpDomain *domain;
    if (!domain) {
        /* the oldest interface that has all that is used here, so that the header may be newer than the runtime */
        ort = base->GetApi(PARALLEL_FOR_SINCE);
        operation.version = PARALLEL_FOR_SINCE;
        const int paths = gblm_paths(F32);
        for (int i = 0; i < PATHS; i++)
            if (paths >> i & 1) path = i;
        const long processors = sysconf(_SC_NPROCESSORS_ONLN);
        parts = processors > 0 ? (int)processors : 1;
        TRY(ort->CreateCustomOpDomain("gblm", &domain));
        TRY(ort->CustomOpDomain_Add(domain, &operation));
    }
    return ort->AddCustomOpDomain(options, domain);
}
#endif
