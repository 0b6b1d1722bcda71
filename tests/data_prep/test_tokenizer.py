"""Tokenizer: same captions, same bytes; nothing is unknown; the vocabulary fits the captions."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from configs.errors import UserError
from data_prep.config import TokenizerConfig
from data_prep.embedded.digits import prompts
from data_prep.storage import open_storage
from data_prep.tokenizer import load, main, sample_captions, train
from tests.data_prep.conftest import make_shards, small_config

CAPTIONS = [prompt for digit in range(10) for prompt in prompts(digit)] * 5
SMALL = TokenizerConfig(vocab_size=512, num_threads=2)


def test_same_captions_in_any_order_give_the_same_bytes() -> None:
    shuffled = [CAPTIONS[i] for i in np.random.default_rng(0).permutation(len(CAPTIONS))]
    assert train(shuffled, SMALL) == train(CAPTIONS, SMALL)


def test_control_ids_and_bytes() -> None:
    processor = load(train(CAPTIONS, SMALL))
    assert (processor.pad_id(), processor.eos_id(), processor.unk_id(), processor.bos_id()) == (0, 1, 2, -1)
    assert sum(processor.IsByte(i) for i in range(processor.GetPieceSize())) == 256


@pytest.mark.parametrize("text", ["héllo wörld", "שלום עולם", "日本語", "emoji 😀👩‍👩‍👧", "tab-less line", "0123456789 {}[]()\\"])
def test_any_text_survives_and_nothing_is_unknown(text: str) -> None:
    processor = load(train(CAPTIONS, SMALL))
    ids = processor.EncodeAsIds(text)
    assert processor.unk_id() not in ids
    assert processor.DecodeIds(ids) == text


def test_frequent_words_are_one_piece_even_in_a_tiny_corpus() -> None:
    assert load(train(CAPTIONS, SMALL)).EncodeAsPieces("a handwritten seven") == ["\u2581a", "\u2581handwritten", "\u2581seven"]


def test_vocabulary_shrinks_to_what_the_captions_support() -> None:
    assert 259 < load(train(CAPTIONS, SMALL)).GetPieceSize() < 512
    assert load(train(CAPTIONS, TokenizerConfig(vocab_size=300, num_threads=1))).GetPieceSize() == 300


def test_a_vocabulary_too_small_for_the_characters_is_refused_with_the_least_size() -> None:
    with pytest.raises(UserError, match=r"vocab_size=100[\s\S]*at least 2\d\d"):
        train(CAPTIONS, TokenizerConfig(vocab_size=100))


def test_lower_case_folds_prompts_of_any_case() -> None:
    processor = load(train(CAPTIONS, TokenizerConfig(vocab_size=512, lower_case=True)))
    assert processor.EncodeAsIds("The Digit SEVEN") == processor.EncodeAsIds("the digit seven")
    assert load(train(CAPTIONS, SMALL)).EncodeAsIds("The") != load(train(CAPTIONS, SMALL)).EncodeAsIds("the")


def test_foreign_models_are_refused() -> None:
    with pytest.raises(UserError, match="not a SentencePiece model"):
        load(b"something else")


def test_the_sample_is_chosen_by_content_and_holds_the_asked_number(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    config = small_config(make_folder(30), tmp_path / "set")
    train_shards = [shard for shard in make_shards(config) if shard.name.startswith("train")]
    storage = open_storage(tmp_path / "set")
    everything, some = sample_captions(storage, train_shards, 1000), sample_captions(storage, train_shards, 7)
    assert len(everything) == sum(shard.num_samples for shard in train_shards)
    assert len(some) == 7
    assert set(some) <= set(everything)
    assert sample_captions(storage, train_shards[::-1], 7) != []
    assert sorted(sample_captions(storage, train_shards[::-1], 7)) == sorted(some)
    assert sample_captions(storage, [], 7) == []


def test_command_line_trains_describes_and_encodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions, model = tmp_path / "captions.txt", tmp_path / "my.model"
    captions.write_text("\n".join(CAPTIONS))
    assert main(["--dry-run", "train", str(captions), str(model), "--vocab-size", "400"]) == 0
    assert main(["train", str(captions), str(model), "--dry-run"]) == 0
    assert not model.exists()
    with pytest.raises(UserError, match="num_threads=0 must be at least 1"):
        main(["train", str(captions), str(model), "--num-threads", "0"])
    assert main(["train", str(captions), str(model), "--vocab-size", "400"]) == 0
    assert main(["info", str(model)]) == 0
    assert main(["encode", str(model), "the digit 7"]) == 0
    output = capsys.readouterr().out
    assert "bytes   256" in output
    assert "\u2581the \u2581digit \u25817" in output
    with pytest.raises(UserError, match="cannot read"):
        main(["info", str(tmp_path / "none.model")])
