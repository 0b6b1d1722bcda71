"""The picture in the READMEs is held true: who may import whom, no global state, the frozen set of verbs."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from launch import cli

REPOSITORY = Path(__file__).resolve().parent.parent
ROOMS = ("configs", "data_prep", "launch", "model", "pipeline")

MAY_IMPORT = {
    "configs": {"configs"},
    "data_prep": {"data_prep", "configs"},
    "model.kernels": {"model.kernels", "configs"},
    "model": {"model", "configs"},
    "pipeline": {"pipeline", "model", "configs", "data_prep.schema", "data_prep.storage", "data_prep.tombstones"},
    "launch": {"launch", "pipeline", "model", "configs", "data_prep"},
}
"""Room -> module prefixes of ours that it may import, at module level or inside a function."""

LIBRARY_ROOMS = {
    "torch": {"model", "pipeline", "launch"},
    "deepspeed": {"pipeline", "launch"},
    "megatron": {"model", "pipeline", "launch"},
    "ray": {"data_prep", "launch"},
}
"""Library -> the only rooms that know it. In launch it may stand inside functions alone: see the next test but one."""

VERBS = (
    *("prep", "retry", "verify", "stats", "peek", "card", "generations", "takedown", "tokenizer"),
    *("train", "eval", "sample", "caption", "export", "import"),
    *("doctor", "demo"),
)

AMBIENT_RNG = {"torch.manual_seed", "torch.cuda.manual_seed", "torch.cuda.manual_seed_all", "np.random.seed", "numpy.random.seed", "random.seed"}

TEXT_SUFFIXES = {".py", ".md", ".yaml", ".yml", ".toml", ".sh", ".txt", ".cfg", ""}
FORBIDDEN_TEXT = re.compile(r"(?<![\w.~])/(?:ho[m]e|ro[o]t|wo[r]k)/|https?://[\w.]*(?:py[p]i|pythonhoste[d]|registr[y])")
"""Paths of one machine and addresses of package hosts: a reader may have neither."""


def source_files() -> list[Path]:
    return sorted(path for room in ROOMS for path in (REPOSITORY / room).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in a file, at any depth; `from a import b` gives `a.b`."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)


def rule_for(module: str) -> set[str]:
    return MAY_IMPORT["model.kernels"] if module.startswith("model.kernels") else MAY_IMPORT[module.split(".")[0]]


def starts_with(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def relative(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def test_imports_run_one_way() -> None:
    wrong = [
        f"{relative(path)}:{line} imports {name}"
        for path in source_files()
        for line, name in imports(path)
        if name.split(".")[0] in (*ROOMS, "tests") and not any(starts_with(name, prefix) for prefix in rule_for(module_name(path)))
    ]
    assert not wrong, "\n".join(wrong)


def test_each_library_stays_in_its_rooms() -> None:
    wrong = [
        f"{relative(path)}:{line} imports {name}"
        for path in source_files()
        for line, name in imports(path)
        for library, rooms in LIBRARY_ROOMS.items()
        if starts_with(name, library) and module_name(path).split(".")[0] not in rooms
    ]
    assert not wrong, "\n".join(wrong)


def test_login_node_modules_import_without_torch() -> None:
    """One process imports all that a login node or a data node runs: torch must not arrive, not even through another module."""
    light = [
        path for path in source_files() if path.relative_to(REPOSITORY).parts[0] in ("configs", "data_prep", "launch") or path.name == "config.py"
    ]
    program = f"import sys, importlib\nfor name in {[module_name(path) for path in light]!r}:\n    importlib.import_module(name)\n"
    program += "    assert 'torch' not in sys.modules, name + ' imports torch'\n"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_global_statement() -> None:
    wrong = [f"{relative(path)}:{node.lineno}" for path in source_files() for node in ast.walk(parse(path)) if isinstance(node, ast.Global)]
    assert not wrong, "\n".join(wrong)


def test_no_star_import() -> None:
    wrong = [f"{relative(path)}:{line}" for path in source_files() for line, name in imports(path) if name.endswith(".*")]
    assert not wrong, "\n".join(wrong)


def test_no_ambient_random_state() -> None:
    wrong = [
        f"{relative(path)}:{node.lineno} {ast.unparse(node.func)}"
        for path in source_files()
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in AMBIENT_RNG
    ]
    assert not wrong, "\n".join(wrong)


def test_packages_have_empty_init_files() -> None:
    folders = sorted({path.parent for path in source_files()})
    missing = [relative(folder) for folder in folders if not (folder / "__init__.py").is_file()]
    assert not missing, f"no __init__.py, so not installed: {missing}"
    filled = [relative(folder / "__init__.py") for folder in folders if (folder / "__init__.py").read_text(encoding="utf-8").strip()]
    assert not filled, f"not empty: {filled}"


def test_no_module_hides_a_stdlib_one() -> None:
    """`python room/file.py` would put the room first on sys.path, and the stdlib module would vanish silently."""
    names = {relative(path): path.stem for path in source_files() if path.name != "__init__.py"}
    hiding = [path for path, stem in names.items() if stem in sys.stdlib_module_names]
    assert not hiding, hiding


def test_set_of_verbs_is_frozen() -> None:
    assert tuple(verb.name for verb in cli.VERBS) == VERBS


def test_each_verb_has_an_entry_function() -> None:
    """Read with ast, so that the check costs no import of torch."""
    for verb in cli.VERBS:
        path = REPOSITORY / (verb.module.replace(".", "/") + ".py")
        functions = {node.name: node for node in parse(path).body if isinstance(node, ast.FunctionDef)}
        assert "main" in functions, f"jetway {verb.name}: {relative(path)} has no main()"
        assert len(functions["main"].args.args) == 1, f"jetway {verb.name}: main takes the arguments after the verb"


def test_text_names_no_machine() -> None:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=False).stdout
    paths = [REPOSITORY / name for name in listing.split("\0") if name] or source_files()
    wrong = [
        f"{relative(path)}:{number}: {line.strip()[:80]}"
        for path in paths
        if path.suffix in TEXT_SUFFIXES and path.is_file()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1)
        if FORBIDDEN_TEXT.search(line)
    ]
    assert not wrong, "\n".join(wrong)
