"""Publish an export on a Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

LOCAL_FILES = ("MANIFEST.json", "COMPLETE")  # digests of a folder on a disk; a hub has its own


def push(folder: Path, repo: str, *, private: bool) -> str:
    """Make the repository if it is not there, and upload `folder` as one commit; the commit's address.

    The token is huggingface_hub's own (`hf auth login`, or HF_TOKEN), and so is the hub (HF_ENDPOINT).

    Raises:
        ValueError: the hub refuses, or cannot be reached; says why.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    hub = HfApi()
    try:
        hub.create_repo(repo, private=private, exist_ok=True)
        done = hub.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Export by vidcls", ignore_patterns=list(LOCAL_FILES)
        )
    except HFValidationError as error:
        raise ValueError(f"--push-to-hub: {repo!r} is no name of a repository: {error}") from None
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(f"--push-to-hub: {hub.endpoint} does not take {repo}: {error}") from error
    return str(done.commit_url)
