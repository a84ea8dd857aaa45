// Every kernel that is compiled against a loop that anyone can read: equal to the last bit without
// an activation, to 2e-6 with one.
//
// Prints a line for each set of kernels; exits with 1 where something differs.

#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <thread>

#include "choose.h"
#include "random_weights.h"
#include "schedule.h"

namespace graphprune {

#ifdef GRAPHPRUNE_SIMDE
extern const KernelSet avx512vnni_simde, avxvnni_simde;
#endif

namespace {

int failures = 0;

void expect(bool holds, const char* what, const char* where) {
  if (holds) return;
  ++failures;
  std::printf("FAILED: %s (%s)\n", what, where);
}

// --- The reference.

struct Row {
  std::vector<int> codes;
  float scale;
  int zero;
};

Row quantized(const float* x, int64_t inputs) {
  float low = 0, high = 0;
  for (int64_t i = 0; i < inputs; ++i) {
    if (!std::isfinite(x[i])) return {std::vector<int>(inputs), NAN, 0};
    low = std::fmin(low, x[i]);
    high = std::fmax(high, x[i]);
  }
  const float scale = std::fmax(high / 255 - low / 255, FLT_MIN);
  const float inverse = 1 / scale;
  Row row = {{}, scale, static_cast<int>(std::nearbyint(-low * inverse))};
  for (int64_t i = 0; i < inputs; ++i) {
    const float moved = std::nearbyint(x[i] * inverse) + static_cast<float>(row.zero);
    row.codes.push_back(static_cast<int>(std::fmin(std::fmax(moved, 0.0f), 255.0f)));
  }
  return row;
}

double activated(double x, Activation activation) {
  if (x < -1e30) return activation == Activation::none ? x : 0;  // also where x is infinite
  switch (activation) {
    case Activation::gelu:
      return x * 0.5 * std::erfc(-x / std::sqrt(2.0));
    case Activation::relu:
      return x < 0 ? 0 : x;
    case Activation::silu:
      return x / (1 + std::exp(-x));
    case Activation::none:
      break;
  }
  return x;
}

// y [tokens, outputs], before the activation.
std::vector<float> reference(const Packed& p, const std::vector<float>& x, int64_t tokens) {
  std::vector<float> y;
  for (int64_t t = 0; t < tokens; ++t) {
    const Row row = quantized(x.data() + t * p.inputs, p.inputs);
    for (int64_t o = 0; o < p.outputs; ++o) {
      const int64_t strip = o / p.height;
      int32_t sum = 0;
      for (int32_t b = p.starts[strip]; b < p.starts[strip + 1]; ++b) {
        for (int i = 0; i < GROUP; ++i) {
          const int64_t input = p.columns[b] * GROUP + i;
          if (input >= p.inputs) continue;
          const int8_t code = p.blocks[b * p.block_bytes() + o % p.height * GROUP + i];
          sum += (row.codes[input] - row.zero) * code;
        }
      }
      const float scale = p.scales[o] * row.scale;
      y.push_back(static_cast<float>(sum) * scale + (p.bias ? p.bias[o] : 0.0f));
    }
  }
  return y;
}

// --- One after the other, or on three threads.

bool run_alone(const void*, void (*f)(void*, size_t), size_t units, void* data) {
  for (size_t u = 0; u < units; ++u) f(data, u);
  return true;
}

bool run_on_threads(const void*, void (*f)(void*, size_t), size_t units, void* data) {
  std::vector<std::thread> threads;
  for (size_t first = 0; first < 3; ++first) {
    threads.emplace_back([=] {
      for (size_t u = first; u < units; u += 3) f(data, u);
    });
  }
  for (auto& thread : threads) thread.join();
  return true;
}

// --- The comparisons.

struct Case {
  int64_t outputs, inputs, height, tokens;
  double density;
  Activation activation;
};

Case random_case(Random& random) {
  constexpr double DENSITIES[] = {0, 0.1, 0.5, 1};
  return {
      .outputs = between(random, 1, 100),
      .inputs = between(random, 1, 150),
      .height = between(random, 0, 1) ? 16 : 32,
      .tokens = between(random, 1, 70),
      .density = DENSITIES[between(random, 0, 3)],
      .activation = static_cast<Activation>(between(random, 0, 3)),
  };
}

std::vector<float> random_x(Random& random, const Case& c) {
  std::vector<float> x(c.tokens * c.inputs);
  const float scale = std::exp(3 * normal(random)), shift = normal(random);
  for (float& value : x) value = scale * (normal(random) + shift);
  // Rows that are nothing but zeros, huge, tiny, or no numbers.
  const float strange[] = {0, 3e38f, -3e38f, 1e-41f, NAN, INFINITY, -INFINITY};
  for (int64_t t = 0; t < c.tokens; ++t) {
    if (between(random, 0, 9)) continue;
    x[t * c.inputs + between(random, 0, c.inputs - 1)] = strange[between(random, 0, 6)];
  }
  return x;
}

bool agrees(float found, float linear, Activation activation) {
  if (std::isnan(linear)) return std::isnan(found);
  if (activation == Activation::none) return found == linear;
  const double wanted = activated(linear, activation);
  if (std::isnan(wanted)) return std::isnan(found);
  return std::fabs(found - wanted) <= 2e-6 * (1 + std::fabs(wanted)) || found == wanted;
}

void compare(const KernelSet& kernels, Random& random, const Case& c) {
  Weights weights;
  random_weights(random, weights, c.outputs, c.inputs, c.height, kernels.exact_bits, c.density);
  const Sentence problem = validate(weights.claims, kernels.exact_bits);
  expect(!problem, problem.text, kernels.name);
  const Packed p = packed(weights, c.activation);
  const std::vector<float> x = random_x(random, c), linear = reference(p, x, c.tokens);
  for (const auto run : {run_alone, run_on_threads}) {
    std::vector<float> y(c.tokens * c.outputs, 12345.0f);
    const Outcome outcome = run_linear(kernels, p, x.data(), c.tokens, y.data(), {run, nullptr});
    expect(outcome == Outcome::done, "ran", kernels.name);
    for (size_t i = 0; i < y.size(); ++i) {
      if (agrees(y[i], linear[i], c.activation)) continue;
      char text[160];
      std::snprintf(text, sizeof text, "%ldx%ld, %ld high, %ld tokens, activation %d: %g at %zu, of %g",
                    static_cast<long>(c.outputs), static_cast<long>(c.inputs),
                    static_cast<long>(c.height), static_cast<long>(c.tokens),
                    static_cast<int>(c.activation), y[i], i, linear[i]);
      return expect(false, text, kernels.name);
    }
  }
}

// Few tokens and so many outputs that these are divided into units: eight, the last strip is cut.
constexpr Case DIVIDED = {700, 500, 32, 13, 1, Activation::relu};

// Codes and inputs as large as they can be: sums that are just inside of int32.
void compare_largest(const KernelSet& kernels) {
  Random random(1);
  Weights weights;
  const Case c = {16, MOST_INPUTS, 16, 5, 1, Activation::none};
  random_weights(random, weights, c.outputs, c.inputs, c.height, kernels.exact_bits, c.density);
  const int largest = kernels.exact_bits == 7 ? 64 : 127;
  for (auto& code : weights.blocks) code = static_cast<int8_t>(code < 0 ? -largest : largest);
  std::memset(weights.blocks.data(), -largest, weights.blocks.size() / 2);
  const Packed p = packed(weights, c.activation);
  std::vector<float> x(c.tokens * c.inputs, 1.0f), y(c.tokens * c.outputs);
  run_linear(kernels, p, x.data(), c.tokens, y.data(), {run_alone, nullptr});
  expect(y == reference(p, x, c.tokens), "the largest sums", kernels.name);
}

void test(const KernelSet& kernels, int count) {
  const int before = failures;
  Random random(0);
  for (int i = 0; i < count; ++i) compare(kernels, random, random_case(random));
  compare(kernels, random, DIVIDED);
  compare_largest(kernels);
  std::printf("%-18s %d cases, %d failures\n", kernels.name, count, failures - before);
}

void test_choice() {
  const Choice unknown = choose("sse9");
  expect(!unknown.kernels && std::strstr(unknown.problem.text, "'sse9'"), "unknown set", "choose");
  expect(choose("scalar").kernels->exact_bits == 8, "scalar by name", "choose");
  expect(choose(nullptr).kernels == choose("").kernels, "an empty name is none", "choose");
  for (auto set = KERNEL_SETS; *set; ++set) {
    const Choice choice = choose((*set)->name);
    expect((choice.kernels == *set) == runs_here(**set), "only what runs here", (*set)->name);
    expect(!choice.kernels == bool(choice.problem), "a problem or kernels", (*set)->name);
  }
}

}  // namespace
}  // namespace graphprune

int main(int count, char** arguments) {
  using namespace graphprune;
  const int cases = count > 1 ? std::atoi(arguments[1]) : 400;
  test_choice();
  for (auto set = KERNEL_SETS; *set; ++set) {
    if (runs_here(**set)) {
      test(**set, cases);
    } else {
      std::printf("%-18s skipped: this CPU lacks it\n", (*set)->name);
    }
  }
#ifdef GRAPHPRUNE_SIMDE
  test(avx512vnni_simde, cases);
  test(avxvnni_simde, cases);
#endif
  return failures > 0;
}
