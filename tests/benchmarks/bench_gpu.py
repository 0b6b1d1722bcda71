"""Everything about speed on one GPU, in under eight minutes: kernels, a training step of 350m and 1p3b, sampling (`make bench-gpu`).

    python -m tests.benchmarks.bench_gpu [--sections gmm,step-1p3b] [--budget 0.5] [--seconds 460] [--small]

Needs torch, Triton and a CUDA device; DeepSpeed is used for the training step where it is installed. Writes a dated report beside this
file and rewrites it after every section. Leaves with 1 if a section failed, with 2 where there is no CUDA device.
"""

import sys

from tests.benchmarks.bench_runner import SECTIONS, main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], default=tuple(SECTIONS), name="gpu", doc=__doc__))
