"""In which form a trained model is left, and whether the Hub gets it too: options that every command shares that
writes one. Needs no torch."""

import re
from dataclasses import dataclass
from typing import Literal

from equipoise.errors import UserError

_NAME = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)
_LONGEST = 96


@dataclass(frozen=True, kw_only=True)
class OutConfig:
    save: Literal["merged", "adapter"] = "merged"
    """What the model's folder holds: `merged`, the whole model, or `adapter`, the LoRA adapter alone, which needs its
    base model to be loaded."""
    push_to_hub: str = ""
    """Put the model on the Hugging Face Hub too, under this name: NAME or OWNER/NAME. The folder here stays."""
    hub_visibility: Literal["private", "public"] = "private"
    """Who may see the repository of --push-to-hub. `private` is refused where it is there already and public."""

    def check_out(self, tuning: str = "lora") -> None:
        """Raises UserError for a name that the Hub does not take, and for an adapter where `tuning` makes none."""
        if self.save == "adapter" and tuning != "lora":
            raise UserError(
                f"--save adapter has nothing to save with --tuning {tuning}, which trains the model's own weights: "
                "use --save merged, or --tuning lora"
            )
        name = self.push_to_hub
        if name and (not _NAME.fullmatch(name) or len(name) > _LONGEST or "--" in name or ".." in name):
            raise UserError(
                f"--push-to-hub {name!r:.120} is no name that the Hub takes: give NAME or OWNER/NAME, of letters, "
                "digits, '-', '_' and '.'"
            )
        if name.endswith((".git", "-", ".")):
            raise UserError(f"--push-to-hub {name!r:.120} ends in a way that the Hub does not take: give another name")
