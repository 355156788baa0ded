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
    except (HfHubHTTPError, _http_error(HfHubHTTPError), OSError) as error:
        raise ValueError(f"--push-to-hub: {hub.endpoint} does not take {repo}: {error}") from error
    return str(done.commit_url)


def _http_error(error: type[Exception]) -> type[Exception]:
    """What the HTTP library under huggingface_hub raises, whichever it is by now: also when no hub answers."""
    return next((cls for cls in error.__mro__ if cls.__name__ == "HTTPError"), error)
