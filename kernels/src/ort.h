// The part of ONNX Runtime's C interface that the operator needs, so that no headers of it have to
// be installed.
//
// OrtApi is a table of functions to which releases only append: the place of a function never
// changes. The places are those of version 17.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {
struct OrtStatus;
struct OrtValue;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtTensorTypeAndShapeInfo;
struct OrtShapeInferContext;
struct OrtOpAttr;

struct OrtApi {
  void (*functions[1])();  // many more
};

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

// What an operator tells ONNX Runtime of itself, as of version 17.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  int (*GetInputType)(const OrtCustomOp*, size_t);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  int (*GetOutputType)(const OrtCustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void*, OrtKernelContext*);
  void (*KernelDestroy)(void*);
  int (*GetInputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetOutputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetInputMemoryType)(const OrtCustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void**);
  OrtStatus* (*KernelComputeV2)(void*, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
  void* later[4];  // of versions after 17, which are not asked for
};
}

namespace graphprune {

constexpr uint32_t ORT_VERSION = 17;  // the first with KernelContext_ParallelFor
constexpr int ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2;
constexpr int ORT_FLOAT = 1, ORT_INT8 = 3, ORT_INT32 = 6;
constexpr int ORT_ATTRIBUTE_INT = 1;
constexpr int ORT_REQUIRED = 0, ORT_OPTIONAL = 1;

using ParallelFunction = void (*)(void* data, size_t unit);

// Calls the functions by their place. A status is null, or has to be returned or released.
class Ort {
 public:
  explicit Ort(const OrtApi* api) : api_(api) {}

  OrtStatus* make_status(int code, const char* message) const {
    return call<OrtStatus*>(0, code, message);
  }
  void release(OrtStatus* status) const { call<void>(93, status); }

  OrtStatus* make_domain(const char* name, OrtCustomOpDomain** made) const {
    return call<OrtStatus*>(26, name, made);
  }
  OrtStatus* add(OrtCustomOpDomain* domain, const OrtCustomOp* op) const {
    return call<OrtStatus*>(27, domain, op);
  }
  OrtStatus* add(OrtSessionOptions* options, OrtCustomOpDomain* domain) const {
    return call<OrtStatus*>(28, options, domain);
  }

  OrtStatus* data_of(const OrtValue* value, void** data) const {
    return call<OrtStatus*>(51, const_cast<OrtValue*>(value), data);
  }
  OrtStatus* shape_of(const OrtValue* value, OrtTensorTypeAndShapeInfo** info) const {
    return call<OrtStatus*>(65, value, info);
  }
  OrtStatus* make_shape(OrtTensorTypeAndShapeInfo** made) const {
    return call<OrtStatus*>(57, made);
  }
  OrtStatus* set_type(OrtTensorTypeAndShapeInfo* info, int type) const {
    return call<OrtStatus*>(58, info, type);
  }
  OrtStatus* set_dims(OrtTensorTypeAndShapeInfo* info, const int64_t* dims, size_t rank) const {
    return call<OrtStatus*>(59, info, dims, rank);
  }
  OrtStatus* get_rank(const OrtTensorTypeAndShapeInfo* info, size_t* rank) const {
    return call<OrtStatus*>(61, info, rank);
  }
  OrtStatus* get_dims(const OrtTensorTypeAndShapeInfo* info, int64_t* dims, size_t rank) const {
    return call<OrtStatus*>(62, info, dims, rank);
  }
  OrtStatus* get_symbols(const OrtTensorTypeAndShapeInfo* info, const char** names,
                         size_t rank) const {
    return call<OrtStatus*>(63, info, names, rank);
  }
  OrtStatus* set_symbols(OrtTensorTypeAndShapeInfo* info, const char** names, size_t rank) const {
    return call<OrtStatus*>(271, info, names, rank);
  }
  void release(OrtTensorTypeAndShapeInfo* info) const { call<void>(99, info); }

  OrtStatus* attribute(const OrtKernelInfo* info, const char* name, int64_t* value) const {
    return call<OrtStatus*>(86, info, name, value);
  }
  // `size` is that of `text`, and becomes what was needed with the final zero.
  OrtStatus* attribute(const OrtKernelInfo* info, const char* name, char* text,
                       size_t* size) const {
    return call<OrtStatus*>(87, info, name, text, size);
  }
  OrtStatus* input_count(const OrtKernelInfo* info, size_t* count) const {
    return call<OrtStatus*>(230, info, count);
  }
  OrtStatus* input_name(const OrtKernelInfo* info, size_t input, char* text, size_t* size) const {
    return call<OrtStatus*>(232, info, input, text, size);
  }
  OrtStatus* node_name(const OrtKernelInfo* info, char* text, size_t* size) const {
    return call<OrtStatus*>(244, info, text, size);
  }
  OrtStatus* constant(const OrtKernelInfo* info, size_t input, int* is_constant,
                      const OrtValue** value) const {
    return call<OrtStatus*>(249, info, input, is_constant, value);
  }

  OrtStatus* input(const OrtKernelContext* context, size_t index, const OrtValue** value) const {
    return call<OrtStatus*>(90, context, index, value);
  }
  OrtStatus* output(OrtKernelContext* context, size_t index, const int64_t* dims, size_t rank,
                    OrtValue** value) const {
    return call<OrtStatus*>(91, context, index, dims, rank, value);
  }
  // Calls `function` for 0 to units - 1 on the threads of the session.
  OrtStatus* parallel_for(const OrtKernelContext* context, ParallelFunction function, size_t units,
                          void* data) const {
    constexpr size_t batches = 0;  // as many as threads
    return call<OrtStatus*>(274, context, function, units, batches, data);
  }

  OrtStatus* input_shape(const OrtShapeInferContext* context, size_t input,
                         OrtTensorTypeAndShapeInfo** info) const {
    return call<OrtStatus*>(268, context, input, info);
  }
  OrtStatus* attribute(const OrtShapeInferContext* context, const char* name,
                       const OrtOpAttr** attribute) const {
    return call<OrtStatus*>(269, context, name, attribute);
  }
  OrtStatus* set_output_shape(const OrtShapeInferContext* context, size_t output,
                              const OrtTensorTypeAndShapeInfo* info) const {
    return call<OrtStatus*>(270, context, output, info);
  }
  OrtStatus* read(const OrtOpAttr* attribute, int type, void* data, size_t size,
                  size_t* needed) const {
    return call<OrtStatus*>(272, attribute, type, data, size, needed);
  }

 private:
  template <class Result, class... Arguments>
  Result call(size_t place, Arguments... arguments) const {
    using Function = Result (*)(Arguments...);
    return reinterpret_cast<Function>(api_->functions[place])(arguments...);
  }

  const OrtApi* api_;
};

}  // namespace graphprune
