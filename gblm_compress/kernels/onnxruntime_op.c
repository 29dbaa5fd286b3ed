/* The custom operator gblm.BitmaskLinear of ONNX Runtime: y = x Wᵀ in fp32, W in the bitmask layout.
 *
 *     BitmaskLinear(x [..., words·64] float, mask [rows, words] int64, values [nonzeros + 64] float, starts [rows] int64)
 *         -> y [..., rows] float
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

enum { X, MASK, VALUES, STARTS, INPUTS };
enum { MAX_RANK = 8, PARALLEL_FOR_SINCE = 17 };
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

static OrtStatusPtr ORT_API_CALL compute(void *kernel, OrtKernelContext *context) {
    (void)kernel;
    const OrtValue *inputs[INPUTS];
    const void *data[INPUTS];
    int64_t shape[MAX_RANK], packed[MAX_RANK];
    size_t rank, packed_rank;
    for (size_t i = 0; i < INPUTS; i++) {
        TRY(ort->KernelContext_GetInput(context, i, &inputs[i]));
        TRY(ort->GetTensorMutableData((OrtValue *)inputs[i], (void **)&data[i]));
    }
    TRY(shape_of(inputs[X], shape, &rank));
    TRY(shape_of(inputs[MASK], packed, &packed_rank));
    if (rank == 0 || packed_rank != 2 || shape[rank - 1] != packed[1] * 64)
        return invalid("BitmaskLinear: the last dimension of x must be 64 times the words in a row of the mask");
    int64_t tokens = 1;
    for (size_t i = 0; i + 1 < rank; i++) tokens *= shape[i];
    shape[rank - 1] = packed[0];
    OrtValue *output;
    void *y;
    TRY(ort->KernelContext_GetOutput(context, 0, shape, rank, &output));
    TRY(ort->GetTensorMutableData(output, &y));
    if (tokens == 0) return NULL;

    Job job = {data[MASK], data[VALUES], data[STARTS], data[X], y, packed[0], packed[1], tokens, F32, path, NULL};
    const Threads threads = {run_session, context, parts};
    if (tokens > FEW_TOKENS && gblm_has_many(F32, path)) {
        job.panels = aligned_alloc(64, (size_t)gblm_panel_bytes(job.words, tokens, F32));
        if (!job.panels) return ort->CreateStatus(ORT_FAIL, "BitmaskLinear: out of memory");
        gblm_many_tokens(&job, &threads);
        free(job.panels);
        return NULL;
    }
    for (int64_t first = 0; first < tokens; first += FEW_TOKENS) {
        job.tokens = tokens - first < FEW_TOKENS ? tokens - first : FEW_TOKENS;
        job.x = (const float *)data[X] + first * job.words * 64;
        job.y = (float *)y + first * job.rows;
        gblm_few_tokens(&job, &threads);
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

static size_t ORT_API_CALL input_count(const OrtCustomOp *op) {
    (void)op;
    return INPUTS;
}

static size_t ORT_API_CALL output_count(const OrtCustomOp *op) {
    (void)op;
    return 1;
}

static ONNXTensorElementDataType ORT_API_CALL input_type(const OrtCustomOp *op, size_t index) {
    (void)op;
    return index == MASK || index == STARTS ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}

static ONNXTensorElementDataType ORT_API_CALL output_type(const OrtCustomOp *op, size_t index) {
    (void)op, (void)index;
    return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}

static OrtCustomOpInputOutputCharacteristic ORT_API_CALL required(const OrtCustomOp *op, size_t index) {
    (void)op, (void)index;
    return INPUT_OUTPUT_REQUIRED;
}

static OrtMemType ORT_API_CALL memory(const OrtCustomOp *op, size_t index) {
    (void)op, (void)index;
    return OrtMemTypeDefault;
}

static int ORT_API_CALL start_version(const OrtCustomOp *op) {
    (void)op;
    return 1;
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
    .GetInputCharacteristic = required,
    .GetOutputCharacteristic = required,
    .GetInputMemoryType = memory,
    .CreateKernelV2 = create,
    .KernelComputeV2 = compute,
    .GetStartVersion = start_version,
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
