"""Quantise a language model's folder with llm-compressor; run by `quantize.py`, in an environment of its own.

    python compress_llm.py SCHEME FOLDER PROMPTS TARGET

SCHEME: fp8 (weights per channel, activations per token while it runs), awq or gptq (weights in 4 bits). PROMPTS: a
safetensors file of prompt embeddings [T, H], each calibrated on as it is. Nothing of this project is imported: the
versions that llm-compressor wants do not fit into vLLM's environment.
"""

import sys

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.awq import AWQModifier
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

GROUPS = (128, 64, 32)  # columns that share a scale: the sizes that vLLM's 4-bit kernels take


def main(scheme: str, folder: str, prompts: str, target: str) -> None:
    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda *_: None  # AWQ pins memory for a GPU, also where there is none
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    embedded = [rows[None].to(model.dtype) for rows in load_file(prompts).values()]
    calibration = DataLoader(
        [{"inputs_embeds": rows, "attention_mask": torch.ones(rows.shape[:2], dtype=torch.long)} for rows in embedded],
        batch_size=None,
    )
    if scheme == "fp8":
        oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=["lm_head"]))
    else:
        modifier = {"awq": AWQModifier, "gptq": GPTQModifier}[scheme]
        oneshot(
            model=model,
            recipe=modifier(
                config_groups={"group_0": four_bits(model, symmetric=scheme == "gptq")}, ignore=["lm_head"]
            ),
            dataset=calibration,
        )
    model.save_pretrained(target, save_compressed=True)


def four_bits(model: torch.nn.Module, symmetric: bool) -> QuantizationScheme:
    columns = {module.in_features for module in model.model.modules() if isinstance(module, torch.nn.Linear)}
    fitting = [size for size in GROUPS if all(count % size == 0 for count in columns)]
    if not fitting:
        sys.exit(f"the language model's widths {sorted(columns)} are no multiples of {GROUPS[-1]}: 4 bits need that")
    return QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(num_bits=4, type="int", symmetric=symmetric, strategy="group", group_size=fitting[0]),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
