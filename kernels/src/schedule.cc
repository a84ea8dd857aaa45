#include "schedule.h"

#include <atomic>
#include <cstdlib>

namespace graphprune {
namespace {

// Tokens that are quantized and multiplied together: at most. Enough for the weights to be read
// seldom from the far caches, and few enough for the codes to stay in the near ones.
constexpr int64_t MOST_TOKENS_OF_UNIT = 24;
constexpr int64_t TILE = 4;  // instruction sets multiply so many tokens at once, or a multiple

// Up to so many tokens make fewer units than large machines have threads: the outputs are divided
// instead.
constexpr int64_t FEW_TOKENS = 48;

// Multiplications below which waking a thread takes longer than it saves: for one token 6 µs from
// the second cache, and 20 from the third.
constexpr int64_t WORK_OF_UNIT = 512 * 1024;
constexpr int64_t MOST_UNITS = 64;

// Memory of one unit. Each has its own, so that calls of one session on several threads share
// nothing.
struct Scratch {
  explicit Scratch(size_t bytes) : memory(std::malloc(bytes)) {}
  ~Scratch() { std::free(memory); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* memory;
};

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

struct Work {
  const KernelSet& kernels;
  const Packed& packed;
  const float* x;
  int64_t tokens;
  float* y;
};

// Many tokens: each unit quantizes and multiplies its own.

struct ByTokens {
  Work work;
  int64_t unit;  // tokens, but of the last
  std::atomic<bool> out_of_memory = false;
};

void run_tokens(void* data, size_t unit) {
  auto& job = *static_cast<ByTokens*>(data);
  const Work& w = job.work;
  const int64_t first = static_cast<int64_t>(unit) * job.unit;
  const int64_t tokens = smaller(w.tokens - first, job.unit);
  const Scratch scratch(rows_bytes(tokens, w.packed.inputs));
  if (!scratch.memory) {
    job.out_of_memory = true;
    return;
  }
  const Rows rows = rows_in(scratch.memory, tokens, w.packed.inputs);
  w.kernels.quantize(w.x + first * w.packed.inputs, rows);
  w.kernels.multiply(w.packed, rows, 0, w.packed.strips(), w.y + first * w.packed.outputs);
}

// Units are a power of two if possible, as threads mostly are, so that all end together.
int64_t tokens_of_unit(int64_t tokens) {
  int64_t units = 2;
  while (tokens > units * MOST_TOKENS_OF_UNIT) units *= 2;
  return (tokens + units * TILE - 1) / (units * TILE) * TILE;
}

Outcome divide_tokens(const Work& work, const Parallel& parallel) {
  ByTokens job{work, tokens_of_unit(work.tokens)};
  const size_t units = (work.tokens + job.unit - 1) / job.unit;
  if (!parallel.run(parallel.context, run_tokens, units, &job)) return Outcome::not_parallel;
  return job.out_of_memory ? Outcome::out_of_memory : Outcome::done;
}

// Few tokens: quantized once, and each unit has outputs of its own.

struct ByOutputs {
  Work work;
  Rows rows;
  int64_t units;
};

// The strip at which a unit begins. Units have the same number of blocks, not of strips, since
// pruning may leave many blocks in some strips and few in others.
int64_t first_strip(const ByOutputs& job, int64_t unit) {
  const Packed& p = job.work.packed;
  if (unit == job.units) return p.strips();
  const int64_t block = p.starts[p.strips()] * unit / job.units;
  int64_t low = 0, high = p.strips();
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    p.starts[middle] < block ? low = middle + 1 : high = middle;
  }
  return unit == 0 ? 0 : low;
}

void run_outputs(void* data, size_t unit) {
  const auto& job = *static_cast<ByOutputs*>(data);
  const auto u = static_cast<int64_t>(unit);
  job.work.kernels.multiply(job.work.packed, job.rows, first_strip(job, u),
                            first_strip(job, u + 1), job.work.y);
}

// A power of two, as threads mostly are: three units would take two threads as long as four.
int64_t units_of_outputs(const Work& work) {
  const Packed& p = work.packed;
  const int64_t products = work.tokens * p.starts[p.strips()] * p.block_bytes();
  const int64_t most = smaller(smaller(products / WORK_OF_UNIT, p.strips()), MOST_UNITS);
  int64_t units = 1;
  while (2 * units <= most) units *= 2;
  return units;
}

Outcome divide_outputs(const Work& work, const Parallel& parallel) {
  const Packed& p = work.packed;
  const Scratch scratch(rows_bytes(work.tokens, p.inputs));
  if (!scratch.memory) return Outcome::out_of_memory;
  ByOutputs job{work, rows_in(scratch.memory, work.tokens, p.inputs), units_of_outputs(work)};
  work.kernels.quantize(work.x, job.rows);
  if (job.units == 1) {
    run_outputs(&job, 0);
    return Outcome::done;
  }
  const bool ran = parallel.run(parallel.context, run_outputs, job.units, &job);
  return ran ? Outcome::done : Outcome::not_parallel;
}

}  // namespace

Outcome run_linear(const KernelSet& kernels, const Packed& packed, const float* x, int64_t tokens,
                   float* y, const Parallel& parallel) {
  if (tokens == 0) return Outcome::done;
  const Work work{kernels, packed, x, tokens, y};
  return tokens <= FEW_TOKENS ? divide_outputs(work, parallel) : divide_tokens(work, parallel);
}

}  // namespace graphprune
