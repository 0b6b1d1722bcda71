"""Child process of `checks.compile_for_gpu`: reads kernels as JSON on stdin, compiles them for a GPU, prints what the assembler says."""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compile_one(request: dict[str, Any], capability: int) -> dict[str, int]:
    """Machine code of one kernel, and its resources."""
    module, _, name = request["kernel"].partition(":")
    function = getattr(importlib.import_module(module), name)
    names = list(request["signature"])
    attrs = {(names.index(argument),): [["tt.divisibility", 16]] for argument in request["aligned"]}
    source = ASTSource(function, signature=request["signature"], constexprs=request["constants"], attrs=attrs)
    options = {"num_warps": request["num_warps"], "num_stages": request["num_stages"]}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([str(CUOBJDUMP), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    figures = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {"registers": figures["REG"], "spilled_bytes": max(figures["STACK"], figures["LOCAL"]), "shared_bytes": compiled.metadata.shared}


def main() -> None:
    """Compiles all kernels of the request."""
    request = json.loads(sys.stdin.read())
    print(json.dumps([compile_one(one, request["capability"]) for one in request["kernels"]]))


if __name__ == "__main__":
    main()
