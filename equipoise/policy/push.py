"""A finished model put on the Hugging Face Hub, private unless asked otherwise. The folder here stays as it is.

Nothing here repeats the text of an error: some quote the request, and so the access token.
"""

import re
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, get_token, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError

from equipoise.errors import UserError
from equipoise.policy.hub import LOG_IN, causes, is_network
from equipoise.policy.out_config import OutConfig
from equipoise.policy.source import Source
from equipoise.runs.exported import exported_to

_OWN_RECORDS = {"run.json", "sentences.csv"}
"""Beside a model, and not for the Hub: they hold paths of this machine, and whole data."""
_FULL = "the account there has no room left: free some on huggingface.co, or give --hub-visibility or a name with more"
_OF_ROOM = re.compile(r"\b(?:storage|quota)\b[^.\n]{0,40}\b(?:limit|exceeded|reached|full)|\bquota exceeded", re.I)


def check_push(out: OutConfig, source: Source) -> None:
    """Before anything is trained. Raises UserError where putting the model on the Hub could not succeed, and for an
    adapter whose base nobody else has."""
    if not out.push_to_hub:
        return
    if is_offline_mode():
        raise UserError(f"--push-to-hub {out.push_to_hub} needs the Hub, and HF_HUB_OFFLINE is set: unset it")
    if get_token() is None:
        raise UserError(
            f"--push-to-hub {out.push_to_hub} needs an access token that may write, and there is none: run {LOG_IN}, "
            "or set HF_TOKEN"
        )
    if out.save == "adapter" and source.kind == "folder":
        raise UserError(
            f"--push-to-hub with --save adapter would put an adapter on the Hub whose base, {source.path_or_id}, is on "
            "this machine alone: use --save merged"
        )


def push(folder: Path, out: OutConfig, say: Callable[[str], None]) -> None:
    """Put the exported model in `folder` where `out.push_to_hub` says, if anywhere. Records of the training stay here.

    Raises UserError: one line with the remedy, everything here being as it was.
    """
    name = out.push_to_hub
    if not name:
        return
    files = [file for file in exported_to(folder) if file not in _OWN_RECORDS and (folder / file).is_file()]
    say(f"putting the model on the Hub as {name}: {len(files)} files")
    try:
        api = HfApi()
        place = api.create_repo(name, private=out.hub_visibility == "private", exist_ok=True)
        if out.hub_visibility == "private" and not api.repo_info(place.repo_id).private:
            raise UserError(
                f"{place.repo_id} is there already and public, so nothing was put there; the model is in {folder}: "
                "give --hub-visibility public, or another name"
            )
        api.upload_folder(
            repo_id=place.repo_id,
            folder_path=folder,
            allow_patterns=files,
            commit_message="A model trained with equipoise",
        )
    except UserError:
        raise
    except Exception as error:  # whatever it is, the model is whole here
        raise UserError(
            f"the model is not on the Hub as {name}: {reason(error)}. It is whole in {folder}, and the same command "
            "tries again"
        ) from None
    say(f"on the Hub: https://huggingface.co/{place.repo_id} ({out.hub_visibility} unless it was there before)")


def reason(error: BaseException) -> str:
    """Why the Hub did not take it, with the remedy."""
    links = list(causes(error))
    status = next((link.response.status_code for link in links if isinstance(link, HfHubHTTPError)), None)
    told = {
        400: "it refuses what was sent, at times for the fields at the top of README.md",
        401: f"it rejects the access token: run {LOG_IN} again, or set HF_TOKEN anew",
        402: _FULL,
        403: "the access token may not write there: give it that permission on huggingface.co, or another name",
        404: "it has no such place: check the name before the slash",
        409: "something else has that name: give another",
        413: "it takes no files of that size from this account",
        429: "it takes no more requests for now: wait some minutes",
        507: _FULL,
    }
    # A full account is refused with the number of a token that may not write, and large files are put by a library
    # whose errors have no number.
    if any(_OF_ROOM.search(str(link)) for link in links):
        return _FULL + (f" (HTTP {status})" if status is not None else "")
    if status in told:
        return f"{told[status]} (HTTP {status})"
    if status is not None:
        return f"it could not take it (HTTP {status}): try again later"
    if any(is_network(link) for link in links):
        return "it cannot be reached: connect to the internet"
    if any(isinstance(link, OSError) for link in links):
        return (
            "a file could not be read or written on this machine: is a disk full, or a folder not writable (HF_HOME)?"
        )
    return f"it failed with {type(error).__name__}"
