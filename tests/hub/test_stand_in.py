"""The stand-in is a Hub to the real clients: data sets, Spaces, revisions, privacy and refusals."""

from pathlib import Path

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

ARTICLES = Path("tests/fixtures/articles")


@pytest.mark.slow
def test_data_set_loads_by_its_id(fresh_python, hub_api):
    hub_api.create_repo("user/articles", repo_type="dataset")
    hub_api.upload_folder(repo_id="user/articles", repo_type="dataset", folder_path=ARTICLES)
    loaded = fresh_python(
        """
        import datasets

        datasets.config.USE_PARQUET_EXPORT = False  # it would ask another host
        articles = datasets.load_dataset("user/articles")
        streamed = datasets.load_dataset("user/articles", split="test", streaming=True)
        articles.push_to_hub("user/parquet")
        again = datasets.load_dataset("user/parquet", split="train")
        result = {
            "splits": {split: list(articles[split]["text"]) for split in articles},
            "streamed": [row["text"] for row in streamed],
            "again": list(again["text"]),
        }
        """
    )
    lines = {path.stem: path.read_text().splitlines() for path in ARTICLES.glob("*.txt")}
    assert loaded["splits"] == lines
    assert loaded["streamed"] == lines["test"]
    assert loaded["again"] == lines["train"]


def test_space_is_kept_as_it_was_pushed(hub_api, tmp_path):
    card = "---\ntitle: Engram\nsdk: gradio\nsdk_version: 6.31.0\napp_file: app.py\ncolorFrom: indigo\n---\n"
    (tmp_path / "README.md").write_text(card)
    (tmp_path / "app.py").write_text("print('hello')\n")
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "style.css").write_text("body { color: black }\n")
    hub_api.create_repo("user/space", repo_type="space", space_sdk="gradio")
    hub_api.upload_folder(repo_id="user/space", repo_type="space", folder_path=tmp_path)
    assert hub_api.space_info("user/space").sdk == "gradio"
    copy = Path(hub_api.snapshot_download("user/space", repo_type="space", local_dir=tmp_path / "copy"))
    for name in ("README.md", "app.py", "page/style.css"):
        assert (copy / name).read_text() == (tmp_path / name).read_text()


@pytest.mark.parametrize(
    ("line", "message"),
    [("colorFrom: beige", '"colorFrom" must be one of'), ("sdk: flask", '"sdk" must be one of'), ("sdk: [", "YAML")],
)
def test_space_with_a_bad_card_is_refused(hub_api, hub, line, message):
    name = "user/bad-space"
    hub_api.create_repo(name, repo_type="space", space_sdk="gradio", exist_ok=True)
    with pytest.raises(ValueError, match=message):
        hub_api.upload_file(
            path_or_fileobj=f"---\nsdk: gradio\n{line}\n---\n".encode(),
            path_in_repo="README.md",
            repo_id=name,
            repo_type="space",
        )
    assert hub.commits(name, "spaces") == []


def test_branches_tags_and_history(hub_api, hub):
    hub_api.create_repo("user/versions-of-a-file")
    oids = [
        hub_api.upload_file(
            path_or_fileobj=text, path_in_repo="file.txt", repo_id="user/versions-of-a-file", commit_message=title
        ).oid
        for text, title in ((b"one", "First"), (b"two", "Second"))
    ]
    hub_api.create_tag("user/versions-of-a-file", tag="v1", revision=oids[0])
    hub_api.create_branch("user/versions-of-a-file", branch="other", revision="v1")
    refs = hub_api.list_repo_refs("user/versions-of-a-file")
    assert {branch.name: branch.target_commit for branch in refs.branches} == {"main": oids[1], "other": oids[0]}
    assert [tag.name for tag in refs.tags] == ["v1"]
    titles = [commit.title for commit in hub_api.list_repo_commits("user/versions-of-a-file")]
    assert titles == ["Second", "First", "initial commit"]
    for revision, text in (("v1", b"one"), ("main", b"two"), (oids[0], b"one")):
        assert hub.files("user/versions-of-a-file", revision=revision) == {"file.txt": text}
    with pytest.raises(HfHubHTTPError, match="412"):
        hub_api.upload_file(
            path_or_fileobj=b"three",
            path_in_repo="file.txt",
            repo_id="user/versions-of-a-file",
            parent_commit=oids[0],
        )


def test_what_is_private_or_not_there_cannot_be_read(hub_api, hub, tmp_path):
    hub_api.create_repo("user/private", private=True)
    nobody = HfApi(endpoint=hub.url, token=False)
    with pytest.raises(RepositoryNotFoundError):
        nobody.model_info("user/private")
    assert hub_api.model_info("user/private").private
    with pytest.raises(RepositoryNotFoundError):
        hub_api.model_info("user/nothing")
    with pytest.raises(RevisionNotFoundError):
        hub_api.model_info("user/private", revision="nothing")
    with pytest.raises(EntryNotFoundError):
        hub_api.hf_hub_download("user/private", "nothing.txt", cache_dir=tmp_path)
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(endpoint=hub.url, token="hf_wrong").create_repo("user/mine")
    hub_api.delete_repo("user/private")
    assert not hub_api.repo_exists("user/private")
