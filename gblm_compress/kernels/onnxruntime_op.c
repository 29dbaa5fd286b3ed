/* The custom operators of ONNX Runtime in the domain gblm, version 3. y = x Wᵀ, x and y and the arithmetic in fp32, the
 * weights in fp32 or fp16:
 *
 *     BitmaskLinear(x [..., words·64] float,
 *                   mask [rows, words] int64, values [nonzeros + 64] float or float16, starts [rows] int64,
 *                   … of up to 7 more weights of the same words and type)
 *         -> y [..., rows] float, … of the next weight
 *     DenseLinear(x [..., columns] float, weight [rows, columns] float or float16; columns is a multiple of 64)
 *         -> y [..., rows] float
 *
 * Bit b of word w of a row says whether column 64·w + b is among the values, which lie row after row; starts says where those
 * of a row begin. Several weights that multiply the same x take one call: one meeting of the threads, and x is packed once.
 * QuantisedLinear is in onnxruntime_quantised.c. Version 1 had BitmaskLinear alone, in fp32, version 2 not QuantisedLinear;
 * their graphs run.
 *
 * The weights are constant initializers: a session checks every bit of the masks when it is made; what is left to check in a
 * run is x. ONNX Runtime may map the file with the initializers, at any offset: another process could write into it, so that
 * what decides where a kernel reads, mask and starts, is kept as a copy, and values that are not aligned are copied too.
 *
 * ONNX Runtime 1.17 or newer loads this library by its path, from any language, and calls RegisterCustomOps. It needs nothing
 * but the C library.
 */
#include "onnxruntime_op.h"

#include "bitmask.h"
#include "many_tokens.h"

enum { PARALLEL_FOR_SINCE = 17 };

/* ---- a session is made: the packed weights ---- */

/* A node with its weights: what is known of each Job before there is an x. */
typedef struct {
    int count;
    Job jobs[MAX_WEIGHTS];
    void *owned[MAX_WEIGHTS][3]; /* copies of mask, starts and perhaps values */
} Linear;

/* The values of a weight, of which ONNX Runtime keeps the memory; copied where they are not aligned. */
static OrtStatusPtr take_values(const char *operator, Job *job, const Form *form, const void *data, void **owned) {
    job->type = form->type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? F32 : F16_X32;
    TRY(gblm_choose_path(operator, gblm_paths(job->type), &job->path));
    job->values = data;
    const size_t size = job->type == F32 ? sizeof(float) : sizeof(uint16_t);
    if ((uintptr_t)data % size == 0) return NULL;
    size_t bytes = size;
    for (size_t i = 0; i < form->rank; i++) bytes *= (size_t)form->shape[i];
    if (!(*owned = malloc(bytes))) return gblm_out_of_memory();
    job->values = memcpy(*owned, data, bytes);
    return NULL;
}

static OrtStatusPtr weight_at(const OrtKernelInfo *info, size_t input, Job *job, void *owned[3]) {
    char name[200];
    const void *data;
    Form mask, values, starts;
    TRY(gblm_constant(info, "BitmaskLinear", input, "mask", "int64", 2, name, &mask, &data));
    job->rows = mask.shape[0];
    job->words = mask.shape[1];
    if (job->rows < 1 || job->words < 1 || job->words > INT64_MAX / 64)
        return gblm_invalid("BitmaskLinear: mask '%s' has shape [%lld, %lld]; it needs at least one row and one word", name,
                       (long long)job->rows, (long long)job->words);
    const size_t mask_bytes = (size_t)(job->rows * job->words) * sizeof *job->mask;
    if (!(job->mask = owned[0] = malloc(mask_bytes))) return gblm_out_of_memory();
    memcpy(owned[0], data, mask_bytes);
    TRY(gblm_constant(info, "BitmaskLinear", input + 2, "starts", "int64", 1, name, &starts, &data));
    if (starts.shape[0] != job->rows)
        return gblm_invalid("BitmaskLinear: starts '%s' has %lld elements; the mask has %lld rows", name,
                       (long long)starts.shape[0], (long long)job->rows);
    const size_t starts_bytes = (size_t)job->rows * sizeof *job->starts;
    if (!(job->starts = owned[1] = malloc(starts_bytes))) return gblm_out_of_memory();
    memcpy(owned[1], data, starts_bytes);
    int64_t bits = 0;
    for (int64_t row = 0; row < job->rows; row++) {
        if (job->starts[row] != bits)
            return gblm_invalid("BitmaskLinear: starts '%s' says %lld at row %lld; the rows before it have %lld bits", name,
                           (long long)job->starts[row], (long long)row, (long long)bits);
        for (int64_t word = 0; word < job->words; word++)
            bits += __builtin_popcountll(job->mask[row * job->words + word]);
    }
    TRY(gblm_constant(info, "BitmaskLinear", input + 1, "values", "float or float16", 1, name, &values, &data));
    if (values.shape[0] != bits + PADDING)
        return gblm_invalid("BitmaskLinear: values '%s' has %lld elements; the mask has %lld bits, which takes %lld with %d of "
                       "padding",
                       name, (long long)values.shape[0], (long long)bits, (long long)bits + PADDING, (int)PADDING);
    return take_values("BitmaskLinear", job, &values, data, &owned[2]);
}

static OrtStatusPtr weights_of(const OrtKernelInfo *info, Linear *linear) {
    size_t inputs, outputs;
    TRY(gblm_ort->KernelInfo_GetInputCount(info, &inputs));
    TRY(gblm_ort->KernelInfo_GetOutputCount(info, &outputs));
    const size_t count = inputs / 3;
    if (inputs % 3 != 1 || count < 1 || count > MAX_WEIGHTS || outputs != count)
        return gblm_invalid("BitmaskLinear: needs x, then mask, values and starts of 1 to %d weights, and an output for each; it "
                       "has %zu inputs and %zu outputs",
                       (int)MAX_WEIGHTS, inputs, outputs);
    linear->count = (int)count;
    for (size_t i = 0; i < count; i++) {
        TRY(weight_at(info, 3 * i + 1, linear->jobs + i, linear->owned[i]));
        if (linear->jobs[i].words != linear->jobs->words)
            return gblm_invalid("BitmaskLinear: the masks have %lld and %lld words in a row; all multiply the same x",
                           (long long)linear->jobs->words, (long long)linear->jobs[i].words);
        if (linear->jobs[i].type != linear->jobs->type)
            return gblm_invalid("BitmaskLinear: the values of weight 0 and weight %zu are of different types", i);
    }
    return NULL;
}

static OrtStatusPtr dense_weight_of(const OrtKernelInfo *info, Linear *linear) {
    char name[200];
    const void *data;
    Form form;
    size_t inputs;
    TRY(gblm_ort->KernelInfo_GetInputCount(info, &inputs));
    if (inputs != 2) return gblm_invalid("DenseLinear: needs x and a weight; it has %zu inputs", inputs);
    TRY(gblm_constant(info, "DenseLinear", 1, "weight", "float or float16", 2, name, &form, &data));
    if (form.shape[0] < 1 || form.shape[1] < 1 || form.shape[1] % 64)
        return gblm_invalid("DenseLinear: weight '%s' has shape [%lld, %lld]; it needs rows, and columns in multiples of 64", name,
                       (long long)form.shape[0], (long long)form.shape[1]);
    linear->count = 1;
    linear->jobs->rows = form.shape[0];
    linear->jobs->words = form.shape[1] / 64;
    return take_values("DenseLinear", linear->jobs, &form, data, &linear->owned[0][2]);
}

static void ORT_API_CALL destroy(void *kernel) {
    Linear *linear = kernel;
    for (int i = 0; i < MAX_WEIGHTS; i++)
        for (int j = 0; j < 3; j++) free(linear->owned[i][j]);
    free(linear);
}

static OrtStatusPtr created(OrtStatusPtr (*weights)(const OrtKernelInfo *, Linear *), const OrtKernelInfo *info,
                            void **kernel) {
    Linear *linear = calloc(1, sizeof *linear);
    if (!linear) return gblm_out_of_memory();
    OrtStatusPtr status = weights(info, linear);
    if (status) destroy(linear);
    else *kernel = linear;
    return status;
}

static OrtStatusPtr ORT_API_CALL create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **kernel) {
    (void)op, (void)api;
    return created(weights_of, info, kernel);
}

static OrtStatusPtr ORT_API_CALL create_dense(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info,
                                              void **kernel) {
    (void)op, (void)api;
    return created(dense_weight_of, info, kernel);
}

/* ---- a run: x ---- */

static OrtStatusPtr ORT_API_CALL compute(void *kernel, OrtKernelContext *context) {
    const Linear *linear = kernel;
    const int count = linear->count;
    const char *operator = linear->jobs->mask ? "BitmaskLinear" : "DenseLinear";
    const int64_t columns = linear->jobs->words * 64;
    Job jobs[MAX_WEIGHTS];
    Form form;
    const void *x;
    int64_t tokens;
    TRY(gblm_take_x(context, operator, columns, &form, &x, &tokens));
    memcpy(jobs, linear->jobs, sizeof jobs);
    for (int i = 0; i < count; i++) {
        TRY(gblm_take_y(context, operator, i, &form, jobs[i].rows, &jobs[i].y));
        jobs[i].x = x;
        jobs[i].tokens = tokens;
    }
    if (tokens == 0) return NULL;
    const Threads threads = {gblm_run_session, context, gblm_parts};
    if (tokens > FEW_TOKENS && gblm_has_many(jobs->type, jobs->path)) {
        void *panels = aligned_alloc(64, (size_t)gblm_panel_bytes(jobs->words, tokens, jobs->type));
        if (!panels) return gblm_out_of_memory();
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

static const char *ORT_API_CALL name(const OrtCustomOp *op) {
    (void)op;
    return "BitmaskLinear";
}

static const char *ORT_API_CALL dense_name(const OrtCustomOp *op) {
    (void)op;
    return "DenseLinear";
}

static const char *ORT_API_CALL provider(const OrtCustomOp *op) {
    (void)op;
    return "CPUExecutionProvider";
}

/* x and the weight, or as many tensors as there are. */
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

static OrtCustomOpInputOutputCharacteristic ORT_API_CALL required(const OrtCustomOp *op, size_t index) {
    (void)op, (void)index;
    return INPUT_OUTPUT_REQUIRED;
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
    .GetVariadicInputHomogeneity = none, /* masks and starts are int64, values are not */
    .GetVariadicOutputMinArity = one,
    .GetVariadicOutputHomogeneity = one,
    .GetInputMemoryType = memory,
    .CreateKernelV2 = create,
    .KernelComputeV2 = compute,
    .GetStartVersion = one,
    .GetEndVersion = end_version,
};

static OrtCustomOp quantised_operation, dense_operation; /* as `operation`, but for the name, the weight, and inputs that are no list */

/* Called by ONNX Runtime for every session that asks for this library, from any thread. The domain lives as long as the
 * process. */
EXPORT OrtStatusPtr ORT_API_CALL RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    static OrtCustomOpDomain *domain;
    /* the oldest interface that has all that is used here, so that the header may be newer than the runtime */
    const OrtApi *api = base->GetApi(PARALLEL_FOR_SINCE);
    if (!api) return base->GetApi(1)->CreateStatus(ORT_FAIL, "gblm: needs ONNX Runtime 1.17 or newer");
    OrtStatusPtr status = NULL;
    pthread_mutex_lock(&lock);
    if (!domain) {
        gblm_ort = api;
        operation.version = PARALLEL_FOR_SINCE;
        dense_operation = operation;
        dense_operation.GetName = dense_name;
        dense_operation.CreateKernelV2 = create_dense;
        dense_operation.GetInputCharacteristic = dense_operation.GetOutputCharacteristic = required;
        const long processors = sysconf(_SC_NPROCESSORS_ONLN);
        gblm_parts = processors > 0 ? (int)processors : 1;
        OrtCustomOpDomain *made = NULL;
        status = gblm_ort->CreateCustomOpDomain("gblm", &made);
        if (!status) status = gblm_ort->CustomOpDomain_Add(made, &operation);
        if (!status) status = gblm_ort->CustomOpDomain_Add(made, &dense_operation);
        quantised_operation = operation;
        gblm_make_quantised(&quantised_operation);
        if (!status) status = gblm_ort->CustomOpDomain_Add(made, &quantised_operation);
        if (!status) domain = made;
    }
    pthread_mutex_unlock(&lock);
    return status ? status : api->AddCustomOpDomain(options, domain);
}
