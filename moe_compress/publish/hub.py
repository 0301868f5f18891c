"""The Hub as a push sees it: few calls, each of whose failures is one sentence without a token in it.

`huggingface_hub` reads HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and HF_HUB_DISABLE_XET when it is imported.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
    constants,
    get_session,
    get_token,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented there, though not marked as exported
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)

from moe_compress.errors import MoECompressError, PublishError, UsageError
from moe_compress.text import first_line

AGAIN = "run the same command again: files that arrived whole are not sent twice"
MAIN = "main"
NOT_FOUND = 404


class UnreachableError(PublishError):
    """The Hub cannot be asked at all."""


@dataclass(frozen=True)
class Remote:
    """What a repository holds where it is pushed to: at the head of the branch, or of `main` if that is to be made."""

    private: bool
    has_branch: bool
    commit: str | None
    files: list[str]


class Hub:
    """A Hub and one user of it. `token` is the one given, or the one that `huggingface_hub` finds."""

    def __init__(self, token: str | None = None) -> None:
        self._token = token or get_token()
        self._api = HfApi(token=self._token or False)
        self._has_xet: bool | None = None

    @property
    def url(self) -> str:
        """The address of the Hub."""
        return str(self._api.endpoint)

    @property
    def has_token(self) -> bool:
        """Whether there is a token to push with."""
        return self._token is not None

    def full_name(self, repo_id: str) -> str:
        """`owner/name`: who has a token owns what is named without an owner. Raises when the token is refused."""
        if self._token is None:
            raise PublishError(f"no token for {self.url} was found; log in with `hf auth login`, or set HF_TOKEN.")
        with self._sentences(repo_id):
            user = self._api.whoami()["name"]
        return repo_id if "/" in repo_id else f"{user}/{repo_id}"

    def look(self, repo_id: str, branch: str) -> Remote | None:
        """The repository, or None where there is none."""
        with self._sentences(repo_id):
            info, has_branch = self._info(repo_id), True
            if info is None:
                return None
            if branch != MAIN:
                at_branch = self._info(repo_id, branch)
                info, has_branch = at_branch or info, at_branch is not None
        files = [file.rfilename for file in info.siblings or ()]
        return Remote(bool(info.private), has_branch, info.sha, files)

    def _info(self, repo_id: str, branch: str | None = None) -> ModelInfo | None:
        """What the Hub says of a repository, None where it has none, with or without its code for that."""
        try:
            return self._api.model_info(repo_id, revision=branch)
        except HfHubHTTPError as error:
            if isinstance(error, RepositoryNotFoundError) or error.response.status_code == NOT_FOUND:
                return None
            raise

    def fetch(self, repo_id: str, file: str, commit: str) -> Path:
        """A copy of a file of the repository, in the cache."""
        with self._sentences(repo_id), self._quiet():
            return Path(self._api.hf_hub_download(repo_id, file, revision=commit))

    def create(self, repo_id: str, *, private: bool) -> None:
        """Create the repository; without `private` its owner's default holds, which is public unless they chose."""
        with self._sentences(repo_id):
            self._api.create_repo(repo_id, private=True if private else None, exist_ok=True)

    def create_branch(self, repo_id: str, branch: str) -> None:
        """Create a branch at the head of `main`."""
        with self._sentences(repo_id):
            self._api.create_branch(repo_id, branch=branch, exist_ok=True)

    def send(self, repo_id: str, branch: str, addition: CommitOperationAdd) -> None:
        """Upload one large file's content; it becomes visible with the commit that names it."""
        with self._sentences(repo_id), self._quiet(), self._transport(repo_id, branch):
            self._api.preupload_lfs_files(repo_id, [addition], revision=branch, free_memory=False)

    def commit(
        self,
        repo_id: str,
        branch: str,
        operations: Sequence[CommitOperationAdd | CommitOperationDelete],
        message: str,
        parent: str | None,
    ) -> str:
        """Make everything visible at once, on top of `parent` if it is named; the new commit's id."""
        known = parent is not None and constants.REGEX_COMMIT_OID.fullmatch(parent) is not None
        with self._sentences(repo_id), self._quiet(), self._transport(repo_id, branch):
            made = self._api.create_commit(
                repo_id, operations, commit_message=message, revision=branch, parent_commit=parent if known else None
            )
        return str(made.oid)

    def contents(self, repo_id: str, commit: str) -> dict[str, str]:
        """What the Hub knows every file of a commit by: the sha256 of a large one, the git id of any other.

        Servers that are not built on git may have ids of their own.
        """
        with self._sentences(repo_id):
            tree = self._api.list_repo_tree(repo_id, recursive=True, revision=commit)
            return {
                entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id
                for entry in tree
                if isinstance(entry, RepoFile)
            }

    @contextmanager
    def _transport(self, repo_id: str, branch: str) -> Iterator[None]:
        """Send by LFS where the Hub has no Xet storage, on which the client insists whenever `hf_xet` is installed."""
        before = constants.HF_HUB_DISABLE_XET
        if not before and self._has_xet is None:
            route = f"{self.url}/api/models/{repo_id}/xet-write-token/{quote(branch, safe='')}"
            answer = get_session().get(route, headers=build_hf_headers(token=self._token))
            self._has_xet = constants.HUGGINGFACE_HEADER_X_XET_ENDPOINT in answer.headers
        constants.HF_HUB_DISABLE_XET = before or not self._has_xet
        try:
            yield
        finally:
            constants.HF_HUB_DISABLE_XET = before

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Keep the client's bars and warnings away: it prints addresses that are signed for whoever reads them."""
        with ExitStack() as stack:
            logger = logging.getLogger("huggingface_hub")
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
            if not are_progress_bars_disabled():
                disable_progress_bars()
                stack.callback(enable_progress_bars)
            yield

    @contextmanager
    def _sentences(self, repo_id: str) -> Iterator[None]:
        """Turn every failure into a `PublishError`."""
        try:
            yield
        except MoECompressError:
            raise
        except HFValidationError:
            raise UsageError(f"`{repo_id}` is no name for a repository; name it owner/name.") from None
        except Exception as error:  # the HTTP library's own exceptions are no part of the Hub client's interface
            sentence = self._without_token(self._sentence(repo_id, error))
            kind = UnreachableError if _answer(error) is None else PublishError
            told = any(self._without_token(str(cause)) != str(cause) for cause in _chain(error))
            raise kind(sentence) from (None if told else error)

    def _sentence(self, repo_id: str, error: Exception) -> str:
        if isinstance(error, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE forbids to reach the Hub; unset it to push."
        if isinstance(error, ValueError) and str(error).startswith("Invalid metadata in README.md"):
            reasons = [line.strip("-. ") for line in str(error).splitlines()[1:]]
            return f"the Hub does not accept the front matter of README.md: {'; '.join(reasons)}."
        cause = _answer(error)
        if cause is None:
            return f"the connection to {self.url} failed ({_plain(error)}); {AGAIN}."
        status = cause.response.status_code
        said = cause.server_message.splitlines()[0].rstrip(".") if cause.server_message else _plain(cause)
        if status == 401:
            return f"{self.url} does not accept your token; log in again with `hf auth login`, or correct HF_TOKEN."
        if status == 403:
            return f"your token may not write to {repo_id} ({said}); use one with the right to write there."
        if status == 404:
            return f"{self.url} has no {repo_id} that you may write to ({said}); check the owner's name."
        if status in (409, 412):
            return f"{repo_id} was changed while it was pushed to ({said}); run the same command again."
        return f"{self.url} answered {status} ({said}); {AGAIN}."

    def _without_token(self, text: str) -> str:
        return text.replace(self._token, "<token>") if self._token else text


def require_name(repo_id: str) -> None:
    """Raise `UsageError` for what cannot be the name of a repository."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(
            f"`{repo_id}` is no name for a repository; name it owner/name ({first_line(error)})."
        ) from None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, what caused it, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _answer(error: BaseException) -> HfHubHTTPError | None:
    """The Hub's answer behind an error, if there was one."""
    return next((cause for cause in _chain(error) if isinstance(cause, HfHubHTTPError)), None)


def _plain(error: Exception) -> str:
    """What an error says, without addresses, which may be signed; where another error caused it, that one."""
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    return " ".join("..." if "://" in word else word for word in first_line(cause).split())
