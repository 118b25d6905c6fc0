"""Checkpoints from the Hugging Face hub: only safetensors, configs and tokenizers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from convert.problems import first_line
from convert.safetensors_header import SUFFIX
from convert.tables import COMPONENTS, TOKENIZER_FILES, check_components
from flux_jax import assets
from flux_jax.components import TOKENIZERS
from flux_jax.errors import UserError

# As PEFT saves an adapter, and its settings.
PEFT_FILES = (f"adapter_model{SUFFIX}", "adapter_config.json")
# As diffusers saves a LoRA.
_LORA_FILE = f"pytorch_lora_weights{SUFFIX}"


def resolve(
    src: str | Path, components: Sequence[str] | None = None, *, revision: str | None = None
) -> Path:
    """A local path as it is; a repository id downloaded to the hub's cache.

    Args:
      src: a path; or when there is none, `owner/name`, or the name of a model that ships with the
        package.
      components: which to download; None for all.
      revision: branch, tag or commit of a repository.

    Raises:
      UserError: neither a path nor a repository that can be reached.
    """
    if not str(src):
        raise UserError("the path of the checkpoint is empty")
    if revision is None:
        src = assets.resolve(src)
    elif src in assets.SHIPPED:
        raise UserError(f"{src}: a model that ships has no revision {revision!r}")
    path = local_path(src)
    if path.exists():
        if revision is not None:
            raise UserError(f"{src}: a local path has no revision {revision!r}")
        return path
    if not isinstance(src, str) or not assets.REPO_ID.fullmatch(src):
        shipped = ", ".join(assets.SHIPPED)
        raise UserError(
            f"{src}: no such file or folder, and neither a hub id (owner/name) nor a model that "
            f"ships ({shipped})"
        )
    return download(src, components, revision=revision)


def patterns(components: Sequence[str] | None) -> list[str]:
    """The files of a repository that a conversion needs."""
    names = COMPONENTS if components is None else tuple(components)
    weights = [f"{name}/*{suffix}" for name in names for suffix in (".json", ".safetensors")]
    texts = [f"{n}/{f}" for n in TOKENIZERS for f in TOKENIZER_FILES]
    return ["model_index.json", "scheduler/*.json", *texts, *weights]


def download(
    repo: str, components: Sequence[str] | None = None, *, revision: str | None = None
) -> Path:
    """Download what a conversion needs of a repository; what is in the cache is not fetched again.

    Raises:
      UserError: the repository is gated or absent, has no such revision, or the hub cannot be
        reached.
    """
    if components is not None:
        check_components(list(components))
    # Late: only this path needs the network's libraries.
    import huggingface_hub

    with _told(repo, revision):
        folder = huggingface_hub.snapshot_download(
            repo, revision=revision, allow_patterns=patterns(components)
        )
    path = Path(folder)
    if not (path / "model_index.json").exists():
        raise UserError(
            f"{repo}: has no model_index.json, so it is no diffusers pipeline; download the "
            "single file that you want and give its path"
        )
    return path


def resolve_lora(src: str | Path) -> Path:
    """The safetensors file of a LoRA, downloaded to the hub's cache if need be.

    Args:
      src: a file, a folder with one, a repository id `owner/name` whose file has the name that
        diffusers gives it, or `owner/name/file.safetensors`.

    Raises:
      UserError: none of these is there, or it cannot be reached.
    """
    if not str(src):
        raise UserError("the path of the LoRA is empty")
    path = local_path(src)
    if path.is_dir():
        return only_file(path)
    if path.exists():
        return path
    repo, name = "/".join(Path(src).parts[:2]), "/".join(Path(src).parts[2:])
    is_path = (
        str(src).startswith((".", "~"))
        or (path.parent != Path() and path.parent.is_dir())
        or (not name and repo.endswith(SUFFIX))
    )
    if is_path or not assets.REPO_ID.fullmatch(repo) or (name and not name.endswith(SUFFIX)):
        raise UserError(
            f"{src}: no such file or folder, and no file of a hub repository "
            f"(owner/name or owner/name/file{SUFFIX})"
        )
    import huggingface_hub
    from huggingface_hub import errors

    def fetched(file: str) -> Path:
        try:
            return Path(huggingface_hub.hf_hub_download(repo, file))
        except errors.RemoteEntryNotFoundError as error:
            raise UserError(
                f"{repo}: has no {file}; name its file as {repo}/FILE{SUFFIX}"
            ) from error

    with _told(repo, None):
        found = fetched(name or _LORA_FILE)
        if found.name == PEFT_FILES[0]:
            # Its settings lie beside it.
            fetched(name.replace(*PEFT_FILES))
        return found


def local_path(src: str | Path) -> Path:
    """A path as it was given, `~` resolved; it need not exist.

    Raises:
      UserError: no user of that name, or a name that no file can have.
    """
    try:
        path = Path(src).expanduser()
        path.exists()
    except (RuntimeError, OSError, ValueError) as error:
        if isinstance(error, PermissionError):
            raise
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        raise UserError(f"{str(src)[:80]}: is no path: {reason}") from error
    return path


def only_file(folder: Path) -> Path:
    """The one safetensors file of a folder.

    Raises:
      UserError: it has none, or several.
    """
    found = sorted(path for path in folder.iterdir() if path.suffix == SUFFIX)
    if len(found) != 1:
        raise UserError(
            f"{folder}: expected one {SUFFIX} file, found {len(found)}; give the file's own path"
        )
    return found[0]


@contextlib.contextmanager
def _told(repo: str, revision: str | None) -> Iterator[None]:
    """What the hub's client raises, as one line that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(
            f"{repo}: gated: accept its licence at https://huggingface.co/{repo} and log in with "
            "`hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{repo}: has no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{repo}: no such path, and no such repository on the hub (or it is private: log in "
            "with `hf auth login`)"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"{repo}: no such path, not in the hub's cache, and the hub cannot be "
            "reached (offline?)"
        ) from error
    except errors.HFValidationError as error:
        raise UserError(f"{repo}: no such path, and no valid hub id (owner/name)") from error
    except (OSError, RuntimeError, errors.HTTPError) as error:  # pyright: ignore[reportPrivateImportUsage]
        # Among them: a connection that breaks down in the middle, an answer such as 500, a full
        # disk, HF_HUB_OFFLINE. The hub's client may have one HTTP library or another.
        reason = first_line(error)
        raise UserError(
            f"{repo}: download failed: {reason}; what is there already is not fetched again"
        ) from error
