"""The data set's SentencePiece tokenizer: train, encode, and say what a model holds (`jetway tokenizer`).

Unigram pieces with byte fallback, so that no text is unknown; ids: 0 pad, 1 end of sequence, 2 unknown, no begin. The same
captions, settings and library give the same bytes: the sample is chosen by content hash and sorted, and the number of
threads, on which the scores depend, is part of the configuration.
"""

import argparse
import hashlib
import io
import logging
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError
from configs.loader import build_config
from data_prep.config import TokenizerConfig
from data_prep.schema import TOKENIZER_FILE, Manifest, ShardIndex, ShardInfo, TokenizerInfo, tar_path
from data_prep.storage import Storage, open_storage

logger = logging.getLogger(__name__)

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2

_SPACE = "\u2581"
"""What SentencePiece writes for a space; every word begins with one."""
_FEW_WORDS = 20_000
_LONGEST_PIECE = 16
"""SentencePiece's own limit."""
_ONLY_BYTES = ("a",)
"""What an empty corpus is replaced with, so that a set without captions still has a (byte-level) tokenizer."""


def train(captions: Iterable[str], config: TokenizerConfig) -> bytes:
    """The serialised SentencePiece model of these captions.

    Has `config.vocab_size` pieces, or as many as the captions support when that is less.

    Raises:
        UserError: `vocab_size` does not even hold the 256 bytes, the control pieces and the captions' characters.
    """
    import sentencepiece

    corpus = sorted(caption for caption in captions if caption) or list(_ONLY_BYTES)
    rule = "nmt_nfkc_cf" if config.lower_case else "nmt_nfkc"
    model = io.BytesIO()
    try:
        with _seed_file(corpus, rule) as seeds:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(corpus),
                model_writer=model,
                model_type="unigram",
                vocab_size=config.vocab_size,
                hard_vocab_limit=False,
                byte_fallback=True,
                pad_id=PAD_ID,
                eos_id=EOS_ID,
                unk_id=UNK_ID,
                bos_id=-1,
                num_threads=config.num_threads,
                normalization_rule_name=rule,
                seed_sentencepieces_file=seeds,
                max_sentence_length=2**20,
                input_sentence_size=0,
                minloglevel=2,
            )
    except RuntimeError as error:
        required = re.search(r"required_chars\. \d+ vs (\d+)", str(error))
        raise UserError(
            "the tokenizer cannot be trained",
            got=f"tokenizer.vocab_size={config.vocab_size}" if required else error,
            expected=f"at least {required.group(1)}" if required else "room for 256 bytes, 3 control pieces and every frequent character",
            fix="set a larger tokenizer.vocab_size",
        ) from None
    return _without_path(model.getvalue())


@contextmanager
def _seed_file(corpus: Sequence[str], rule: str) -> Iterator[str]:
    """Candidate pieces for a corpus of few distinct words, as a file for SentencePiece; "" leaves the choice to it.

    SentencePiece collects candidates from the *distinct* words, so a word that no other word contains is never one, however
    often it is written: small vocabularies come out as fragments (14 tokens for "a handwritten seven" in place of 3). Here
    substrings are counted by occurrence, as in Kudo 2018 (arXiv 1804.10959), section 3.2.
    """
    import sentencepiece

    normalizer = sentencepiece.SentencePieceNormalizer(rule_name=rule)
    words = Counter(f"{_SPACE}{word}" for caption in corpus for word in normalizer.Normalize(caption).split())
    if len(words) > _FEW_WORDS:
        yield ""
        return
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for start in range(len(word)):
            for end in range(start + 2, min(len(word), start + _LONGEST_PIECE) + 1):
                counts[word[start:end]] += count
    ranked = sorted(((count * len(piece), piece) for piece, count in counts.items() if count > 1), key=lambda item: (-item[0], item[1]))
    if not ranked:
        yield ""
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "seeds.tsv")
        path.write_text("".join(f"{piece}\t{score}\n" for score, piece in ranked), encoding="utf-8")
        yield str(path)


def _without_path(data: bytes) -> bytes:
    """The model without the name of the temporary seed file, which SentencePiece records among its settings."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(data)
    model.trainer_spec.ClearField("seed_sentencepieces_file")
    return bytes(model.SerializeToString())


def load(data: bytes, where: str = "the tokenizer") -> Any:
    """A `sentencepiece.SentencePieceProcessor` from a serialised model.

    Raises:
        UserError: not a SentencePiece model, or one whose control ids are not ours.
    """
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(data)
    except RuntimeError as error:
        raise UserError(f"{where} is not a SentencePiece model", got=error) from None
    found = (processor.pad_id(), processor.eos_id(), processor.unk_id())
    if found != (PAD_ID, EOS_ID, UNK_ID):
        raise UserError(f"{where} has other control ids", got=f"pad, eos, unk = {found}", expected=f"{(PAD_ID, EOS_ID, UNK_ID)}")
    return processor


def sample_captions(storage: Storage, shards: Sequence[ShardInfo], sample_size: int) -> list[str]:
    """At most `sample_size` captions of these shards, chosen by the content hash of their images; in no particular order."""
    indexes = [ShardIndex.load(storage, shard.name, sha256=shard.index_sha256) for shard in shards]
    if not indexes:
        return []
    # Bytes 8-16: the split was decided by bytes 0-8, and the two choices must not be related.
    ranks = [np.ascontiguousarray(index.sha256[:, 8:16]).view(">u8")[:, 0] for index in indexes]
    everything = np.concatenate(ranks)
    threshold = np.sort(everything)[min(sample_size, len(everything)) - 1]
    captions: list[str] = []
    for shard, index, rank in zip(shards, indexes, ranks, strict=True):
        rows = np.flatnonzero(rank <= threshold)
        data = storage.read_bytes(tar_path(shard.name)) if len(rows) else b""
        for row in rows:
            offset, size = index.offsets[row, 1], index.sizes[row, 1]
            captions.append(data[offset : offset + size].decode())
    return captions


def make_tokenizer(output: str, shards: Sequence[ShardInfo], config: TokenizerConfig) -> TokenizerInfo:
    """Trains the tokenizer on the train split (or takes the given model) and publishes it in the data set.

    Raises:
        UserError: the model file is missing or unfit, or `vocab_size` too small.
    """
    storage = open_storage(output)
    if config.model_file is not None:
        data = _read_model(Path(config.model_file))
    else:
        data = train(sample_captions(storage, shards, config.sample_size), config)
    num_pieces = load(data, config.model_file or TOKENIZER_FILE).GetPieceSize()
    storage.put_bytes(TOKENIZER_FILE, data)
    return TokenizerInfo(file=TOKENIZER_FILE, sha256=hashlib.sha256(data).hexdigest(), num_pieces=num_pieces)


def check_given_model(config: TokenizerConfig) -> None:
    """Raises:
    UserError: `model_file` is missing or unfit.
    """
    if config.model_file is not None:
        load(_read_model(Path(config.model_file)), config.model_file)


def load_tokenizer(storage: Storage, manifest: Manifest) -> Any:
    """The processor of a data set, checked against its manifest.

    Raises:
        UserError: missing, or not the one that the manifest names.
    """
    info = manifest.tokenizer
    where = f"{storage.url}/{info.file}"
    try:
        data = storage.read_bytes(info.file)
    except FileNotFoundError:
        raise UserError(f"{where} is missing", fix="restore it, or prepare the data set again") from None
    found = hashlib.sha256(data).hexdigest()
    if found != info.sha256:
        raise UserError(f"{where} is not the tokenizer of this data set", got=f"sha256 {found}", expected=info.sha256)
    return load(data, where)


def main(argv: Sequence[str]) -> int:
    """Entry point of `jetway tokenizer`."""
    parser = argparse.ArgumentParser(prog="jetway tokenizer", description="Train a SentencePiece tokenizer, encode text, or describe a model.")
    dry_run = "say what would be done; write nothing"
    parser.add_argument("--dry-run", action="store_true", help=dry_run)
    common = argparse.ArgumentParser(add_help=False)  # after the second verb too, without undoing one before it
    common.add_argument("--dry-run", action="store_true", default=argparse.SUPPRESS, help=dry_run)
    verbs = parser.add_subparsers(dest="verb", required=True)
    info = verbs.add_parser("info", parents=[common], help="sizes and first pieces of a model")
    info.add_argument("model", help="a data set (folder or s3://) or a .model file")
    encode = verbs.add_parser("encode", parents=[common], help="pieces and ids of a text")
    encode.add_argument("model", help="a data set (folder or s3://) or a .model file")
    encode.add_argument("text", nargs="*", help="the text; without it, lines of standard input")
    training = verbs.add_parser("train", parents=[common], help="train on a text file, one caption a line (`jetway prep` does it for data sets)")
    training.add_argument("captions", help="UTF-8 text file")
    training.add_argument("output", help="the .model file to write")
    training.add_argument("--vocab-size", type=int, default=TokenizerConfig.__dataclass_fields__["vocab_size"].default)
    training.add_argument("--num-threads", type=int, default=TokenizerConfig.__dataclass_fields__["num_threads"].default)
    training.add_argument("--lower-case", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.verb == "train":
        return _train_file(arguments)
    processor = _open_model(arguments.model)
    if arguments.verb == "info":
        pieces = [processor.IdToPiece(i) for i in range(processor.GetPieceSize())]
        print(f"pieces  {len(pieces)}  (pad {processor.pad_id()}, eos {processor.eos_id()}, unk {processor.unk_id()}, no bos)")
        words = [piece for i, piece in enumerate(pieces) if not processor.IsByte(i) and i not in (PAD_ID, EOS_ID, UNK_ID)]
        print(f"bytes   {sum(processor.IsByte(i) for i in range(len(pieces)))}")
        print(f"first   {' '.join(words[:24])}")
    else:
        for line in [" ".join(arguments.text)] if arguments.text else (line.rstrip("\n") for line in sys.stdin):
            ids = processor.EncodeAsIds(line)
            print(f"{' '.join(processor.IdToPiece(i) for i in ids)}\n{' '.join(map(str, ids))}  ({len(ids)} tokens, without eos)")
    return 0


def _train_file(arguments: argparse.Namespace) -> int:
    path, output = Path(arguments.captions), Path(arguments.output)
    try:
        captions = [" ".join(line.split()) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}", got=error, expected="a UTF-8 text file with one caption a line") from None
    options = {"vocab_size": arguments.vocab_size, "num_threads": arguments.num_threads, "lower_case": arguments.lower_case}
    config = build_config(TokenizerConfig, options, source="the options")
    if arguments.dry_run:
        print(f"would train {arguments.vocab_size} pieces on {len(captions)} captions of {path} and write {output}")
        return 0
    data = train(captions, config)
    open_storage(output.parent).put_bytes(output.name, data)
    print(f"{output}: {load(data).GetPieceSize()} pieces from {len(captions)} captions")
    return 0


def _open_model(text: str) -> Any:
    if text.endswith(".model") and "://" not in text:
        return load(_read_model(Path(text)), text)
    storage = open_storage(text)
    return load_tokenizer(storage, Manifest.load(storage))


def _read_model(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {path}", got=error.strerror, expected="a SentencePiece .model file") from None
