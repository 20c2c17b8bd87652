"""What to do about a Hub repo that cannot be read: said in one message, whatever library ran into it."""

from huggingface_hub import get_token
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from .licences import gated_licence


def explain_hub_error(error: BaseException) -> str | None:
    """
    What to do, where `error` comes from a Hub repo that is gated, private or missing; else None.

    Args:
        error: Any error; those that it was raised from are looked at too, so that it does not matter how
            `transformers` or `datasets` put it.
    """
    cause: BaseException | None = error
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, GatedRepoError | RepositoryNotFoundError | RevisionNotFoundError):
            return _message(cause)
        cause = cause.__cause__ or cause.__context__
    return None


def _message(error: HfHubHTTPError) -> str:
    repo_id = getattr(error, "repo_id", None) or "the Hub repo"
    prefix = {"dataset": "datasets/", "space": "spaces/"}.get(getattr(error, "repo_type", None) or "", "")
    login = "log in with `hf auth login`, or set HF_TOKEN"
    known = " (the token that is set may not read it)" if get_token() else " (no token is set)"
    if isinstance(error, GatedRepoError):  # is a RepositoryNotFoundError too
        return (
            f"{repo_id} is gated{known}: accept {gated_licence(repo_id)} at https://huggingface.co/{prefix}{repo_id}, "
            f"then {login}"
        )
    if isinstance(error, RevisionNotFoundError):
        return (
            f"{repo_id} has no such revision; expected a branch, a tag or a commit of https://huggingface.co/{repo_id}"
        )
    return (
        f"{repo_id} is neither a folder here nor a repo that can be seen at {ENDPOINT}{known}: check the name; if it "
        f"is private, {login}"
    )
