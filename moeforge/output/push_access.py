"""Owns whether a repository of the Hub may be written to: known before anything is made or sent.

huggingface_hub finds the token in its usual places; it is never shown, and never handed around.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeforge.errors import Finding, HubError
from moeforge.sources.hub import explain

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_TOKENS = "https://huggingface.co/settings/tokens"
_LOG_IN = f"Log in with `hf auth login`, or set HF_TOKEN to a token that may write: {_TOKENS}"


@dataclass(frozen=True)
class Access:
    """A repository that may be written to, as far as the Hub tells before it is.

    Attributes:
        repo_id: `owner/name`, as the Hub writes it.
        exists: whether it is there.
        private: whether it is, or will be, private; None where your account's default decides.
        token: whether there is a token; without one, nothing is known of what may be written.
    """

    repo_id: str
    exists: bool
    private: bool | None
    token: bool = True


def check_access(
    repo_id: str, *, private: bool | None = None, pr: bool = False, anonymous: bool = False
) -> Access:
    """Ask the Hub whether a push may be made; change nothing there.

    Args:
        repo_id: `owner/name`, or `name` for your own.
        private: visibility that the repository must have; None takes it as it is.
        pr: a pull request is meant, for which the repository has to be there and to be readable.
        anonymous: go on without a token, and say so in the result.

    Raises:
        HubError: there is no token, or it may not write there; the repository has another
            visibility than asked for; the Hub cannot be reached.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # no __all__

    api, what = client(), f"pushing to {repo_id}"
    try:
        validate_repo_id(repo_id)
        if constants.HF_HUB_OFFLINE:
            raise OfflineModeIsEnabled
        token = api.token is not None
        if not token and not anonymous:
            raise HubError(Finding(f"{what}: there is no token", _LOG_IN))
        if "/" not in repo_id:
            if not token:
                finding = Finding(f"{what}: without a token, {repo_id} has no owner", _LOG_IN)
                raise HubError(finding)
            repo_id = f"{api.whoami()['name']}/{repo_id}"
        found = _found(api, repo_id)
        if found is None:
            _refuse_new(api, repo_id, what, pr=pr, token=token)
            return Access(repo_id, exists=False, private=private, token=token)
        if token and not pr:
            ask(api, f"models/{found.id}/auth-check/write")
    except HubError:
        raise
    except Exception as error:  # huggingface_hub raises its own, its HTTP library's and others
        raise explain(error, what) from error
    if private is not None and found.private != private:
        asked, is_so = ("private", "public") if private else ("public", "private")
        page = f"{api.endpoint}/{found.id}/settings"
        what = f"{found.id} exists and is {is_so}, not {asked}; nothing was sent"
        raise HubError(Finding(what, f"Change it in its settings, {page}, or push elsewhere."))
    return Access(found.id, exists=True, private=found.private, token=token)


def client() -> HfApi:
    """Return the client; where there is a token, one that sends it whatever it is asked.

    Others leave it out of reading where HF_HUB_DISABLE_IMPLICIT_TOKEN says so.
    """
    from huggingface_hub import HfApi, get_token

    return HfApi(token=True if get_token() else None)


def _found(api: HfApi, repo_id: str) -> Any:
    """Return what the Hub says of a repository; None where it shows none."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return api.model_info(repo_id)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return None


def ask(api: HfApi, path: str, **query: str) -> int:
    """Return the status with which the Hub answers a question that the client has no word for.

    Raises:
        HfHubHTTPError: the answer is an error, and not that there is no such page.
    """
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, but no __all__
        build_hf_headers,
        get_session,
        hf_raise_for_status,
    )

    url = f"{api.endpoint}/api/{path}"
    answer = get_session().get(url, headers=build_hf_headers(token=api.token), params=query)
    if answer.status_code != 404:
        hf_raise_for_status(answer)
    return int(answer.status_code)


def _refuse_new(api: HfApi, repo_id: str, what: str, *, pr: bool, token: bool) -> None:
    """Refuse a repository that cannot be made."""
    from huggingface_hub.errors import HfHubHTTPError

    if pr:
        why = "there is no repository to open a pull request in, or you may not see it"
        fix = "Correct the name, or push without --pr, which makes the repository."
        raise HubError(Finding(f"{what}: {why}", fix))
    if not token:
        return
    try:
        me, owner = api.whoami(), repo_id.partition("/")[0]
    except HfHubHTTPError as error:
        if error.response.status_code == 429:  # few such questions are allowed: it may still go
            return
        raise
    teams = [str(team.get("name")) for team in me.get("orgs") or ()]
    access = (me.get("auth") or {}).get("accessToken") or {}
    if access.get("role") == "read":
        raise HubError(Finding(f"{what}: your token may only read", _LOG_IN))
    # A fine-grained token may be one of an organization and not be told of it.
    if owner.lower() in (name.lower() for name in (me["name"], *teams)):
        return
    if access.get("role") == "fineGrained" and not teams:
        return
    listed = f", {', '.join(teams)}" if teams else ""
    found = f"there is no such repository, and you cannot make one of {owner}"
    fix = f"Your token makes repositories of {me['name']}{listed}; see {_TOKENS}"
    raise HubError(Finding(f"{what}: {found}", fix))
