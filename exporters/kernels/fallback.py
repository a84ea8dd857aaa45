"""SparseLinear as a function of standard operators, kept in the file for runtimes without kernels.

It unpacks the weight and multiplies in float, so it needs no quantization of x, and no less time
than a dense product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from graphprune.exporters.kernels.library import DOMAIN, OPERATOR
from graphprune.exporters.kernels.packing import WIDTH

if TYPE_CHECKING:
    import onnx

INPUTS = ("x", "blocks", "columns", "starts", "scales", "bias")
ATTRIBUTES = ("outputs", "inputs", "bits", "activation")

# Strips are `height` outputs, groups are WIDTH inputs; a block is the tile of a strip and a group.
_HEAD = f"""
<ir_version: 10, opset_import: ["" : OPSET, "{DOMAIN}" : 1]>
agraph (float[n] x) => (float[n] y) {{ y = {DOMAIN}.{OPERATOR}(x) }}
<domain: "{DOMAIN}", opset_import: ["" : OPSET]>
"""
_BODY = f"""
{OPERATOR} <{", ".join(ATTRIBUTES)}> ({", ".join(INPUTS)}) => (y)
{{
  zero = Constant<value_ints: ints = [0]>()
  one = Constant<value_ints: ints = [1]>()
  both = Constant<value_ints: ints = [0, 1]>()
  width = Constant<value_ints: ints = [{WIDTH}]>()
  rest = Constant<value_ints: ints = [{WIDTH - 1}]>()
  outputs_0 = Constant<value_int: int = @outputs>()
  inputs_0 = Constant<value_int: int = @inputs>()
  outputs_1 = Unsqueeze(outputs_0, zero)
  inputs_1 = Unsqueeze(inputs_0, zero)
  rounded = Add(inputs_1, rest)
  groups = Div(rounded, width)
  padded = Mul(groups, width)

  count = Shape<start: int = 0, end: int = 1>(blocks)
  height = Shape<start: int = 1, end: int = 2>(blocks)
  bounds = Shape<start: int = 0, end: int = 1>(starts)
  strips = Sub(bounds, one)

  none = ConstantOfShape(count)
  here = Cast<to: int = 7>(none)
  ones = Add(here, one)
  last = Constant<value_int: int = 0>()
  upto = CumSum(ones, last)
  number = Sub(upto, one)
  starts_64 = Cast<to: int = 7>(starts)
  ends = Slice(starts_64, one, bounds, zero)
  ends_column = Unsqueeze(ends, one)
  passed = LessOrEqual(ends_column, number)
  passed_64 = Cast<to: int = 7>(passed)
  strip = ReduceSum<keepdims: int = 0>(passed_64, zero)

  columns_64 = Cast<to: int = 7>(columns)
  strip_column = Unsqueeze(strip, one)
  group_column = Unsqueeze(columns_64, one)
  places = Concat<axis: int = 1>(strip_column, group_column)
  shape = Concat<axis: int = 0>(strips, groups, height, width)
  nothing = ConstantOfShape(shape)
  codes = Cast<to: int = 1>(blocks)
  tiles = ScatterND(nothing, places, codes)
  turned = Transpose<perm: ints = [0, 2, 1, 3]>(tiles)
  all_outputs = Mul(strips, height)
  flat = Concat<axis: int = 0>(all_outputs, padded)
  matrix = Reshape(turned, flat)
  scale_column = Unsqueeze(scales, one)
  scaled = Mul(matrix, scale_column)
  from = Concat<axis: int = 0>(zero, zero)
  to = Concat<axis: int = 0>(outputs_1, inputs_1)
  weight = Slice(scaled, from, to, both)
  weight_turned = Transpose<perm: ints = [1, 0]>(weight)
  own_bias = Slice(bias, zero, outputs_1, zero)
  product = MatMul(x, weight_turned)
  sum = Add(product, own_bias)

  activation = Constant<value_string: string = @activation>()
  named_gelu = Constant<value_string: string = "gelu">()
  named_relu = Constant<value_string: string = "relu">()
  named_silu = Constant<value_string: string = "silu">()
  is_gelu = Equal(activation, named_gelu)
  is_relu = Equal(activation, named_relu)
  is_silu = Equal(activation, named_silu)
  gelu = Gelu(sum)
  relu = Relu(sum)
  sigmoid = Sigmoid(sum)
  silu = Mul(sum, sigmoid)
  or_silu = Where(is_silu, silu, sum)
  or_relu = Where(is_relu, relu, or_silu)
  y = Where(is_gelu, gelu, or_relu)
}}
"""


def fallback(opset: int) -> onnx.FunctionProto:
    """The function, of the operator's domain and name.

    Args:
        opset: of the model, which its functions must share; from 20 on, which has Gelu.
    """
    import onnx.parser

    text = _HEAD.replace("OPSET", str(opset)) + _BODY
    function: onnx.FunctionProto = onnx.parser.parse_model(text).functions[0]
    return function
