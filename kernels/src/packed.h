// A weight [outputs, inputs] of which only the blocks are kept that hold a nonzero.
//
// A block is `height` outputs times GROUP inputs, int8, output after output. The blocks of a strip
// (`height` outputs that lie side by side) follow each other in the order of their inputs, so that
// a kernel reads all weights once from front to back while it holds the sums of a strip.
#pragma once

#include <cstdint>

namespace graphprune {

constexpr int GROUP = 4;  // inputs of a block: what one lane of an int8 product adds up

// 255 * 128 * inputs has to fit into the int32 sums.
constexpr int64_t MOST_INPUTS = INT32_MAX / (255 * 128);

enum class Activation { none, gelu, relu, silu };

// The arrays lie in the model's file, or where ONNX Runtime has read it to: nothing is copied.
struct Packed {
  int64_t outputs;
  int64_t inputs;
  int64_t height;           // outputs of a block: 16 or 32
  const int8_t* blocks;     // [blocks, height, GROUP]
  const int32_t* columns;   // [blocks]: first input / GROUP
  const int32_t* starts;    // [strips + 1]: first block of each strip, and the number of blocks
  const float* scales;      // [strips * height]
  const float* bias;        // [strips * height], or null
  const int32_t* row_sums;  // [strips * height]: sum of each output's codes
  Activation activation;

  int64_t strips() const { return (outputs + height - 1) / height; }
  int64_t groups() const { return (inputs + GROUP - 1) / GROUP; }
  int64_t block_bytes() const { return height * GROUP; }
};

}  // namespace graphprune
