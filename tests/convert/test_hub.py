"""The hub: what is downloaded, and what a failure says. The network is played by a function."""

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from convert import hub
from flux_jax.assets import shipped_path
from flux_jax.errors import UserError


def test_a_shipped_model_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("tiny") == shipped_path("tiny")
    # A folder of that name comes first, if a checkpoint is in it.
    (tmp_path / "tiny").mkdir()
    assert hub.resolve("tiny") == shipped_path("tiny")
    (tmp_path / "tiny" / "model_index.json").touch()
    assert hub.resolve("tiny") == Path("tiny")


def refuse(error):
    def snapshot_download(repo, **options):
        raise error

    return snapshot_download


def http(kind, text="403 Client Error"):
    request = SimpleNamespace(method="GET", url="https://huggingface.co/x")
    response = SimpleNamespace(status_code=403, headers={}, request=request, url=request.url)
    return kind(text, response=response)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (http(errors.GatedRepoError), "a/b: gated: accept its licence at .*hf auth login"),
        (http(errors.RepositoryNotFoundError), "a/b: no such path, and no such repository"),
        (http(errors.RevisionNotFoundError), "a/b: has no revision 'v9'"),
        (errors.LocalEntryNotFoundError("x"), "hub cannot be reached"),
        (errors.HFValidationError("x"), "no valid hub id"),
        (errors.OfflineModeIsEnabled("offline\nmore"), "a/b: download failed: offline; what is"),
        (http(errors.HfHubHTTPError, "500 Server Error"), "a/b: download failed: 500 Server Error"),
        (OSError(28, "No space left on device"), "download failed: .*No space left"),
        # A connection that breaks down: of the HTTP library that the hub's client has.
        (errors.HTTPError("peer closed connection"), "download failed: peer closed connection"),
    ],
)
def test_a_failure_is_one_line(monkeypatch, error, message):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse(error))
    with pytest.raises(UserError, match=message):
        hub.resolve("a/b", revision="v9")


def test_names_that_are_none():
    with pytest.raises(UserError, match="the path of the checkpoint is empty"):
        hub.resolve("")
    with pytest.raises(UserError, match="tiny: a model that ships has no revision 'main'"):
        hub.resolve("tiny", revision="main")


def test_the_file_of_a_lora(tmp_path, monkeypatch):
    asked = []

    def hf_hub_download(repo, name):
        asked.append((repo, name))
        if name.startswith("absent") or (repo, name) == ("a/c", "adapter_config.json"):
            raise http(errors.RemoteEntryNotFoundError)
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    standard = "pytorch_lora_weights.safetensors"
    assert hub.resolve_lora("a/b") == tmp_path / standard
    assert hub.resolve_lora("a/b/styles/x.safetensors") == tmp_path / "styles" / "x.safetensors"
    assert asked == [("a/b", standard), ("a/b", "styles/x.safetensors")]
    with pytest.raises(UserError, match=r"a/b: has no absent.*; name its file as a/b/FILE"):
        hub.resolve_lora("a/b/absent.safetensors")
    (tmp_path / "loras").mkdir()
    here = f"{tmp_path}/loras/absent.safetensors"
    for name in ("a", "a/b/x.bin", "a b/c", "./a/b.safetensors", "a/b.safetensors", here):
        with pytest.raises(UserError, match="no such file or folder, and no file of a hub"):
            hub.resolve_lora(name)
    with pytest.raises(UserError, match="the path of the LoRA is empty"):
        hub.resolve_lora("")
    # PEFT's settings lie beside its weights.
    asked.clear()
    hub.resolve_lora("a/b/x/adapter_model.safetensors")
    assert asked == [("a/b", "x/adapter_model.safetensors"), ("a/b", "x/adapter_config.json")]
    with pytest.raises(UserError, match=r"a/c: has no adapter_config.json"):
        hub.resolve_lora("a/c/adapter_model.safetensors")


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "x" * 300], ids=["user", "long"])
def test_what_is_no_path(name):
    for resolve in (hub.resolve, hub.resolve_lora):
        with pytest.raises(UserError, match="is no path: "):
            resolve(name)


def test_the_one_file_of_a_folder(tmp_path):
    with pytest.raises(UserError, match="expected one .safetensors file, found 0"):
        hub.resolve_lora(tmp_path)
    (tmp_path / "a.safetensors").touch()
    assert hub.resolve_lora(tmp_path) == tmp_path / "a.safetensors"
    assert hub.resolve_lora(tmp_path / "a.safetensors") == tmp_path / "a.safetensors"
    (tmp_path / "b.safetensors").touch()
    with pytest.raises(UserError, match="found 2; give the file's own path"):
        hub.resolve_lora(tmp_path)


def test_only_what_is_needed_is_downloaded(monkeypatch, tmp_path):
    asked = {}

    def snapshot_download(repo, *, revision, allow_patterns):
        asked.update(repo=repo, revision=revision, patterns=allow_patterns)
        (tmp_path / "model_index.json").touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub.resolve("a/b", ["vae"], revision="main") == tmp_path
    assert (asked["repo"], asked["revision"]) == ("a/b", "main")
    assert "vae/*.safetensors" in asked["patterns"]
    assert not any(p.startswith("transformer/") or p.endswith(".bin") for p in asked["patterns"])
    assert not any(p == "*.safetensors" for p in asked["patterns"])  # the 24 GB beside the folders
    assert "transformer/*.safetensors" in hub.patterns(None)


def test_a_repository_without_a_pipeline_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **o: str(tmp_path))
    with pytest.raises(UserError, match="a/b: has no model_index.json"):
        hub.resolve("a/b")


def test_a_path_goes_before_the_hub(tmp_path):
    assert hub.resolve(str(tmp_path)) == tmp_path
    with pytest.raises(UserError, match="a local path has no revision 'main'"):
        hub.resolve(str(tmp_path), revision="main")
    for absent in ("./a", "/a/b/c", "a", "a b/c"):
        with pytest.raises(UserError, match="no such file or folder, and neither a hub id"):
            hub.resolve(absent)


def test_an_unknown_component_is_not_downloaded():
    with pytest.raises(UserError, match="unknown component unet"):
        hub.resolve("a/b", ["unet"])
