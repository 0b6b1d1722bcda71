"""Python environments of other tools, which pin what would clash with ours.

    python -m tests.peers.environments [NAME ...]        # makes them, once; without names: all that read our data sets

An *overlay* is a virtual environment that sees ours behind its own packages: `webdataset==0.2.111` in front of the installed one,
while PyTorch is not downloaded again. They lie in `.venv-peers/` beside this repository, or where JETWAY_PEERS says.
"""

import argparse
import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What is installed, and over what."""

    requirements: tuple[str, ...]
    is_overlay: bool = True
    max_python: tuple[int, int] | None = None


ENVIRONMENTS = {
    "webdataset-0.2.111": Environment(requirements=("webdataset==0.2.111",)),
    "webdataset-0.2.86": Environment(requirements=("webdataset==0.2.86",)),
    "energon": Environment(requirements=("megatron-energon==7.4.1",)),
    "datasets": Environment(requirements=("datasets>=4.0",)),
    "img2dataset": Environment(requirements=("img2dataset==1.47.0",), is_overlay=False, max_python=(3, 12)),
}
READERS = tuple(name for name in ENVIRONMENTS if name != "img2dataset")


def location(name: str) -> Path:
    """Folder of an environment, whether it exists or not."""
    return Path(os.environ.get("JETWAY_PEERS") or REPOSITORY / ".venv-peers") / name


def interpreter(name: str) -> Path:
    """The Python of an environment that was made before.

    Raises:
        FileNotFoundError: it was not.
    """
    python = location(name) / "bin" / "python"
    if not (location(name) / "finished").is_file():
        raise FileNotFoundError(f"no environment {location(name)}: make it with `python -m tests.peers.environments {name}`")
    return python


def make(name: str, base: str = sys.executable) -> Path:
    """Makes an environment unless it is there; returns its Python. `base` is the interpreter of one that is no overlay.

    Raises:
        RuntimeError: this Python is too new for it, or pip failed.
    """
    environment, folder = ENVIRONMENTS[name], location(name)
    python, finished = folder / "bin" / "python", folder / "finished"
    wanted = "\n".join(environment.requirements) + "\n"
    if finished.is_file() and finished.read_text() == wanted:
        return python
    if environment.max_python and _version(base) > environment.max_python:
        newest = ".".join(map(str, environment.max_python))
        raise RuntimeError(f"{name} needs Python {newest} or older: give one with --python")
    _run([sys.executable if environment.is_overlay else base, "-m", "venv", "--clear", "--without-pip", str(folder)])
    if environment.is_overlay:
        own, ours = _site_packages(str(python)), sysconfig.get_path("purelib")
        (Path(own) / "behind.pth").write_text(ours + "\n")
    install = ["install", "--quiet", "--disable-pip-version-check", *environment.requirements]
    _run([sys.executable, "-m", "pip", "--python", str(python), *install])
    finished.write_text(wanted)
    return python


def main(argv: Sequence[str]) -> int:
    """Makes the named environments and prints where they are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ENVIRONMENTS)}")
    parser.add_argument("--python", default=sys.executable, help="interpreter of img2dataset, which needs 3.12 or older")
    arguments = parser.parse_args(argv)
    unknown = set(arguments.names) - set(ENVIRONMENTS)
    if unknown:
        parser.error(f"no such environment: {', '.join(sorted(unknown))}")
    for name in arguments.names or READERS:
        print(make(name, arguments.python))
    return 0


def _version(python: str) -> tuple[int, ...]:
    program = "import sys; print(*sys.version_info[:2])"
    return tuple(map(int, subprocess.run([python, "-c", program], capture_output=True, text=True, check=True).stdout.split()))


def _site_packages(python: str) -> str:
    program = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return subprocess.run([python, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
