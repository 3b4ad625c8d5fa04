"""The `parameters` of a model's configuration: as Triton hands them to the model, or read from the repository."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.errors import RepositoryError


@dataclass(frozen=True)
class Parameters:
    """values: texts by name. model: whose they are."""

    model: str
    values: Mapping[str, str]

    @classmethod
    def read(cls, repository: Path, model: str, configuration: str) -> Parameters:
        """What Triton would hand over that was started with `--model-config-name configuration`."""
        from google.protobuf import text_format
        from tritonclient.grpc.model_config_pb2 import ModelConfig

        path = repository / model / "configs" / f"{configuration}.pbtxt"
        if not path.is_file():
            path = repository / model / "config.pbtxt"
        try:
            config = text_format.Parse(path.read_text(), ModelConfig())
        except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
            raise RepositoryError(f"{path} cannot be read as a model's configuration: {error}") from None
        return cls(model, {name: value.string_value for name, value in config.parameters.items()})

    def integer(self, name: str, default: int) -> int:
        """A whole number. Raises RepositoryError for anything else."""
        value = self.text(name, "")
        if not value:
            return default
        if not value.isdecimal():
            raise RepositoryError(f"parameter {name} of {self.model} must be a whole number, not {value!r}")
        return int(value)

    def text(self, name: str, default: str) -> str:
        """A text; the default where it is missing or empty."""
        return self.values.get(name, "").strip() or default
