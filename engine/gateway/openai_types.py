"""The bodies of OpenAI's routes, as far as they are answered, and what of them is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Container
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from engine.errors import InvalidInput
from engine.gateway.refusal import invalid, unsupported
from engine.gateway.scans import Named, ScanPart, decoded, inline
from engine.methods import checked_question
from engine.prompt.turns import Turn, checked_turns

_CAPTION = re.compile(r"\s*slice\s*\d+\s*", re.IGNORECASE)
# What OpenAI's API has and this one has not, with what of it asks for nothing here.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": (),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True,),
    "functions": (),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "logit_bias": (),
    "prediction": (),
    "web_search_options": (),
}
MAX_MESSAGES = 1000
MAX_PARTS = 4096


_NOTHING: tuple[Any, ...] = (None, False, [], {}, "")


class _Body(BaseModel):
    """Unknown fields are refused, unless they ask for nothing (null, false, an empty list or object)."""

    model_config = ConfigDict(extra="allow")

    def refuse_unknown(self, where: str = "", but: Container[str] = ()) -> None:
        for name, value in (self.model_extra or {}).items():
            if name not in but and value not in _NOTHING:
                known = ", ".join(type(self).model_fields)
                message = f"{where}{name[:60]}: this is not supported; known are {known}"
                raise invalid(message, f"{where}{name[:60]}", "unknown_parameter")


class TextPart(_Body):
    type: Literal["text"]
    text: str


class FileContent(_Body):
    """file_id: of /v1/files, or of a study. file_data: a scan's file, raw base64 or a data URL."""

    file_id: str | None = None
    file_data: str | None = None
    filename: str | None = None


class FilePart(_Body):
    type: Literal["file"]
    file: FileContent


class ImageUrl(_Body):
    """url: a data URL. detail: has no meaning here."""

    url: str
    detail: str | None = None


class ImagePart(_Body):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | FilePart | ImagePart, Field(discriminator="type")]


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(max_length=MAX_PARTS)] | None = None
    name: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: bool = False


class JsonSchema(_Body):
    """schema: what of the standard is taken says `engine.answer_schema`. An answer is held to it, strict or not."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(_Body):
    type: Literal["text", "json_schema", "json_object"]
    json_schema: JsonSchema | None = None

    def asked(self) -> dict[str, Any] | None:
        """The schema that the answer is held to; None for text. Raises Refusal."""
        self.refuse_unknown("response_format.")
        if self.type == "json_object":
            what = "an answer is held to a schema, not to JSON at large: send type json_schema with the schema"
            raise unsupported("response_format", what)
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise invalid("response_format: type json_schema has a json_schema, others have none", "response_format")
        if self.json_schema is None:
            return None
        self.json_schema.refuse_unknown("response_format.json_schema.")
        return self.json_schema.schema_


class ChatRequest(_Body):
    """A chat completion. preset, crop: of the scan, see `engine.api.M3D.upload`. top_k, repetition_penalty, choices,
    only_choices: see `engine.sampling.Sampling`. user, metadata, store and service_tier have no effect, and are not
    kept.
    """

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    choices: str | list[str] | None = None
    only_choices: bool | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    preset: str = "auto"
    crop: str | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None

    def refuse_unsupported(self) -> None:
        """Raises Refusal for what OpenAI's API has and this one has not."""
        for name, nothing in _UNSUPPORTED.items():
            if (self.model_extra or {}).get(name) not in (*_NOTHING, *nothing):
                raise unsupported(name, "this is not supported: a question about a scan is answered in text")
        self.refuse_unknown(but=_UNSUPPORTED)
        if self.n not in (None, 1):
            raise unsupported("n", "one answer is made a request; ask again with another seed")
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs: only with logprobs=true", "top_logprobs")
        for name in ("presence_penalty", "frequency_penalty"):
            if getattr(self, name):
                raise unsupported(name, "use repetition_penalty (above 1 repeats less)")
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options: only with stream=true", "stream_options")

    def sampling(self) -> dict[str, Any]:
        """What was given of `engine.sampling.Sampling`, which checks it. Raises Refusal."""
        given = {
            "max_new_tokens": self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed,
            "stop": self.stop,
            "logprobs": (self.top_logprobs or 0) if self.logprobs else None,
            "choices": self.choices,
            "only_choices": self.only_choices,
            "json_schema": None if self.response_format is None else self.response_format.asked(),
        }
        return {name: value for name, value in given.items() if value is not None}

    def conversation(self, hold: Callable[[int], object]) -> tuple[ScanPart, list[Turn]]:
        """The scan, and the turns, of which the last is the question. hold: see `engine.gateway.scans.inline`.

        Messages of one role in a row are one turn, with a line for each: some clients send a scan and its question as
        two. Raises Refusal.
        """
        names: list[Named] = []
        contents: list[bytes] = []
        turns: list[Turn] = []
        for place, message in enumerate(self.messages):
            where = f"messages.{place}."
            message.refuse_unknown(where)
            if isinstance(message.content, list):
                _collect(message.content, f"{where}content", names, contents)
            role, text = ("system" if message.role == "developer" else message.role), _text_of(message)
            if turns and turns[-1].role == role:
                text = "\n".join(filter(None, (turns.pop().text, text)))
            turns.append(Turn(role, text))
        try:
            turns = checked_turns(turns)
            checked_question(turns[-1].text)
        except InvalidInput as error:
            raise invalid(f"messages: {error}", "messages") from None
        return _one_scan(names, contents, hold), turns


def _collect(parts: list[Part], where: str, names: list[Named], contents: list[bytes]) -> None:
    for number, part in enumerate(parts):
        param = f"{where}.{number}"
        part.refuse_unknown(f"{param}.")
        if isinstance(part, ImagePart):
            if not part.image_url.url[:5].lower() == "data:":
                raise invalid(f"{param}: addresses are not fetched: send the content as a data URL", param)
            contents.append(decoded(part.image_url.url, param))
        elif isinstance(part, FilePart):
            part.file.refuse_unknown(f"{param}.file.")
            if (part.file.file_id is None) == (part.file.file_data is None):
                raise invalid(f"{param}: a file part has file_id or file_data, one of the two", param)
            if part.file.file_id is not None:
                names.append(Named(part.file.file_id, param))
            else:
                contents.append(decoded(part.file.file_data or "", param))


def _one_scan(names: list[Named], contents: list[bytes], hold: Callable[[int], object]) -> ScanPart:
    """A conversation that is sent again with each question may name its scan in each of them."""
    different = {name.public: name for name in names}
    if different and contents or len(different) > 1:
        raise invalid("messages: there is more than one scan: a conversation is about one", "messages")
    if different:
        return next(iter(different.values()))
    contents = list(dict.fromkeys(contents)) if len(set(contents)) == 1 else contents
    if not contents:
        raise invalid(
            "messages: there is no scan: add a part of type file (file_id of /v1/files or of a study, or file_data), "
            "or of type image_url with a data URL",
            "messages",
        )
    return inline(contents, "messages", hold)


def _text_of(message: Message) -> str:
    """The question. Captions that only count slices, as MedGemma's convention has them, are no part of it."""
    if not isinstance(message.content, list):
        return message.content or ""
    texts = []
    for before, part in zip([None, *message.content], message.content):
        is_caption = isinstance(before, ImagePart) and isinstance(part, TextPart) and _CAPTION.fullmatch(part.text)
        if isinstance(part, TextPart) and not is_caption:
            texts.append(part.text)
    return "\n".join(texts)


class EmbeddedFile(_Body):
    """A scan to embed, as a file part of a chat."""

    type: Literal["file"]
    file: FileContent


class EmbeddingsRequest(_Body):
    """input: texts, or file parts (scans), in any order. dimensions: only M3D-CLIP's own."""

    model: str
    input: str | EmbeddedFile | Annotated[list[str | EmbeddedFile], Field(min_length=1, max_length=2048)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    preset: str = "auto"
    crop: str | None = None
    user: str | None = None

    def items(self, hold: Callable[[int], object]) -> list[str | ScanPart]:
        """Texts, and scans for file parts. hold: see `engine.gateway.scans.inline`."""
        self.refuse_unknown()
        given = self.input if isinstance(self.input, list) else [self.input]
        return [each if isinstance(each, str) else _scan_of(each, f"input.{n}", hold) for n, each in enumerate(given)]


def _scan_of(part: EmbeddedFile, param: str, hold: Callable[[int], object]) -> ScanPart:
    part.refuse_unknown(f"{param}.")
    names: list[Named] = []
    contents: list[bytes] = []
    _collect([FilePart(type="file", file=part.file)], param, names, contents)
    return _one_scan(names, contents, hold)
