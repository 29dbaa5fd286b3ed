/* What the operators for ONNX Runtime share, in onnxruntime_shared.c: both operators call it, it calls neither. */
#ifndef GBLM_ONNXRUNTIME_OP_H
#define GBLM_ONNXRUNTIME_OP_H

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "job.h"
#include "onnxruntime_api.h"

enum { MAX_RANK = 8, MAX_WEIGHTS = 8, PADDING = 64 };
extern const OrtApi *gblm_ort;
extern int gblm_parts; /* threads that share a product, at most */

#define TRY(CALL)                               \
    do {                                        \
        OrtStatusPtr status = (CALL);           \
        if (status) return status;              \
    } while (0)

/* A value's type and shape: undefined where it is no tensor; of more than MAX_RANK dimensions only their number. */
typedef struct {
    ONNXTensorElementDataType type;
    size_t rank;
    int64_t shape[MAX_RANK];
} Form;

__attribute__((format(printf, 1, 2))) OrtStatusPtr gblm_invalid(const char *format, ...);
OrtStatusPtr gblm_out_of_memory(void);
OrtStatusPtr gblm_form_of(const OrtValue *value, Form *form);

/* The best of the CPU's `paths`, or the one that GBLM_COMPRESS_KERNEL names. */
OrtStatusPtr gblm_choose_path(const char *operator, int paths, int *path);

/* Constant input `index`, which must be of `types` ("int64", "float16", "int8", "float or float16", "int8 or uint8") and of
 * that rank, 0 for 1 or 2; errors call it by its name in the graph. */
OrtStatusPtr gblm_constant(const OrtKernelInfo *info, const char *operator, size_t index, const char *role,
                           const char *types, size_t rank, char name[200], Form *form, const void **data);

/* Input x, float [..., columns], its form, and how many tokens it has. */
OrtStatusPtr gblm_take_x(OrtKernelContext *context, const char *operator, int64_t columns, Form *form, const void **x,
                         int64_t *tokens);

/* Output `index`, float [..., rows], where `form` is that of x. */
OrtStatusPtr gblm_take_y(OrtKernelContext *context, const char *operator, int index, Form *form, int64_t rows, void **y);

/* `run` of Threads on those of the session, whose kernel context is the context. */
void gblm_run_session(void *context, void (*part)(void *work, int index), void *work, int count);

/* Turn a copy of BitmaskLinear's operator into QuantisedLinear's; in onnxruntime_quantised.c. */
void gblm_make_quantised(OrtCustomOp *operation);
#endif
