"""Attention as one operator of ONNX Runtime's, for the graphs that it computes on a CPU.

ONNX has attention as products and a softmax between them: 200 MB of scores in each block of a 32x256x256 volume,
written and read three times. ONNX Runtime's own operator computes it block by block in the processor's cache, and
OpenVINO reads it, too. TensorRT does not: its plans start from plain ONNX, in which it finds attention by itself.
"""

from __future__ import annotations

import onnxscript
import torch
from onnx.defs import OpSchema
from onnxscript import opset20 as op

DOMAIN, VERSION = "com.microsoft", 1
_TENSOR = OpSchema.FormalParameter
# The operator as far as it is used here; onnxscript does not know it.
_SCHEMA = OpSchema(
    "MultiHeadAttention",
    DOMAIN,
    VERSION,
    type_constraints=[("T", ["tensor(float)"], "")],
    inputs=[_TENSOR(name, "T") for name in ("query", "key", "value")],
    outputs=[_TENSOR("output", "T")],
    attributes=[OpSchema.Attribute("num_heads", OpSchema.AttrType.INT, "")],
)
_attention = onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, VERSION), _SCHEMA.name, _SCHEMA)


def translation_table() -> dict:
    """For torch.onnx.export: how F.scaled_dot_product_attention without mask, dropout or own scale is written."""
    return {torch.ops.aten.scaled_dot_product_attention.default: _translated}


def _translated(query, key, value):
    """[B, heads, N, E] each, as PyTorch has them; the operator wants [B, N, heads * E]."""
    heads, width = query.shape[1], query.shape[3]
    flat = op.Constant(value_ints=[0, 0, heads * width])
    rows = [op.Reshape(op.Transpose(part, perm=[0, 2, 1, 3]), flat) for part in (query, key, value)]
    apart = op.Reshape(_attention(*rows, num_heads=heads), op.Constant(value_ints=[0, 0, heads, width]))
    return op.Transpose(apart, perm=[0, 2, 1, 3])
