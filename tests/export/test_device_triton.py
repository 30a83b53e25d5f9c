"""Triton's model repository: the configuration parses as Triton's message, and an older version is never left beside."""

import json
import os

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from gsforget.errors import RequestError, SafetyError
from gsforget.export.build import export_model
from gsforget.export.device import triton
from gsforget.export.device.metadata import ArtifactInfo, check_hash, sidecar_path
from gsforget.export.device.preprocess import Preprocess
from gsforget.export.device.runtime import open_model

NAMES = ['ant "red"', "forgotten-1", "Käfer", "line\nbreak"]


def info(sequence=2, model_id="0123456789abcdef", **changes):
    fields = {"class_names": NAMES, "forgotten": (1,), "preprocess": Preprocess((3, 16, 8), (0.5,) * 3, (0.5,) * 3)}
    return ArtifactInfo(sequence=sequence, model_id=model_id, precision="fp16", **fields | changes)


def served(kind="engine", batch=(1, 8, 64), backend="trt", **changes):
    return triton.Served(kind, info(**changes), batch, backend if kind == "engine" else "")


@pytest.fixture
def artifact(tmp_path):
    path = tmp_path / "model-0002-fp16-trt-sm90.engine"
    path.write_bytes(b"a plan")
    return path


def put(repository, artifact, sequence=2, kind="engine", **changes):
    return triton.publish(repository, served(kind, sequence=sequence, **changes), artifact, {"sha256": "x"})


# Fields of triton-inference-server/common, protobuf/model_config.proto: name, number, type (or message), repeated.
T = descriptor_pb2.FieldDescriptorProto
FIELDS = {
    "ModelConfig": [
        ("name", 1, T.TYPE_STRING, False),
        ("platform", 2, T.TYPE_STRING, False),
        ("backend", 17, T.TYPE_STRING, False),
        ("version_policy", 3, "ModelVersionPolicy", False),
        ("max_batch_size", 4, T.TYPE_INT32, False),
        ("input", 5, "ModelInput", True),
        ("output", 6, "ModelOutput", True),
        ("dynamic_batching", 11, "ModelDynamicBatching", False),
        ("parameters", 14, "Entry", True),
    ],
    "ModelInput": [
        ("name", 1, T.TYPE_STRING, False),
        ("data_type", 2, "DataType", False),
        ("dims", 4, T.TYPE_INT64, True),
    ],
    "ModelOutput": [
        ("name", 1, T.TYPE_STRING, False),
        ("data_type", 2, "DataType", False),
        ("dims", 3, T.TYPE_INT64, True),
        ("label_filename", 4, T.TYPE_STRING, False),
    ],
    "ModelVersionPolicy": [("latest", 1, "Latest", False)],
    "Latest": [("num_versions", 1, T.TYPE_UINT32, False)],
    "ModelDynamicBatching": [("preferred_batch_size", 1, T.TYPE_INT32, True)],
    "Entry": [("key", 1, T.TYPE_STRING, False), ("value", 2, "ModelParameter", False)],
    "ModelParameter": [("string_value", 1, T.TYPE_STRING, False)],
}


@pytest.fixture(scope="module")
def parse():
    """parse(text): `config.pbtxt` as protobuf's own reader of text understands it; unknown fields are errors."""
    file = descriptor_pb2.FileDescriptorProto(name="model_config.proto", package="inference", syntax="proto3")
    types = file.enum_type.add(name="DataType")
    for name, number in (("TYPE_INVALID", 0), ("TYPE_FP16", 10), ("TYPE_FP32", 11), ("TYPE_BF16", 14)):
        types.value.add(name=name, number=number)
    for message, fields in FIELDS.items():
        made = file.message_type.add(name=message)
        for name, number, kind, repeated in fields:
            label = T.LABEL_REPEATED if repeated else T.LABEL_OPTIONAL
            plain = isinstance(kind, int)
            named = None if plain else f".inference.{kind}"
            number_of = kind if plain else (T.TYPE_ENUM if kind == "DataType" else T.TYPE_MESSAGE)
            made.field.add(name=name, number=number, label=label, type=number_of, type_name=named)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    message = message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))
    return lambda text: text_format.Parse(text, message())


@pytest.mark.parametrize("kind", ["engine", "onnx"])
def test_the_configuration_is_tritons(parse, tmp_path, artifact, kind):
    where = put(tmp_path / "repo", artifact, kind=kind)
    folder = tmp_path / "repo" / where["model"]
    config = parse((folder / "config.pbtxt").read_text(encoding="utf-8"))
    assert config.name == folder.name == where["model"], "Triton demands that they agree"
    assert (config.platform, config.backend) == (("tensorrt_plan", "") if kind == "engine" else ("", "onnxruntime"))
    assert config.max_batch_size == 64
    assert list(config.dynamic_batching.preferred_batch_size) == [8]
    assert config.version_policy.latest.num_versions == 1
    (image,), (logits,) = config.input, config.output
    assert (image.name, image.data_type, list(image.dims)) == ("images", 11, [3, 16, 8])
    assert (logits.name, logits.data_type, list(logits.dims)) == ("logits", 11, [len(NAMES)])
    labels = (folder / logits.label_filename).read_text(encoding="utf-8").splitlines()
    assert labels == ['ant "red"', "forgotten-1", "Käfer", "line break"]
    assert [p.name for p in folder.iterdir() if p.is_dir()] == ["2"]
    file = folder / "2" / ("model.plan" if kind == "engine" else "model.onnx")
    assert file.read_bytes() == b"a plan"
    assert json.loads(sidecar_path(file).read_text())["file"] == file.name


def test_names_with_quotes_and_backslashes_survive(parse):
    odd = served(input_name='im"a\\ges', output_name="lögits")
    config = parse(triton.config(odd))
    assert (config.input[0].name, config.output[0].name) == ('im"a\\ges', "lögits")


def test_the_next_erasure_leaves_no_older_version(tmp_path, artifact):
    repository = tmp_path / "repo"
    put(repository, artifact, 1)
    folder = repository / "model-fp16-trt"
    (folder / ".7-partial").mkdir()  # what a killed export leaves
    artifact.write_bytes(b"the next plan")
    assert put(repository, artifact, 2)["version"] == 2
    assert sorted(p.name for p in folder.iterdir()) == ["2", "config.pbtxt", "labels.txt"]
    assert (folder / "2" / "model.plan").read_bytes() == b"the next plan"
    artifact.write_bytes(b"built again")
    put(repository, artifact, 2)
    assert sorted(p.name for p in folder.iterdir()) == ["2", "config.pbtxt", "labels.txt"]
    assert (folder / "2" / "model.plan").read_bytes() == b"built again"


def test_older_versions_go_last(tmp_path, artifact, monkeypatch):
    """Whatever point a kill hits, the highest version that Triton sees is whole, and there is one."""
    repository, steps = tmp_path / "repo", []
    put(repository, artifact, 1)
    folder = repository / "model-fp16-trt"
    artifact.write_bytes(b"the next plan")

    def watched(function):
        def call(*args, **kwargs):
            done = function(*args, **kwargs)
            highest = max(int(p.name) for p in folder.iterdir() if p.name.isdigit())
            steps.append((highest, (folder / str(highest) / "model.plan").read_bytes()))
            return done

        return call

    for module, name in (
        (triton, "_copy"),
        (triton, "write_file"),
        (triton, "write_sidecar"),
        (triton, "flush_folder"),
    ):
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    monkeypatch.setattr(triton.shutil, "rmtree", watched(triton.shutil.rmtree))
    put(repository, artifact, 2)
    assert set(steps) == {(1, b"a plan"), (2, b"the next plan")}
    assert [s[0] for s in steps] == sorted(s[0] for s in steps)


def test_what_would_bring_erased_classes_back_is_refused(tmp_path, artifact):
    repository = tmp_path / "repo"
    put(repository, artifact, 3)
    with pytest.raises(SafetyError) as refused:
        put(repository, artifact, 2)
    assert refused.value.kind == "rollback"
    assert sorted(p.name for p in (repository / "model-fp16-trt").iterdir() if p.is_dir()) == ["3"]


def test_a_sibling_with_fewer_erasures_is_named(tmp_path, artifact):
    repository = tmp_path / "repo"
    put(repository, artifact, 1, kind="onnx")
    (repository / "unrelated").mkdir()
    assert put(repository, artifact, 2)["older"] == [str(repository / "model-fp16-onnx")]
    assert put(repository, artifact, 2, kind="onnx")["older"] == []


def test_what_has_no_place_in_a_repository(tmp_path, artifact):
    repository = tmp_path / "repo"
    for refused, words in (
        (served(sequence=0), "counts versions from 1"),
        (served(backend="rtx"), "standard TensorRT"),
        (served(batch=(2, 8, 64)), "any size from 1"),
        (served(features_name="features"), "audits"),
    ):
        with pytest.raises(RequestError, match=words):
            triton.check(repository, refused)
    put(repository, artifact)
    with pytest.raises(RequestError, match="another model"):
        put(repository, artifact, model_id="f" * 16)
    with pytest.raises(RequestError, match="not a folder"):
        triton.check(artifact, served())
    (repository / "model-fp16-trt" / "config.pbtxt").write_text("name: 'by hand'")
    with pytest.raises(RequestError, match="another model"):
        put(repository, artifact)


def test_a_run_and_its_file_from_the_exporter(original, tmp_path, make_run, parse):
    run = make_run(original, tmp_path / "forget-0001", 1, seed=1)
    repository = tmp_path / "repo"
    made = export_model(run, onnx=True, triton_repo=repository, batch=(1, 4, 16))
    folder = repository / "model-fp32-onnx"
    assert made["triton"] == {"model": folder.name, "version": 1, "path": str(folder / "1"), "older": []}
    config = parse((folder / "config.pbtxt").read_text())
    model = folder / "1" / "model.onnx"
    assert check_hash(model)["sha256"] == made["artifacts"][0]["sha256"]
    assert list(config.input[0].dims) == list(open_model(model).info.preprocess.input_size)
    assert (folder / "labels.txt").read_text().split() == ["ant", "forgotten-1", "cat", "dog"]
    inside = {p.relative_to(repository): p.stat().st_size for p in repository.rglob("*") if p.is_file()}
    again = export_model(made["artifacts"][0]["path"], triton_repo=repository, batch=(1, 4, 16))
    assert (again["artifacts"], again["triton"]["version"]) == ([], 1)
    (noted,) = triton.read_record(run / "artifacts")
    assert noted == {"repository": str(repository.resolve()), "model": folder.name, "version": 1}
    assert {p.relative_to(repository): p.stat().st_size for p in repository.rglob("*") if p.is_file()} == inside
    with pytest.raises(RequestError, match="one file"):
        export_model(run, onnx=True, trt=True, backend="rtx", triton_repo=repository)
    with pytest.raises(RequestError, match="counts versions from 1"):
        export_model(original, onnx=True, triton_repo=repository, out=tmp_path / "out")
    assert not (tmp_path / "out").exists(), "refused before anything was made"


def test_weights_beside_an_onnx_file_lie_in_a_folder_of_its_name(tmp_path, artifact):
    data = tmp_path / "weights.data"
    data.write_bytes(b"weights")
    one = served("onnx")
    triton.publish(tmp_path / "repo", one, artifact, {"sha256": "x", "data_files": {data.name: "y"}}, [data])
    version = tmp_path / "repo" / one.name / "2"
    assert sorted(os.listdir(version)) == ["model.onnx"]
    assert sorted(os.listdir(version / "model.onnx")) == ["model.onnx", "model.onnx.json", "weights.data"]
