"""What a run that is spread by DeepSpeed, FSDP2 or over machines promises: the shipped files are what the libraries
accept, and with DeepSpeed a checkpoint holds what is trained, in float32, and is gone on from to the bit."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from safetensors.torch import load_file

from engine.errors import CheckpointError
from export import build_engines
from tests import m3d_data
from tests import toy_models as toy
from tests.conftest import ROOT
from tests.unit.test_training_stages import AS_ON_GPUS
from training import finetune, merge_lora, trainer
from training.config import build, check_trainer
from training.data.sets import Captions

SPREAD = ROOT / "training" / "configs" / "spread"
_DEEPSPEED = ("deepspeed==0.19.8", "hjson==3.1.0", "msgpack==1.2.4", "py-cpuinfo==9.0.0", "ninja==1.13.2")
# A process of two; with a second argument it ends without a word before that step.
_RANK = """
import os, sys
import torch
from training import config, finetune, trainer
settings = config.read(finetune.Settings, sys.argv[1])
step = trainer.StageTrainer.training_step
def die_before_step(self, *args, **kwargs):
    if sys.argv[2:] == [str(self.state.global_step + 1)]: os._exit(9)
    return step(self, *args, **kwargs)
trainer.StageTrainer.training_step = die_before_step
torch.manual_seed(settings.seed)
finetune.train(settings)
os._exit(0)  # a mesh holds its group, a thread of which may abort an interpreter that ends
"""
_VALIDATED = """
import sys
import torch
from deepspeed.runtime.config import DeepSpeedConfig
import json
values = json.load(open(sys.argv[1]))
values |= {"bf16": {"enabled": True}, "gradient_clipping": 1.0, "gradient_accumulation_steps": 1,
           "train_micro_batch_size_per_gpu": 8, "train_batch_size": 8}
config = DeepSpeedConfig(values)
print(config.zero_config.stage, config.bfloat16_config.enabled)
"""


@pytest.mark.parametrize("file, stage", [("zero2.json", 2), ("zero3.json", 3)])
def test_zero_is_configured_as_the_trainer_fills_it_in(file, stage):
    config = HfDeepSpeedConfig(str(SPREAD / file))
    assert config.get_value("zero_optimization.stage") == stage
    # Others can only be filled in for models of transformers; ours say them.
    trainers = {"bf16.enabled", "gradient_clipping", "gradient_accumulation_steps", "train_micro_batch_size_per_gpu"}
    values = json.loads((SPREAD / file).read_text())
    automatic = {
        f"{name}.{key}"
        for name, part in values.items()
        if isinstance(part, dict)
        for key in part
        if part[key] == "auto"
    }
    automatic |= {name for name, value in values.items() if value == "auto"}
    assert automatic == trainers | {"train_batch_size"}
    if stage == 3:
        assert config.get_value("zero_optimization.stage3_gather_16bit_weights_on_model_save") is True


def test_fsdp2_is_configured_as_accelerate_takes_it():
    values = json.loads((SPREAD / "fsdp2.json").read_text())
    check_trainer({"fsdp": True, "fsdp_config": str(SPREAD / "fsdp2.json")})
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=values["version"],
        reshard_after_forward=values["reshard_after_forward"],
        auto_wrap_policy=values["auto_wrap_policy"],
        transformer_cls_names_to_wrap=values["transformer_layer_cls_to_wrap"],
        state_dict_type=values["state_dict_type"],
    )
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert "FULL_STATE_DICT" in str(plugin.state_dict_type)


def test_two_machines_are_configured_as_accelerate_launches_them():
    config = load_config_from_file(str(SPREAD / "two_machines.yaml"))
    assert (config.num_machines, config.num_processes, config.mixed_precision) == (2, 16, "bf16")
    assert config.distributed_type.value == "MULTI_GPU"


def test_a_state_without_what_is_frozen_is_whole_and_one_without_what_is_trained_is_not():
    class Model(trainer.StageModel):
        def __init__(self):
            super().__init__()
            self.frozen, self.trained = torch.nn.Linear(2, 2).requires_grad_(False), torch.nn.Linear(2, 2)

    model = Model()
    model.load_state_dict({"trained.weight": torch.zeros(2, 2), "trained.bias": torch.zeros(2)})
    assert not model.trained.weight.any() and model.frozen.weight.any()
    with pytest.raises(CheckpointError, match="1 parts are missing and 0 are unknown, for example trained.bias"):
        model.load_state_dict({"trained.weight": torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match="0 parts are missing and 1 are unknown, for example other"):
        model.load_state_dict({**model.state_dict(), "other": torch.zeros(1)})


# --- with DeepSpeed itself -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Of processes that see DeepSpeed, which nothing else here needs."""
    folder = tmp_path_factory.mktemp("deepspeed")
    uv = [str(Path(sys.executable).with_name("uv")), "pip", "install", "--quiet", "--python", sys.executable]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    subprocess.run(
        [*uv, "--no-deps", "--no-build-isolation", "--target", str(folder), *_DEEPSPEED], env=environment, check=True
    )
    paths = {"PYTHONPATH": f"{folder}:{ROOT}", "PATH": f"{folder}/bin:{os.environ['PATH']}"}
    return environment | paths


def two_processes(environment: dict, script: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    return subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=600)


def train_whole_and_torn(folder: Path, environment: dict, script: str, **trainer) -> dict[str, torch.Tensor]:
    """Train once in one go, and once killed and resumed, which ends in the same weights. The adapter's weights."""
    data, llm = m3d_data.write_root(folder / "data"), toy.language_model(folder / "tiny-llama")
    (folder / "rank.py").write_text(script)
    configurations = {}
    for name in ("whole", "torn"):
        values = toy.finetune_configuration(folder / name, data, llm, **trainer)
        values["data"]["m3d"]["validation"] = {"samples": 2, "answers": 1}
        configurations[name] = str(toy.written(values, folder / f"{name}.json"))
    done = two_processes(environment, folder / "rank.py", configurations["whole"])
    assert done.returncode == 0, done.stderr[-3000:]
    killed = two_processes(environment, folder / "rank.py", configurations["torn"], "3")
    assert killed.returncode != 0 and not (folder / "torn" / "final").exists()
    assert (folder / "torn" / "checkpoint-2").is_dir(), killed.stderr[-3000:]
    resumed = two_processes(environment, folder / "rank.py", configurations["torn"])
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    for name in ("model.safetensors", "adapter_model.safetensors"):
        whole, torn = (load_file(folder / run / "final" / name) for run in ("whole", "torn"))
        assert whole.keys() == torn.keys() and all(torch.equal(value, torn[key]) for key, value in whole.items())
    return whole


@pytest.mark.slow(group="faults")
@pytest.mark.integration
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_in_bf16_keeps_float32_and_goes_on_to_the_bit(tmp_path, environment, stage):
    file = SPREAD / f"zero{stage}.json"
    checked = subprocess.run(
        [sys.executable, "-c", _VALIDATED, str(file)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert checked.stdout.split()[-2:] == [str(stage), "True"], checked.stderr[-2000:]
    settings = {"bf16": True, "deepspeed": str(file), "max_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    lora = train_whole_and_torn(tmp_path, environment, _RANK, **settings)
    # Weights that bf16 cannot hold: the optimizer's own.
    assert all(value.dtype == torch.float32 for value in lora.values())
    assert any(not torch.equal(value, value.bfloat16().float()) for value in lora.values())
    for states in (tmp_path / "whole" / "checkpoint-3").glob("global_step3/*model_states.pt"):
        held = torch.load(states, weights_only=False)
        names = {*held["module"], *(name for shapes in held["param_shapes"] for name in shapes)}
        assert names and not [name for name in names if ".base_layer." in name]
        assert not held["frozen_param_shapes"] and not held["frozen_param_fragments"]
    merged = merge_lora.merge(merge_lora.Settings(trained=tmp_path / "whole" / "final", out=tmp_path / "merged"))
    assert (merged / "model.safetensors").is_file()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "whole" / "tensorboard"))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert "eval/segmentation_loss_mask" in scalars
    # In three pieces, no process answers.
    assert ("eval/segmentation_dice" in scalars) == (stage == 2)
    assert ("samples/text_summary" in events.Tags()["tensors"]) == (stage == 2)


# --- with FSDP2 ------------------------------------------------------------------------------------------------------
@pytest.mark.slow(group="faults")
@pytest.mark.integration
@pytest.mark.parametrize("bf16", [False, True])
def test_fsdp2_keeps_what_is_trained_and_goes_on_to_the_bit(tmp_path, bf16):
    settings = {"bf16": bf16, "fsdp": True, "fsdp_config": str(SPREAD / "fsdp2.json"), "max_steps": 3}
    settings |= {"eval_strategy": "steps", "eval_steps": 1}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    lora = train_whole_and_torn(tmp_path, environment, AS_ON_GPUS + _RANK, **settings)
    assert all(value.dtype == torch.float32 for value in lora.values())
    assert not [file.name for file in (tmp_path / "whole" / "checkpoint-3").iterdir() if "fsdp" in file.name]
    merged = merge_lora.merge(merge_lora.Settings(trained=tmp_path / "whole" / "final", out=tmp_path / "merged"))
    assert (merged / "model.safetensors").is_file()


# --- the guide -------------------------------------------------------------------------------------------------------
GUIDE = (ROOT / "docs" / "training.md").read_text()


def test_the_guide_names_files_that_there_are():
    named = set(re.findall(r"(?:training|export)/[\w/]+\.(?:py|json|yaml)", GUIDE))
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).is_file()] == []
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", GUIDE) if "://" not in link]
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []


def test_the_guide_s_configuration_and_export_are_understood():
    (block,) = (found for found in re.findall(r"```json\n(.*?)```", GUIDE, re.S) if '"out"' in found)
    settings = build(finetune.Settings, json.loads(block))
    check_trainer(settings.trainer)
    (command,) = re.findall(r"python export/build_engines.py (.*?)```", GUIDE.replace("\\\n", " "), re.S)
    build_engines._parser().parse_args(shlex.split(command))


def test_the_guide_s_index_of_own_data_is_read(tmp_path):
    (block,) = (found for found in re.findall(r"```json\n(.*?)```", GUIDE, re.S) if '"validation": [' in found)
    index = json.loads(block)
    for entry in (*index["train"], *index["validation"]):
        m3d_data.save(tmp_path / entry["image"], m3d_data.image(1))
        (tmp_path / entry["text"]).write_text("A report.")
    (tmp_path / "M3D_Cap_npy" / "M3D_Cap.json").write_text(block)
    for split in index:
        assert Captions(tmp_path, split, m3d_data.SIZE)[0].answer == "A report."
