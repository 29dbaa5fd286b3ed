/* What the operators for ONNX Runtime share: errors, constant inputs, x and y, and the threads of a session. */
#include "onnxruntime_op.h"

const OrtApi *gblm_ort;
int gblm_parts;

OrtStatusPtr gblm_invalid(const char *format, ...) {
    char message[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    return gblm_ort->CreateStatus(ORT_INVALID_ARGUMENT, message);
}

OrtStatusPtr gblm_form_of(const OrtValue *value, Form *form) {
    OrtTensorTypeAndShapeInfo *info;
    int is_tensor = 0;
    memset(form, 0, sizeof *form);
    if (value) TRY(gblm_ort->IsTensor(value, &is_tensor));
    if (!is_tensor) return NULL; /* of undefined type */
    TRY(gblm_ort->GetTensorTypeAndShape(value, &info));
    OrtStatusPtr status = gblm_ort->GetTensorElementType(info, &form->type);
    if (!status) status = gblm_ort->GetDimensionsCount(info, &form->rank);
    if (!status && form->rank <= MAX_RANK) status = gblm_ort->GetDimensions(info, form->shape, form->rank);
    gblm_ort->ReleaseTensorTypeAndShapeInfo(info);
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
void gblm_run_session(void *context, void (*part)(void *, int), void *work, int count) {
    Region region = {part, work};
    OrtStatusPtr status = gblm_ort->KernelContext_ParallelFor(context, region_part, (size_t)count, 0, &region);
    if (!status) return;
    gblm_ort->ReleaseStatus(status);
    for (int i = 0; i < count; i++) part(work, i);
}

OrtStatusPtr gblm_out_of_memory(void) { return gblm_ort->CreateStatus(ORT_FAIL, "gblm: out of memory"); }

OrtStatusPtr gblm_choose_path(const char *operator, int paths, int *path) {
    static const char *const names[PATHS] = {"portable", "neon", "neon-dot", "avx2", "avx-vnni", "vnni", "avx512", "amx"};
    const char *forced = getenv("GBLM_COMPRESS_KERNEL");
    *path = -1;
    for (int i = 0; i < PATHS; i++)
        if (paths >> i & 1 && (!forced || !strcmp(forced, names[i]))) *path = i;
    if (*path >= 0) return NULL;
    return gblm_invalid("%s: GBLM_COMPRESS_KERNEL=%s: this CPU has no such path for these weights", operator, forced);
}

OrtStatusPtr gblm_constant(const OrtKernelInfo *info, const char *operator, size_t index, const char *role,
                           const char *types, size_t rank, char name[200], Form *form, const void **data) {
    static const struct {
        const char *name;
        ONNXTensorElementDataType type;
    } known[] = {{"int64", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64},     {"float16", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16},
                 {"float or float16", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT}, {"float or float16", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16},
                 {"int8", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8},       {"int8 or uint8", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8},
                 {"int8 or uint8", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8}};
    const OrtValue *value = NULL;
    int is_constant = 0, fits = 0;
    size_t size = 200;
    OrtStatusPtr unnamed = gblm_ort->KernelInfo_GetInputName(info, index, name, &size);
    if (unnamed) {
        gblm_ort->ReleaseStatus(unnamed);
        snprintf(name, 200, "input %zu", index);
    }
    TRY(gblm_ort->KernelInfoGetConstantInput_tensor(info, index, &is_constant, &value));
    if (!is_constant || !value)
        return gblm_invalid("%s: %s '%s' must be a constant initializer", operator, role, name);
    TRY(gblm_form_of(value, form));
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        fits |= form->type == known[i].type && !strcmp(known[i].name, types);
    if (!fits || (rank ? form->rank != rank : form->rank < 1 || form->rank > 2))
        return gblm_invalid("%s: %s '%s' must be a tensor of %s with %zu dimension%s; it has element type %d and %zu", operator,
                            role, name, types, rank ? rank : 2, rank == 1 ? "" : "s", (int)form->type, form->rank);
    return gblm_ort->GetTensorMutableData((OrtValue *)value, (void **)data);
}

OrtStatusPtr gblm_take_x(OrtKernelContext *context, const char *operator, int64_t columns, Form *form, const void **x,
                         int64_t *tokens) {
    const OrtValue *input;
    *tokens = 1;
    TRY(gblm_ort->KernelContext_GetInput(context, 0, &input));
    TRY(gblm_form_of(input, form));
    if (form->type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT || form->rank < 1 || form->rank > MAX_RANK ||
        form->shape[form->rank - 1] != columns)
        return gblm_invalid("%s: x must be a tensor of float with 1 to %d dimensions, the last of %lld; it has element type %d "
                            "and %zu dimensions, the last of %lld",
                            operator, (int)MAX_RANK, (long long)columns, (int)form->type, form->rank,
                            (long long)(form->rank && form->rank <= MAX_RANK ? form->shape[form->rank - 1] : 0));
    for (size_t i = 0; i + 1 < form->rank; i++)
        if (form->shape[i] == 0) *tokens = 0;
    for (size_t i = 0; *tokens && i + 1 < form->rank; i++)
        if (__builtin_mul_overflow(*tokens, form->shape[i], tokens))
            return gblm_invalid("%s: x has too many tokens", operator);
    return gblm_ort->GetTensorMutableData((OrtValue *)input, (void **)x);
}

OrtStatusPtr gblm_take_y(OrtKernelContext *context, const char *operator, int index, Form *form, int64_t rows, void **y) {
    OrtValue *output = NULL;
    form->shape[form->rank - 1] = rows;
    TRY(gblm_ort->KernelContext_GetOutput(context, (size_t)index, form->shape, form->rank, &output));
    if (!output) return gblm_invalid("%s: output %d has no name; each weight needs one", operator, index);
    return gblm_ort->GetTensorMutableData(output, y);
}
