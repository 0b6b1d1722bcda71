"""One forward and backward pass of the image head in a process of its own, for its resident memory.

    python -m tests.benchmarks.bench_memory torch 4096

Prints JSON: bytes above inputs, outputs and gradients, and seconds of the fastest of three further passes. Prints nothing and fails if
the result is not the reference's.
"""

import json
import sys
from collections.abc import Sequence

import torch

from tests.benchmarks.bench_device import Device
from tests.benchmarks.bench_heads import gmm_problem


def gmm_sizes(*, small: bool) -> dict[str, int]:
    """The image head of 1p3b, or a small one whose outputs are as far above its width's."""
    if small:
        return {"width": 64, "mixtures": 128, "soft_dim": 32, "workspace_bytes": 2**22}
    return {"width": 1536, "mixtures": 1024, "soft_dim": 128, "workspace_bytes": 2**30}


def main(argv: Sequence[str]) -> int:
    """Runs one implementation at one number of tokens."""
    impl, tokens = argv[0], int(argv[1])
    torch.set_num_threads(1)
    device = Device()
    warm = gmm_problem(device, tokens=64, **gmm_sizes(small=True))
    warm.step(impl)()  # libraries' own memory is not the head's
    problem = gmm_problem(device, tokens=tokens, **gmm_sizes(small=True))
    extra = device.peak_bytes(lambda: problem.run(impl)) - problem.owned_bytes
    seconds = min(device.seconds(problem.step(impl)) for _ in range(3))
    if impl != "reference":
        problem.check(impl)  # after the measurement of memory, to which it would add
    print(json.dumps({"extra_bytes": max(extra, 0), "seconds": seconds}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
