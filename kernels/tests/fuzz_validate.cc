// Feeds the validator weights that were damaged at random, and runs the kernel on those that it
// accepts. Built with AddressSanitizer and UndefinedBehaviorSanitizer: what reads outside of an
// array ends the program.
//
//     fuzz_validate [inputs] [seed]

#include <cstdio>
#include <cstdlib>
#include <limits>

#include "random_weights.h"
#include "schedule.h"

namespace graphprune {

extern const KernelSet scalar;

namespace {

int64_t strange_number(Random& random) {
  constexpr int64_t NUMBERS[] = {
      0, 1, -1, 2, 3, 4, 15, 16, 17, 31, 32, 33, 64, 127, 128, INT32_MAX, INT32_MIN,
      int64_t{INT32_MAX} + 1, MOST_INPUTS, MOST_INPUTS + 1,
      std::numeric_limits<int64_t>::max(), std::numeric_limits<int64_t>::min()};
  return between(random, 0, 1) ? NUMBERS[between(random, 0, std::size(NUMBERS) - 1)]
                               : between(random, -5, 200);
}

template <class Value>
void damage_value(Random& random, std::vector<Value>& values) {
  if (values.empty()) return;
  Value& value = values[between(random, 0, values.size() - 1)];
  value = between(random, 0, 1) ? static_cast<Value>(value + between(random, -2, 2))
                                : static_cast<Value>(strange_number(random));
}

template <class Value>
void damage_length(Random& random, std::vector<Value>& values) {
  const int64_t change = between(random, -3, 3);
  values.resize(std::max<int64_t>(0, static_cast<int64_t>(values.size()) + change));
  values.shrink_to_fit();  // or the sanitizer takes the room for a part of the array
}

void damage_float(Random& random, std::vector<float>& values) {
  constexpr float NUMBERS[] = {0, -1, 1e38f, 1e-45f, std::numeric_limits<float>::quiet_NaN(),
                               std::numeric_limits<float>::infinity()};
  if (!values.empty()) values[between(random, 0, values.size() - 1)] = NUMBERS[between(random, 0, 5)];
}

// Arrays first; the shapes follow them.
void damage_arrays(Random& random, Weights& w) {
  switch (between(random, 0, 11)) {
    case 0: return damage_value(random, w.blocks);
    case 1:
    case 2: return damage_value(random, w.columns);
    case 3:
    case 4: return damage_value(random, w.starts);
    case 5: return damage_float(random, w.scales);
    case 6: return damage_float(random, w.bias);
    case 7: return damage_length(random, w.columns);
    case 8: return damage_length(random, w.starts);
    case 9: return damage_length(random, w.scales);
    case 10: return damage_length(random, w.bias);
    default: return;
  }
}

// What the node says of itself, and ranks. Shapes tell the truth about the arrays, as ONNX Runtime
// makes sure: only their factors are exchanged, as in a block of another form.
void damage_claims(Random& random, Weights& w) {
  switch (between(random, 0, 9)) {
    case 0: w.claims.outputs = strange_number(random); return;
    case 1: w.claims.inputs = strange_number(random); return;
    case 2: w.claims.bits = strange_number(random); return;
    case 3: w.claims.blocks.rank = between(random, 0, 3); return;
    case 4: w.claims.columns.rank = between(random, 0, 1); return;
    case 5: w.claims.starts.rank = between(random, 0, 1); return;
    case 6: w.claims.bias.rank = between(random, 0, 1); return;
    case 7: std::swap(w.blocks_shape[0], w.blocks_shape[between(random, 1, 2)]); return;
    case 8: w.claims.has_bias = between(random, 0, 1) && !w.bias.empty(); return;
    default: return;
  }
}

bool run_alone(const void*, void (*f)(void*, size_t), size_t units, void* data) {
  for (size_t u = 0; u < units; ++u) f(data, u);
  return true;
}

void run(Random& random, Weights& w) {
  const Packed p = packed(w, static_cast<Activation>(between(random, 0, 3)));
  const int64_t tokens = between(random, 0, 3);
  std::vector<float> x(tokens * p.inputs), y(tokens * p.outputs);
  for (float& value : x) value = normal(random);
  run_linear(scalar, p, x.data(), tokens, y.data(), {run_alone, nullptr});
}

// Whether the validator accepted it.
bool feed(Random& random) {
  Weights w;
  const int64_t height = between(random, 0, 1) ? 16 : 32;
  random_weights(random, w, between(random, 1, 70), between(random, 1, 40), height,
                 between(random, 7, 8), 0.5);
  const int64_t damages = between(random, 0, 3);
  for (int64_t i = 0; i < damages; ++i) damage_arrays(random, w);
  claim(w, height);
  for (int64_t i = 0; i < damages; ++i) damage_claims(random, w);
  if (validate(w.claims, static_cast<int>(between(random, 7, 8)))) return false;
  // Where much is claimed truly, as of outputs without blocks, running it takes long.
  if (w.claims.outputs <= 4096 && w.claims.inputs <= 4096) run(random, w);
  return true;
}

}  // namespace
}  // namespace graphprune

int main(int count, char** arguments) {
  const long inputs = count > 1 ? std::atol(arguments[1]) : 1'000'000;
  graphprune::Random random(count > 2 ? std::atoi(arguments[2]) : 0);
  long accepted = 0;
  for (long i = 0; i < inputs; ++i) accepted += graphprune::feed(random);
  std::printf("%ld inputs, %ld accepted, no read out of bounds\n", inputs, accepted);
  return accepted == 0 || accepted == inputs;
}
