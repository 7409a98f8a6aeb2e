"""Owns what is said when the Hugging Face Hub, or the way to it, says no."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeforge.errors import Finding, HubError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

_FIXES = {
    400: "Correct what it names and try again.",
    401: "Log in with `hf auth login`, or correct HF_TOKEN.",
    403: "Check the name, and what your token may do: https://huggingface.co/settings/tokens",
    404: "Check the name: there may be no such owner, or none that your token may write to.",
    409: "Something else is changing the repository: look at it, then try again.",
    412: "Something else is changing the repository: look at it, then try again.",
    413: "A file is too large for the Hub: build with a smaller --shard-size.",
    422: "Correct what it names and try again.",
    429: "Wait some minutes; `hf auth login` raises the limit.",
}
_LATER = "Try again later; finished transfers are not repeated. See https://status.huggingface.co"


def _explain_answer(error: HfHubHTTPError) -> tuple[str, str]:
    """Return reason and fix for an answer of the Hub that is an error."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "access is restricted", "Ask for access on its page, then `hf auth login`."
    if isinstance(error, errors.RepositoryNotFoundError):
        reason = "there is no such repository, or it is private and you may not see it"
        return reason, "Correct the id or the path, or `hf auth login`."
    if isinstance(error, errors.RevisionNotFoundError):
        return "there is no such revision", "See the branches and tags on its page."
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return "there is no such file or folder in the repository", "See the files on its page."
    status = error.response.status_code
    said = " ".join((error.server_message or "").split())[:300]
    reason = f"the Hub answered {status}" + (f": {said}" if said else "")
    return reason, _FIXES.get(status, _LATER)


def explain(error: Exception, what: str) -> HubError:
    """Turn an error of huggingface_hub into one that says what to do.

    The text of an HTTP library's own error is never shown: it may quote headers, and so the token.

    Args:
        error: what huggingface_hub raised.
        what: what could not be used or done.
    """
    from huggingface_hub import errors

    http_error = errors.HfHubHTTPError.__bases__[0]  # of httpx or of httpx2
    chain: list[BaseException] = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(inner)
    answer = next((e for e in chain if isinstance(e, errors.HfHubHTTPError)), None)
    if answer is not None:
        reason, fix = _explain_answer(answer)
    elif isinstance(chain[-1], errors.LocalEntryNotFoundError):
        reason = "offline mode is on, and it is not in the cache"
        fix = "Go online once, or fetch it with `hf download`."
    elif isinstance(chain[-1], errors.OfflineModeIsEnabled):
        reason, fix = "offline mode is on", "Unset HF_HUB_OFFLINE."
    elif any(isinstance(e, http_error) for e in chain):
        system = str(chain[-1]) if isinstance(chain[-1], OSError) else type(chain[-1]).__name__
        reason = f"the connection to the Hub failed ({system})"
        fix = "Check network, proxy and HF_ENDPOINT; HF_HUB_OFFLINE=1 uses the local cache only."
    elif any(isinstance(e, errors.HFValidationError) for e in chain):
        reason, fix = " ".join(str(error).split())[:300], "Write it as owner/name."
    else:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        fix = "Correct what it names and try again; finished transfers are not repeated."
    return HubError(Finding(f"{what}: {reason}", fix))
