"""LLaMA's layers on a CPU: vLLM's kernels, called without what lies between them in vLLM.

vLLM reaches each kernel through modules, registered operations and their dispatchers, which trace, compile and know
all kinds of hardware. On a CPU, uncompiled, a token of a small model takes longer there than in the kernels, and the
threads that wait for the next product fall asleep meanwhile. The pass below calls the same kernels in the same order,
and for RMSNorm one that vLLM builds for CPUs but uses on GPUs only.

Written against vLLM 0.32 (vllm/model_executor/models/llama.py, vllm/v1/attention/backends/cpu_attn.py). Models that it
does not fit keep vLLM's own pass, and `seg_state_check` compares the two at every start.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

_ROW = 8  # the kernels of RMSNorm take rows of a multiple of this


def use_on(runner) -> bool:
    """Give the model of vLLM's `runner` the pass below; False, and nothing changed, where it does not fit."""
    if runner.device.type != "cpu" or not runner.model_config.enforce_eager:
        return False
    model = getattr(runner.model, "model", None)
    if not _fits(model):
        return False
    norms = Norms.of_vllm()
    if not norms.round(runner.model_config.dtype):
        return False
    model.forward = _forward_of(model, norms)
    return True


@dataclass(frozen=True)
class Norms:
    """plain(out, x, weight, epsilon), and added(x, residual, weight, epsilon), which writes to both."""

    plain: Callable
    added: Callable

    @classmethod
    def of_vllm(cls) -> "Norms":
        return cls(torch.ops._C.rms_norm.default, torch.ops._C.fused_add_rms_norm.default)

    def round(self, dtype: torch.dtype) -> bool:
        """Whether results are the nearest values of `dtype`: for processors without bf16, vLLM's kernels cut its digits
        off, and over a model's layers that adds up to five times the error of rounding."""
        x, other = torch.randn(2, 512, generator=torch.Generator().manual_seed(0)).to(dtype).split(1)
        ones, total = torch.ones_like(x[0]), x.float() + other.float()
        normed, added, residual = torch.empty_like(x), x.clone(), other.clone()
        self.plain(normed, x, ones, 0.0)
        self.added(added, residual, ones, 0.0)
        return all(torch.allclose(result.float(), exact, rtol=times * torch.finfo(dtype).eps + 1e-5, atol=1e-7)
                   # Rounding is off by half of eps at most, cutting by all of it. `added` is rounded twice.
                   for result, exact, times in ((normed, functional.rms_norm(x.float(), ones.shape), 0.6),
                                                (residual, total, 0.6),
                                                (added, functional.rms_norm(total, ones.shape), 1.2)))


def _fits(model) -> bool:
    """Whether it consists of LLaMA's own layers (Phi-3 has them, too), whole in this process and not quantised."""
    from vllm.model_executor.layers.attention.attention import Attention
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaModel
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    def fits(layer) -> bool:
        if type(layer) is not LlamaDecoderLayer:
            return False
        attention, mlp = layer.self_attn, layer.mlp
        products = (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
        return (type(attention) is LlamaAttention and type(mlp) is LlamaMLP
                and type(attention.attn) is Attention and type(attention.attn.impl) is CPUAttentionBackendImpl
                and layer.hidden_size % _ROW == 0
                and all(type(one.quant_method) is UnquantizedLinearMethod and one.tp_size == 1 and one.bias is None
                        for one in products))

    return type(model) is LlamaModel and all(map(fits, model.layers))


def _forward_of(model, norms: Norms) -> Callable:
    from vllm.forward_context import get_forward_context

    own = model.forward
    layers = list(map(_Layer, model.layers))
    last_norm = _of_norm(model.norm)

    def forward(input_ids, positions, intermediate_tensors, inputs_embeds=None):
        context = get_forward_context()
        if not isinstance(context.attn_metadata, dict):  # no requests: vLLM tries the model out
            return own(input_ids, positions, intermediate_tensors, inputs_embeds)
        # A copy: the embeddings lie in a buffer of vLLM's, and the sums are made in place.
        residual = model.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds.clone()
        x = torch.empty_like(residual)
        norms.plain(x, residual, *layers[0].input_norm)
        for number, layer in enumerate(layers):
            if number:
                norms.added(x, residual, *layer.input_norm)
            x = layer.attention(x, positions, context)
            norms.added(x, residual, *layer.attention_norm)
            x = layer.mlp(x)
        norms.added(x, residual, *last_norm)
        return x

    return forward


class _Layer:
    """One decoder layer, its parts at hand. x: rows of the step's tokens, each as wide as the model."""

    def __init__(self, layer):
        attention, mlp = layer.self_attn, layer.mlp
        self.input_norm, self.attention_norm = map(_of_norm, (layer.input_layernorm, layer.post_attention_layernorm))
        self.qkv, self.out, self.gate_up, self.down = map(_product, (
            attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj))
        self.rotary = attention.rotary_emb.forward
        self.sizes = [attention.q_size, attention.kv_size, attention.kv_size]
        self.attn, self.impl, self.name = attention.attn, attention.attn.impl, attention.attn.layer_name

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
        gate, factor = self.gate_up(x).chunk(2, -1)
        return self.down(functional.silu(gate).mul_(factor))


def _of_norm(norm) -> tuple[torch.Tensor, float]:
    """What the kernels of RMSNorm take."""
    return norm.weight.data, norm.variance_epsilon


def _product(linear) -> Callable[[torch.Tensor], torch.Tensor]:
    """x @ weight.T by the kernel that vLLM has chosen for this weight."""
    multiply, weight = linear.cpu_linear, linear.weight
    return lambda x: multiply(x, weight, None)
