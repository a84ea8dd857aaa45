#include "sparse_linear.h"

#include <cinttypes>
#include <cstdlib>
#include <cstring>

#include "choose.h"
#include "heap.h"
#include "schedule.h"
#include "validate.h"

namespace graphprune {
namespace {

enum Input : size_t { X, BLOCKS, COLUMNS, STARTS, SCALES, BIAS, INPUTS };
constexpr const char* INPUT_NAMES[] = {"x", "blocks", "columns", "starts", "scales", "bias"};
constexpr size_t MOST_DIMS = 16;

#define GRAPHPRUNE_RETURN_IF(call) \
  if (OrtStatus* status = (call)) return status

struct Shape {
  int64_t dims[MOST_DIMS];
  size_t rank = 0;
};

// The node of a session.
struct Node {
  Ort ort;
  char name[128];
  Packed packed;
  int32_t* row_sums = nullptr;

  explicit Node(const OrtApi* api) : ort(api), name("") {}
  ~Node() { std::free(row_sums); }
  Node(const Node&) = delete;
  Node& operator=(const Node&) = delete;

  OrtStatus* invalid(const Sentence& s) const {
    const Sentence whole = sentence("SparseLinear node '%s': %s", name, s.text);
    return ort.make_status(ORT_INVALID_ARGUMENT, whole.text);
  }
};

OrtStatus* read_shape(const Ort& ort, const OrtTensorTypeAndShapeInfo* info, Shape* shape) {
  GRAPHPRUNE_RETURN_IF(ort.get_rank(info, &shape->rank));
  if (shape->rank > MOST_DIMS) {
    return ort.make_status(ORT_INVALID_ARGUMENT, "SparseLinear: a tensor has over 16 dimensions");
  }
  return ort.get_dims(info, shape->dims, shape->rank);
}

OrtStatus* shape_of(const Ort& ort, const OrtValue* value, Shape* shape) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  GRAPHPRUNE_RETURN_IF(ort.shape_of(value, &info));
  OrtStatus* status = read_shape(ort, info, shape);
  ort.release(info);
  return status;
}

// --- The beginning of a session: attributes and weights are read and checked.

void read_name(Node& node, const OrtKernelInfo* info) {
  size_t size = sizeof node.name;
  // Too long a name is an error, and then there is none to show.
  if (OrtStatus* status = node.ort.node_name(info, node.name, &size)) {
    node.ort.release(status);
    std::strcpy(node.name, "?");
  }
}

OrtStatus* read_activation(const Node& node, const OrtKernelInfo* info, Activation* found) {
  constexpr const char* NAMES[] = {"none", "gelu", "relu", "silu"};
  char text[16] = "";
  size_t size = sizeof text;
  *found = Activation::none;
  if (OrtStatus* status = node.ort.attribute(info, "activation", text, &size)) {
    node.ort.release(status);
    // Absent, or longer than all that there are: then the size that it needs was written.
    if (size <= sizeof text) return nullptr;
    std::strcpy(text, "something long");
  }
  for (int i = 0; i < 4; ++i) {
    if (std::strcmp(text, NAMES[i]) == 0) {
      *found = static_cast<Activation>(i);
      return nullptr;
    }
  }
  return node.invalid(sentence("activation must be none, gelu, relu or silu, got %s", text));
}

OrtStatus* read_attributes(const Node& node, const OrtKernelInfo* info, Claims* claims) {
  struct {
    const char* name;
    int64_t* value;
  } const wanted[] = {
      {"outputs", &claims->outputs}, {"inputs", &claims->inputs}, {"bits", &claims->bits}};
  for (const auto& attribute : wanted) {
    if (OrtStatus* status = node.ort.attribute(info, attribute.name, attribute.value)) {
      node.ort.release(status);
      return node.invalid(sentence("the attribute %s is missing", attribute.name));
    }
  }
  return nullptr;
}

OrtStatus* has_input(const Node& node, const OrtKernelInfo* info, size_t input, bool* found) {
  size_t count = 0, size = 0;
  GRAPHPRUNE_RETURN_IF(node.ort.input_count(info, &count));
  *found = input < count;
  if (!*found) return nullptr;
  // An input that is left out in the middle has no name: only its final zero needs room.
  GRAPHPRUNE_RETURN_IF(node.ort.input_name(info, input, nullptr, &size));
  *found = size > 1;
  return nullptr;
}

OrtStatus* read_weight(const Node& node, const OrtKernelInfo* info, size_t input, Shape* shape,
                       Tensor* tensor) {
  int is_constant = 0;
  const OrtValue* value = nullptr;
  GRAPHPRUNE_RETURN_IF(node.ort.constant(info, input, &is_constant, &value));
  if (!is_constant) {
    return node.invalid(sentence("the input %s must be an initializer", INPUT_NAMES[input]));
  }
  void* data = nullptr;
  GRAPHPRUNE_RETURN_IF(shape_of(node.ort, value, shape));
  GRAPHPRUNE_RETURN_IF(node.ort.data_of(value, &data));
  *tensor = {data, shape->dims, shape->rank};
  return nullptr;
}

OrtStatus* read_weights(const Node& node, const OrtKernelInfo* info, Shape (&shapes)[INPUTS],
                        Claims* claims) {
  Tensor* const tensors[] = {nullptr,         &claims->blocks, &claims->columns,
                             &claims->starts, &claims->scales, &claims->bias};
  GRAPHPRUNE_RETURN_IF(has_input(node, info, BIAS, &claims->has_bias));
  for (size_t input = BLOCKS; input <= (claims->has_bias ? BIAS : SCALES); ++input) {
    GRAPHPRUNE_RETURN_IF(read_weight(node, info, input, &shapes[input], tensors[input]));
  }
  return nullptr;
}

OrtStatus* prepare(Node& node, const OrtKernelInfo* info) {
  Claims claims;
  Shape shapes[INPUTS];
  Activation activation;
  read_name(node, info);
  GRAPHPRUNE_RETURN_IF(read_activation(node, info, &activation));
  GRAPHPRUNE_RETURN_IF(read_attributes(node, info, &claims));
  GRAPHPRUNE_RETURN_IF(read_weights(node, info, shapes, &claims));
  if (Sentence s = validate(claims, chosen().kernels->exact_bits)) return node.invalid(s);
  node.packed = packed_of(claims, activation);
  const size_t count = node.packed.strips() * node.packed.height;
  node.row_sums = static_cast<int32_t*>(std::malloc(count * sizeof(int32_t)));
  if (!node.row_sums) return node.invalid(sentence("out of memory"));
  add_up_rows(node.packed, node.row_sums);
  node.packed.row_sums = node.row_sums;
  return nullptr;
}

OrtStatus* create(const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** made) {
  Node* node = make_object<Node>(api);
  if (!node) return Ort(api).make_status(ORT_FAIL, "SparseLinear: out of memory");
  if (OrtStatus* status = prepare(*node, info)) {
    free_object(node);
    return status;
  }
  *made = node;
  return nullptr;
}

void destroy(void* node) { free_object(static_cast<Node*>(node)); }

// --- A call.

struct Session {
  const Ort& ort;
  const OrtKernelContext* context;
};

bool run_in_session(const void* context, ParallelFunction f, size_t units, void* data) {
  const auto& session = *static_cast<const Session*>(context);
  OrtStatus* status = session.ort.parallel_for(session.context, f, units, data);
  if (status) session.ort.release(status);
  return status == nullptr;
}

OrtStatus* status_of(const Node& node, Outcome outcome) {
  switch (outcome) {
    case Outcome::out_of_memory:
      return node.invalid(sentence("out of memory"));
    case Outcome::not_parallel:
      return node.invalid(sentence("ONNX Runtime cannot run it on its threads"));
    case Outcome::done:
      break;
  }
  return nullptr;
}

// Checks the shape of x and makes it that of y.
OrtStatus* to_output_shape(const Node& node, Shape* shape, int64_t* tokens) {
  if (shape->rank == 0) return node.invalid(sentence("x must have a dimension, got a scalar"));
  int64_t& last = shape->dims[shape->rank - 1];
  if (last != node.packed.inputs) {
    return node.invalid(sentence("x must have %" PRId64 " features in its last dimension, got %"
                                 PRId64, node.packed.inputs, last));
  }
  last = node.packed.outputs;
  *tokens = 1;
  for (size_t i = 0; i + 1 < shape->rank; ++i) *tokens *= shape->dims[i];
  return nullptr;
}

OrtStatus* compute(void* kernel, OrtKernelContext* context) {
  const Node& node = *static_cast<const Node*>(kernel);
  const Ort& ort = node.ort;
  Shape shape;
  int64_t tokens = 0;
  const OrtValue* input = nullptr;
  OrtValue* output = nullptr;
  void *x = nullptr, *y = nullptr;
  GRAPHPRUNE_RETURN_IF(ort.input(context, X, &input));
  GRAPHPRUNE_RETURN_IF(shape_of(ort, input, &shape));
  GRAPHPRUNE_RETURN_IF(to_output_shape(node, &shape, &tokens));
  GRAPHPRUNE_RETURN_IF(ort.output(context, 0, shape.dims, shape.rank, &output));
  GRAPHPRUNE_RETURN_IF(ort.data_of(input, &x));
  GRAPHPRUNE_RETURN_IF(ort.data_of(output, &y));
  const Session session{ort, context};
  return status_of(node, run_linear(*chosen().kernels, node.packed, static_cast<const float*>(x),
                                    tokens, static_cast<float*>(y), {run_in_session, &session}));
}

// --- What is known before a session runs.

struct NamedShape : Shape {
  const char* symbols[MOST_DIMS];  // empty for dimensions that are numbers

  // ONNX Runtime has no way to set a dimension of which nothing is known.
  bool is_known() const {
    for (size_t i = 0; i < rank; ++i) {
      if (dims[i] < 0 && *symbols[i] == '\0') return false;
    }
    return rank > 0;
  }
};

OrtStatus* read_input(const Ort& ort, const OrtShapeInferContext* context, NamedShape* shape) {
  OrtTensorTypeAndShapeInfo* x = nullptr;  // belongs to the context
  GRAPHPRUNE_RETURN_IF(ort.input_shape(context, X, &x));
  GRAPHPRUNE_RETURN_IF(read_shape(ort, x, shape));
  return ort.get_symbols(x, shape->symbols, shape->rank);
}

OrtStatus* replace_last(const Ort& ort, const OrtShapeInferContext* context, NamedShape* shape) {
  const OrtOpAttr* outputs = nullptr;
  size_t size = 0;
  int64_t* last = &shape->dims[shape->rank - 1];
  shape->symbols[shape->rank - 1] = "";
  GRAPHPRUNE_RETURN_IF(ort.attribute(context, "outputs", &outputs));
  return ort.read(outputs, ORT_ATTRIBUTE_INT, last, sizeof *last, &size);
}

OrtStatus* set_output(const Ort& ort, const OrtShapeInferContext* context, NamedShape* shape) {
  OrtTensorTypeAndShapeInfo* y = nullptr;
  GRAPHPRUNE_RETURN_IF(ort.make_shape(&y));
  OrtStatus* status = ort.set_type(y, ORT_FLOAT);
  if (!status) status = ort.set_dims(y, shape->dims, shape->rank);
  if (!status) status = ort.set_symbols(y, shape->symbols, shape->rank);
  if (!status) status = ort.set_output_shape(context, 0, y);
  ort.release(y);
  return status;
}

OrtStatus* infer_shape(const OrtCustomOp* op, OrtShapeInferContext* context) {
  const Ort ort(reinterpret_cast<const SparseLinear*>(op)->api);
  NamedShape shape;
  GRAPHPRUNE_RETURN_IF(read_input(ort, context, &shape));
  if (shape.rank == 0) return nullptr;
  GRAPHPRUNE_RETURN_IF(replace_last(ort, context, &shape));
  return shape.is_known() ? set_output(ort, context, &shape) : nullptr;
}

// --- What the operator is.

const char* name(const OrtCustomOp*) { return "SparseLinear"; }
const char* provider(const OrtCustomOp*) { return "CPUExecutionProvider"; }
size_t input_count(const OrtCustomOp*) { return INPUTS; }
size_t output_count(const OrtCustomOp*) { return 1; }
int input_type(const OrtCustomOp*, size_t input) {
  constexpr int TYPES[] = {ORT_FLOAT, ORT_INT8, ORT_INT32, ORT_INT32, ORT_FLOAT, ORT_FLOAT};
  return TYPES[input];
}
int output_type(const OrtCustomOp*, size_t) { return ORT_FLOAT; }
int input_kind(const OrtCustomOp*, size_t input) {
  return input == BIAS ? ORT_OPTIONAL : ORT_REQUIRED;
}
int output_kind(const OrtCustomOp*, size_t) { return ORT_REQUIRED; }
int default_memory(const OrtCustomOp*, size_t) { return 0; }
int version(const OrtCustomOp*) { return 1; }

}  // namespace

SparseLinear sparse_linear(const OrtApi* api) {
  OrtCustomOp op = {};
  op.version = ORT_VERSION;
  op.GetName = name;
  op.GetExecutionProviderType = provider;
  op.GetInputType = input_type;
  op.GetInputTypeCount = input_count;
  op.GetOutputType = output_type;
  op.GetOutputTypeCount = output_count;
  op.KernelDestroy = destroy;
  op.GetInputCharacteristic = input_kind;
  op.GetOutputCharacteristic = output_kind;
  op.GetInputMemoryType = default_memory;
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = compute;
  op.InferOutputShapeFn = infer_shape;
  op.GetStartVersion = version;
  op.GetEndVersion = version;
  return {op, api};
}

}  // namespace graphprune
