// What the library exports: registration, and which kernels it chose.

#include <pthread.h>

#include <cstdio>
#include <cstdlib>

#include "choose.h"
#include "heap.h"
#include "sparse_linear.h"

namespace graphprune {
namespace {

// What sessions point to for as long as they live: it is made once and never freed. A second
// ONNX Runtime in the same process gets its own.
struct Registration {
  SparseLinear linear;
  OrtCustomOpDomain* domain = nullptr;
  Registration* next = nullptr;

  explicit Registration(const OrtApi* api) : linear(sparse_linear(api)) {}
};

pthread_mutex_t registrations_lock = PTHREAD_MUTEX_INITIALIZER;
Registration* registrations = nullptr;

Registration* find(const OrtApi* api) {
  for (Registration* r = registrations; r; r = r->next) {
    if (r->linear.api == api) return r;
  }
  return nullptr;
}

// Call it with the lock.
OrtStatus* make(const OrtApi* api, Registration** made) {
  const Ort ort(api);
  auto* registration = make_object<Registration>(api);
  if (!registration) return ort.make_status(ORT_FAIL, "graphprune-kernels: out of memory");
  OrtStatus* status = ort.make_domain("graphprune", &registration->domain);
  if (!status) status = ort.add(registration->domain, &registration->linear.op);
  if (status) {
    free_object(registration);
    return status;
  }
  registration->next = registrations;
  *made = registrations = registration;
  return nullptr;
}

OrtStatus* find_or_make(const OrtApi* api, Registration** found) {
  pthread_mutex_lock(&registrations_lock);
  *found = find(api);
  OrtStatus* status = *found ? nullptr : make(api, found);
  pthread_mutex_unlock(&registrations_lock);
  return status;
}

// An ONNX Runtime that lacks what is needed still has an older interface, which can say so.
OrtStatus* too_old(const OrtApiBase* base) {
  const Sentence s = sentence("graphprune-kernels needs ONNX Runtime 1.17 or newer, this is %s",
                              base->GetVersionString());
  for (uint32_t version = ORT_VERSION - 1; version > 0; --version) {
    if (const OrtApi* api = base->GetApi(version)) {
      return Ort(api).make_status(ORT_FAIL, s.text);
    }
  }
  std::fprintf(stderr, "%s\n", s.text);
  std::abort();  // no ONNX Runtime that has custom operators is without version 1
}

}  // namespace
}  // namespace graphprune

#define GRAPHPRUNE_EXPORT extern "C" __attribute__((visibility("default")))

// ONNX Runtime calls this where the library is registered with session options.
GRAPHPRUNE_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace graphprune;
  const OrtApi* api = base->GetApi(ORT_VERSION);
  if (!api) return too_old(base);
  const Ort ort(api);
  if (!chosen().kernels) return ort.make_status(ORT_INVALID_ARGUMENT, chosen().problem.text);
  Registration* registration = nullptr;
  if (OrtStatus* status = find_or_make(api, &registration)) return status;
  return ort.add(options, registration->domain);
}

// The instruction set in use; null where the environment names one that cannot be used.
GRAPHPRUNE_EXPORT const char* graphprune_kernels_isa() {
  const auto* kernels = graphprune::chosen().kernels;
  return kernels ? kernels->name : nullptr;
}

// Bits of the largest codes that these kernels multiply exactly, 7 or 8; 0 where there are none.
GRAPHPRUNE_EXPORT int graphprune_kernels_bits() {
  const auto* kernels = graphprune::chosen().kernels;
  return kernels ? kernels->exact_bits : 0;
}

// Why there are none; empty otherwise.
GRAPHPRUNE_EXPORT const char* graphprune_kernels_problem() {
  return graphprune::chosen().problem.text;
}
