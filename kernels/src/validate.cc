#include "validate.h"

#include <cinttypes>
#include <cstring>

namespace graphprune {
namespace {

constexpr int LARGEST_OF_7_BITS = 64;  // 2 * 255 * 64 is the most that fits into 16 bits

Sentence check_attributes(const Claims& c) {
  if (c.bits != 7 && c.bits != 8) {
    return sentence("bits must be 7 or 8, got %" PRId64, c.bits);
  }
  if (c.outputs < 1 || c.outputs > INT32_MAX) {
    return sentence("outputs must be between 1 and %d, got %" PRId64, INT32_MAX, c.outputs);
  }
  if (c.inputs < 1 || c.inputs > MOST_INPUTS) {
    return sentence("inputs must be between 1 and %" PRId64
                    ", for more the int32 sums could overflow; got %" PRId64,
                    MOST_INPUTS, c.inputs);
  }
  return {};
}

Sentence check_blocks_shape(const Tensor& blocks) {
  if (blocks.rank != 3 || blocks.dims[2] != GROUP ||
      (blocks.dims[1] != 16 && blocks.dims[1] != 32)) {
    return sentence("blocks must have the shape [count, 16 or 32, %d]", GROUP);
  }
  if (blocks.dims[0] < 0 || blocks.dims[0] > INT32_MAX) {
    return sentence("blocks must be between 0 and %d, got %" PRId64, INT32_MAX, blocks.dims[0]);
  }
  return {};
}

Sentence check_length(const char* name, const Tensor& tensor, int64_t wanted) {
  if (tensor.rank != 1) {
    return sentence("%s must have one dimension, got %zu", name, tensor.rank);
  }
  if (tensor.dims[0] != wanted) {
    return sentence("%s must have %" PRId64 " elements, got %" PRId64, name, wanted,
                    tensor.dims[0]);
  }
  return {};
}

Sentence check_lengths(const Claims& c) {
  const int64_t height = c.blocks.dims[1];
  const int64_t strips = (c.outputs + height - 1) / height;
  if (Sentence s = check_length("columns", c.columns, c.blocks.dims[0])) return s;
  if (Sentence s = check_length("starts", c.starts, strips + 1)) return s;
  if (Sentence s = check_length("scales", c.scales, strips * height)) return s;
  return c.has_bias ? check_length("bias", c.bias, strips * height) : Sentence{};
}

Sentence check_starts(const int32_t* starts, int64_t strips, int64_t blocks) {
  if (starts[0] != 0) return sentence("starts must begin with 0, got %d", starts[0]);
  for (int64_t s = 0; s < strips; ++s) {
    if (starts[s + 1] < starts[s]) {
      return sentence("starts must not decrease: %d follows %d", starts[s + 1], starts[s]);
    }
  }
  if (starts[strips] != blocks) {
    return sentence("starts must end with the number of blocks, %" PRId64 ", got %d", blocks,
                    starts[strips]);
  }
  return {};
}

// Call with starts that are right.
Sentence check_columns(const Packed& p) {
  for (int64_t s = 0; s < p.strips(); ++s) {
    int64_t before = -1;
    for (int64_t b = p.starts[s]; b < p.starts[s + 1]; ++b) {
      if (p.columns[b] <= before) {
        return sentence("columns must ascend within %" PRId64 " outputs: %d follows %" PRId64,
                        p.height, p.columns[b], before);
      }
      before = p.columns[b];
    }
    if (before >= p.groups()) {
      return sentence("column %" PRId64 " is beyond the %" PRId64 " inputs", before, p.inputs);
    }
  }
  return {};
}

Sentence check_finite(const char* name, const float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] - values[i] != 0) return sentence("%s must be finite", name);
  }
  return {};
}

bool exceeds_7_bits(const int8_t* codes, int64_t count) {
  // Without a branch the compiler makes vectors of it: matrices have millions of codes.
  int outside = 0;
  for (int64_t i = 0; i < count; ++i) {
    outside |= (codes[i] > LARGEST_OF_7_BITS) | (codes[i] < -LARGEST_OF_7_BITS);
  }
  return outside != 0;
}

Sentence check_codes(const Claims& c, const Packed& p, int exact_bits) {
  if (c.bits == 8 && exact_bits == 8) return {};
  if (!exceeds_7_bits(p.blocks, c.blocks.dims[0] * p.block_bytes())) return {};
  if (c.bits == 7) return sentence("bits is 7, but blocks hold codes beyond 64");
  return sentence(
      "packed for CPUs with VNNI (8 bits), and this one needs 7: export again with bits=7");
}

}  // namespace

Sentence validate(const Claims& c, int exact_bits) {
  if (Sentence s = check_attributes(c)) return s;
  if (Sentence s = check_blocks_shape(c.blocks)) return s;
  if (Sentence s = check_lengths(c)) return s;
  const Packed p = packed_of(c, Activation::none);
  if (Sentence s = check_starts(p.starts, p.strips(), c.blocks.dims[0])) return s;
  if (Sentence s = check_columns(p)) return s;
  if (Sentence s = check_finite("scales", p.scales, p.strips() * p.height)) return s;
  if (c.has_bias) {
    if (Sentence s = check_finite("bias", p.bias, p.strips() * p.height)) return s;
  }
  return check_codes(c, p, exact_bits);
}

Packed packed_of(const Claims& c, Activation activation) {
  return {
      .outputs = c.outputs,
      .inputs = c.inputs,
      .height = c.blocks.dims[1],
      .blocks = static_cast<const int8_t*>(c.blocks.data),
      .columns = static_cast<const int32_t*>(c.columns.data),
      .starts = static_cast<const int32_t*>(c.starts.data),
      .scales = static_cast<const float*>(c.scales.data),
      .bias = c.has_bias ? static_cast<const float*>(c.bias.data) : nullptr,
      .row_sums = nullptr,
      .activation = activation,
  };
}

void add_up_rows(const Packed& p, int32_t* sums) {
  std::memset(sums, 0, p.strips() * p.height * sizeof *sums);
  for (int64_t s = 0; s < p.strips(); ++s) {
    for (int64_t b = p.starts[s]; b < p.starts[s + 1]; ++b) {
      const int8_t* codes = p.blocks + b * p.block_bytes();
      for (int64_t i = 0; i < p.height; ++i, codes += GROUP) {
        sums[s * p.height + i] += codes[0] + codes[1] + codes[2] + codes[3];
      }
    }
  }
}

}  // namespace graphprune
