"""Where a data set lies: a local folder or an object store, behind one small interface.

A write is all or nothing: a reader sees the old object, the new one, or none; never a half. Locally that is a temporary
file, fsync and rename; on an object store it is one put, or one multipart upload that is aborted when it fails.
`fs.open(..., "wb")` is never used: s3fs publishes what was written so far when the body of the `with` fails.
The kinds of storage are in `stores/`.
"""

import os

from data_prep.stores.base import Storage, writing
from data_prep.stores.local import TEMPORARY, LocalStorage
from data_prep.stores.objects import ObjectStorage

__all__ = ["TEMPORARY", "LocalStorage", "ObjectStorage", "Storage", "open_storage", "writing"]


def open_storage(url: str | os.PathLike[str]) -> Storage:
    """The storage at a local folder (which need not exist yet) or at an fsspec address such as `s3://bucket/prefix`."""
    text = os.fspath(url)
    if text.startswith("file://"):
        text = text[len("file://") :]
    if "://" in text:
        return ObjectStorage(text)
    return LocalStorage(text)
