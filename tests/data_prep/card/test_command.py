"""The card: offline, well-formed, escaped, complete, and honest about what is not known."""

import base64
import io
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from configs.errors import UserError
from data_prep import metadata
from data_prep.card.command import main
from data_prep.card.gather import gather
from data_prep.card.style import POLICY
from data_prep.schema import manifest_path, tar_path, write_lineage
from data_prep.tombstones import Hits, TombstoneFile, tombstones_path

VOID = {"meta", "link", "img", "rect", "line", "path", "br", "circle"}


class Page(HTMLParser):
    """Parses a page strictly: every element is closed in order; collects text, images and addresses."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.errors: list[str] = []
        self.images: list[dict[str, str]] = []
        self.addresses: list[str] = []
        self.texts: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()
        self.errors += [f"{tag} stays open" for tag in self.open]

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = {name: value or "" for name, value in attributes}
        self.addresses += [value for name, value in values.items() if name in ("src", "href", "srcset", "action", "data")]
        self.errors += [f"{tag} has a handler" for name in values if name.startswith("on")]
        if tag == "img":
            self.images.append(values)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.errors.append(f"</{tag}> closes something else")

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def written(made: object, tmp_path: Path, *options: str) -> Page:
    path = tmp_path / "card.html"
    assert main([made.url, "--output", str(path), *options]) == 0  # type: ignore[attr-defined]
    return Page(path.read_text(encoding="utf-8"))


def test_page_is_well_formed_and_asks_nothing_of_the_network(make_set: Callable, tmp_path: Path) -> None:
    page = written(make_set(), tmp_path)
    assert page.errors == []
    assert page.addresses
    assert all(address.startswith("data:") for address in page.addresses)
    assert "script" not in page.tags
    text = (tmp_path / "card.html").read_text(encoding="utf-8")
    assert f'content="{POLICY}"' in text
    assert "default-src 'none'" in POLICY
    assert not re.search(r"url\(|@import|https?://(?!img\d\.example\.org|dead\.example\.com)", text.split("</style>")[0])


def test_captions_are_text_however_they_look(make_set: Callable, tmp_path: Path) -> None:
    made = make_set()
    page = written(made, tmp_path)
    nasty = made.captions[0].replace("\u0007", "\ufffd")
    assert nasty in [image["alt"] for image in page.images]
    assert nasty in page.text
    assert "<script" not in (tmp_path / "card.html").read_text(encoding="utf-8")


def test_contact_sheet_holds_small_jpegs_of_the_training_split(make_set: Callable, tmp_path: Path) -> None:
    page = written(make_set(), tmp_path, "--samples", "5")
    assert 4 <= len(page.images) <= 5
    for image in page.images:
        data = base64.b64decode(image["src"].removeprefix("data:image/jpeg;base64,"))
        with Image.open(io.BytesIO(data)) as opened:
            opened.load()
            assert min(opened.size) <= 192
    assert written(make_set(), tmp_path, "--samples", "0").images == []


def test_all_the_facts_are_there(make_set: Callable, tmp_path: Path) -> None:
    text = written(make_set(), tmp_path).text
    for fact in (
        *("birds", "12 training samples", "4 held-out samples", "2 shards", "256 × 256 pixels, RGB jpg", "44 % of 36 samples read are kept"),
        *(
            "300 pieces of the tokenizer",
            "list.parquet",
            "every reason (6)",
            "host name did not resolve",
            "SERVFAIL (100 %)",
            "dead.example.com (100 %)",
        ),
        *("jpeg", "png", "640", "Licences", "CC-BY 4.0", "Language", "similarity", "0.3 to 0.315", "img0.example.org", "fertility"),
        *("eval/coco", "robots.txt respected", "Taken down since nothing", "all samples", "settings, 2 of them not the default", "prep", "Labels"),
    ):
        assert fact in text, fact


def test_the_flow_accounts_for_every_sample(make_set: Callable, tmp_path: Path) -> None:
    text = written(make_set(), tmp_path).text
    stages = dict(re.findall(r"(block lists|network|filters|duplicates|image|input and text) −(\d+)", text))
    assert stages == {"block lists": "2", "network": "13", "filters": "3", "duplicates": "2"}
    assert "36 samples read" in text
    assert "16 kept, 44 %" in text
    written(make_set(failures={}, name="lossless"), tmp_path)
    assert "nothing lost" in (tmp_path / "card.html").read_text(encoding="utf-8")


def test_without_sidecars_the_json_members_tell(make_set: Callable, tmp_path: Path) -> None:
    page = written(make_set(sidecars=False, stats=False), tmp_path)
    assert page.errors == []
    assert "Shorter side" in page.text
    assert "Aspect ratio" in page.text
    assert "JPEG quality" not in page.text, "unknown there, so not shown"
    assert "Effort" not in page.text


def test_samples_taken_down_are_neither_shown_nor_counted(make_set: Callable, tmp_path: Path) -> None:
    made = make_set()
    before = written(made, tmp_path)
    shard = made.manifest.splits["train"].shards[0].name
    hits = Hits(rows=(0, 3), keys=("0000000000", "0000000003"))
    file = TombstoneFile(number=1, reason="asked", rules_sha256="", generations=(1,), shards={shard: hits})
    made.storage.put_bytes(tombstones_path(1), file.to_bytes())
    after = written(made, tmp_path)
    assert len(after.images) == len(before.images) - 2
    assert made.captions[0].replace("\u0007", "\ufffd") not in after.text
    assert "in 1 takedown; no training run uses these samples any more 2" in after.text
    assert "all samples" in after.text


def test_an_older_generation_is_described_as_it_was(make_set: Callable, tmp_path: Path) -> None:
    made = make_set(generations=2)
    newest, oldest = written(made, tmp_path), written(made, tmp_path, "--generation", "1")
    assert "24 training samples" in newest.text
    assert "12 training samples" in oldest.text
    assert "generation 1 (prep" in oldest.text
    for page in (newest, oldest):
        assert "2 grow on 1" in page.text, "the history is whole in both"


def test_what_a_deleted_generation_read_still_counts(make_set: Callable, tmp_path: Path) -> None:
    made = make_set(generations=2)
    before = gather(made.storage, None, num_samples=0).stats
    write_lineage(made.storage, {1: None})  # as `jetway generations DATASET compact --delete-old` leaves it
    made.storage.delete(manifest_path(1))
    assert gather(made.storage, None, num_samples=0).stats == before
    assert "generation 2 (grow" in written(made, tmp_path).text


def test_the_same_data_set_gives_the_same_page(make_set: Callable, tmp_path: Path) -> None:
    made = make_set()
    written(made, tmp_path)
    first = (tmp_path / "card.html").read_bytes()
    written(made, tmp_path)
    assert (tmp_path / "card.html").read_bytes() == first


def test_dry_run_writes_nothing(make_set: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([make_set().url, "--output", str(tmp_path / "card.html"), "--dry-run"]) == 0
    assert not (tmp_path / "card.html").exists()
    assert "would describe generation 1" in capsys.readouterr().out


def test_mistakes_are_named(make_set: Callable, tmp_path: Path) -> None:
    made = make_set()
    with pytest.raises(UserError, match="no generation 7"):
        main([made.url, "--generation", "7"])
    with pytest.raises(UserError, match=r"--samples must be in 0\.\.2000"):
        main([made.url, "--samples", "-1"])
    with pytest.raises(UserError, match="holds no data set"):
        main([str(tmp_path / "nothing")])


def test_damage_is_named_rather_than_shown(make_set: Callable, tmp_path: Path) -> None:
    made = make_set()
    shard = made.manifest.splits["train"].shards[0]
    sidecar = Path(made.url, metadata.metadata_path(shard.name))
    whole = sidecar.read_bytes()
    sidecar.write_bytes(whole[:-9] + b"x" + whole[-8:])
    with pytest.raises(UserError, match="is damaged"):
        main([made.url, "--output", str(tmp_path / "card.html")])
    sidecar.write_bytes(whole)
    tar = Path(made.url, tar_path(shard.name))
    content = bytearray(tar.read_bytes())
    content[512:2000] = bytes(1488)
    tar.write_bytes(content)
    with pytest.raises(UserError, match="does not decode"):
        main([made.url, "--output", str(tmp_path / "card.html")])
    assert not (tmp_path / "card.html").exists()


def test_the_command_line_of_the_card_costs_no_numpy() -> None:
    program = "import sys, data_prep.card.command; assert 'PIL' not in sys.modules, 'PIL'"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
