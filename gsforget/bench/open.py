"""A bench from what a person names: methods, model, data, protocol or recipe; and the files that come of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsforget.errors import RequestError

if TYPE_CHECKING:
    from gsforget.baselines import Method
    from gsforget.bench.recipes import Recipe
    from gsforget.folder import ModelConfig

TABLE, CSV, FIGURE = "bench.md", "bench.csv", "bench.png"


def run_bench(
    methods: Sequence[str],
    model: str | Path,
    data: str | Path,
    protocol: str,
    *,
    seeds: int = 3,
    trials: int = 8,
    epochs: int = 20,
    shots: int | None = None,
    missing: int = 0,
    layout: str | None = None,
    task: str | None = None,
    checkpoint: str | Path | None = None,
    model_kwargs: dict[str, Any] | None = None,
    never_seen: Sequence[str | Path] = (),
    relearn: bool = False,
    class_names: Sequence[str] | None = None,
    device: str = "auto",
    out: str | Path = "bench",
    again: Sequence[str] = (),
    skip_corrupt: bool = False,
    annotations: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure ways to forget side by side; what is stored in `out` already is not measured again.

    Args:
        methods: names of `gsforget.baselines`, "all", or Python files that define `METHOD`, whose code is run.
        model: model folder to start from; or the name of a model with its `checkpoint`, of which one is made in `out`.
        task: of such a model: classify or face (default: the recipe's, else classify); a folder's is checked against it.
        model_kwargs: of such a model, as timm has them.
        data: image folder as for `forget`, or in the layout that the recipe or `layout` names.
        protocol: X-Y (see `protocols`), or a recipe (see `recipes`), which brings shots, missing, layout and settings.
        trials: settings that each method may try on the first request, its published ones among them.
        epochs: passes over the retained images that a method may make at most.
        never_seen: model folders of models trained without a request's classes, one per request or one for all.
        again: methods to measure anew.
        annotations: of a detector, as for `forget`.  Its methods are gsforget's own, without trials and references.

    Returns:
        ``rows`` (see `table.Row`), ``setting``, ``failed``, ``published`` figures of a recipe, ``artifacts``.

    Raises:
        RequestError, SafetyError: see `gsforget.errors`; what fails inside a method is a row of the result instead.
    """
    from gsforget.bench.protocols import make_protocol
    from gsforget.bench.recipes import find_recipe
    from gsforget.bench.run import Bench, Options, code_sha256
    from gsforget.bench.subject import start_folder
    from gsforget.export.device.preprocess import Preprocess
    from gsforget.folder import read_config
    from gsforget.images import ImageSet
    from gsforget.predict import pick_device
    from gsforget.request import refuse_annotations

    say = progress or (lambda _text: None)
    chosen = _methods(methods, again)
    recipe = None if protocol.replace("-", "").isdigit() else find_recipe(protocol)
    if recipe:
        protocol, shots, missing, layout = recipe.protocol, recipe.shots, recipe.missing, layout or recipe.layout
    where = Path(out)
    names = list(class_names) if class_names is not None else None
    if checkpoint is not None:
        names = names or _open_data(Path(data), layout, None).class_names
    by_name = task or (recipe.task if recipe else None)
    weights = Path(checkpoint) if checkpoint else None
    folder = start_folder(model, names or [], weights, model_kwargs or {}, by_name, where)
    config = read_config(folder)
    _check_start(folder, config, task, recipe, never_seen)
    if config.task == "detect":
        from gsforget.bench.detectors import open_bench

        _refuse_for_detectors(missing, never_seen, relearn, None if recipe else layout)
        of_detector = open_bench(
            folder,
            Path(data),
            protocol,
            recipe,
            seeds=seeds,
            shots=shots,
            annotations=annotations,
            class_names=class_names,
            out=where,
            device=device,
            skip_corrupt=skip_corrupt,
            say=say,
        )
        content, changed = of_detector.run(chosen, again)
        return {**write(content, where, recipe), "older_code": changed}
    refuse_annotations(annotations)
    images = _open_data(Path(data), layout, names or config.class_names)
    prepare = Preprocess.from_dict(config.to_json())
    train, test = (ImageSet(split, prepare.load, skip_corrupt) for split in (images.train, images.test))
    for split in (train, test):
        split.check()
    options = Options(
        seeds, trials, epochs, tuple(map(Path, never_seen)), relearn, dict(recipe.settings) if recipe else {}
    )
    made = make_protocol(protocol, config.num_classes, shots, missing)
    bench = Bench(folder, images, train, test, made, options, where, pick_device(device), say)
    for name in again:
        bench.store.drop_method(name)
    changed = [m.name for m in chosen if bench.store.is_older(m.name, code_sha256(m))]
    content = bench.run(chosen)
    return {**write(content, where, recipe), "older_code": changed}


def _methods(methods: Sequence[str], again: Sequence[str]) -> list[Method]:
    """The named ones, each once.  Raises RequestError ``unknown_method``, also for one `again` that is not among them."""
    from gsforget.baselines import find_method, method_names

    named = [name for m in methods for name in (method_names() if m == "all" else [m])]
    chosen = [find_method(name) for name in dict.fromkeys(named)]
    unknown = sorted({*again} - {m.name for m in chosen})
    if not chosen or unknown:
        raise RequestError(
            f"{unknown[0]} is to be measured again, but is not among the methods."
            if unknown
            else "No method was named.",
            "Name methods with --methods; gsforget bench --list shows them.",
            "unknown_method",
        )
    return chosen


def _check_start(
    folder: Path, config: ModelConfig, task: str | None, recipe: Recipe | None, never_seen: Sequence[str | Path]
) -> None:
    """Refuse a start that is not of the task or recipe, has forgotten already, or does not fit its references."""
    from gsforget.folder import read_config
    from gsforget.source import check_task

    check_task(str(folder), config, task)
    for path in map(Path, never_seen):
        if read_config(path).num_classes != config.num_classes:
            raise RequestError(
                f"{path} has {read_config(path).num_classes} classes, and the model {config.num_classes}.",
                "A never-seen model has the same head, trained without images of the classes.",
                "bad_reference",
            )
    if config.forgotten:
        raise RequestError(
            f"Classes were forgotten from {folder} already.", "Start from the original model.", "not_the_original"
        )
    if recipe and (recipe.task == "detect") != (config.task == "detect"):
        raise RequestError(
            f"The recipe {recipe.name} is for models of the task {recipe.task}; that in {folder} is of {config.task}.",
            "Name another model, or another recipe of gsforget bench --list.",
            "other_task",
        )


def write(content: dict[str, Any], out: Path, recipe: Recipe | None = None) -> dict[str, Any]:
    """Write table, CSV and figure beside `bench.json`, and say what is in them."""
    from gsforget.bench import figure, table
    from gsforget.bench.run import BENCH
    from gsforget.folder import write_file

    write_file(out / TABLE, table.markdown(content))
    write_file(out / CSV, table.to_csv(content))
    figure.draw(content, out / FIGURE)
    found = table.rows(content)
    return {
        "setting": content["setting"],
        "machine": content["machine"],
        "rows": [row.to_json() for row in found],
        "failed": [f"{row.method}: {text}" for row in found for text in row.failed],
        "published": {"recipe": recipe.name, "figure": recipe.figure, **recipe.published} if recipe else None,
        "published_earlier": recipe.earlier if recipe else {},
        "table": {"columns": table.headings(content), "rows": [table.cells_of(row, content) for row in found]},
        "artifacts": [str(out / name) for name in (BENCH, TABLE, CSV, FIGURE)],
    }


def _refuse_for_detectors(missing: int, never_seen: Sequence[str | Path], relearn: bool, layout: str | None) -> None:
    from gsforget.request import refuse

    refuse(
        {"--missing": missing, "--reference": never_seen, "--relearn": relearn, "--layout": layout},
        "{} is about classifiers, and the model is a detector.",
        "Leave out {}.",
        "not_for_detection",
    )


def _open_data(root: Path, layout: str | None, names: list[str] | None) -> Any:
    from gsforget.data import scan

    if layout is None:
        return scan(root, names, missing_ok=True)
    from gsforget.bench.layouts import open_layout

    return open_layout(layout, root, names)
