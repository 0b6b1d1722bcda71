"""What the READMEs say can be typed: links, commands, make targets and configuration names exist."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.loader import CONFIG_DIR, resolve_path
from launch import cli

REPOSITORY = Path(__file__).resolve().parent.parent
VERBS = [verb.name for verb in cli.VERBS]

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)
COMMAND = re.compile(r"\bjetway ([a-z][a-z_-]*)")
MODULE = re.compile(r"\bpython -m ((?:configs|data_prep|launch|model|pipeline)[\w.]*)")
TARGET = re.compile(r"\bmake ([a-z]+)")
CONFIG = re.compile(r"\bjetway (?:train|prep) ((?:train|data)/\w+)")


def tracked(pattern: str) -> list[Path]:
    """Files under git that match, or all that match where there is no git."""
    listing = subprocess.run(["git", "ls-files", "-z", pattern], cwd=REPOSITORY, capture_output=True, text=True, check=False).stdout
    names = [REPOSITORY / name for name in listing.split("\0") if name]
    return sorted(path for path in names or REPOSITORY.rglob(pattern) if path.is_file())


PAGES = tracked("*.md")


def name_of(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def in_code(path: Path, pattern: re.Pattern[str]) -> Iterator[str]:
    """What the pattern captures inside code blocks and code spans."""
    for span in CODE.findall(path.read_text(encoding="utf-8")):
        yield from pattern.findall(span)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    targets = [target.partition("#")[0] for target in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in target]
    missing = [target for target in targets if target and not (page.parent / target).exists()]
    assert not missing, missing


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist(page: Path) -> None:
    unknown = {verb for verb in in_code(page, COMMAND) if verb not in VERBS}
    assert not unknown, f"no such verb: {unknown}"
    modules = {module.rstrip(".") for module in in_code(page, MODULE)}
    missing = {module for module in modules if not (REPOSITORY / (module.replace(".", "/") + ".py")).is_file()}
    assert not missing, f"no such module: {missing}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    unknown = set(in_code(page, TARGET)) - targets
    assert not unknown, f"no such target: {unknown}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_configurations_exist(page: Path) -> None:
    for name in in_code(page, CONFIG):
        assert resolve_path(name).is_file()


@pytest.mark.parametrize("path", sorted(CONFIG_DIR.rglob("*.yaml")), ids=name_of)
def test_yaml_header_names_a_command_for_this_file(path: Path) -> None:
    header = "\n".join(line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    assert set(COMMAND.findall(header)) <= set(VERBS)
    assert str(path.relative_to(CONFIG_DIR).with_suffix("")) in header


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_and_can_be_tried_dry(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main([verb, "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: jetway {verb}")
    assert "--dry-run" in text


def test_readme_shows_every_verb() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    missing = [verb for verb in VERBS if f"jetway {verb}" not in text]
    assert not missing, missing


def test_continuous_integration_runs_what_the_readme_says() -> None:
    assert "make test" in (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")
    assert "make test" in (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_rooms_have_a_readme() -> None:
    missing = [room for room in ("configs", "data_prep", "launch", "model", "pipeline", "tests") if not (REPOSITORY / room / "README.md").is_file()]
    assert not missing, missing
