"""`gsforget bench`: ways to forget side by side, as a table, CSV and a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gsforget.cli.options import AnnotationsOption, Device, DeviceOption, JsonOption, parse_kwargs, parse_list
from gsforget.cli.output import emit_json, next_command, say, table

Opt = typer.Option


def bench(
    methods: Annotated[
        str, Opt(help="Comma-separated names, all, or Python files of your own (their code runs).")
    ] = "",
    protocol: Annotated[str, Opt(metavar="X-Y|RECIPE", help="X classes are left, forget Y of them; or a recipe.")] = "",
    model: Annotated[
        str, Opt(help="Model folder to start from, never written to; or a model's name, with --checkpoint.")
    ] = "",
    data: Annotated[Path | None, Opt(help="Image folder, or a data set in the recipe's layout.")] = None,
    seeds: Annotated[int, Opt(min=1, help="Seeds, from 0 on.")] = 3,
    trials: Annotated[int, Opt(min=1, max=8, help="Settings each method may try on the first request.")] = 8,
    epochs: Annotated[int, Opt(min=1, help="Passes over the retained images a method may make at most.")] = 20,
    annotations: AnnotationsOption = None,
    shots: Annotated[int | None, Opt(min=1, help="Training images per class; default: all.")] = None,
    missing: Annotated[int, Opt(min=0, help="Retained classes without training images.")] = 0,
    task: Annotated[
        str | None, Opt(help="classify, face or detect; default: the folder's, the recipe's, else classify.")
    ] = None,
    checkpoint: Annotated[
        Path | None, Opt(help="Weights of a model by name: safetensors or a torch file of tensors.")
    ] = None,
    model_kwargs: Annotated[str, Opt(help="Of a model by name, e.g. img_size=28,patch_size=7.")] = "",
    layout: Annotated[str | None, Opt(help="How the data lies on disk; default: train/ and test/ folders.")] = None,
    reference: Annotated[
        str, Opt(help="Model folders trained without the classes: one per request, comma-separated, or one for all.")
    ] = "",
    relearn: Annotated[bool, Opt("--relearn", help="Measure full relearning too (slow).")] = False,
    class_names: Annotated[Path | None, Opt(help="File with all class names in the model's index order.")] = None,
    again: Annotated[str, Opt(help="Methods to measure anew.")] = "",
    out: Annotated[Path, Opt(help="Folder of the results; a second call measures what is missing.")] = Path("bench"),
    device: DeviceOption = Device.auto,
    skip_corrupt: Annotated[bool, Opt("--skip-corrupt", help="Leave out images that cannot be read.")] = False,
    list_all: Annotated[bool, Opt("--list", help="Show methods and recipes, and measure nothing.")] = False,
    json: JsonOption = False,
) -> None:
    """Measure ways to forget side by side, stored cell by cell."""
    if list_all:
        _list(json)
        return
    from gsforget.bench.open import run_bench
    from gsforget.classes import read_names
    from gsforget.errors import RequestError

    lacking = [
        name
        for name, v in (("--methods", methods), ("--protocol", protocol), ("--model", model), ("--data", data))
        if not v
    ]
    if lacking or data is None:
        raise RequestError(
            f"A bench needs {' and '.join(lacking)}.",
            "For example: gsforget bench --methods gs-lora++,scrub --protocol 10-2 --model DIR --data DIR; see also --list.",
            "usage",
        )
    document = run_bench(
        parse_list(methods, "--methods"),
        model,
        data,
        protocol,
        seeds=seeds,
        trials=trials,
        epochs=epochs,
        shots=shots,
        missing=missing,
        layout=layout,
        task=task,
        checkpoint=checkpoint,
        model_kwargs=parse_kwargs(model_kwargs),
        never_seen=parse_list(reference, "--reference"),
        relearn=relearn,
        class_names=read_names(class_names) if class_names else None,
        device=device.value,
        out=out,
        again=parse_list(again, "--again"),
        skip_corrupt=skip_corrupt,
        annotations=annotations,
        progress=lambda text: say(f"{text} …", "dim"),
    )
    _show(document, out)
    if json:
        emit_json(document)


def _show(document: dict[str, Any], out: Path) -> None:
    shown = document["table"]
    table(shown["columns"], shown["rows"], f"Protocol {document['setting']['protocol']}", shown["columns"][1:-1])
    for text in document["failed"]:
        say(f"Failed: {text}", "red")
    if document["published"]:
        known = {k: v for k, v in document["published"].items() if isinstance(v, tuple)}
        named = f"{document['published']['figure']} of {document['published']['recipe']}"
        say(f"Published {named}: {_listed(known, ', ')}." if known else f"No figures are published for {named}.")
    if document["published_earlier"]:
        say(f"Published AP of kinds forgotten earlier: {_listed(document['published_earlier'], ', ')}.")
    if document["older_code"]:
        names = ",".join(document["older_code"])
        say(f"Measured by older code of the same method: {names}; --again {names} measures them anew.", "yellow")
    if not any(row["verdict"] in ("pass", "fail") for row in document["rows"]):
        say("Without --reference, models trained without the classes, the audit stays inconclusive.")
    next_command(f"open {out / 'bench.png'}, {out / 'bench.md'}")


def _listed(figures: dict[str, Any], between: str) -> str:
    """Figures by method, one per request."""
    return "; ".join(f"{k} {between.join('-' if x is None else f'{x:g}' for x in v)}" for k, v in figures.items())


def _list(as_json: bool) -> None:
    from dataclasses import asdict

    from gsforget.baselines import find_method, method_names
    from gsforget.bench.recipes import RECIPES

    methods = [find_method(name) for name in method_names()]
    table(
        ("method", "paper", "settings tried"),
        [(m.name, m.paper, str(1 + len(m.trials))) for m in methods],
        "Methods (--methods)",
        ("settings tried",),
    )
    table(
        ("recipe", "layout", "protocol", "published"),
        [
            (
                r.name,
                r.layout,
                ", ".join(
                    [
                        r.protocol,
                        *([f"{r.shots}-shot"] if r.shots else []),
                        *([f"{r.missing} missing"] if r.missing else []),
                    ]
                ),
                _listed(r.published, "/")
                + (f"; AP left of earlier kinds: {_listed(r.earlier, '/')}" if r.earlier else ""),
            )
            for r in RECIPES
        ],
        "Recipes (--protocol), none of them run here",
    )
    if as_json:
        emit_json(
            {
                "methods": [{"name": m.name, "paper": m.paper, "control": m.control} for m in methods],
                "recipes": [asdict(r) for r in RECIPES],
            }
        )
