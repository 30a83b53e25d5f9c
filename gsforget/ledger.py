"""The ledger: one line per erasure, each holding the SHA-256 of the line before it, so that the chain can be checked.

The last line is held by the hash of the model it names, by what the run's request and metrics say as well, and by its
signature where a key exists.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsforget.canonical import FIRST, canonical, line_sha256
from gsforget.canonical import read_lines as read_chained
from gsforget.errors import RequestError, SafetyError
from gsforget.folder import CONFIG, WEIGHTS, ModelConfig, read_config, sha256
from gsforget.purged import day, find_purged

if TYPE_CHECKING:
    from gsforget.export.device.keys import PublicKey, SigningKey

LEDGER = "ledger.jsonl"
FIELDS = ("base", "classes", "config", "delta", "method", "metrics", "model", "request", "time", "verdict")
SIGNED = b"gsforget ledger 1\n"  # comes before what is signed, so that no signature holds for anything else
HINT = "Restore the run folder from a backup; do not deploy this model."


def append(parent_lines: list[str], entry: dict[str, Any], key: SigningKey | None = None) -> list[str]:
    """The parent's lines and one more; ``sequence``, ``previous`` and ``time`` (UTC, to the second) are filled in.

    With a key, ``key_id`` and ``signature`` are filled in as well; see `check_signatures`.

    Args:
        parent_lines: the ledger of the model that the erasure started from; empty for an original model.
        entry: plain data, without the line's place in the chain: ``classes`` (a list of ``{"index", "name"}``, names
            from before the erasure), ``method``, ``base`` and ``model`` (SHA-256 of the weights before and after),
            ``delta``, ``request`` and ``config`` (SHA-256 of these files), ``verdict``, and ``metrics`` (percent).

    Raises:
        ValueError: the entry lacks a field.
        SafetyError: ``broken_ledger``: the parent's chain is broken, or its length does not fit the entry's sequence.
    """
    number = len(parent_lines) + 1
    if entry.get("sequence", number) != number:
        message = f"The model was erased {entry['sequence'] - 1} time(s), its {LEDGER} has {number - 1} line(s)."
        raise SafetyError(message, HINT, "broken_ledger")
    previous = line_sha256(parent_lines[-1]) if parent_lines else FIRST
    time = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    filled = {"time": time, **entry, "sequence": number, "previous": previous}
    lacking = [f for f in FIELDS if f not in filled]
    if lacking:
        raise ValueError(f"the ledger entry lacks {', '.join(lacking)}")
    if key is not None:
        filled["key_id"] = key.key_id
        filled["signature"] = key.sign(_signed(filled)).hex()
    lines = [*parent_lines, canonical(filled)]
    parse(lines)
    return lines


def read_lines(path: Path) -> list[str]:
    """The lines of a ledger file; none when the file is absent.  Raises SafetyError ``broken_ledger`` if it is cut."""
    return read_chained(path, HINT)


def parse(lines: list[str], where: Path | str = LEDGER) -> list[dict[str, Any]]:
    """Entries of a ledger whose chain is whole.

    Raises SafetyError ``broken_ledger`` naming the first line that is malformed, out of sequence, does not hold the
    hash of the line before it, or does not start from the model that the line before it ended with.
    """
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        entry = _parse_line(line, f"{where}: line {number}")
        previous = line_sha256(lines[number - 2]) if number > 1 else FIRST
        if entry["sequence"] != number:
            raise SafetyError(f"{where}: line {number} has sequence {entry['sequence']}.", HINT, "broken_ledger")
        if entry["previous"] != previous:
            changed = (
                f"line {number - 1} was changed after line {number} was written"
                if number > 1
                else "line 1 is not the first"
            )
            raise SafetyError(f"{where}: {changed} (line {number} holds another hash).", HINT, "broken_ledger")
        if entries and entry["base"] != entries[-1]["model"]:
            raise SafetyError(
                f"{where}: line {number} does not start from the model of line {number - 1}.", HINT, "broken_ledger"
            )
        entries.append(entry)
    return entries


def _parse_line(line: str, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
        whole = isinstance(entry, dict) and canonical(entry) == line
        if whole:
            whole = all(f in entry for f in (*FIELDS, "sequence", "previous"))
            _ = [(int(c["index"]), str(c["name"])) for c in entry["classes"]]
            _ = dict(entry["metrics"])
    except (ValueError, TypeError, KeyError):
        whole = False
    if not whole:
        raise SafetyError(f"{where} is malformed.", HINT, "broken_ledger")
    return entry


def _signed(entry: Mapping[str, Any]) -> bytes:
    """What the signature of a line covers: all of it but the signature."""
    return SIGNED + canonical({k: v for k, v in entry.items() if k != "signature"}).encode()


def check_signatures(entries: Sequence[Mapping[str, Any]], keys: Sequence[PublicKey], all_of_them: bool) -> Check:
    """Whether lines are signed, and by whom.

    Args:
        entries: of a ledger whose chain is whole.
        keys: signing keys that are trusted.
        all_of_them: whether a line that is not signed by one of these fails; else it is not checked.
    """
    known, unsure = {key.key_id: key for key in keys}, []
    for number, entry in enumerate(entries, 1):
        named, signature = entry.get("key_id"), entry.get("signature")
        if named is None and signature is None:
            unsure.append(f"line {number} of {LEDGER} is not signed")
        elif named not in known:
            unsure.append(f"line {number} of {LEDGER} is signed by key {named}, which is not known here")
        elif not _holds(known[named], signature, entry):
            return Check("signature", "fail", f"the signature of line {number} of {LEDGER} does not hold")
    if not unsure:
        return Check("signature", "pass", f"all {len(entries)} line(s) are signed by a key that is trusted here")
    return Check("signature", "fail" if all_of_them else "not checked", unsure[-1])


def _own_keys() -> list[PublicKey]:
    from gsforget.export.device.keys import own_public_key

    own = own_public_key()
    return [own] if own else []


def _holds(key: PublicKey, signature: Any, entry: Mapping[str, Any]) -> bool:
    try:
        return key.verify(bytes.fromhex(signature), _signed(entry))
    except (TypeError, ValueError):
        return False


def forgotten_names(entries: list[dict[str, Any]]) -> dict[int, str]:
    """Every class erased so far: index to the name it had."""
    return {int(c["index"]): str(c["name"]) for entry in entries for c in entry["classes"]}


@dataclass(frozen=True)
class Check:
    """One thing that was checked: verdict ``pass``, ``fail``, ``purged`` or ``not checked``."""

    name: str
    verdict: str
    detail: str


@dataclass(frozen=True)
class Report:
    """All checks of one run folder."""

    checks: list[Check]

    @property
    def passed(self) -> bool:
        return all(c.verdict != "fail" for c in self.checks)

    def error(self) -> SafetyError | None:
        """The first failure as SafetyError ``broken_ledger``; None where nothing failed."""
        failed = next((c for c in self.checks if c.verdict == "fail"), None)
        return SafetyError(f"{failed.detail}.", HINT, "broken_ledger") if failed else None

    def to_json(self) -> dict[str, Any]:
        return {"checks": [asdict(c) for c in self.checks], "verdict": "pass" if self.passed else "fail"}


def history(run_folder: Path) -> list[dict[str, Any]]:
    """The erasures behind a run, oldest first.  Raises as ``parse`` does, and RequestError ``no_model``, ``no_ledger``."""
    path = run_folder / LEDGER
    if not path.is_file():
        read_config(run_folder)
        raise _no_ledger(run_folder)
    return parse(read_lines(path), path)


def _no_ledger(folder: Path) -> RequestError:
    message = f"{folder} has no {LEDGER}, so no erasure by gsforget is known of it."
    return RequestError(message, "Name a run folder such as runs/forget-0001.", "no_ledger")


def inspect(run_folder: Path, keys: Sequence[PublicKey] = ()) -> Report:
    """Check a run folder against its ledger, and its artifacts against their sidecars; failures are reported, not raised.

    Args:
        keys: signing keys of which one must have signed each line.  Without, this workstation's own key is taken, where
            it has one, and lines that it did not sign are not checked.

    Raises RequestError ``no_model`` or ``no_ledger`` where there is nothing to check.
    """
    config = read_config(run_folder, weights=find_purged(run_folder, WEIGHTS) is None)
    path = run_folder / LEDGER
    if not path.is_file() and _is_original(config):
        raise _no_ledger(run_folder)
    try:
        entries = parse(read_lines(path), path)
        if not entries:
            raise SafetyError(
                f"{path} is absent or empty, yet config.json counts {config.sequence} erasure(s).",
                HINT,
                "broken_ledger",
            )
    except SafetyError as error:
        return Report([Check("chain", "fail", error.message.removesuffix(".")), *check_artifacts(run_folder)])
    chain = Check("chain", "pass", f"{len(entries)} line(s), each holding the hash of the line before it")
    last = entries[-1]
    files = (("model", WEIGHTS), ("config", CONFIG), ("delta", "delta.safetensors"), ("request", "request.json"))
    return Report(
        [
            chain,
            check_signatures(entries, keys or _own_keys(), bool(keys)),
            *(_check_file(field, run_folder, name, last[field], len(entries)) for field, name in files),
            _check_forgotten(config, entries, read_object(run_folder / "request.json")),
            *_check_metrics(read_object(run_folder / "metrics.json"), entries),
            *check_artifacts(run_folder),
        ]
    )


def verify(run_folder: Path) -> Report:
    """``inspect``, with the first failure raised as SafetyError ``broken_ledger``."""
    report = inspect(run_folder)
    error = report.error()
    if error:
        raise error
    return report


def parent_lines(folder: Path) -> list[str]:
    """The lines to continue from a model folder: none for an original model, else the verified ledger's."""
    if not (folder / LEDGER).is_file() and _is_original(read_config(folder)):
        return []
    verify(folder)
    return read_lines(folder / LEDGER)


def _is_original(config: ModelConfig) -> bool:
    return not config.forgotten and not config.sequence


def _check_file(name: str, run_folder: Path, file: str, expected: str | None, line: int) -> Check:
    path = run_folder / file
    gone = find_purged(run_folder, file)
    if gone and gone.sha256 != expected:
        detail = f"{path} was purged, but what was removed is not the file that line {line} of {LEDGER} names"
        return Check(name, "fail", detail)
    if gone:
        return Check(name, "purged", f"{path.name}, as line {line} names it, was removed on {day(gone.date)}")
    if not path.is_file():
        return Check(name, "not checked", f"{path} is not there, and no purge noted its removal")
    if expected is None:
        return Check(name, "not checked", f"line {line} names no {name}")
    if sha256(path) != expected:
        return Check(name, "fail", f"{path} is not the file that line {line} of {LEDGER} names (its hash differs)")
    return Check(name, "pass", f"{path.name} is what line {line} names")


def _check_forgotten(config: ModelConfig, entries: list[dict[str, Any]], request: dict[str, Any]) -> Check:
    last = entries[-1]
    asked, names = request.get("indices") or [], request.get("names") or []
    named = {int(c["index"]): str(c["name"]) for c in last["classes"]}
    if named and asked and names and named != {i: names[i] for i in asked}:
        detail = f"line {len(entries)} of {LEDGER} names other classes than request.json, which it holds the hash of"
        return Check("forgotten", "fail", detail)
    erased = sorted(forgotten_names(entries))
    if sorted(config.forgotten) != erased:
        detail = f"config.json lists {sorted(config.forgotten)} as erased, the {len(entries)} line(s) of {LEDGER} say {erased}"
        return Check("forgotten", "fail", detail)
    if config.sequence != len(entries):
        detail = f"config.json has sequence {config.sequence}, {LEDGER} has {len(entries)} line(s)"
        return Check("forgotten", "fail", detail)
    return Check("forgotten", "pass", f"{len(erased)} class(es) erased, as in config.json")


def _check_metrics(measured: dict[str, Any], entries: list[dict[str, Any]]) -> list[Check]:
    """The figures of the last line against `metrics.json`; nothing where that holds none."""
    summary, noted = measured.get("summary"), entries[-1]["metrics"]
    if not isinstance(summary, dict):
        return []
    wrong = next((k for k in noted if k in summary and summary[k] != noted[k]), None)
    if wrong is None:
        return [Check("metrics", "pass", f"metrics.json has the figures that line {len(entries)} names")]
    detail = f"metrics.json says {wrong} {summary[wrong]}, line {len(entries)} of {LEDGER} {noted[wrong]}"
    return [Check("metrics", "fail", detail)]


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is absent or no such thing, which the checks of hashes say."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def check_artifacts(run_folder: Path) -> list[Check]:
    """Re-hash each file under `artifacts/` and compare it with field ``sha256`` of its sidecar `<file>.json`."""
    folder = run_folder / "artifacts"
    files = (
        sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")) if folder.is_dir() else []
    )
    sidecars = {p for p in files if p.suffix == ".json" and p.with_suffix("") in files}
    return [_check_artifact(p, str(p.relative_to(run_folder))) for p in files if p not in sidecars]


def _check_artifact(path: Path, name: str) -> Check:
    sidecar = path.with_name(f"{path.name}.json")
    if not sidecar.is_file():
        return Check(name, "not checked", f"it has no sidecar {sidecar.name}")
    try:
        expected = json.loads(sidecar.read_bytes())["sha256"]
    except (ValueError, KeyError, TypeError):
        return Check(name, "fail", f"{sidecar} holds no readable sha256")
    if sha256(path) != expected:
        return Check(name, "fail", f"{path} is not the file that its sidecar describes (its hash differs)")
    return Check(name, "pass", "its hash is that of its sidecar")
