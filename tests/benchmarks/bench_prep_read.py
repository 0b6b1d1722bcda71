"""Reads shards with whichever webdataset this Python has, and prints samples, members, bytes and CPU seconds as JSON.

    python bench_prep_read.py SHARD ...

Nothing is decoded. The first pass fills the page cache and is not counted; the second is. Imports nothing of ours: it also runs in the
environments of other versions.
"""

import json
import os
import sys
import time

import webdataset


def read(shards: list[str]) -> tuple[int, int, int]:
    """Samples, members and bytes of content."""
    samples = members = size = 0
    for sample in webdataset.WebDataset(shards, shardshuffle=False):
        samples += 1
        for name, content in sample.items():
            if not name.startswith("__"):
                members += 1
                size += len(content)
    return samples, members, size


def main() -> None:
    """Prints one line of JSON."""
    shards = sys.argv[1:]
    read(shards)
    start = time.process_time()
    samples, members, size = read(shards)
    used = time.process_time() - start
    sizes = sum(os.path.getsize(shard) for shard in shards)
    version = getattr(webdataset, "__version__", "?")
    print(json.dumps({"version": version, "samples": samples, "members": members, "content": size, "tars": sizes, "cpu_s": used}))


if __name__ == "__main__":
    main()
