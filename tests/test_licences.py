"""What is said about what may be used commercially, and about repos that cannot be read."""

import pytest
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from spa3r_hf.hub_errors import explain_hub_error
from spa3r_hf.licences import describe_sources, gated_licence, licence_metadata, licence_section, source_of


@pytest.mark.parametrize(
    "name, licence, is_commercial",
    [
        ("facebook/VGGT-1B", "CC BY-NC 4.0", False),
        ("outputs/vggt-1b", "CC BY-NC 4.0", False),
        ("facebook/VGGT-1B-Commercial", "VGGT Licence v1 with its acceptable use policy", True),
        ("facebook/dinov3-vitl16-pretrain-lvd1689m", "DINOv3 Licence", True),
        ("/data/ScanNet", "ScanNet Terms of Use", False),
        ("data/scannetpp", "ScanNet++ Terms of Use", False),
        ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen Research Licence", False),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "Apache 2.0", True),
        ("procedural rooms 0 to 191", "MIT", True),
        ("questions about rooms", "MIT", True),
        ("photographs/kitchen", "not known here", None),
    ],
)
def test_known_sources(name, licence, is_commercial):
    source = source_of(name)
    assert (source.licence, source.is_commercial) == (licence, is_commercial)
    assert source.title and (is_commercial is None) == (source.link == "")


def test_a_folder_says_its_own_licence(tmp_path):
    folder = tmp_path / "teacher"
    folder.mkdir()
    assert source_of(str(folder)).is_commercial is None
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A card\n")
    assert source_of(str(folder)).is_free and source_of(str(folder)).title == "teacher"
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    assert source_of(str(folder)).is_commercial is False
    (folder / "README.md").write_text("no front matter")
    assert source_of(str(folder)).is_commercial is None


@pytest.mark.parametrize(
    "names, metadata, verdict",
    [
        (["procedural rooms", None], {"license": "mit"}, "**Commercial use** of these weights is permitted: MIT."),
        (
            ["procedural rooms", "facebook/VGGT-1B"],
            {"license": "cc-by-nc-4.0"},
            "**No commercial use** of these weights: VGGT-1B does not permit it.",
        ),
        (
            ["procedural rooms", "facebook/dinov3-vits16"],
            {"license": "other", "license_name": "dinov3-licence"},
            "**Commercial use** of these weights is permitted, under the conditions of the licences below.",
        ),
        (
            ["scannet", "facebook/VGGT-1B-Commercial"],
            {"license": "other", "license_name": "several-non-commercial"},
            "**No commercial use** of these weights: ScanNet does not permit it.",
        ),
        (["my photographs", "procedural rooms"], {}, "may be used commercially depends on my photographs"),
        (["my photographs", "scannet"], {}, "**No commercial use** of these weights: ScanNet does not permit it."),
    ],
)
def test_the_strictest_decides(names, metadata, verdict):
    sources = describe_sources(names)
    found = licence_metadata(sources)
    assert {key: value for key, value in found.items() if key != "license_link"} == metadata
    assert ("license_link" in found) == (metadata.get("license") == "other")
    section = licence_section(sources)
    assert verdict in section and section.count("\n- ") == len(sources) and "The code is MIT" in section


def test_sources_are_named_once():
    names = ["facebook/dinov3-vitl16", "facebook/dinov3-vits16", None, "procedural rooms 0 to 3", "procedural rooms"]
    assert [source["title"] for source in describe_sources(names)] == ["DINOv3", "procedural rooms"]


class Response:
    """As much of one as the errors look at."""

    headers: dict = {}
    request = status_code = None


def error_of(kind: type[HfHubHTTPError], repo_id: str) -> HfHubHTTPError:
    error = kind("the Hub says no", response=Response())  # type: ignore[arg-type]
    error.repo_id, error.repo_type = repo_id, "model"  # type: ignore[attr-defined]
    return error


def test_hub_errors_are_explained_through_what_wraps_them():
    gated = error_of(GatedRepoError, "facebook/dinov3-vits16")
    try:
        try:
            raise OSError("trouble") from gated
        except OSError as error:
            raise ValueError("no configuration") from error
    except ValueError as error:
        message = explain_hub_error(error)
    assert message is not None and "facebook/dinov3-vits16 is gated" in message
    assert "accept the DINOv3 Licence (https://ai.meta.com" in message and "hf auth login" in message
    other = explain_hub_error(error_of(GatedRepoError, "someone/secret"))
    assert other is not None and "accept its licence at https://huggingface.co/someone/secret" in other
    assert "no such revision" in str(explain_hub_error(error_of(RevisionNotFoundError, "a/b")))
    assert "neither a folder here nor a repo" in str(explain_hub_error(error_of(RepositoryNotFoundError, "a/b")))
    assert explain_hub_error(ValueError("x = 3")) is None and explain_hub_error(FileNotFoundError("y")) is None


def test_gated_licences():
    assert "VGGT Licence v1" in gated_licence("facebook/VGGT-1B-Commercial")
    assert gated_licence("someone/else") == "its licence"
