"""Living with the Hugging Face Hub: its refusals in one line with the remedy, and a quick check before a long download.

Nothing here repeats the text of an error it was given: some of them quote the request, and so the access token.
"""

import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import file_exists, get_hf_file_metadata, hf_hub_url, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from transformers.utils import logging as transformers_logging

from equipoise.documents import read_json
from equipoise.errors import UserError

_OF_A_TOKENIZER = ("tokenizer_config.json", "tokenizer.json", "chat_template.jinja")
# huggingface_hub speaks HTTP through httpx in 1.x and httpx2 in 2.x; their errors share no base class.
_HTTP_LIBRARIES = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}

LOG_IN = "`hf auth login` (today's name of `huggingface-cli login`)"


@dataclass(frozen=True)
class HubAccess:
    """Whether a model could be loaded from the Hub or its local cache, as far as a few seconds can tell."""

    available: bool
    cached: bool
    """Whether all its weights are in the local cache, so that nothing needs to be downloaded."""
    reason: str
    """One line; if not available, it says what to do."""


def hub_access(model_id: str, timeout: float = 5.0) -> HubAccess:
    """Look for a model in the local cache, else ask the Hub for it. Never raises; takes at most `timeout` seconds."""
    if _is_cached(model_id):
        return HubAccess(True, True, f"{model_id} is in the local Hub cache")
    refusal = _refusal(model_id, timeout)
    return HubAccess(refusal is None, False, refusal or f"the Hub grants access to {model_id}")


def _refusal(model_id: str, timeout: float) -> str | None:
    """Why the Hub does not give the model, or does not answer in `timeout` seconds; None where it does."""
    refusals: list[str | None] = []

    def ask() -> None:
        try:
            get_hf_file_metadata(hf_hub_url(model_id, "config.json"), timeout=timeout)
            refusals.append(None)
        except Exception as error:  # this function promises never to raise
            unknown = f"asking the Hub for {model_id} failed with {type(error).__name__}: use --model bundled"
            refusals.append(explain(model_id, error) or unknown)

    # In a thread, because looking up a host name has no timeout of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return refusals[0] if refusals else _unreachable(model_id)


def cached_folder(model_id: str) -> Path | None:
    """The folder in the local Hub cache that a model is to be loaded from; None where the Hub is to be asked.

    A chat template is a file of its own in newer models, and without it the prompt is another: where the cache does not
    tell that it has everything of the tokenizer, a Hub that answers within seconds is asked.
    """
    config = try_to_load_from_cache(model_id, "config.json") if _is_cached(model_id) else None
    if not isinstance(config, str):
        return None
    return Path(config).parent if _has_tokenizer(model_id) or _refusal(model_id, 5.0) is not None else None


def _has_tokenizer(model_id: str) -> bool:
    config, tokenizer, template = (try_to_load_from_cache(model_id, name) for name in _OF_A_TOKENIZER)
    if not isinstance(config, str) or not isinstance(tokenizer, str):
        return False
    try:
        return template is not None or "chat_template" in read_json(Path(config))
    except (OSError, ValueError, TypeError):
        return False


def holds(model_id: str, name: str) -> bool:
    """Whether a model on the Hub has a file of this name. Raises UserError where the Hub does not say."""
    try:
        return file_exists(model_id, name)
    except Exception as error:  # whatever it is, nothing is loaded
        line = explain(model_id, error)
        raise UserError(line or f"asking the Hub for {model_id} failed: try again, or use --model bundled") from None


def explain(model_id: str, error: BaseException) -> str | None:
    """One line with the remedy for a failure to load `model_id` from the Hub; None for an error that is no such thing.

    transformers wraps the Hub's errors in its own, so the whole chain of causes counts, the most telling link first.
    """
    chain = list(causes(error))
    texts = " ".join(str(link) for link in chain)
    responses = [link for link in chain if isinstance(link, HfHubHTTPError)]
    status = responses[0].response.status_code if responses else None
    page = f"https://huggingface.co/{model_id}"
    if "Illegal header value" in texts:
        return "the Hub access token holds a character no token has (a line break?): set HF_TOKEN again, or unset it"
    if "fine-grained token" in texts:
        return (
            f"the access token may not read gated models such as {model_id}: allow gated repositories in the token's "
            "settings on huggingface.co"
        )
    if any(isinstance(link, GatedRepoError) for link in chain):
        if status == 401:
            return f"{model_id} is gated: accept its licence at {page}, run {LOG_IN}, then try again (HTTP 401)"
        return f"{model_id} is gated and not granted to this account: request access at {page} (HTTP 403)"
    if any(isinstance(link, RepositoryNotFoundError) for link in chain):
        return (
            f"the Hub knows no model {model_id!r}, or it is private: check the spelling, or run {LOG_IN} "
            f"with an account that may read it (HTTP {status})"
        )
    if any(isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT) for link in chain) or (
        "No space left on device" in texts
    ):
        return f"the disk is full, so {model_id} cannot be downloaded: free some space, or set HF_HOME to a larger disk"
    if any(isinstance(link, PermissionError) or getattr(link, "errno", None) == errno.EROFS for link in chain):
        return f"the Hub cache cannot be written, so {model_id} cannot be downloaded: set HF_HOME to a writable folder"
    if responses and isinstance(responses[0], EntryNotFoundError):
        return f"the model {model_id!r} lacks config.json or safetensors weights: choose one that has both"
    if status is not None:
        return _refused(model_id, status)
    if is_offline_mode() and any(isinstance(link, (ConnectionError, LocalEntryNotFoundError)) for link in chain):
        return f"{model_id} is not in the local Hub cache and HF_HUB_OFFLINE is set: unset it, or use --model bundled"
    if any(is_network(link) for link in chain):
        return _unreachable(model_id)
    return None


@contextmanager
def quiet_progress(reports: bool = True) -> Iterator[None]:
    """No progress bars of transformers inside: for what takes a second, and beside a progress bar of ours. Without
    `reports` none of its warnings either."""
    shown, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    if not reports:
        transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what caused it, one after the other."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def is_network(error: BaseException) -> bool:
    """Whether the error is that of a connection."""
    return (
        isinstance(error, (ConnectionError, TimeoutError, LocalEntryNotFoundError))
        or type(error).__module__.partition(".")[0] in _HTTP_LIBRARIES
        or type(error).__name__ == "RevisionResolutionError"  # huggingface_hub 2.x
    )


def _refused(model_id: str, status: int) -> str:
    if status == 401:
        return f"the Hub rejects the access token: run {LOG_IN} again, or unset HF_TOKEN (HTTP 401)"
    if status == 403:
        return f"the access token may not read {model_id}: give it that permission on huggingface.co (HTTP 403)"
    if status == 429:
        return f"the Hub refuses more requests for {model_id}: wait some minutes, or run {LOG_IN} (HTTP 429)"
    return f"the Hub could not deliver {model_id} (HTTP {status}): try again later, or use --model bundled"


def _unreachable(model_id: str) -> str:
    return (
        f"the Hub cannot be reached and {model_id} is not in the local cache: connect to the internet, or use "
        "--model bundled or a local folder"
    )


def _is_cached(model_id: str) -> bool:
    def path(name: str) -> str | None:
        found = try_to_load_from_cache(model_id, name)
        return found if isinstance(found, str) else None  # "known not to exist" is another kind of object

    try:
        if path("config.json") is None:
            return False
        if path("model.safetensors") is not None:
            return True
        index = path("model.safetensors.index.json")
        if index is None:
            return False
        shards = set(read_json(Path(index))["weight_map"].values())
        return all(path(shard) is not None for shard in shards)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # no valid id, or a damaged cache
        return False
