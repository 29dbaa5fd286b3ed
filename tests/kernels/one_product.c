/* A user of the operators in C: open a graph whose library lies beside it, and print one product.
 *
 *     one_product FOLDER COLUMNS ROWS
 *
 * x[i] = i % 7 - 3 goes into input "x" of FOLDER/model.onnx, with shape [1, COLUMNS]; output "y" has shape [1, ROWS].
 */
#include <onnxruntime/onnxruntime_c_api.h>
#include <stdio.h>
#include <stdlib.h>

static const OrtApi *ort;

static void must(OrtStatus *status) {
    if (!status) return;
    fprintf(stderr, "%s\n", ort->GetErrorMessage(status));
    exit(1);
}

int main(int count, char **arguments) {
    if (count != 4) return 2;
    char graph[4096], library[4096];
    snprintf(graph, sizeof graph, "%s/model.onnx", arguments[1]);
    snprintf(library, sizeof library, "%s/gblm_onnxruntime.so", arguments[1]);
    const int64_t columns = atoll(arguments[2]), rows = atoll(arguments[3]), shape[2] = {1, columns};

    OrtEnv *environment;
    OrtSessionOptions *options;
    OrtSession *session;
    ort = OrtGetApiBase()->GetApi(ORT_API_VERSION);
    must(ort->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "one_product", &environment));
    must(ort->CreateSessionOptions(&options));
    must(ort->RegisterCustomOpsLibrary_V2(options, library));
    must(ort->CreateSession(environment, graph, options, &session));

    float *x = malloc((size_t)columns * sizeof *x), *y;
    for (int64_t i = 0; i < columns; i++) x[i] = (float)(i % 7 - 3);
    const char *inputs[] = {"x"}, *outputs[] = {"y"};
    OrtMemoryInfo *memory;
    OrtValue *given, *product = NULL;
    must(ort->CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &memory));
    must(ort->CreateTensorWithDataAsOrtValue(memory, x, (size_t)columns * sizeof *x, shape, 2,
                                             ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, &given));
    must(ort->Run(session, NULL, inputs, (const OrtValue *const *)&given, 1, outputs, 1, &product));
    must(ort->GetTensorMutableData(product, (void **)&y));
    for (int64_t i = 0; i < rows; i++) printf("%.9g\n", (double)y[i]);

    ort->ReleaseValue(product);
    ort->ReleaseValue(given);
    ort->ReleaseMemoryInfo(memory);
    ort->ReleaseSession(session);
    ort->ReleaseSessionOptions(options);
    ort->ReleaseEnv(environment);
    free(x);
    return 0;
}
