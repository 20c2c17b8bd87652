"""What models and data sets that others made, or that were made here, may be used for: for model cards and messages.

Facts, not legal advice; the licences themselves decide.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load


@dataclass(frozen=True)
class Source:
    """
    Something that weights are made of.

    Attributes:
        title: Its name.
        licence: The name of its licence.
        hub_id: That licence in the Hub's metadata: "mit", ..., or "other".
        link: Where it can be read.
        is_commercial: Whether it permits commercial use. None: not known here.
        terms: What else it says, in a few words.
    """

    title: str
    licence: str
    hub_id: str
    link: str
    is_commercial: bool | None
    terms: str = ""

    @property
    def is_free(self) -> bool:
        """Whether it asks for no more than this project's own licence."""
        return self.hub_id == "mit"


_ROOMS = Source("procedural rooms", "MIT", "mit", "https://opensource.org/license/mit", True, "made by this code")
_VGGT = "https://huggingface.co/facebook/VGGT-1B"
_DINOV3 = "https://ai.meta.com/resources/models-and-libraries/dinov3-license"
_SCANNET = "http://kaldir.vc.in.tum.de/scannet/ScanNet_TOS.pdf"
_SCANNETPP = "https://kaldir.vc.in.tum.de/scannetpp/static/scannetpp-terms-of-use.pdf"
_QWEN = "https://huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct/blob/main/LICENSE"

# The first that is found in a name counts.
_KNOWN: tuple[tuple[str, Source], ...] = (
    (r"(procedural|generated) rooms|questions about rooms", _ROOMS),
    (
        r"vggt-1b-commercial",
        Source(
            *("VGGT-1B-Commercial", "VGGT Licence v1 with its acceptable use policy", "other"),
            *("https://huggingface.co/facebook/VGGT-1B-Commercial", True, "no military use; access is asked for"),
        ),
    ),
    (r"vggt-1b", Source("VGGT-1B", "CC BY-NC 4.0", "cc-by-nc-4.0", _VGGT, False)),
    (
        r"dinov3[-_]vit",
        Source(
            "DINOv3", "DINOv3 Licence", "other", _DINOV3, True, "no military use; passed on with what is made of it"
        ),
    ),
    (
        r"scannet(pp|\+\+)",
        Source("ScanNet++", "ScanNet++ Terms of Use", "other", _SCANNETPP, False, "non-commercial research"),
    ),
    (
        r"scannet",
        Source("ScanNet", "ScanNet Terms of Use", "other", _SCANNET, False, "non-commercial research and education"),
    ),
    (
        r"qwen2\.5-vl-3b",
        Source("Qwen2.5-VL-3B", "Qwen Research Licence", "other", _QWEN, False, "research and evaluation only"),
    ),
    (
        r"qwen2\.5-vl-7b|qwen3-vl",
        Source("", "Apache 2.0", "apache-2.0", "https://www.apache.org/licenses/LICENSE-2.0", True),
    ),
)
_HUB_IDS = {"mit": ("MIT", True), "apache-2.0": ("Apache 2.0", True), "cc-by-nc-4.0": ("CC BY-NC 4.0", False)}


def source_of(name: str) -> Source:
    """
    What is known of the licence of a model or a data set.

    Args:
        name: A Hub id; a folder, whose own card says its licence if it has one; or the name of a data set.
    """
    title = Path(name).name if name.startswith((".", "/", "~")) or Path(name).is_dir() else name
    for pattern, source in _KNOWN:
        if re.search(pattern, name.lower()):
            return source if source.title else Source(**{**asdict(source), "title": title})
    card = Path(name) / "README.md"
    hub_id = (metadata_load(card) or {}).get("license") if card.is_file() else None
    if hub_id in _HUB_IDS:
        licence, is_commercial = _HUB_IDS[hub_id]
        return Source(title, licence, hub_id, "its card", is_commercial)
    return Source(title, "not known here", hub_id or "unknown", "", None)


def describe_sources(names: Iterable[str | None]) -> list[dict[str, Any]]:
    """`source_of` each name that is not None, once each, as JSON holds it: a run's `sources`."""
    return [asdict(source) for source in dict.fromkeys(source_of(name) for name in names if name is not None)]


def licence_metadata(sources: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """
    `license`, and with "other" `license_name` and `license_link`, of what is made of these sources: the strictest of
    their licences decides. Empty, where one of them is not known.
    """
    found = [Source(**source) for source in sources]
    bound = sorted((source for source in found if not source.is_free), key=lambda source: bool(source.is_commercial))
    if any(source.is_commercial is None for source in found):
        return {}
    if not bound:
        return {"license": "mit"}
    if len({source.licence for source in bound}) == 1 and bound[0].hub_id != "other":
        return {"license": bound[0].hub_id}
    name = "several-commercial-use-permitted" if bound[0].is_commercial else "several-non-commercial"
    if len({source.licence for source in bound}) == 1:
        name = re.sub(r"\W+", "-", bound[0].licence.lower()).strip("-")
    return {"license": "other", "license_name": name, "license_link": bound[0].link}


def licence_section(sources: Sequence[Mapping[str, Any]], what: str = "these weights") -> str:
    """Markdown: what may be used commercially, said plainly, and the licence of each source."""
    found = [Source(**source) for source in sources]
    forbidding = [source.title for source in found if source.is_commercial is False]
    unknown = [source.title for source in found if source.is_commercial is None]
    if forbidding:
        verdict = f"**No commercial use** of {what}: {_listed(forbidding)} {_do(forbidding)} not permit it."
    elif unknown:
        verdict = (
            f"Whether {what} may be used commercially depends on {_listed(unknown)}, whose licence is not known here."
        )
    elif any(not source.is_free for source in found):
        verdict = f"**Commercial use** of {what} is permitted, under the conditions of the licences below."
    else:
        verdict = f"**Commercial use** of {what} is permitted: MIT. No pictures or weights of others went into them."
    lines = [
        f"- {source.title}: {source.licence}"
        + (f" ({source.link})" if source.link.startswith("http") else "")
        + (f"; {source.terms}" if source.terms else "")
        for source in found
    ]
    return f"{verdict} The code is MIT.\n\n" + "\n".join(lines) if lines else f"{verdict} The code is MIT."


def gated_licence(repo_id: str) -> str:
    """The licence that has to be accepted to get at a gated repo, as a message names it."""
    source = source_of(repo_id)
    return "its licence" if source.is_commercial is None else f"the {source.licence} ({source.link})"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _do(names: Sequence[str]) -> str:
    return "does" if len(names) == 1 else "do"
