"""The plan of a GPU's memory: what fits which card, and what the language model gets of it."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch

from benchmarks.make_checkpoint import config_of
from engine import doctor, gpu, gpu_memory
from engine.errors import RepositoryError, Unavailable
from engine.gpu import Gpu
from engine.runtime.decoder.llm_engine import LlmEngine
from engine.runtime.decoder_settings import DecoderSettings
from tests.unit import fake_models

GIB, MB = 1 << 30, 1_000_000
# Bytes that programs can have, as vLLM's and NVIDIA's documents print them.
L4 = Gpu("NVIDIA L4", "580.95.05", "8.9", round(22.05 * GIB), round(22.05 * GIB))
A10G = Gpu("NVIDIA A10G", "580.95.05", "8.6", round(22.06 * GIB), round(22.06 * GIB))
A100 = Gpu("NVIDIA A100", "580.95.05", "8.0", round(79.15 * GIB), round(79.15 * GIB))
H100 = Gpu("NVIDIA H100", "580.95.05", "9.0", round(79.19 * GIB), round(79.19 * GIB))
T4 = Gpu("NVIDIA T4", "580.95.05", "7.5", round(14.58 * GIB), round(14.58 * GIB))
CONFIGS = {
    "7B": {key: value for key, value in config_of("7b").items() if not isinstance(value, dict)},
    "4B": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32020,
    },
}
# Bytes of the weights of LLaMA-2-7B and Phi-3-mini.
BF16 = {"7B": 6_738_000_000 * 2, "4B": 3_821_000_000 * 2}
QUANTIZED = {"bf16": 1.0, "fp8": 0.53, "int4": 0.30}
# What an export of the published size has recorded (fp16 plans of batches of 1 and 4; ONNX graphs), 30 November 2026.
ENCODER = {"weights": 194 * MB, "contexts": [40 * MB, 126 * MB], "bindings": 59 * MB, "source": "engine"}
FP32_ENCODER = {"weights": 442 * MB, "contexts": [630 * MB, 1741 * MB], "bindings": 59 * MB, "source": "engine"}
HEAD = {"weights": 107 * MB, "contexts": [544 * MB], "bindings": 29 * MB, "source": "graph"}
GRAPHS = ("vision_encoder", "segmentation_encoder", "segmentation_head", "clip_image_encoder", "clip_text_encoder")
BERT = {"weights": 439 * MB, "contexts": [1404 * MB], "bindings": 1 * MB, "source": "graph"}


def exported(folder, size="7B", weights="bf16", encoder=ENCODER, clip=True, precision="bf16", **settings):
    """A repository for target tensorrt, as far as a plan reads it. settings: of the decoder."""
    graphs = {"vision_encoder": encoder, "segmentation_encoder": encoder, "segmentation_head": HEAD}
    if clip:
        graphs |= {"clip_image_encoder": encoder, "clip_text_encoder": BERT}
    bytes_ = BF16[size] * QUANTIZED[weights] * (2 if precision == "fp32" else 1)
    manifest = fake_models.manifest(
        target="tensorrt",
        precision=precision,
        num_visual_tokens=256,
        context_length=4096,
        graphs={name: {"gpu_memory": memory} for name, memory in graphs.items()},
        plans={"builder": "tensorrt"},
        files={"decoder/1/llm/model.safetensors": round(bytes_)},
        quantization={} if weights == "bf16" else {"scheme": weights},
    )
    (folder / "decoder" / "1" / "llm").mkdir(parents=True, exist_ok=True)
    (folder / "decoder" / "1" / "llm" / "config.json").write_text(json.dumps(CONFIGS[size]))
    lines = (f"{name} = {value}\n" for name, value in settings.items())
    (folder / "settings.toml").write_text(f"[decoder.tensorrt]\n{''.join(lines)}")
    return folder, manifest


def planned(folder, card, **how) -> gpu_memory.Plan:
    (plan,) = gpu_memory.plans(*exported(folder, **how), [card])
    return plan


@pytest.mark.parametrize("card", [L4, A10G, A100, H100], ids=lambda card: card.name.split()[1])
@pytest.mark.parametrize("size", ["7B", "4B"])
@pytest.mark.parametrize("weights", QUANTIZED)
def test_the_published_sizes_fit_the_usual_cards_and_all_parts_together_stay_below_their_memory(
    tmp_path, card, size, weights
):
    plan = planned(tmp_path, card, size=size, weights=weights)
    assert gpu_memory.misfits(*exported(tmp_path, size=size, weights=weights), [card]) == []
    share = plan.share(card.memory)
    assert plan.llm.least <= share <= 0.9 * card.memory and share + plan.others <= card.memory
    chats = plan.llm.cache(share) // plan.llm.row // plan.llm.chat
    least = {("7B", "bf16"): (5, 190), ("7B", "fp8"): (25, 210), ("7B", "int4"): (40, 225)}
    small, large = least.get((size, weights), (40, 300))
    assert chats >= (small if card.memory < 30 * GIB else large)


@pytest.mark.parametrize(
    ("card", "how", "ways"),
    [
        (T4, {}, ["--llm-quantization awq", "tensor_parallel_size to 2"]),
        (T4, {"weights": "fp8", "clip": False}, []),
        (L4, {"precision": "fp32", "encoder": FP32_ENCODER, "clip": False}, ["--precision bf16"]),
        (
            replace(T4, memory=round(11.6 * GIB)),
            {"weights": "int4"},
            ["without --clip-checkpoint", "context_length to 1024"],
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would_make_it_fit(tmp_path, card, how, ways):
    repository, manifest = exported(tmp_path, **how)
    found = gpu_memory.misfits(repository, manifest, [card])
    if not ways:
        assert found == []
        return
    (words,) = found
    assert f"{gpu_memory.gib(card.memory)}: " in words and "take a GPU with" in words
    for way in ways:
        assert way in words
    assert ("--precision bf16" in words) == (manifest.precision == "fp32")


@pytest.mark.parametrize(
    ("card", "how", "named"),
    [
        (replace(T4, memory=round(11.6 * GIB)), {"weights": "int4"}, {"clip_checkpoint", "context_length"}),
        (L4, {"gpu_memory_utilization": 0.5}, {"gpu_memory_utilization", "awq", "tensor_parallel_size"}),
        (H100, {"gpu_memory_utilization": 0.1}, {"gpu_memory_utilization"}),
        (L4, {"kv_cache_gib": 40}, {"kv_cache_gib"}),
        (L4, {"max_num_batched_tokens": 65536}, {"max_num_batched_tokens"}),
        (L4, {"max_num_seqs": 100000}, {"max_num_seqs"}),
        (replace(L4, memory=12 * GIB), {"tensor_parallel_size": 2, "clip": False}, {"context_length", "awq", "to 4"}),
    ],
)
def test_the_setting_at_fault_is_named_and_every_way_out_that_is_named_is_one(tmp_path, card, how, named):
    cards = [replace(card, number=number) for number in range(8)]
    count = how.get("tensor_parallel_size", 1)
    repository, manifest = exported(tmp_path, **how)
    words = gpu_memory.misfits(repository, manifest, cards[:count])[0]
    assert all(name.replace("_", "-") in words or name in words for name in named), words
    changes = re.findall(r"set the decoder's (\w+) to ([\d.]+)", words)
    assert {name for name, _ in changes} <= named | {"context_length", "tensor_parallel_size"}
    for name, value in changes:
        changed = {**how, name: value}
        used = cards[: int(changed.get("tensor_parallel_size", 1))]
        assert gpu_memory.misfits(*exported(tmp_path, **changed), used) == [], (name, value)
    if "--clip-checkpoint" in words:
        assert gpu_memory.misfits(*exported(tmp_path, **{**how, "clip": False}), cards[:count]) == []


def test_a_kv_cache_of_the_settings_is_planned_as_vllm_takes_it(tmp_path):
    plan = planned(tmp_path, H100, kv_cache_gib=4)
    assert plan.llm.cache(plan.share(H100.memory)) == 4 * GIB
    assert plan.share(H100.memory) == plan.llm.weights + plan.llm.working + 4 * GIB
    # One context is kept room for, however small the setting.
    least = planned(tmp_path, H100, kv_cache_gib=0.001).llm
    assert least.cache(0) == least.row * least.context


def test_a_gpu_is_left_out_only_if_the_others_are_enough(tmp_path):
    small = replace(L4, memory=4 * GIB)
    repository, manifest = exported(tmp_path)
    assert "CUDA_VISIBLE_DEVICES=1" in gpu_memory.misfits(repository, manifest, [small, replace(L4, number=1)])[0]
    assert "CUDA_VISIBLE" not in gpu_memory.misfits(repository, manifest, [small, replace(T4, number=1)])[0]
    repository, manifest = exported(tmp_path, tensor_parallel_size=2)
    assert "CUDA_VISIBLE" not in gpu_memory.misfits(repository, manifest, [L4, replace(small, number=1)])[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"context_length": 8192}, "the model has 4096"),
        ({"context_length": 5}, "takes 288 at least"),
        ({"tensor_parallel_size": 3}, "does not divide the 32 heads"),
    ],
)
def test_settings_that_the_decoder_or_vllm_would_refuse_are_refused_before_anything_is_loaded(
    tmp_path, settings, words
):
    with pytest.raises(RepositoryError, match=words):
        gpu_memory.misfits(*exported(tmp_path, **settings), [H100, H100, H100])


def test_the_parts_of_a_plan_are_what_the_manifest_says_and_what_processes_take_beside(tmp_path):
    parts = planned(tmp_path, L4).parts
    assert parts["vision_encoder"] == (194 + 40 + 126 + 59) * MB
    assert parts["segmentation_head"] == (107 + 544 + 29) * MB
    processes = {name: size for name, size in parts.items() if name not in GRAPHS}
    # Contexts of Triton and of the language model's engine; Triton's own pool; what stays free.
    assert sum(processes.values()) == 2 * gpu_memory.CONTEXT_BYTES + (256 << 20) + gpu_memory.RESERVE_BYTES


def test_vllm_is_told_the_share_of_the_plan_and_not_the_setting(tmp_path, monkeypatch):
    repository, manifest = exported(tmp_path)
    manifest.write(repository)
    monkeypatch.setattr(gpu, "find_gpus", lambda: [replace(L4, free=L4.memory - round(4.5 * GIB))])
    told = {}
    engine = LlmEngine(
        repository / "decoder" / "1" / "llm",
        torch.bfloat16,
        4096,
        0,
        gpu_memory.decoder_settings(repository),
        memory_share=lambda: gpu_memory.decoder_share(repository, manifest),
    )
    monkeypatch.setattr("vllm.engine.arg_utils.AsyncEngineArgs", lambda **settings: told.update(settings))
    monkeypatch.setattr("vllm.v1.engine.async_llm.AsyncLLM.from_engine_args", lambda arguments: None)
    engine._make()
    assert told["gpu_memory_utilization"] == gpu_memory.decoder_share(repository, manifest) < 0.8


def test_every_gpu_holds_the_graphs_and_as_many_as_the_setting_says_the_language_model(tmp_path):
    repository, manifest = exported(tmp_path, tensor_parallel_size=2)
    cards = [L4, replace(L4, number=1), replace(L4, number=2)]
    first, second, third = gpu_memory.plans(repository, manifest, cards)
    assert first.llm == second.llm and third.llm is None
    assert first.llm.weights == BF16["7B"] // 2 and third.others < first.others
    (words,) = gpu_memory.misfits(repository, manifest, cards[:1])
    assert "tensor_parallel_size is 2, and there is 1 GPU" in words


def test_a_gpu_that_is_too_small_for_the_graphs_alone_is_left_out(tmp_path):
    repository, manifest = exported(tmp_path)
    (words,) = gpu_memory.misfits(repository, manifest, [L4, replace(L4, memory=1 * GIB, number=1)])
    assert "NVIDIA L4 (GPU 1) has 1.00 GiB: leave out what does not fit, by CUDA_VISIBLE_DEVICES=0" in words


def test_a_gpu_whose_memory_is_not_known_is_taken_as_it_is(tmp_path, monkeypatch):
    repository, manifest = exported(tmp_path)
    shared = replace(L4, memory=None, free=None)
    assert (
        gpu_memory.misfits(repository, manifest, [shared]) == gpu_memory.occupied(repository, manifest, [shared]) == []
    )
    monkeypatch.setattr(gpu, "find_gpus", lambda: [shared])
    assert gpu_memory.decoder_share(repository, manifest) == 0.9


@pytest.mark.parametrize(
    ("card", "setting", "free", "bound"),
    [
        (H100, 0.9, H100.memory - 5 * GIB, "the setting"),
        (L4, 0.9, L4.memory, "the plan"),  # the other models are not loaded yet
        (L4, 0.9, L4.memory - round(4.5 * GIB), "what is free"),
    ],
)
def test_the_language_model_takes_the_least_of_setting_plan_and_what_is_free(
    tmp_path, monkeypatch, card, setting, free, bound
):
    repository, manifest = exported(tmp_path, gpu_memory_utilization=setting)
    (plan,) = gpu_memory.plans(repository, manifest, [card])
    monkeypatch.setattr(gpu, "find_gpus", lambda: [replace(card, free=free)])
    share = gpu_memory.decoder_share(repository, manifest)
    bounds = {
        "the setting": setting,
        "the plan": (card.memory - plan.others) / card.memory,
        "what is free": (free - gpu_memory.CONTEXT_BYTES - gpu_memory.RESERVE_BYTES) / card.memory,
    }
    assert min(bounds, key=bounds.get) == bound and 0 <= bounds[bound] - share < 2e-4
    # vLLM refuses to start with more than is free once its own process has CUDA.
    assert share * card.memory <= free - gpu_memory.CONTEXT_BYTES


def test_a_language_model_that_finds_too_little_memory_says_how_much_it_needs(tmp_path, monkeypatch):
    repository, manifest = exported(tmp_path)
    monkeypatch.setattr(gpu, "find_gpus", lambda: [replace(L4, free=12 * GIB)])
    with pytest.raises(Unavailable, match=r"10.88 GiB of NVIDIA L4 .* 12.00 GiB of 22.05 GiB free, and needs 1\d\."):
        gpu_memory.decoder_share(repository, manifest)
    (words,) = gpu_memory.occupied(repository, manifest, gpu.find_gpus())
    assert "has 12.00 GiB of memory free" in words and "nvidia-smi" in words


def test_the_cache_is_as_large_as_that_of_the_engine(tmp_path):
    plan = planned(tmp_path, L4)
    assert plan.llm.row == 2 * 32 * 4096 * 2  # keys and values, layers, width, bytes of a bf16
    grouped = {**CONFIGS["7B"], "num_key_value_heads": 8}
    assert gpu_memory.cache_row_bytes(grouped, 2) == plan.llm.row // 4
    assert gpu_memory.cache_row_bytes({**grouped, "head_dim": 64}, 4) == plan.llm.row // 4


def test_the_table_adds_up_to_the_gpus_memory(tmp_path):
    plan = planned(tmp_path, L4)
    sizes = [float(size.split()[0]) for _, size in plan.rows()]
    assert abs(sum(sizes) - L4.memory / GIB) < 0.01 * len(sizes)
    rows = dict(plan.rows())
    assert "chats of 512 tokens" in rows["language model: KV cache"]
    assert "estimated" in rows["segmentation_head"] and "estimated" not in rows["vision_encoder"]


def test_more_rows_a_step_more_answers_and_a_longer_context_take_more(tmp_path):
    llm = planned(tmp_path, L4).llm
    settings = DecoderSettings(max_num_batched_tokens=16384, max_num_seqs=512)
    larger = gpu_memory.language_model(*exported(tmp_path), settings)
    assert larger.working > llm.working + 1.3e9 and larger.row == llm.row
    assert gpu_memory.language_model(*exported(tmp_path), DecoderSettings(context_length=512)).context < llm.context


@pytest.mark.parametrize("damage", ["settings.toml", "config.json", "graph"])
def test_a_repository_that_lacks_what_a_plan_needs_is_refused(tmp_path, damage):
    repository, manifest = exported(tmp_path)
    if damage == "settings.toml":
        (repository / damage).write_text("no settings")
    elif damage == "config.json":
        (repository / "decoder" / "1" / "llm" / "config.json").write_text("{}")
    else:
        manifest = replace(manifest, graphs={"vision_encoder": {}})
    with pytest.raises(RepositoryError, match="cannot be read|does not say"):
        gpu_memory.plans(repository, manifest, [L4])


@pytest.mark.parametrize(("cards", "said"), [([L4], "22.05 GiB"), ([], "any GPU")])
def test_the_doctor_prints_the_plan(tmp_path, monkeypatch, cards, said):
    repository, manifest = exported(tmp_path)
    found = doctor._gpu_memory(repository, manifest, cards)
    fits, *lines = found if cards else [None, *found]
    assert said in lines[0].what + lines[0].detail and {line.state for line in lines} == {""}
    assert fits is None or (fits.state, fits.what) == ("ok", "fits this machine")
    assert any("vision_encoder" in finding.what for finding in found)
    assert any("tokens" in finding.detail for finding in found) == bool(cards)
