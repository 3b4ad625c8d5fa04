"""The language model: visual tokens and a question in, text deltas and `[SEG]` states out."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from engine.answer_schema import schema_for_grammar
from engine.api import AnswerDetails, AnswerInfo, ChosenToken, ScoredToken
from engine.errors import InvalidInput, RepositoryError, ResourceExhausted, Unavailable, one_line, shortened
from engine.gpu import DRIVER_NEEDED, too_old
from engine.gpu_memory import decoder_share
from engine.manifest import LLM_FOLDER, Manifest
from engine.models.language_model import FAMILIES, known_families
from engine.prompt import Prompt
from engine.prompt.prompt import QuestionOrTurns
from engine.runtime.decoder import seg_states, vllm_environment
from engine.runtime.decoder.choices import MAX_STEPS, Ids, grammar_of, logprobs_of, steps_of
from engine.runtime.decoder.detokenizer import Detokenizer
from engine.runtime.decoder.embedding_table import EmbeddingTable
from engine.runtime.decoder.llm_engine import LlmEngine
from engine.runtime.decoder_settings import DecoderSettings
from engine.sampling import Sampling

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Delta:
    """What an answer gained since the last delta.

    token_ids include a final EOS. The last delta has the rest: finish_reason ("stop" or "length"), states (fp32 [K, H],
    a row for each `[SEG]` of the answer), info and, if there is something to say, details of the whole answer.
    logprobs: of token_ids, if they were asked for. seg_spans, of the last delta: where each `[SEG]` stands in the
    answer's text, see `Detokenizer.spans`.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    states: np.ndarray | None = None
    info: AnswerInfo | None = None
    details: AnswerDetails | None = None
    logprobs: tuple[ChosenToken, ...] = ()
    seg_spans: tuple[tuple[int, int], ...] = ()


class Decoder:
    """Answers questions from one asyncio loop, many at a time; vLLM batches them.

    repository: an exported model repository. temporary: a folder for what vLLM leaves; None for the usual one. Raises
    RepositoryError if the repository does not fit its manifest.

    A prompt is embeddings only, laid out as the model's family has it. The same scan gives the same rows up to its last
    visual token, so vLLM's prefix cache has them when the second question comes.
    """

    def __init__(
        self, repository: Path | str, settings: DecoderSettings = DecoderSettings(), temporary: Path | None = None
    ):
        self.settings = settings
        self.temporary = temporary
        self.manifest = manifest = Manifest.read(repository)
        self.repository = Path(repository)
        self.folder = self.repository / LLM_FOLDER
        if manifest.precision not in DTYPES:
            raise RepositoryError(
                f"the manifest's precision {manifest.precision!r} is none of {', '.join(DTYPES)}: "
                "export the repository again"
            )
        if manifest.family not in FAMILIES:
            raise RepositoryError(
                f"the manifest's family {manifest.family!r} is none of {known_families()}: export the repository again"
            )
        self.dtype = DTYPES[manifest.precision]
        self.context_length = settings.context_of(manifest)
        self._table = EmbeddingTable(self.folder)
        if tuple(self._table.rows.shape) != (manifest.vocab_size, manifest.llm_width):
            raise RepositoryError(
                f"{self.folder} has embeddings {tuple(self._table.rows.shape)}, the manifest says "
                f"{(manifest.vocab_size, manifest.llm_width)}: export the repository again"
            )
        self._answering = 0
        # A prompt finds cached blocks under its own salt only: tenants, and runs of the server, share none.
        self._salt = secrets.token_hex(16)

    async def start(
        self,
        on_health: Callable[[str], None] = lambda words: None,
        on_broken: Callable[[str], None] = lambda words: None,
    ) -> None:
        """Load the language model and check it; `health` is "ready" then. on_health, on_broken: see `LlmEngine`.

        Raises Unavailable if the export is for a GPU and PyTorch sees none, RepositoryError for what cannot be used.
        """
        vllm_environment.prepare(self.settings.threads)
        if self.manifest.target == "tensorrt":
            check_cuda()
        self._tokenizer = await asyncio.to_thread(_read_tokenizer, self.folder)
        layout = FAMILIES[self.manifest.family].layout(self._tokenizer)
        self._prompt = Prompt(layout, self.manifest.num_visual_tokens, self.context_length, self.manifest.eos_token_ids)
        share = partial(decoder_share, self.repository, self.manifest) if self.manifest.target == "tensorrt" else None
        self.engine = LlmEngine(
            self.folder,
            self.dtype,
            self.context_length,
            self._prompt.padding_id,
            self.settings,
            on_health,
            on_broken,
            memory_share=share,
            temporary=self.temporary,
        )
        await self.engine.start()

    async def stop(self) -> None:
        """End the engine and its process; answers in progress fail with Unavailable."""
        await self.engine.stop()

    @property
    def health(self) -> str:
        return self.engine.health

    async def answer(
        self,
        visual_tokens: np.ndarray,
        question: QuestionOrTurns,
        sampling: Sampling = Sampling(),
        cache_salt: str = "",
    ) -> AsyncGenerator[Delta, None]:
        """Deltas of the answer about a scan; a slow reader gets fewer and larger ones.

        To stop decoding, close the iterator or cancel its task.

        visual_tokens: [N, H] floats. question: or the turns of a conversation, see `Prompt.input_ids`. cache_salt:
        names a tenant; tenants share no cached prefix. An explicit max_new_tokens that the context has no room for is
        refused; the default is cut to what is left. Choices are scored when the answer is there: its prompt is in the
        prefix cache then.
        Raises InvalidInput, ResourceExhausted (too many questions), Unavailable (the engine died or is restarting).
        """
        arrival = time.monotonic()
        if self._answering >= self.settings.max_num_seqs + self.settings.max_waiting:
            raise ResourceExhausted(
                f"{self._answering} questions are being answered or wait, this server's limit: try again shortly"
            )
        self._answering += 1
        try:
            rows = self._prompt_rows(visual_tokens, question)
            choices = await self._choices(sampling, question, len(rows)) if sampling.choices else {}
            key, salt = uuid.uuid4().hex, f"{self._salt}/{cache_salt}"
            params = self._params(sampling, self._max_new_tokens(sampling, len(rows)), key, choices)
            has_history = not isinstance(question, str) and len(question) > 1
            logprobs: list[ChosenToken] = []
            async with aclosing(self._deltas(rows, params, key, salt, arrival, sampling.only_choices)) as deltas:
                async for delta in deltas:
                    logprobs += delta.logprobs
                    if delta.finish_reason and (logprobs or choices or has_history):
                        score = partial(self._logprob, rows, salt)
                        details = AnswerDetails(
                            logprobs=tuple(logprobs),
                            choices=await logprobs_of(choices, score) if choices else {},
                            history_used=self._prompt.multi_turn if has_history else None,
                        )
                        delta = replace(delta, details=details)
                    yield delta
        finally:
            self._answering -= 1

    async def _deltas(
        self, rows, params, key: str, salt: str, arrival: float, trimmed: bool
    ) -> AsyncGenerator[Delta, None]:
        text = Detokenizer(self._tokenizer, params.stop or (), self.manifest.seg_token_id, trimmed)
        count, first_token, seg_positions, states_are_free = 0, 0.0, [], False
        try:
            async with aclosing(self.engine.generate(rows, params, key, salt)) as outputs:
                async for output in outputs:
                    first_token = first_token or time.monotonic()
                    said = output.outputs[0]
                    ids = tuple(said.token_ids)
                    seg_positions += [count + i for i, id_ in enumerate(ids) if id_ == self.manifest.seg_token_id]
                    count += len(ids)
                    logprobs = self._chosen(ids, said.logprobs, params.logprobs) if said.logprobs else ()
                    if not output.finished:
                        yield Delta(text.add(ids), ids, logprobs=logprobs)
            stop = said.stop_reason if isinstance(said.stop_reason, str) else None
            states = np.zeros((0, self.manifest.llm_width), np.float32)
            if seg_positions:
                states = await self.engine.take_states(key, seg_positions)
            # A finished request without states frees itself. After a stop text, which is found on this side, the engine
            # may have gone on for a token.
            states_are_free = bool(seg_positions) or stop is None
            now = time.monotonic()
            info = AnswerInfo(len(rows), output.num_cached_tokens or 0, count, first_token - arrival, now - arrival)
            last = text.finish(ids, stop)
            yield Delta(last, ids, said.finish_reason, states, info, logprobs=logprobs, seg_spans=text.spans)
        finally:
            if not states_are_free:
                self.engine.drop_states(key)

    def _chosen(self, ids: Ids, logprobs, most: int) -> tuple[ChosenToken, ...]:
        """vLLM's log-probabilities of tokens. Tokens that are not allowed are not named."""
        found = []
        for id_, by_id in zip(ids, logprobs):
            # The token itself comes first, then the likeliest, which it may be one of.
            top = sorted(((other, each) for other, each in by_id.items()), key=lambda pair: -pair[1].logprob)[:most]
            scored = [self._scored(other, each.logprob) for other, each in top if math.isfinite(each.logprob)]
            found.append(ChosenToken(**vars(self._scored(id_, by_id[id_].logprob)), top=tuple(scored)))
        return tuple(found)

    def _scored(self, id_: int, logprob: float) -> ScoredToken:
        return ScoredToken(id_, self._tokenizer.decode([id_], skip_special_tokens=False), logprob)

    async def _choices(self, sampling: Sampling, question: QuestionOrTurns, prompt_length: int) -> dict[str, Ids]:
        """The tokens of each choice. Raises InvalidInput for those that cannot be scored."""
        choices: dict[str, Ids] = {}
        for text in sampling.choices:
            choices[text] = tuple(self._prompt.choice_ids(question, text))
            await asyncio.sleep(0)  # others are not kept waiting by many choices behind a long question
        texts: dict[Ids, str] = {}
        for text, ids in choices.items():
            if not ids or not all(0 <= id_ < self.manifest.vocab_size for id_ in ids):
                raise InvalidInput(f"the model does not know the choice {shortened(text)}: use another wording")
            if (other := texts.setdefault(ids, text)) != text:
                raise InvalidInput(
                    f"the choices {shortened(other)} and {shortened(text)} are the same tokens to the model: use other "
                    "wordings"
                )
        if (steps := len(steps_of(choices))) > MAX_STEPS:
            raise InvalidInput(
                f"the choices have {steps} tokens in all, at most {MAX_STEPS} are scored: give fewer or shorter ones"
            )
        room = self.context_length - prompt_length
        if (longest := max(map(len, texts))) > room:
            raise InvalidInput(
                f"a choice has {longest} tokens, but the context of {self.context_length} tokens has room for {room} "
                f"beside this prompt of {prompt_length}: shorten the choice or the question"
            )
        return choices

    async def _logprob(self, rows: torch.Tensor, salt: str, said: Ids, token: int) -> float:
        """log p(token | prompt, said). The rows of the prompt, and of what was said, are in the prefix cache."""
        from vllm import SamplingParams

        # Only this token may be sampled; its log-probability is that among all. vLLM's logprob_token_ids would do it
        # for several tokens, but spoils the log-probabilities of others in the batch (model runner V1).
        params = SamplingParams(
            max_tokens=1, temperature=0, ignore_eos=True, detokenize=False, logprobs=0, allowed_token_ids=[token]
        )
        prompt = torch.cat([rows, self._table.embed(said, self.dtype)]) if said else rows
        async with aclosing(self.engine.generate(prompt, params, uuid.uuid4().hex, salt)) as outputs:
            async for output in outputs:
                (by_id,) = output.outputs[0].logprobs
        return by_id[token].logprob

    def _prompt_rows(self, visual_tokens: np.ndarray, question: QuestionOrTurns) -> torch.Tensor:
        """[T, H], the whole prompt, in the engine's dtype. What vLLM would accept and break on is refused here."""
        expected = (self.manifest.num_visual_tokens, self.manifest.llm_width)
        tokens = np.asarray(visual_tokens)
        if tokens.shape != expected or tokens.dtype.kind != "f":
            raise InvalidInput(f"visual tokens must be floats of shape {expected}, not {tokens.dtype} {tokens.shape}")
        head, tail = self._prompt.split_ids(question)
        if not all(0 <= id_ < self.manifest.vocab_size for id_ in (*head, *tail)):
            raise InvalidInput(
                f"the question has token {max(*head, *tail)}, the model knows 0 to "
                f"{self.manifest.vocab_size - 1}: use another wording"
            )
        # A copy: the tokens are a read-only map of a file in the study store.
        visual = torch.from_numpy(np.array(tokens, np.float32)).to(self.dtype)
        # NaN would stay in blocks of the KV cache and spoil the answers of those who get them next.
        if not torch.isfinite(visual).all():
            raise InvalidInput(
                f"the visual tokens of this scan are not finite in {self.manifest.precision}: check the "
                "scan, or export with --precision fp32"
            )
        return torch.cat([self._table.embed(head, self.dtype), visual, self._table.embed(tail, self.dtype)])

    def _max_new_tokens(self, sampling: Sampling, prompt_length: int) -> int:
        room = self.context_length - prompt_length  # at least 1, `Prompt` has seen to that
        if sampling.max_new_tokens > room and sampling.max_new_tokens != Sampling.max_new_tokens:
            raise InvalidInput(
                f"max_new_tokens is {sampling.max_new_tokens}, but the context of {self.context_length} "
                f"tokens has room for {room} beside this prompt of {prompt_length}: ask for at most "
                f"{room}, or shorten the question"
            )
        return min(sampling.max_new_tokens, room)

    def _params(self, sampling: Sampling, max_tokens: int, key: str, choices: Mapping[str, Ids]):
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        held = None
        if sampling.only_choices:
            held = StructuredOutputsParams(grammar=grammar_of(choices))
        elif sampling.json_schema is not None:
            held = StructuredOutputsParams(json=schema_for_grammar(sampling.json_schema))
        seg = self.manifest.seg_token_id
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            repetition_penalty=sampling.repetition_penalty,
            seed=sampling.seed,
            stop=list(sampling.stop),
            # Pass the stop ids explicitly: vLLM may read others from tokenizer and configuration.
            stop_token_ids=list(self.manifest.eos_token_ids),
            ignore_eos=True,
            # vLLM's own text serves to find stop texts only.
            detokenize=bool(sampling.stop),
            skip_special_tokens=True,
            output_kind=RequestOutputKind.DELTA,
            logprobs=sampling.logprobs,
            structured_outputs=held,
            extra_args=None if seg is None else {seg_states.EXTRA_ARG: [key, seg]},
        )


def _read_tokenizer(folder: Path):
    from engine.models.checkpoint import load_tokenizer

    return load_tokenizer(folder)


def check_cuda() -> None:
    """Raises Unavailable with the reason if PyTorch can use no GPU: vLLM would end with words about something else."""
    if old := too_old():
        raise Unavailable(f"this export is for a GPU, and {old}; `m3d doctor --target tensorrt` says what is here")
    if torch.cuda.is_available():  # which takes none of its memory
        return
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        raise Unavailable(
            f"this export is for a GPU, and PyTorch {torch.__version__} sees none ({one_line(error)}): it needs "
            f"NVIDIA's driver {DRIVER_NEEDED} or later; `m3d doctor --target tensorrt` says what is here"
        ) from None
