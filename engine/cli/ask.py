"""`m3d ask`: a question about a scan, its answer as it is made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from engine.cli import options
from engine.cli.notes import note_answer, note_study

if TYPE_CHECKING:
    from engine.api import Answer

Choice = Annotated[
    list[str] | None,
    typer.Option(
        help="text with which the answer may begin: its log-probability is printed; may be given several times"
    ),
]
OnlyChoices = Annotated[bool, typer.Option("--only-choices", help="let the answer be one of the choices")]
JsonSchema = Annotated[Path | None, typer.Option(help="file with a JSON schema; the answer is JSON of it")]


def ask(
    scan: options.ScanPath,
    question: options.Question,
    server: options.ServerUrl = "localhost:8001",
    preset: options.Preset = "auto",
    crop: options.Crop = None,
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    seed: options.Seed = None,
    repetition_penalty: options.RepetitionPenalty = None,
    stop: options.Stop = None,
    choice: Choice = None,
    only_choices: OnlyChoices = False,
    json_schema: JsonSchema = None,
    timeout: options.Timeout = 600.0,
) -> None:
    from engine.client import M3DClient

    sampling = options.sampling_of(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        repetition_penalty=repetition_penalty,
        stop=stop,
        choices=choice,
        only_choices=only_choices,
        json_schema=None if json_schema is None else options.text_of(json_schema, "--json-schema"),
    )
    with M3DClient(server, timeout) as client:
        study = client.upload(scan, preset=preset, crop=crop)
        note_study(study)
        begun = False
        try:
            with client.stream(study, question, **sampling) as stream:
                for text in stream:
                    # Many tokenizers begin an answer with a space.
                    print(text if begun else text.lstrip(), end="", flush=True)
                    begun = True
        except BaseException:
            # The error message begins on a line of its own.
            print(end="\n" if begun else "")
            raise
        print()
        answer = cast("Answer", stream.answer)  # it is there when the stream has ended
        note_answer(answer)
        _print_choices(answer)


def _print_choices(answer: Answer) -> None:
    """Log-probabilities of the choices, best first."""
    for text, logprob in sorted(answer.choices.items(), key=lambda pair: -pair[1]):
        print(f"{logprob:+.4f}\t{text}")
