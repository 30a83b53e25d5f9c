"""Where artifacts go: a folder, and a model repository of NVIDIA Triton beside it; both checked before any work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsforget.errors import RequestError
from gsforget.export.device.files import check_folder
from gsforget.folder import read_config

if TYPE_CHECKING:
    from gsforget.export.device.metadata import ArtifactInfo
    from gsforget.export.device.targets import Plan
    from gsforget.export.device.triton import Served


def find_place(folder: Path, out: Path | None) -> Path:
    """Where artifacts go.  Raises RequestError for a place inside an original model."""
    from gsforget.export.build.chain import REQUEST

    read_config(folder)
    is_run = (folder / REQUEST).is_file()
    place = out or (folder / "artifacts" if is_run else Path("artifacts"))
    inside = folder.resolve() in (place.resolve(), *place.resolve().parents)
    if inside and not is_run:
        raise RequestError(
            f"{place} lies in {folder}, an original model, which is never written to.",
            "Name another folder: --out DIR.",
            "out_in_original",
        )
    if place.resolve() == folder.resolve():
        raise RequestError(
            f"{place} is the run itself; its files never change.",
            "Leave --out out: artifacts go to RUN/artifacts.",
            "bad_out",
        )
    check_folder(place)
    return place


@dataclass
class Repository:
    """A Triton repository that an export goes into, checked before the work is done."""

    path: Path
    served: Served

    @classmethod
    def plan(
        cls, path: str | Path | None, info: ArtifactInfo, onnx: bool, plan: Plan | None, sizes: tuple[int, int, int]
    ) -> Repository | None:
        from gsforget.export.device import triton

        if path is None:
            return None
        if onnx and plan:
            raise RequestError(
                "A Triton model is one file.",
                "Type --triton-repo with --trt or with --onnx, not with both.",
                "two_kinds",
            )
        served = triton.Served("engine" if plan else "onnx", info, sizes, plan.backend if plan else "")
        triton.check(Path(path), served)
        return cls(Path(path), served)

    def fill(self, published: dict[str, tuple[Path, dict[str, Any]]]) -> dict[str, Any]:
        from gsforget.export.device.triton import note, publish

        file, content = published[self.served.kind]
        data = [file.with_name(name) for name in content.get("data_files", ())]
        note(file.parent, self.path, self.served)
        return publish(self.path, self.served, file, content, data)
