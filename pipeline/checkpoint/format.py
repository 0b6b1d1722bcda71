"""What a checkpoint consists of: fragments of named tensors, files, and the manifest that ties them together. See README.md."""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoint.geometry import Region

FORMAT = "jetway-checkpoint/1"
MANIFEST = "manifest.json"
CHECKSUMS = "SHA256SUMS"
"""Same digests as the manifest's, plus the manifest's own, in the format of `sha256sum --check`."""

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names of the types that may be stored."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(slots=True, kw_only=True)
class Fragment:
    """A piece of a named tensor that one rank holds and wants stored.

    The piece is `tensor.numel()` elements from `flat_start` of the flattened local slice, and that slice is
    [shard_start, shard_start + shard_size) along `shard_dim` of the tensor of `global_shape`.
    """

    name: str
    """Kind and global name: `param/...` (fp32 master), `exp_avg/...`, `exp_avg_sq/...`, `ema/...`, `buffer/...`."""
    global_shape: tuple[int, ...]
    tensor: Tensor
    """1-D, on any device."""
    shard_dim: int | None = None
    """Dimension split over tensor-parallel ranks; None: this rank's slice is the whole tensor."""
    shard_start: int = 0
    shard_size: int | None = None
    """None: the whole dimension."""
    flat_start: int = 0

    @classmethod
    def whole(cls, name: str, tensor: Tensor) -> "Fragment":
        """A tensor that this rank holds in full."""
        return cls(name=name, global_shape=tuple(tensor.shape), tensor=tensor.detach().reshape(-1))

    @property
    def region(self) -> Region:
        """Where the piece lies. Raises ValueError if it leaves the global tensor."""
        if self.tensor.dim() != 1:
            raise ValueError(f"fragment of {self.name} must be 1-D, not {tuple(self.tensor.shape)}")
        return make_region(
            self.global_shape,
            shard_dim=self.shard_dim,
            shard_start=self.shard_start,
            shard_size=self.shard_size,
            flat_start=self.flat_start,
            flat_len=self.tensor.numel(),
        )


def make_region(
    global_shape: tuple[int, ...],
    *,
    shard_dim: int | None = None,
    shard_start: int = 0,
    shard_size: int | None = None,
    flat_start: int = 0,
    flat_len: int | None = None,
) -> Region:
    """A region with its defaults filled in; a slice of the whole dimension is stored as `shard_dim=None`, so that equal regions compare equal.

    Raises:
        ValueError: the region leaves the tensor.
    """
    shape = tuple(global_shape)
    if shard_dim is not None:
        shard_dim = shard_dim + len(shape) if shard_dim < 0 else shard_dim
        if not 0 <= shard_dim < len(shape):
            raise ValueError(f"shard_dim={shard_dim} is no dimension of shape {shape}")
        size = shape[shard_dim] - shard_start if shard_size is None else shard_size
        if shard_start == 0 and size == shape[shard_dim]:
            shard_dim = None
    if shard_dim is None:
        shard_start = size = 0
        local_numel = prod(shape)
    else:
        local_numel = prod(shape) // max(1, shape[shard_dim]) * size
    length = local_numel - flat_start if flat_len is None else flat_len
    return Region(global_shape=shape, shard_dim=shard_dim, shard_start=shard_start, shard_size=size, flat_start=flat_start, flat_len=length)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFragment:
    """One fragment in the manifest: which file and key hold it, and its place in the tensor."""

    name: str
    dtype: str
    """A key of DTYPES."""
    file: str
    key: str
    region: Region


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """One data file in the manifest."""

    name: str
    num_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if "/" in self.name or self.name.startswith("."):
            raise ValueError(f"file name {self.name!r} leads out of the checkpoint")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor in the manifest, with all its fragments."""

    global_shape: tuple[int, ...]
    dtype: str
    fragments: tuple[StoredFragment, ...]

    def is_complete(self) -> bool:
        """Whether the fragments cover every element: whole slices, and slices that together span their dimension."""
        if prod(self.global_shape) == 0:
            return True
        ranges: defaultdict[tuple[int | None, int, int], list[tuple[int, int]]] = defaultdict(list)
        numel: dict[tuple[int | None, int, int], int] = {}
        for fragment in self.fragments:
            region = fragment.region
            key = (region.shard_dim, region.shard_start, region.shard_size)
            ranges[key].append((region.flat_start, region.flat_start + region.flat_len))
            numel[key] = prod(region.local_shape)
        whole = [key for key, spans in ranges.items() if _spans_cover(spans, numel[key])]
        if any(dim is None for dim, _, _ in whole):
            return True
        dims = {dim for dim, _, _ in whole if dim is not None}
        return any(_spans_cover([(s, s + n) for d, s, n in whole if d == dim], self.global_shape[dim]) for dim in dims)


def _spans_cover(spans: Iterable[tuple[int, int]], total: int) -> bool:
    reached = 0
    for low, high in sorted(spans):
        if low > reached:
            return False
        reached = max(reached, high)
    return reached >= total


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything a checkpoint says about itself."""

    step: int
    files: tuple[StoredFile, ...]
    tensors: Mapping[str, StoredTensor]
    state: Mapping[str, Any]

    @classmethod
    def build(cls, step: int, files: Iterable[StoredFile], fragments: Iterable[StoredFragment], state: Mapping[str, Any]) -> "Manifest":
        """Groups fragments by tensor.

        Raises:
            ValueError: two writers disagree about a tensor's shape or type, or the fragments of a tensor leave a gap.
        """
        groups: defaultdict[str, list[StoredFragment]] = defaultdict(list)
        for fragment in fragments:
            groups[fragment.name].append(fragment)
        tensors = {}
        for name, group in sorted(groups.items()):
            kinds = {(fragment.region.global_shape, fragment.dtype) for fragment in group}
            if len(kinds) > 1:
                raise ValueError(f"ranks disagree about shape or type of {name}: {sorted(kinds)}")
            ordered = sorted(group, key=lambda f: (f.region.shard_start, f.region.flat_start, f.file))
            tensors[name] = StoredTensor(*kinds.pop(), tuple(ordered))
            if not tensors[name].is_complete():
                raise ValueError(f"the fragments of {name} do not cover its shape {tensors[name].global_shape}")
        return cls(step, tuple(sorted(files, key=lambda f: f.name)), tensors, dict(state))

    def to_json(self) -> str:
        """One JSON object; a fragment is [file, key, shard dim, shard start, shard size, flat start, flat length]."""
        tensors = {
            name: {
                "shape": list(tensor.global_shape),
                "dtype": tensor.dtype,
                "fragments": [list(_fragment_row(fragment)) for fragment in tensor.fragments],
            }
            for name, tensor in self.tensors.items()
        }
        head = {"format": FORMAT, "step": self.step, "state": dict(self.state)}
        files = _lines([json.dumps(asdict(file)) for file in self.files])
        rows = _lines([f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in tensors.items()])
        return f'{json.dumps(head, indent=1)[:-2]},\n "files": [{files}],\n "tensors": {{{rows}}}\n}}\n'

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Reads `to_json`'s output.

        Raises:
            ValueError: another format, or damaged.
        """
        try:
            body = json.loads(text)
            if body.get("format") != FORMAT:
                raise ValueError(f"format {body.get('format')!r} is not {FORMAT!r}")
            files = tuple(StoredFile(**file) for file in body["files"])
            tensors = {
                name: StoredTensor(tuple(entry["shape"]), entry["dtype"], tuple(_fragments_from_rows(name, entry)))
                for name, entry in body["tensors"].items()
            }
            return cls(int(body["step"]), files, tensors, body["state"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a checkpoint manifest ({type(error).__name__}: {error})") from None

    def checksums(self, manifest_sha256: str) -> str:
        """Contents of the SHA256SUMS file."""
        lines = [f"{file.sha256}  {file.name}\n" for file in self.files]
        return "".join([*lines, f"{manifest_sha256}  {MANIFEST}\n"])


def _lines(items: list[str]) -> str:
    return "\n  " + ",\n  ".join(items) + "\n " if items else ""


def _fragment_row(fragment: StoredFragment) -> Iterator[str | int | None]:
    region = fragment.region
    yield from (fragment.file, fragment.key, region.shard_dim, region.shard_start, region.shard_size, region.flat_start, region.flat_len)


def _fragments_from_rows(name: str, entry: Mapping[str, Any]) -> Iterator[StoredFragment]:
    for file, key, shard_dim, shard_start, shard_size, flat_start, flat_len in entry["fragments"]:
        region = Region(
            global_shape=tuple(entry["shape"]),
            shard_dim=shard_dim,
            shard_start=shard_start,
            shard_size=shard_size,
            flat_start=flat_start,
            flat_len=flat_len,
        )
        yield StoredFragment(name=name, dtype=entry["dtype"], file=file, key=key, region=region)
