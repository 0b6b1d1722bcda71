"""Child process of `checks.compile_for_gpu`: reads kernels as JSON on stdin, compiles them for a GPU, prints what the assembler says."""

import importlib
import inspect
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


def build_source(function: Any, signature: dict[str, str], constants: dict[str, Any], aligned: list[str]) -> ASTSource:
    """What is compiled, in the words of the installed Triton: they changed with 3.3."""
    places = [list(signature).index(argument) for argument in aligned]
    if "constexprs" in inspect.signature(ASTSource).parameters:
        attrs = {(place,): [["tt.divisibility", 16]] for place in places}
        return ASTSource(function, signature=signature, constexprs=constants, attrs=attrs)
    attrs = importlib.import_module("triton.backends.compiler").AttrsDescriptor.from_hints(dict.fromkeys(places, 16))
    return ASTSource(function, signature=signature, constants=constants, attrs=attrs)


def compile_one(request: dict[str, Any], capability: int) -> dict[str, int]:
    """Machine code of one kernel, and its resources."""
    module, _, name = request["kernel"].partition(":")
    function = getattr(importlib.import_module(module), name)
    source = build_source(function, request["signature"], request["constants"], request["aligned"])
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
