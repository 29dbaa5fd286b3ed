/* The part of ONNX Runtime's C interface that the operators use, so that they build with a C compiler alone. ONNX Runtime adds
 * functions at the end of OrtApi and never moves one: the number after a name is its slot, counted in pointers. The numbers are
 * those of onnxruntime_c_api.h, version 17 (ONNX Runtime 1.17) and newer; tests/kernels/test_onnxruntime_op.py compares them with
 * that file where it is installed. */
#ifndef GBLM_ONNXRUNTIME_API_H
#define GBLM_ONNXRUNTIME_API_H

#include <stddef.h>
#include <stdint.h>

#ifdef _WIN32
#define ORT_API_CALL __stdcall
#else
#define ORT_API_CALL
#endif

typedef struct OrtStatus *OrtStatusPtr; /* NULL: no error */
typedef struct OrtValue OrtValue;
typedef struct OrtTensorTypeAndShapeInfo OrtTensorTypeAndShapeInfo;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtCustomOp OrtCustomOp;

typedef enum { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 } OrtErrorCode;
typedef enum { OrtMemTypeDefault = 0 } OrtMemType;
typedef enum { INPUT_OUTPUT_REQUIRED = 0, INPUT_OUTPUT_VARIADIC = 2 } OrtCustomOpInputOutputCharacteristic;
typedef enum {
    ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED = 0,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 = 2,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8 = 3,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 = 7,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 = 10
} ONNXTensorElementDataType;

/* FROM and TO are the slots before and after a gap. */
#define GAP(FROM, TO) void *gap_after_##FROM[(TO) - (FROM) - 1]
#define CALL(NAME) (ORT_API_CALL *NAME)

typedef struct OrtApi {
    OrtStatusPtr CALL(CreateStatus)(OrtErrorCode, const char *message); /* 0 */
    GAP(0, 26);
    OrtStatusPtr CALL(CreateCustomOpDomain)(const char *name, OrtCustomOpDomain **); /* 26 */
    OrtStatusPtr CALL(CustomOpDomain_Add)(OrtCustomOpDomain *, const OrtCustomOp *); /* 27 */
    OrtStatusPtr CALL(AddCustomOpDomain)(OrtSessionOptions *, OrtCustomOpDomain *); /* 28 */
    GAP(28, 50);
    OrtStatusPtr CALL(IsTensor)(const OrtValue *, int *); /* 50 */
    OrtStatusPtr CALL(GetTensorMutableData)(OrtValue *, void **); /* 51 */
    GAP(51, 60);
    OrtStatusPtr CALL(GetTensorElementType)(const OrtTensorTypeAndShapeInfo *, ONNXTensorElementDataType *); /* 60 */
    OrtStatusPtr CALL(GetDimensionsCount)(const OrtTensorTypeAndShapeInfo *, size_t *); /* 61 */
    OrtStatusPtr CALL(GetDimensions)(const OrtTensorTypeAndShapeInfo *, int64_t *, size_t rank); /* 62 */
    GAP(62, 65);
    OrtStatusPtr CALL(GetTensorTypeAndShape)(const OrtValue *, OrtTensorTypeAndShapeInfo **); /* 65 */
    GAP(65, 86);
    OrtStatusPtr CALL(KernelInfoGetAttribute_int64)(const OrtKernelInfo *, const char *name, int64_t *); /* 86 */
    GAP(86, 90);
    OrtStatusPtr CALL(KernelContext_GetInput)(const OrtKernelContext *, size_t index, const OrtValue **); /* 90 */
    OrtStatusPtr CALL(KernelContext_GetOutput)(OrtKernelContext *, size_t index, const int64_t *shape, size_t rank, OrtValue **); /* 91 */
    GAP(91, 93);
    void CALL(ReleaseStatus)(OrtStatusPtr); /* 93 */
    GAP(93, 99);
    void CALL(ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo *); /* 99 */
    GAP(99, 230);
    OrtStatusPtr CALL(KernelInfo_GetInputCount)(const OrtKernelInfo *, size_t *); /* 230 */
    OrtStatusPtr CALL(KernelInfo_GetOutputCount)(const OrtKernelInfo *, size_t *); /* 231 */
    OrtStatusPtr CALL(KernelInfo_GetInputName)(const OrtKernelInfo *, size_t index, char *name, size_t *size); /* 232 */
    GAP(232, 249);
    OrtStatusPtr CALL(KernelInfoGetConstantInput_tensor)(const OrtKernelInfo *, size_t index, int *is_constant, const OrtValue **); /* 249 */
    GAP(249, 274);
    OrtStatusPtr CALL(KernelContext_ParallelFor)(const OrtKernelContext *, void (*part)(void *, size_t), size_t count, size_t batch, void *); /* 274 */
} OrtApi;

typedef struct OrtApiBase {
    const OrtApi *CALL(GetApi)(uint32_t version); /* 0 */
} OrtApiBase;

/* As of version 17; later versions add fields at the end, which ONNX Runtime reads only of an operator of that version. */
struct OrtCustomOp {
    uint32_t version; /* 0 */
    GAP(0, 2);
    const char *CALL(GetName)(const OrtCustomOp *); /* 2 */
    const char *CALL(GetExecutionProviderType)(const OrtCustomOp *); /* 3 */
    ONNXTensorElementDataType CALL(GetInputType)(const OrtCustomOp *, size_t index); /* 4 */
    size_t CALL(GetInputTypeCount)(const OrtCustomOp *); /* 5 */
    ONNXTensorElementDataType CALL(GetOutputType)(const OrtCustomOp *, size_t index); /* 6 */
    size_t CALL(GetOutputTypeCount)(const OrtCustomOp *); /* 7 */
    GAP(7, 9);
    void CALL(KernelDestroy)(void *kernel); /* 9 */
    OrtCustomOpInputOutputCharacteristic CALL(GetInputCharacteristic)(const OrtCustomOp *, size_t index); /* 10 */
    OrtCustomOpInputOutputCharacteristic CALL(GetOutputCharacteristic)(const OrtCustomOp *, size_t index); /* 11 */
    OrtMemType CALL(GetInputMemoryType)(const OrtCustomOp *, size_t index); /* 12 */
    int CALL(GetVariadicInputMinArity)(const OrtCustomOp *); /* 13 */
    int CALL(GetVariadicInputHomogeneity)(const OrtCustomOp *); /* 14 */
    int CALL(GetVariadicOutputMinArity)(const OrtCustomOp *); /* 15 */
    int CALL(GetVariadicOutputHomogeneity)(const OrtCustomOp *); /* 16 */
    OrtStatusPtr CALL(CreateKernelV2)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *, void **kernel); /* 17 */
    OrtStatusPtr CALL(KernelComputeV2)(void *kernel, OrtKernelContext *); /* 18 */
    void *InferOutputShapeFn; /* 19; none */
    int CALL(GetStartVersion)(const OrtCustomOp *); /* 20 */
    int CALL(GetEndVersion)(const OrtCustomOp *); /* 21 */
    GAP(21, 26); /* of versions newer than 17 */
};

#undef GAP
#undef CALL
#endif
