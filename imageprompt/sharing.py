"""The upload of a model or a processor to the Hub: all of it in one commit, of nothing but what was made here.

It is what `push_to_hub` of the package's classes does. A model that runs by the code that came with it has the
library's own `push_to_hub`, which sends the same files with a plain card.
"""

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel, ProcessorMixin
from transformers import __version__ as transformers_version

from .cards import CARD, SAMPLE, CardFacts, model_card, read_card
from .configuration import REQUIREMENTS, ImagePromptConfig
from .provenance import is_weights


def push_model(
    model: PreTrainedModel,
    repo_id: str,
    *,
    commit_message: str | None = None,
    max_shard_size: int | str = "50GB",
    tags: str | list[str] | None = None,
    **details: Any,
) -> CommitInfo:
    """What `model.push_to_hub` does: weights, code, settings and a card that says what is known of the model.

    Args:
        details: `commit_description`, `private`, `token`, `revision` and `create_pr`, as of [`upload`].
    """
    facts = CardFacts(tags=[*(model.model_tags or []), *CardFacts(tags=tags).tags])
    commit_message = commit_message or "Upload model"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        files = files_in(folder)
        return upload(
            folder, files, repo_id, config=model.config, facts=facts, commit_message=commit_message, **details
        )


def push_processor(
    processor: ProcessorMixin, repo_id: str, *, commit_message: str | None = None, **details: Any
) -> CommitInfo:
    """What `processor.push_to_hub` does; without a card, which is the model's to write.

    Args:
        details: as of [`push_model`].
    """
    commit_message = commit_message or "Upload processor"
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        return upload(folder, files_in(folder), repo_id, commit_message=commit_message, **details)


def upload(
    folder: str | Path,
    files: Iterable[str],
    repo_id: str,
    *,
    config: ImagePromptConfig | None = None,
    facts: CardFacts | None = None,
    commit_message: str,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Upload files of a folder in one commit; the repository is made if there is none.

    Args:
        folder: where the files are.
        files: paths in the folder, and in the repository.
        repo_id: `"name"` or `"owner/name"`.
        config: of the model, if its weights are among the files; then the commit brings a model card and
            `requirements.txt` as well, and takes away weights of an earlier push that would be loaded in their place.
        facts: what the card says besides.
        private: who may see the repository; one that is there already must be as is wished.
        revision: the branch, made if there is none; `main` by default.
        others: as of the library's `push_to_hub`.

    Raises:
        ValueError: for an impossible name, a missing or refused token, a repository that others may see against the
            wish, a README.md that cannot be read, or one that has no place for the sample.
        OSError: if the Hub cannot be reached, or breaks off; the message says whether the commit arrived.
    """
    folder, names, facts = Path(folder), sorted(set(files) - {CARD}), facts or CardFacts()
    validate_repo_id(repo_id)
    own_card = read_card(folder / CARD) if (folder / CARD).is_file() else None
    refuse_without_token(token)
    api = HfApi(token=token, library_name="transformers", library_version=transformers_version)
    with _saying_what_went_wrong(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        refuse_other_visibility(api, repo_id, private)
        # What is there: of a branch that is still to be made, what it will begin with.
        named = revision not in (None, "main") and not revision.startswith("refs/")
        base = None if named and not api.revision_exists(repo_id, revision) else revision
        there, head = set(api.list_repo_files(repo_id, revision=base)), api.model_info(repo_id, revision=base).sha
        operations: list[Any] = [CommitOperationAdd(name, folder / name) for name in names]
        if config is not None:
            if REQUIREMENTS not in names:
                operations.append(CommitOperationAdd(REQUIREMENTS, config.requirements.encode()))
            card = own_card
            if card is None and CARD in there:
                where = f"{api.endpoint}/{repo_id}/blob/{base or 'main'}/{CARD}"
                card = read_card(api.hf_hub_download(repo_id, CARD, revision=base), where)
            operations.append(CommitOperationAdd(CARD, str(model_card(config, repo_id, facts, card)).encode()))
            if facts.sample is not None:
                operations.append(CommitOperationAdd(SAMPLE, facts.sample[0]))
            stale = sorted(name for name in there - set(names) if is_weights(name))
            operations += [CommitOperationDelete(name) for name in stale]
        if named and base is None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with _saying_whether_it_arrived(api, repo_id, revision, head, create_pr):
            return api.create_commit(
                repo_id,
                operations,
                commit_message=commit_message,
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )


def files_in(folder: str | Path) -> list[str]:
    """Every file of a folder and of those in it, as paths from there."""
    return [path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()]


def refuse_without_token(token: bool | str | None) -> None:
    """Raise a ValueError if there is no token, neither this one nor in one of the usual places."""
    if not (token if isinstance(token, str) else get_token()):
        raise ValueError("You are not logged in to the Hub: run `hf auth login`, or set HF_TOKEN to a token.")


def refuse_other_visibility(api: HfApi, repo_id: str, private: bool | None) -> None:
    """The Hub heeds `private` only where it makes a repository; an old one may be open to everybody."""
    if private is None or (is_private := bool(api.model_info(repo_id).private)) == private:
        return
    is_, wish = ("private", "public") if is_private else ("public", "private")
    raise ValueError(
        f"{repo_id} is there already and {is_}, not {wish} as you wish; nothing was sent. Change it at "
        f"{api.endpoint}/{repo_id}/settings, push to another name, or leave out `private`."
    )


@contextmanager
def _saying_what_went_wrong(repo_id: str) -> Iterator[None]:
    try:
        yield
    except HfHubHTTPError as error:
        if error.response.status_code == 401:
            raise ValueError(
                f"The Hub does not accept this token for {repo_id}: {error.server_message or error} Make one that may "
                "write at https://huggingface.co/settings/tokens, and pass it to `hf auth login` or as HF_TOKEN."
            ) from error
        if error.response.status_code == 403:
            raise ValueError(
                f"This token may not write to {repo_id}: {error.server_message or error} Push to a name of your own, "
                "or use a token that may write there."
            ) from error
        raise
    except HTTPError as error:
        raise ConnectionError(f"The Hub cannot be reached: {error} Nothing was sent to {repo_id}.") from error


@contextmanager
def _saying_whether_it_arrived(
    api: HfApi, repo_id: str, revision: str | None, head: str | None, is_request: bool
) -> Iterator[None]:
    """A connection may break before the Hub has the commit, and after: only the Hub knows.

    Args:
        head: the newest commit before.
        is_request: whether it is a pull request, which leaves the branch as it is.
    """
    try:
        yield
    except (HTTPError, RuntimeError) as error:  # the library raises a RuntimeError where an upload breaks off
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            raise
        place = f"{repo_id}{f' ({revision})' if revision else ''}"
        try:
            now = None if is_request else api.model_info(repo_id, revision=revision).sha
        except HTTPError:
            now = None
        if now is None:
            page = "discussions" if is_request else f"commits/{revision or 'main'}"
            said = f"may have arrived all the same: look at {api.endpoint}/{repo_id}/{page} before you push again."
        elif now == head:
            said = "changed nothing there; what was uploaded is kept for some time: push again to go on."
        else:
            said = f"arrived all the same, as {api.endpoint}/{repo_id}/commit/{now}, if nobody else pushes there."
        raise ConnectionError(f"{error} {error.__cause__ or ''} The push to {place} broke off. It {said}") from error
