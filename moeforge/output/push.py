"""Owns sending a finished checkpoint folder to the Hugging Face Hub.

Knows nothing of how the folder was made. huggingface_hub finds the token in its usual places
(`hf auth login`, HF_TOKEN); it is never shown.
"""

from __future__ import annotations

from pathlib import Path

from moeforge.errors import Finding, HubError, SourceError
from moeforge.sources.folder import INDEX, SINGLE, FolderSource
from moeforge.sources.hub import explain

_WEIGHTS = (SINGLE, INDEX, "model-*.safetensors")


def _check(folder: Path) -> None:
    """Refuse what is no complete checkpoint with a model card."""
    FolderSource(str(folder), folder).specs()
    if not (folder / "README.md").is_file():
        what = f"{folder} has no README.md, which is the model card on the Hub"
        raise SourceError(Finding(what, "Write one; `moeforge build` does."))


def push(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
) -> str:
    """Upload a checkpoint folder as one state of a model repository, and return its URL.

    The repository and the branch are created where they do not exist. Weights that an earlier push
    left on the branch and this folder does not have are removed, for transformers would prefer an
    old model.safetensors to new shards. What is already there is not sent again.

    Args:
        folder: complete checkpoint with config.json, safetensors weights and README.md.
        repo_id: `owner/name`, or `name` for your own.
        private: visibility that the repository must have; None leaves it as it is, or as your
            account's default.
        revision: branch to upload to; main if None.
        message: first line of the commit.

    Raises:
        SourceError: the folder is not complete; nothing was sent.
        HubError: the Hub refused or could not be reached, or the repository exists with another
            visibility than asked for.
    """
    _check(folder)
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        if private is not None and api.model_info(url.repo_id).private != private:
            asked, found = ("private", "public") if private else ("public", "private")
            what = f"{url.repo_id} exists and is {found}, not {asked}; nothing was sent"
            raise HubError(
                Finding(what, f"Change it in its settings, {url}/settings, or push elsewhere.")
            )
        if revision:
            api.create_branch(url.repo_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=message or "Upload with moeforge",
            delete_patterns=list(_WEIGHTS),
        )
    except HubError:
        raise
    except Exception as error:  # huggingface_hub raises its own, its HTTP library's and others
        raise explain(error, f"pushing to {repo_id}") from error
    return f"{url}/tree/{revision}" if revision else str(url)
