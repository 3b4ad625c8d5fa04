"""What users set: `settings.toml` in a model repository, which the server and `M3DEngine` read, and no export writes.

Each model has a table of its name. What is not in the file has its default; names and values that are none are refused.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import tomllib
from pydantic import Field
from pydantic.dataclasses import dataclass

from engine.errors import RepositoryError
from engine.runtime.decoder_settings import CpuDecoderSettings, DecoderSettings
from engine.scan.limits import Limits
from engine.validation import CHECKED, checked

FILE_NAME = "settings.toml"
_Count = Annotated[int, Field(ge=0)]
_Positive = Annotated[int, Field(ge=1)]
_PARAMETER = re.compile(r'^parameters \{ key: "(\w+)"', re.M)


@dataclass(frozen=True, config=CHECKED)
class PoolSettings:
    """threads: requests in work at a time. waiting: those that may wait; more are refused."""

    threads: _Positive = 2
    waiting: _Count = 64


@dataclass(frozen=True, config=CHECKED)
class StudySettings(PoolSettings):
    """study_store_mb: memory for studies in /dev/shm, MB; 0 takes 2147, or half of a smaller /dev/shm.

    max_bytes, max_voxels, max_files: see `engine.scan.limits.Limits`.
    """

    threads: _Positive = 4
    study_store_mb: _Count = 0
    max_bytes: _Positive = Limits.max_bytes
    max_voxels: _Positive = Limits.max_voxels
    max_files: _Positive = Limits.max_files

    @property
    def limits(self) -> Limits:
        """What a scan may weigh."""
        return Limits(self.max_bytes, self.max_voxels, self.max_files)


@dataclass(frozen=True, config=CHECKED)
class GraphSettings:
    """Of a graph on a CPU. threads: of one run; 0 takes all that the process may use.

    precision: of its products; auto: bf16 if the language model has it and the processor computes it natively.
    """

    threads: _Count = 0
    precision: Literal["auto", "fp32", "bf16"] = "fp32"


@dataclass(frozen=True, config=CHECKED)
class DecoderTables:
    """The decoder's settings by the target that a repository was exported for."""

    cpu: CpuDecoderSettings = CpuDecoderSettings()
    tensorrt: DecoderSettings = DecoderSettings()


@dataclass(frozen=True, config=CHECKED)
class Settings:
    """One table a model."""

    study: StudySettings = StudySettings()
    decoder: DecoderTables = DecoderTables()
    segmentation: PoolSettings = PoolSettings()
    retrieval: PoolSettings = PoolSettings()
    vision_encoder: GraphSettings = GraphSettings(precision="auto")
    segmentation_encoder: GraphSettings = GraphSettings(precision="auto")
    segmentation_head: GraphSettings = GraphSettings()
    clip_image_encoder: GraphSettings = GraphSettings()
    clip_text_encoder: GraphSettings = GraphSettings()

    def decoder_on(self, target: str) -> DecoderSettings:
        """target: of the repository's manifest."""
        return getattr(self.decoder, target)

    @classmethod
    def read(cls, repository: Path) -> Settings:
        """The settings of a repository; the defaults where it has no settings.toml.

        Raises RepositoryError for what is unknown or not allowed, and for a repository of an earlier version, whose
        settings are parameters of its configurations.
        """
        path = repository / FILE_NAME
        _check_configurations(repository)
        try:
            values = tomllib.loads(path.read_text())
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError) as error:  # of TOML, and of text
            raise RepositoryError(f"{path} cannot be read ({error}): mend it, or remove it for the defaults") from None
        try:
            return checked(cls, values)
        except ValueError as error:
            raise RepositoryError(f"{path}: {error}; a setting that is left out has its default") from None


def _check_configurations(repository: Path) -> None:
    """Raises RepositoryError if a configuration has parameters that were settings until version 0.2."""
    for model, values in asdict(Settings()).items():
        known = values.get("cpu", values)
        for path in ("config.pbtxt", "configs/cpu.pbtxt"):
            file = repository / model / path
            if file.is_file() and (old := [name for name in _PARAMETER.findall(file.read_text()) if name in known]):
                raise RepositoryError(
                    f"{file} has the parameters {', '.join(old)}: they are settings of table {model} in "
                    f"{repository / FILE_NAME} now; copy there what you had changed, and write the configurations "
                    f"again: `python -m engine.server.repository {shlex.quote(str(repository))}`"
                )
