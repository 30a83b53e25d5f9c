"""What the commands say about faces, for people."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsforget.cli.output import emit_json, next_command, say, table

if TYPE_CHECKING:
    from gsforget.cli.infer import Opened

SIDES = (("forget", "forgotten"), ("retain", "retained"), ("old", "forgotten before"), ("never_seen", "never seen"))


def show_faces(face: dict[str, Any]) -> None:
    """Verification, identification and misattribution before and after a request, next to people never seen."""
    rows = []
    for group, title in SIDES:
        before, after = face[group]["before"], face[group]["after"]
        if before["tar"] is not None:
            rate = after["tar"]
            interval = "" if rate["low"] is None else f"{rate['low']:.1f} to {rate['high']:.1f}"
            rank = [f"{side['rank_one']['percent']:.1f}" if side["rank_one"] else "" for side in (before, after)]
            cosine = [f"{side['cosine']:.2f}" for side in (before, after)]
            rows.append((title, f"{before['tar']['percent']:.1f}", f"{rate['percent']:.1f}", interval, *rank, *cosine))
    at = face["threshold"]["after"]
    table(
        ("people", "TAR before", "after", "95 % interval", "rank 1 before", "after", "cosine before", "after"),
        rows,
        f"Verification at a false accept rate of {at['far']:.2g} ({at['impostors']:,} pairs of different retained people), "
        "identification with half of the images enrolled, mean cosine of two images of a person",
        ("TAR before", "after", "rank 1 before", "cosine before"),
    )
    found = {group: face["misattribution"][group]["after"] for group in ("forget", "never_seen")}
    said = [
        f"of {title} at most {one['percent']:.1f} % of a person's images are ({one['low']:.1f} to {one['high']:.1f} %)"
        for title, one in (("forgotten people", found["forget"]), ("never-seen people", found["never_seen"]))
        if one is not None
    ]
    if said:
        say(f"Taken for one and the same retained person: {', '.join(said)}.")
    gallery = face["gallery"]
    if gallery:
        deleted = ", ".join(gallery["deleted"]) or "nobody"
        say(
            f"Gallery: deleted {deleted}; {len(gallery['enrolled_again'])} people are enrolled again in the run's "
            f"artifacts/gallery.npz. Delete {gallery['path']} itself: it still holds the old templates."
        )
        if gallery["to_enroll_again"]:
            say(f"Enroll again, for the data holds no images of them: {', '.join(gallery['to_enroll_again'][:5])}.")


def infer_faces(
    model: Path,
    images: list[Path],
    gallery: Path | None,
    enroll: Path | None,
    top: int,
    device: str,
    trust_code: bool,
    as_json: bool,
) -> None:
    """Write a gallery from a folder of people, or identify images by one."""
    from gsforget.cli.infer import load
    from gsforget.errors import RequestError
    from gsforget.export.device import gallery as galleries
    from gsforget.export.device.infer import find_images

    if gallery is None:
        raise RequestError(
            "It was not said where the gallery is to be written.",
            "Add --gallery FILE, such as people.npz.",
            "no_gallery",
        )
    if enroll is not None and images:
        raise RequestError(
            "--enroll makes a gallery, and images are identified by one.", "Do one after the other.", "two_targets"
        )
    if enroll is None and not images:
        raise RequestError(
            "No images are named.", f"Type gsforget infer {model} IMAGE --gallery {gallery}.", "no_images"
        )
    opened = load(model, device, trust_code)
    _check_faces(opened, model)
    if enroll is not None:
        made = galleries.enroll(opened.predictor, opened.preprocess, enroll, opened.hashes[0], say)
        made.save(gallery)
        say(f"{len(made.names)} people of {enroll} are enrolled in {gallery}, by {int(made.images.sum())} images.")
        say("Whoever lies in that folder is enrolled, forgotten people too: leave their folders out.")
        if as_json:
            emit_json({"gallery": str(gallery), "people": made.names, "threshold": made.threshold})
        next_command(f"gsforget infer {shlex.quote(str(model))} IMAGE --gallery {shlex.quote(str(gallery))}")
        return
    known = galleries.load_gallery(gallery)
    known.check_model(opened.hashes, gallery)
    paths = find_images(images)
    found = known.identify(galleries.embed(opened.predictor, opened.preprocess, paths), top)
    entries = [{"path": str(path), **one} for path, one in zip(paths, found, strict=True)]
    if as_json:
        emit_json({"images": entries, "threshold": known.threshold})
        return
    rows = []
    for entry in entries:
        ranked = [f"{t['id']} {t['cosine']:.2f}" for t in entry["top"]]
        rows.append((entry["path"], entry["person"] or "nobody enrolled", ranked[0], ", ".join(ranked[1:])))
    table(("Image", "Person", "Nearest", "Then"), rows)
    say(
        f"A person is named above a cosine of {known.threshold:.2f}. Whether an image shows a face at all is not looked at."
    )


def compare_faces(opened: Opened, model: Path, paths: list[Path], as_json: bool) -> None:
    """The cosine of two images."""
    from gsforget.errors import RequestError
    from gsforget.export.device.gallery import embed

    if len(paths) != 2:
        raise RequestError(
            f"{model} embeds faces; {len(paths)} image(s) were named, and without a gallery two are compared.",
            "Name two images, or add --gallery FILE.",
            "no_gallery",
        )
    first, second = embed(opened.predictor, opened.preprocess, paths)
    cosine = float(first @ second)
    if as_json:
        emit_json({"images": [str(p) for p in paths], "cosine": cosine})
    else:
        say(f"The cosine of {paths[0]} and {paths[1]} is {cosine:.3f} (1: the same image, about 0: strangers).")
    people = f"gsforget infer {shlex.quote(str(model))} --enroll DIR --gallery people.npz"
    next_command(people)


def _check_faces(opened: Opened, model: Path) -> None:
    from gsforget.errors import RequestError

    if opened.task != "face":
        raise RequestError(
            f"{model} is no embedding model: it tells classes, and knows no galleries.",
            "Leave out --gallery and --enroll.",
            "not_faces",
        )
