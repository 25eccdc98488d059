"""The Hugging Face Hub: files of a repository by revision and token, and repositories that are pushed."""

from __future__ import annotations

import functools
import os
import re
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants, get_token, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


@dataclass(frozen=True)
class HubAccess:
    """How a repository of the Hub is read.

    Args:
        revision: A branch, tag or commit; None for the default branch.
        token: The name of the environment variable that holds the token; None for the token of ``hf auth login`` or of
            HF_TOKEN.
    """

    revision: str | None = None
    token: str | None = None

    def secret(self) -> str | None:
        """Read the token itself; None for the default one. Raises ValueError for a variable that is not set."""
        if self.token is None:
            return None
        if not (secret := os.environ.get(self.token)):
            raise ValueError(f"model.token names the environment variable {self.token}, which is not set: export it")
        return secret


DEFAULT_ACCESS = HubAccess()


def is_hub_id(source: str | Path) -> bool:
    """Return whether a text has the form owner/name."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) is not None


@functools.cache
def hub_answers(seconds: float = 3.0) -> bool:
    """Return whether a connection to the Hub can be opened, whose client would otherwise retry for some 20 seconds.

    Behind a proxy the answer is yes without a trial.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():
        return True
    address = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((str(address.hostname), address.port or 443), seconds).close()
    except OSError:
        return False
    return True


def download(repository: str, file: str, access: HubAccess = DEFAULT_ACCESS) -> Path:
    """Download a file of a repository into the local cache, or find it there.

    Raises PermissionError for a gated repository, FileNotFoundError for any other that does not give the file.
    """
    secret = access.secret()
    try:
        online = hub_answers()
        path = hf_hub_download(repository, file, revision=access.revision, token=secret, local_files_only=not online)
    except GatedRepoError:
        raise PermissionError(
            f"{repository} is gated: accept its licence at https://huggingface.co/{repository}, then run"
            " `hf auth login`, or name the variable of your token in model.token"
        ) from None
    except RevisionNotFoundError:
        raise FileNotFoundError(
            f"{repository} has no revision {access.revision!r}: give a branch, tag or commit of it in model.revision"
        ) from None
    except RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{repository} is not a folder here, and the Hub has no such model, or a private one: check the name, or"
            " run `hf auth login`"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        at = f" at revision {access.revision!r}" if access.revision else ""
        raise FileNotFoundError(
            f"{repository} is not a folder here, not in the local cache{at}, and the Hub did not give it"
            f" ({type(error).__name__}): check the path, or download it once while online"
        ) from error
    return Path(path)


@dataclass(frozen=True)
class Push:
    """A new repository of models on the Hub, which a folder is uploaded to.

    Args:
        repository: Its name, owner/name.
        private: Whether only its owner sees it.
    """

    repository: str
    private: bool = False

    def require(self) -> None:
        """Check the name and the token before anything is written.

        Raises ValueError for a text that is no name, or no token, FileExistsError for a name that is taken,
        FileNotFoundError while offline.
        """
        if not is_hub_id(self.repository):
            raise ValueError(f"{self.repository!r} is no name on the Hub: write owner/name")
        if get_token() is None:
            raise ValueError(
                f"a push to {self.repository} needs a token that may write: run `hf auth login`, or set HF_TOKEN"
            )
        if not hub_answers():
            raise FileNotFoundError(f"{self.repository} cannot be pushed: the Hub cannot be reached from here")
        with _refusals(self.repository):
            exists = self._api().repo_exists(self.repository)
        if exists:
            raise FileExistsError(f"{self.repository} exists on the Hub: choose another name, or remove it there first")

    def upload(self, folder: Path) -> str:
        """Create the repository with the files of a folder, and return its address. Raises ValueError if refused."""
        with _refusals(self.repository, f". The export is in {folder}"):
            api = self._api()
            api.create_repo(self.repository, private=self.private)
            api.upload_folder(
                repo_id=self.repository, folder_path=folder, commit_message="Upload the export of a genalign run"
            )
        return f"{constants.ENDPOINT}/{self.repository}"

    @staticmethod
    def _api() -> HfApi:
        return HfApi(endpoint=constants.ENDPOINT)


@contextmanager
def _refusals(repository: str, end: str = "") -> Iterator[None]:
    """Raise ValueError, in one line with this end, for a request that the Hub refuses or that does not arrive."""
    reasons = {
        401: "the token is not valid: run `hf auth login` again",
        403: "the token may not write there: take one with write access, and an owner that you are a member of",
        409: "the name is taken: choose another",
    }
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = reasons.get(status, str(error).splitlines()[0])
        raise ValueError(f"the Hub refused the push to {repository} ({status}): {reason}{end}") from error
    except Exception as error:  # of the client's HTTP library, which differs by version
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"the push to {repository} failed ({type(error).__name__}: {reason}): try again{end}"
        ) from error
