"""New files from old ones: what the edits say, at every precision, and nothing where anything does not fit."""

import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gsforget.errors import SafetyError
from gsforget.export.device.changes import Digest, GiveEdit, PatchedArtifact, Scale, TensorChange, TensorEdit
from gsforget.export.device.edit import Edits, rest_sha256
from gsforget.export.device.factors import Factors, narrow
from gsforget.export.device.files import mapped
from gsforget.export.device.manifest import Manifest
from gsforget.export.device.package import plain_payload


def sha(raw):
    return hashlib.sha256(raw).hexdigest()


class Case:
    """A file with a tensor in it twice, once transposed, amid bytes that stay and bytes that are replaced."""

    def __init__(self, chain, dtype, seed=0, rows=5, columns=7, give=b"longer than before", axis=0):
        rng = np.random.default_rng(seed)
        rank = 3
        self.factors = Factors(
            rng.integers(-32767, 32768, (rank, columns), dtype=np.int16),
            rng.integers(-32767, 32768, (rows, rank), dtype=np.int16),
            np.array([-16, -15, -17], np.int32),
            np.full(rank, -15, np.int32),
        )
        scale, scales = None, np.empty(0, np.float32)
        if dtype == "int8":
            weight = rng.integers(-128, 128, (rows, columns)).astype(np.int8)
            scales = rng.uniform(0.01, 1, (2, 1 if axis is None else (rows, columns)[axis])).astype(np.float32)
            scale = tuple(s[:, None] if axis == 0 else s[None, :] for s in scales)
        else:
            weight = narrow(rng.standard_normal((rows, columns)), dtype)
        new = self.factors.apply(weight, dtype, scale)
        parts = [np.ascontiguousarray(getattr(self.factors, k)).tobytes() for k in ("a", "b", "ea", "eb")]
        at = [sum(map(len, parts[:i])) for i in range(5)]
        self.payload = b"".join((*parts, scales.tobytes(), give))
        before, after = weight.tobytes(), new.tobytes()
        turned = np.ascontiguousarray(weight.T).tobytes(), np.ascontiguousarray(new.T).tobytes()
        self.old = b"head" + before + b"meta" + turned[0] + b"tail"
        self.new = b"head" + after + give + turned[1] + b"tail"
        size = len(before)
        edits = (
            TensorEdit(4, size, "w"),
            GiveEdit(4 + size, 4, (len(self.payload) - len(give), len(give))),
            TensorEdit(8 + size, size, "w", True),
        )
        change = TensorChange(
            "w", dtype, (rows, columns), rank, tuple(at[:4]), sha(before), sha(after),
            Scale(at[4], at[4] + scales.nbytes // 2, axis) if dtype == "int8" else None,
        )  # fmt: skip
        self.artifact = PatchedArtifact(
            "engine", "new.engine", (), None, Digest(sha(self.old), len(self.old)), Digest(sha(self.new), len(self.new)),
            edits, rest_sha256(self.old, edits),
        )  # fmt: skip
        content, _ = chain.content(1)
        content |= {"tensors": [change.to_json()], "artifacts": [self.artifact.to_json()]}
        self.manifest = Manifest.from_json({**content, "payload": plain_payload(self.payload)})

    def make(self, old=None, payload=None):
        old = memoryview(self.old if old is None else old)
        edits = Edits(self.manifest, self.payload if payload is None else payload)
        edits.prepare(old, self.artifact)
        return b"".join(edits.pieces(old, self.artifact))


DTYPES = ["float32", "float16", "bfloat16", "int8"]


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 40),
    st.integers(1, 40),
    st.binary(max_size=30),
    st.sampled_from([None, 0, 1]),
)
@settings(max_examples=25, deadline=None)
def test_the_new_file_is_the_one_that_was_meant(chain, dtype, seed, rows, columns, give, axis):
    case = Case(chain, dtype, seed, rows, columns, give, axis)
    assert case.make() == case.new


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.data())
@settings(max_examples=25, deadline=None)
def test_any_changed_byte_of_the_old_file_is_refused(chain, dtype, data):
    case = Case(chain, dtype)
    old = bytearray(case.old)
    old[data.draw(st.integers(0, len(old) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(SafetyError) as caught:
        case.make(bytes(old))
    assert caught.value.kind == "wrong_base"


@pytest.mark.parametrize("old", [b"", b"x", None])
def test_a_shorter_or_longer_old_file_is_refused(chain, old):
    case = Case(chain, "float32")
    for wrong in (old if old is not None else case.old[:-1], case.old + b"x"):
        with pytest.raises(SafetyError) as caught:
            case.make(wrong)
        assert caught.value.kind == "wrong_base"


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_other_factors_never_give_another_file(chain, data):
    """A payload byte that changes nothing is possible (a factor times zero); a file that differs is not."""
    case = Case(chain, "float16")
    payload = bytearray(case.payload)
    payload[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        made, kind = case.make(payload=bytes(payload)), "wrong_result"
    except SafetyError as error:
        made, kind = case.new, error.kind
    assert made == case.new
    assert kind in ("wrong_result", "inexact_delta", "out_of_range")


def test_scales_that_cannot_be_are_refused(chain):
    case = Case(chain, "int8")
    scale = case.manifest.tensors[0].scale
    for wrong, at in itertools.product((0.0, -1.0, np.inf, np.nan), (scale.before, scale.after)):
        payload = case.payload[:at] + np.float32(wrong).tobytes() + case.payload[at + 4 :]
        with pytest.raises(SafetyError) as caught:
            case.make(payload=payload)
        assert caught.value.kind == "wrong_result"


def test_files_are_read_where_they_lie(tmp_path):
    for content in (b"", b"some bytes"):
        (tmp_path / "f").write_bytes(content)
        assert bytes(mapped(tmp_path / "f")) == content
    with pytest.raises(OSError, match="No such file"):
        mapped(tmp_path / "none")
