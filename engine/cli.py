"""The command line, `m3d`: serve a repository, and ask about scans."""

from __future__ import annotations

import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from engine.errors import InvalidInput, M3DError, Unavailable

if TYPE_CHECKING:
    from engine.api import Segmentation
    from engine.results.measurements import Measurements

# Everything else is imported by the command that needs it, so that help comes at once. What help says of a command is
# an argument and no docstring: python -OO has none of those.

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="M3D-LaMed, the 3D medical multimodal language model: serve it, ask about scans, segment them.",
    epilog="Answers and masks are for research; this is not a medical device.",
)
notes = Console(stderr=True, highlight=False, soft_wrap=True)


def _asked(question: str) -> str:
    """The question, if it can be asked: a scan of gigabytes is not sent for one that cannot."""
    from engine.methods import checked_question

    return checked_question(question)


def _crop(crop: str | None) -> str | None:
    """The crop, if it can be read."""
    if crop is not None:
        from engine.volume.crop import Crop

        Crop.of(crop)
    return crop


def _merge(merge: str) -> str:
    """How several [SEG] are drawn, if that is known."""
    from engine.seg_states import checked_merge

    return checked_merge(merge)


_NO_PICTURE = "matplotlib is not installed: pip install 'm3d-engine[picture]'"
# engine.scan.FORMATS in few words: importing it takes longer than help may.
_SCAN = "scan: .nii, .nii.gz, .nrrd, .mha, .mgh, .mgz, .npy, a DICOM folder, or a zip of one"
ServerUrl = Annotated[str, typer.Option("--server", envvar="M3D_SERVER", help="gRPC address of the server")]
Preset = Annotated[str, typer.Option(help="preprocessing: auto, ct, mr, m3d-cap, m3d-seg, m3d-refseg or raw")]
Crop = Annotated[
    str | None,
    typer.Option(
        help="region that the model sees: i0:i1,j0:j1,k0:k1 in voxels of the array's axes, or x0:x1,y0:y1,z0:z1mm in "
        "mm (RAS+); default all",
        callback=_crop,
    ),
]
Timeout = Annotated[float, typer.Option(help="seconds until the request is given up")]
ScanPath = Annotated[Path, typer.Argument(metavar="SCAN", help=_SCAN)]
Question = Annotated[str, typer.Argument(help="what to ask", callback=_asked)]
MaxNewTokens = Annotated[int | None, typer.Option(help="tokens of the answer at most (default 256)")]
Temperature = Annotated[float | None, typer.Option(help="0 (default) is greedy; else 0.01 to 2")]
TopP = Annotated[float | None, typer.Option(help="sample from the likeliest tokens that sum up to this")]
TopK = Annotated[int | None, typer.Option(help="sample from this many likeliest tokens; 0 is all")]
Seed = Annotated[int | None, typer.Option(help="makes sampling repeatable")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="above 1 repeats less")]
Stop = Annotated[list[str] | None, typer.Option(help="text that ends the answer; may be given several times")]

Choice = Annotated[
    list[str] | None,
    typer.Option(
        help="text with which the answer may begin: its log-probability is printed; may be given several times"
    ),
]
OnlyChoices = Annotated[bool, typer.Option("--only-choices", help="let the answer be one of the choices")]
JsonSchema = Annotated[Path | None, typer.Option(help="file with a JSON schema; the answer is JSON of it")]


def _text_of(path: Path, option: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{option} {path} cannot be read as text: {getattr(error, 'strerror', error)}") from None


def _sampling(**given) -> dict:
    """What was given, if the server will take it."""
    from engine.sampling import Sampling

    sampling = {name: value for name, value in given.items() if value not in (None, [])}
    Sampling.from_dict(sampling)
    return sampling


@app.command(help="Serve an exported model repository until Ctrl-C or SIGTERM.")
def serve(
    repository: Annotated[Path, typer.Option(help="exported model repository")] = Path("model_repository"),
    target: Annotated[str, typer.Option(help="what it was exported for: cpu or tensorrt")] = "cpu",
    host: Annotated[
        str, typer.Option(help="address that clients come to; 0.0.0.0 lets anybody on the network in, without a key")
    ] = "127.0.0.1",
    grpc_port: Annotated[int, typer.Option(help="port of the client protocol")] = 8001,
    metrics_host: Annotated[str, typer.Option(help="address of metrics and health checks")] = "127.0.0.1",
    metrics_port: Annotated[
        int, typer.Option(help="port of /metrics (Prometheus), /health/live and /health/ready, over HTTP")
    ] = 8002,
    log: Annotated[Path | None, typer.Option(help="file for Triton's log (default: in the cache folder)")] = None,
    start_timeout: Annotated[float, typer.Option(help="seconds until all models must be ready")] = 900.0,
) -> None:
    from engine.server import Server

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    server = Server(
        repository,
        target=target,
        host=host,
        metrics_host=metrics_host,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        log=log,
        start_timeout=start_timeout,
        on_progress=_progress,
    )
    _warn_of_the_network(host, grpc_port, metrics_host, metrics_port)
    try:
        server.start()
        notes.print(
            f"[green]ready[/] on {server.url} (gRPC), metrics on {server.metrics_url}; log: {escape(str(server.log))}"
        )
        notes.print(f'try: m3d ask SCAN "Describe the scan." --server {server.url}   (stop with Ctrl-C)')
        server.wait()
    except KeyboardInterrupt:
        notes.print("stopping")
    finally:
        # Stopping is bounded; a second Ctrl-C must not cut it short.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        server.stop()


@app.command(help="Ask about a scan; the answer appears as it is made.")
def ask(
    scan: ScanPath,
    question: Question,
    server: ServerUrl = "localhost:8001",
    preset: Preset = "auto",
    crop: Crop = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    repetition_penalty: RepetitionPenalty = None,
    stop: Stop = None,
    choice: Choice = None,
    only_choices: OnlyChoices = False,
    json_schema: JsonSchema = None,
    timeout: Timeout = 600.0,
) -> None:
    from engine.client import M3DClient

    sampling = _sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        repetition_penalty=repetition_penalty,
        stop=stop,
        choices=choice,
        only_choices=only_choices,
        json_schema=None if json_schema is None else _text_of(json_schema, "--json-schema"),
    )
    with M3DClient(server, timeout) as client:
        study = client.upload(scan, preset=preset, crop=crop)
        _note_study(study)
        begun = False
        try:
            with client.stream(study, question, **sampling) as stream:
                for text in stream:
                    # Many tokenizers begin an answer with a space.
                    print(text if begun else text.lstrip(), end="", flush=True)
                    begun = True
        except BaseException:
            # What is said about it begins a line of its own.
            print(end="\n" if begun else "")
            raise
        print()
        _note_answer(stream.answer)
        _print_choices(stream.answer)


@app.command(
    help="Ask for a structure; write its mask in the scan's own space, its measurements (JSON), and a picture of it."
)
def segment(
    scan: ScanPath,
    question: Question,
    output: Annotated[Path, typer.Option("--output", "-o", help="mask, .nii or .nii.gz")] = Path("mask.nii.gz"),
    merge: Annotated[
        str,
        typer.Option(
            help="reference: one mask, whatever the answer names; each: one mask for each \\[SEG] of the answer, "
            "written as mask_1.nii.gz, mask_2.nii.gz, ... by the name of --output; no file that exists is overwritten",
            callback=_merge,
        ),
    ] = "reference",
    picture: Annotated[Path | None, typer.Option(help="PNG of three planes (default: by the mask)")] = None,
    server: ServerUrl = "localhost:8001",
    preset: Preset = "auto",
    crop: Crop = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    repetition_penalty: RepetitionPenalty = None,
    stop: Stop = None,
    timeout: Timeout = 600.0,
) -> None:
    from engine.client import M3DClient
    from engine.picture import has_matplotlib, montage
    from engine.results.measurements import measure
    from engine.seg_states import EACH

    draws = has_matplotlib()
    if picture is not None and not draws:
        raise InvalidInput(f"--picture {picture}: {_NO_PICTURE}")
    files = _MaskFiles.of(output, picture, scan, merge == EACH)
    sampling = _sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        repetition_penalty=repetition_penalty,
        stop=stop,
    )
    with M3DClient(server, timeout) as client:
        study = client.upload(scan, preset=preset, crop=crop)
        _note_study(study)
        result = client.segment(study, question, merge=merge, **sampling)
    print(result.answer.text.strip(), flush=True)
    _note_answer(result.answer)
    if result.mask is None:
        notes.print("the answer asks for no mask (it has no [SEG]): nothing is written; for answers alone use m3d ask")
        raise typer.Exit(1)
    written = [each.save(files.mask(number)) for number, each in enumerate(result.segments, 1)]
    try:
        shown = result.source.read() if result.source else None
        unread = f"{scan} has changed since it was sent"
    except Unavailable as error:
        shown, unread = None, str(error)
    measured = [measure(each.mask, each.affine, shown, preset=result.preset) for each in result.segments]
    if merge == EACH:
        _save_segments(files.table, result, written, measured)
    else:
        measured[0].save(files.table)
    written.append(files.table)
    if shown is None:
        notes.print(f"[yellow]warning:[/] {escape(unread)}: no picture, no intensities")
    elif not draws:
        notes.print(f"[dim]no picture: {escape(_NO_PICTURE)}[/]")
    else:
        montage(
            files.picture,
            shown.array,
            shown.affine,
            result.mask,
            question,
            result.answer.text,
            findings=[(each.words, each.mask) for each in result.segments] if merge == EACH else (),
            modality=shown.modality,
            preset=result.preset,
        )
        written.append(files.picture)
    notes.print(f"[green]wrote[/] {escape(', '.join(map(str, written)))}")
    for number, (each, found) in enumerate(zip(result.segments, measured), 1):
        if merge == EACH:
            notes.print(f"[bold]{number}[/] {escape(each.words or '[SEG]')}")
        if each.score is not None:
            notes.print(f"score {each.score:.3f} (mean probability in the mask, not calibrated)")
        _note_measurements(found, each.mask.size)


@dataclass(frozen=True)
class _MaskFiles:
    """Where `m3d segment` writes. numbered: whether there is a mask for each [SEG]."""

    output: Path
    picture: Path
    table: Path
    numbered: bool

    @classmethod
    def of(cls, output: Path, picture: Path | None, scan: Path, numbered: bool) -> _MaskFiles:
        """Raises InvalidInput for what cannot be written, or would overwrite the scan or, numbered, any file."""
        if not output.name.endswith((".nii", ".nii.gz")):
            raise InvalidInput(f"--output {output.name}: a mask is written as .nii or .nii.gz")
        stem = _stem(output)
        files = cls(output, picture or output.with_name(stem + ".png"), output.with_name(stem + ".json"), numbered)
        if files.picture.suffix != ".png":
            raise InvalidInput(f"--picture {files.picture.name}: a picture is written as .png")
        for path in (files.output, files.picture, files.table):
            if not path.absolute().parent.is_dir():
                raise InvalidInput(f"the folder {path.parent} does not exist")
            if path.exists() and scan.exists() and path.samefile(scan):
                raise InvalidInput(f"{path} is the scan itself, which would be overwritten: give another --output")
        if numbered and (there := files._there()):
            raise InvalidInput(
                f"{there[0]} is there already, and with --merge each nothing is overwritten, so that no mask of "
                "another answer lies among those of this one: give another --output, or move it away"
            )
        return files

    def mask(self, number: int) -> Path:
        """Of the answer's [SEG] of this number, from 1."""
        if not self.numbered:
            return self.output
        stem = _stem(self.output)
        return self.output.with_name(f"{stem}_{number}{self.output.name[len(stem) :]}")

    def _there(self) -> list[Path]:
        """What exists of all that may be written."""
        name = re.compile(re.escape(_stem(self.output)) + r"_[0-9]+\.nii(\.gz)?")
        masks = [path for path in self.output.absolute().parent.iterdir() if name.fullmatch(path.name)]
        return sorted(masks) + [path for path in (self.table, self.picture) if path.exists()]


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")


def _save_segments(path: Path, result: Segmentation, files: list[Path], measured: list[Measurements]) -> None:
    """Write what each mask is of, and its measurements, as JSON."""
    import json

    segments = [
        {"file": file.name, "words": each.words, "span": list(each.span), "score": each.score, **found.to_dict()}
        for each, file, found in zip(result.segments, files, measured)
    ]
    document = {"answer": result.answer.text, "segments": segments}
    path.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")


@app.command(help="Rank texts by how well they fit a scan (M3D-CLIP), best first.")
def rank(
    scan: ScanPath,
    texts: Annotated[list[str] | None, typer.Argument(help="texts to rank")] = None,
    file: Annotated[Path | None, typer.Option(help="file with one text a line, besides those given")] = None,
    server: ServerUrl = "localhost:8001",
    preset: Preset = "auto",
    crop: Crop = None,
    timeout: Timeout = 600.0,
) -> None:
    from engine.client import M3DClient

    texts = list(texts or ())
    if file is not None:
        texts += [line.strip() for line in _text_of(file, "--file").splitlines() if line.strip()]
    if not texts:
        raise InvalidInput("nothing to rank: give texts, or --file with one a line")
    with M3DClient(server, timeout) as client:
        study = client.upload(scan, preset=preset, crop=crop)
        _note_study(study)
        ranking = client.rank(study, texts)
    _note_cut(ranking)
    for text, score in ranking.sorted():
        print(f"{score:+.4f}\t{text}")


@app.command(help="Write one of the packaged real scans as NIfTI, to have something to ask about.")
def sample(
    name: Annotated[str, typer.Argument(help="brain-mr, chest-ct or spine-ct")],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder to write into, or a .nii.gz file")] = Path("."),
) -> None:
    from engine.samples import write_sample

    print(write_sample(name, output))


@app.command(
    help="Say what a checkpoint is, what it lacks, and what its export needs, before anything large is downloaded."
)
def inspect(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="folder or Hugging Face id (owner/name\\[/subfolder]\\[@revision]) of M3D-LaMed or M3D-CLIP"
        ),
    ],
    target: Annotated[str, typer.Option(help="what it shall be exported for: cpu or tensorrt")] = "cpu",
    precision: Annotated[str, typer.Option(help="of the export: fp32, bf16, fp16, or fp8 with tensorrt")] = "fp32",
    as_json: Annotated[bool, typer.Option("--json", help="print all that is known as JSON")] = False,
) -> None:
    import json
    from dataclasses import asdict

    from engine.server.triton import TARGETS

    if target not in TARGETS:
        raise InvalidInput(f"--target {target}: known are {', '.join(TARGETS)}")
    try:
        from engine import inspection
        from engine.inspection_table import rows, verdict
    except ModuleNotFoundError as error:
        raise Unavailable(
            f"m3d inspect needs {error.name}, which the client alone does without: install 'm3d-engine[cpu]'"
        ) from None
    found = inspection.inspect(checkpoint, target, precision, _progress)
    if as_json:
        print(json.dumps({**asdict(found), "ready": found.ready}, indent=2))
    else:
        _print_table(rows(found))
        print(verdict(found))
    raise typer.Exit(0 if found.ready else 1)


@app.command(help="Say what this machine has, what is missing for serving, and how to get it.")
def doctor(
    repository: Annotated[Path, typer.Option(help="model repository to look at")] = Path("model_repository"),
    target: Annotated[str | None, typer.Option(help="cpu or tensorrt (default: the repository's)")] = None,
) -> None:
    from engine.doctor import examine, target_of
    from engine.server.triton import TARGETS

    target = target or target_of(repository)
    if target not in TARGETS:
        raise InvalidInput(f"--target {target}: known are {', '.join(TARGETS)}")
    findings = examine(repository, target)
    _print_table([(finding.state, finding.what, finding.detail) for finding in findings])
    missing = [finding for finding in findings if finding.state == "missing"]
    where = {"cpu": "on the CPU", "tensorrt": "on the GPU"}[target]
    print(f"{len(missing)} missing for serving {where}" if missing else f"ready to serve {where}")
    raise typer.Exit(1 if missing else 0)


def _warn_of_the_network(host: str, grpc_port: int, metrics_host: str, metrics_port: int) -> None:
    """Say who can do what, if others than this machine's users can reach a port."""
    if not _is_loopback(host):
        notes.print(
            f"[yellow]warning:[/] --host {escape(host)}: whoever can reach port {grpc_port} can upload scans, ask, "
            "segment and rank, use any study whose handle he has, and take all of the machine's capacity. Nobody needs "
            "a key, and the traffic is not encrypted. Put a gateway or a firewall before it."
        )
    if not _is_loopback(metrics_host):
        notes.print(
            f"[yellow]warning:[/] --metrics-host {escape(metrics_host)}: whoever can reach port {metrics_port} can "
            "read counts, timings and whether the server is ready, without a key. No scan and no answer is there."
        )


def _is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`. Of names only localhost is known to be so."""
    import ipaddress

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _print_table(rows: list[tuple[str, str, str]]) -> None:
    """Print rows of (state, what, detail)."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    colours = {"ok": "green", "missing": "red", "wrong": "red", "note": "yellow"}
    for state, what, detail in rows:
        mark = f"[{colours[state]}]{state}[/]" if state else ""
        table.add_row(mark, f"[bold]{escape(what)}[/]", escape(detail))
    Console(highlight=False).print(table)


def _progress(text: str) -> None:
    notes.print(f"[dim]{escape(text)}[/]")


def _note_study(study) -> None:
    notes.print(f"[dim]{escape(study.info.reason)}[/]")


def _note_answer(answer) -> None:
    took = answer.timings
    first = f", first text after {took.first_text_s:.2f} s" if took.first_text_s else ""
    notes.print(f"[dim]{len(answer.token_ids)} tokens in {took.total_s:.2f} s{first} ({answer.finish_reason})[/]")
    for box in answer.boxes:
        corners = escape(str([round(float(v), 1) for v in box]))
        notes.print(f"[dim]box, voxels (i0, j0, k0) to (i1, j1, k1): {corners}[/]")


def _print_choices(answer) -> None:
    """Log-probabilities of the choices, best first."""
    for text, logprob in sorted(answer.choices.items(), key=lambda pair: -pair[1]):
        print(f"{logprob:+.4f}\t{text}")


def _note_measurements(measured, voxels: int) -> None:
    """voxels: of the whole scan."""
    notes.print(
        f"{measured.volume_ml:,.3f} mL, {measured.voxel_count:,} voxels "
        f"({measured.voxel_count / voxels:.2%} of the scan)"
    )
    if measured.centroid_ras_mm is not None:
        x, y, z = measured.centroid_ras_mm
        notes.print(f"centroid ({x:.1f}, {y:.1f}, {z:.1f}) mm (RAS+)")
    if measured.intensity_mean is not None:
        unit = " HU" if measured.intensity_unit == "HU" else ""
        notes.print(
            f"intensity {measured.intensity_mean:.4g}{unit}, SD {measured.intensity_sd:.4g}, "
            f"from {measured.intensity_min:.4g} to {measured.intensity_max:.4g}"
        )


def _note_cut(ranking) -> None:
    """Warn of texts that were not read to their end, by their number in the order given, from 1."""
    cut = [str(number) for number, is_cut in enumerate(ranking.cut, 1) if is_cut]
    if cut:
        which = f"text {cut[0]} is" if len(cut) == 1 else f"texts {', '.join(cut)} are"
        notes.print(
            f"[yellow]warning:[/] {which} longer than M3D-CLIP reads: only the first {ranking.text_limit} tokens count"
        )


def _interrupt(*_) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Entry point of `m3d`: one line instead of a traceback, exit code 2 for bad input and 1 for all else."""
    try:
        app()
    except (M3DError, OSError) as error:
        notes.print("[red]error:[/] ", end="")
        notes.print(str(error), markup=False)
        sys.exit(2 if isinstance(error, InvalidInput) else 1)


if __name__ == "__main__":
    main()
