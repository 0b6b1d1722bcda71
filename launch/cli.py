"""The `jetway` command: one table of verbs, each imported only when it is called.

A user's mistake (`UserError`) is one message on stderr and exit code 2; `--traceback` or JETWAY_TRACEBACK=1 shows the stack as well.
"""

import difflib
import errno
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

from configs.errors import UserError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


@dataclass(frozen=True, slots=True)
class Verb:
    """One word after `jetway`."""

    name: str
    module: str
    """Module whose `main(argv) -> int` receives the arguments after the verb."""
    group: str
    help: str


VERBS = (
    Verb("prep", "data_prep.run", "Data", "turn URLs or images, and captions, into a data set: shards, index, manifest, tokenizer"),
    Verb("retry", "data_prep.retry", "Data", "a second chance for samples that failed, as a new generation of the data set"),
    Verb("verify", "data_prep.verify", "Data", "check every checksum of a data set"),
    Verb("stats", "data_prep.stats", "Data", "histograms of sizes and caption lengths, and why samples were dropped"),
    Verb("peek", "data_prep.peek", "Data", "look at some samples: a contact sheet as PNG"),
    Verb("card", "data_prep.card.command", "Data", "one HTML page that shows a data set: samples, distributions, losses, history"),
    Verb("generations", "data_prep.generations", "Data", "the history of a data set: list, compare, go back, compact"),
    Verb("takedown", "data_prep.takedown", "Data", "take samples out of a data set by address, domain, content, look or key"),
    Verb("tokenizer", "data_prep.tokenizer", "Data", "train a SentencePiece tokenizer on a text file, or look into a data set's"),
    Verb("train", "launch.local", "Model", "train, or continue training, the run that a configuration describes"),
    Verb("eval", "pipeline.evaluate", "Model", "bits per subpixel and text perplexity on held-out samples"),
    Verb("sample", "pipeline.sample", "Model", "draw images from prompts"),
    Verb("caption", "pipeline.caption", "Model", "write captions for image files"),
    Verb("export", "pipeline.export", "Model", "write a checkpoint's weights as safetensors or in the official big_vision layout"),
    Verb("import", "pipeline.import_", "Model", "read official big_vision weights into a checkpoint"),
    Verb("doctor", "launch.doctor", "Machine", "what is installed, what each optional part would add, and what is wrong"),
    Verb("demo", "launch.demo", "Machine", "the whole way on this machine: digits in, generated digits and captions out"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code: 0 done, 1 the verb's own "no", 2 a user's mistake, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in arguments or os.environ.get("JETWAY_TRACEBACK", "0") not in ("", "0")
    arguments = [argument for argument in arguments if argument != "--traceback"]
    try:
        logging.basicConfig(level=_log_level(), format="%(message)s", stream=sys.stderr)
        code = _dispatch(arguments)
        sys.stdout.flush()  # a reader that has left shows here rather than at exit
    except KeyboardInterrupt:
        print("\njetway: interrupted; the same command again goes on where it can", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # `jetway stats DATA | head` is no error. Python flushes stdout once more at exit: give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, ModuleNotFoundError, OSError) as error:
        message = _explain(error)
        if message is None:
            raise
        if show_traceback:
            traceback.print_exc()
        print(f"jetway: {message}", file=sys.stderr)
        return EXIT_USER_ERROR
    return code


def _log_level() -> str:
    level = os.environ.get("JETWAY_LOG_LEVEL", "INFO").upper()
    if level not in LOG_LEVELS:
        raise UserError("unknown log level", got=f"JETWAY_LOG_LEVEL={level}", expected=", ".join(LOG_LEVELS))
    return level


def _explain(error: UserError | ModuleNotFoundError | OSError) -> str | None:
    """The message for an error that the user can mend; None for one of ours, whose stack we want to see."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        if (error.name or "").split(".")[0] in ("configs", "data_prep", "launch", "model", "pipeline"):
            return None
        return f"the package {error.name!r} is not installed\n  to fix: `jetway doctor` lists what is missing and how to install it"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"no space left\n  got: {error}\n  to fix: free some space, or choose another folder, and run the same command again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR) and error.filename is not None:
        return f"{error.filename} cannot be used\n  got: {error.strerror}\n  expected: a path that you may read and write\n  to fix: choose another"
    return None


def _dispatch(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        print(f"jetway {metadata.version('jetway')}")
        return 0
    name, *rest = arguments
    verb = next((verb for verb in VERBS if verb.name == name), None)
    if verb is None:
        names = [verb.name for verb in VERBS]
        close = difflib.get_close_matches(name, names, n=1)
        raise UserError(
            "unknown verb", got=name, expected=", ".join(names), fix=f"did you mean `jetway {close[0]}`?" if close else "see `jetway --help`"
        )
    return int(importlib.import_module(verb.module).main(rest))


def usage() -> str:
    """The text of `jetway --help`."""
    lines = ["usage: jetway VERB [arguments]", "", "Pretrain JetFormer: one autoregressive model over text and raw pixels."]
    for group in dict.fromkeys(verb.group for verb in VERBS):
        lines += ["", f"{group}:", *(f"  {verb.name:<11} {verb.help}" for verb in VERBS if verb.group == group)]
    lines += [
        "",
        "`jetway VERB --help` explains one verb; `--dry-run` shows what it would do and writes nothing.",
        "`--traceback` shows the stack of an error.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
