"""LLaMA's layers on a CPU: vLLM's kernels, called without what lies between them in vLLM.

vLLM reaches each kernel through modules, registered operations and their dispatchers, which trace, compile and know all
kinds of hardware. On a CPU, uncompiled, a token of a small model takes longer there than in the kernels, and the threads
that wait for the next product fall asleep meanwhile. The pass below calls the same kernels in the same order, and those
for RMSNorm and SiLU that vLLM has for CPUs, too, but uses on GPUs only.

Written against vLLM 0.32 (vllm/model_executor/models/llama.py, vllm/v1/attention/backends/cpu_attn.py). Models that it
does not fit keep vLLM's own pass, and `seg_state_check` compares states with transformers' at every start.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

_ROW = 16  # the kernels of RMSNorm and SiLU take rows of a multiple of this


def use_on(runner) -> bool:
    """Give the model of vLLM's `runner` the pass below; False, and nothing changed, where it does not fit."""
    if runner.device.type != "cpu" or not runner.model_config.enforce_eager:
        return False
    model, kernels = getattr(runner.model, "model", None), Kernels.of_vllm()
    if not (_fits(model) and kernels.round(runner.model_config.dtype)):
        return False
    model.forward = _forward_of(model, kernels)
    return True


@dataclass(frozen=True)
class Kernels:
    """rms_norm(out, x, weight, epsilon), add_rms_norm(x, residual, weight, epsilon) which writes to both, and
    silu_and_mul(out, gate and factor side by side)."""

    rms_norm: Callable
    add_rms_norm: Callable
    silu_and_mul: Callable

    @classmethod
    def of_vllm(cls) -> "Kernels":
        kernels = torch.ops._C
        return cls(kernels.rms_norm.default, kernels.fused_add_rms_norm.default, kernels.silu_and_mul.default)

    def round(self, dtype: torch.dtype) -> bool:
        """Whether results are the nearest values of `dtype`: for processors without bf16, vLLM's kernels cut its digits
        off, and over a model's layers that adds up to five times the error of rounding."""
        x, other = torch.randn(2, 512, generator=torch.Generator().manual_seed(0)).to(dtype).split(1)
        ones, total = torch.ones_like(x[0]), x.float() + other.float()
        normed, added, residual, product = torch.empty_like(x), x.clone(), other.clone(), torch.empty_like(x)
        self.rms_norm(normed, x, ones, 0.0)
        self.add_rms_norm(added, residual, ones, 0.0)
        self.silu_and_mul(product, torch.cat([x, other], -1))
        return all(((result.float() - exact).abs() <= (times * torch.finfo(dtype).eps + 1e-5) * exact.abs()).all()
                   # Rounding is off by half of eps at most, cutting by all of it. `added` is rounded twice.
                   for result, exact, times in ((normed, functional.rms_norm(x.float(), ones.shape), 0.6),
                                                (residual, total, 0.6),
                                                (added, functional.rms_norm(total, ones.shape), 1.2),
                                                (product, functional.silu(x.float()) * other.float(), 0.6)))


def _fits(model) -> bool:
    """Whether it consists of LLaMA's own layers (Phi-3 has them, too), whole in this process and not quantised."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaModel
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    def fits(layer) -> bool:
        if type(layer) is not LlamaDecoderLayer:
            return False
        attention, mlp = layer.self_attn, layer.mlp
        products = (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
        return (type(attention) is LlamaAttention and type(mlp) is LlamaMLP
                and type(attention.attn.impl) is CPUAttentionBackendImpl
                and attention.attn.kv_sharing_target_layer_name is None and attention.attn.query_quant is None
                and layer.hidden_size % _ROW == 0 and mlp.down_proj.input_size % _ROW == 0
                and all(type(one.quant_method) is UnquantizedLinearMethod and one.tp_size == 1 and one.bias is None
                        for one in products))

    return type(model) is LlamaModel and all(map(fits, model.layers))


def _forward_of(model, kernels: Kernels) -> Callable:
    from vllm.forward_context import get_forward_context

    rms_norm, add_rms_norm = kernels.rms_norm, kernels.add_rms_norm
    without_requests = model.forward
    layers = [_Layer(layer, kernels) for layer in model.layers]
    last_norm = _of_norm(model.norm)

    def forward(input_ids, positions, intermediate_tensors, inputs_embeds=None):
        context = get_forward_context()
        if not isinstance(context.attn_metadata, dict):  # vLLM runs the model for its own purposes
            return without_requests(input_ids, positions, intermediate_tensors, inputs_embeds)
        # A copy: the embeddings lie in a buffer of vLLM's, and the sums are made in place.
        residual = model.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds.clone()
        x = torch.empty_like(residual)
        rms_norm(x, residual, *layers[0].input_norm)
        for number, layer in enumerate(layers):
            if number:
                add_rms_norm(x, residual, *layer.input_norm)
            x = layer.attention(x, positions, context)
            add_rms_norm(x, residual, *layer.attention_norm)
            x = layer.mlp(x)
        add_rms_norm(x, residual, *last_norm)
        return x

    return forward


class _Layer:
    """One decoder layer, its parts at hand. x: rows of the step's tokens, each as wide as the model."""

    def __init__(self, layer, kernels: Kernels):
        attention, mlp = layer.self_attn, layer.mlp
        self.input_norm, self.attention_norm = map(_of_norm, (layer.input_layernorm, layer.post_attention_layernorm))
        self.qkv, self.out, self.gate_up, self.down = map(_product, (
            attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj))
        self.rotary = attention.rotary_emb.forward
        self.sizes = [attention.q_size, attention.kv_size, attention.kv_size]
        self.attn, self.impl, self.name = attention.attn, attention.attn.impl, attention.attn.layer_name
        self.silu_and_mul = kernels.silu_and_mul

    def attention(self, x: torch.Tensor, positions: torch.Tensor, context) -> torch.Tensor:
        attn, cache = self.attn, self.attn.kv_cache
        query, key, value = self.qkv(x).split(self.sizes, -1)
        query, key = self.rotary(positions, query, key)
        query = query.view(-1, attn.num_heads, attn.head_size)
        key, value = key.view(-1, attn.num_kv_heads, attn.head_size), value.view(-1, attn.num_kv_heads, attn.head_size)
        self.impl.do_kv_cache_update(attn, key, value, cache, context.slot_mapping[self.name])
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        self.impl.forward(attn, query, key, value, cache, context.attn_metadata[self.name], output)
        return self.out(output.view(len(output), -1))

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        both = self.gate_up(x)
        product = both.new_empty(len(both), both.shape[1] // 2)
        self.silu_and_mul(product, both)
        return self.down(product)


def _of_norm(norm) -> tuple[torch.Tensor, float]:
    """What the kernels of RMSNorm take."""
    return norm.weight.data, norm.variance_epsilon


def _product(linear) -> Callable[[torch.Tensor], torch.Tensor]:
    """x @ weight.T by the kernel that vLLM has chosen for this weight."""
    return lambda x: linear.cpu_linear(x, linear.weight, None)
