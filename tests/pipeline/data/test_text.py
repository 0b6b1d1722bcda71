"""Token rows hold what spec 1.1 and 1.5 say, and an over-long caption keeps its EOS."""

import numpy as np
import pytest
import sentencepiece

from configs.errors import UserError
from model.config import TextConfig
from pipeline.data.dataset import open_dataset
from pipeline.data.text import CaptionCodec, LabelCodec, build_codec, dataset_codec


@pytest.fixture
def make_codec(tokenizer_model, num_pieces):
    def make(**fields) -> CaptionCodec:
        return CaptionCodec(TextConfig(**{"num_pieces": num_pieces, **fields}), tokenizer_model)

    return make


@pytest.fixture
def pieces(tokenizer_model):
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model)
    return lambda text: processor.encode(text.lower(), out_type=int)


def test_pads_are_scored_when_not_ignored(make_codec, pieces):
    encoded = make_codec(length=16).encode(["the blue square", ""])
    used = pieces("the blue square")
    assert encoded.ids.tolist() == [used + [1] * (16 - len(used)), [1] * 16]
    assert encoded.mask.all()
    assert encoded.loss.all()
    assert not encoded.cut.any()


def test_ignored_pads_are_masked_and_the_eos_is_scored_but_masked(make_codec, pieces):
    used = pieces("the blue square")
    num = len(used)
    encoded = make_codec(length=16, ignore_pad=True, pad_id=0).encode(["the blue square", ""])
    assert encoded.ids.tolist() == [[*used, 1] + [0] * (15 - num), [1] + [0] * 15]
    assert encoded.mask.tolist() == [[True] * num + [False] * (16 - num), [False] * 16]
    assert encoded.loss.tolist() == [[True] * (num + 1) + [False] * (15 - num), [True] + [False] * 15]


@pytest.mark.parametrize("ignore_pad", [False, True])
def test_a_long_caption_is_cut_and_keeps_its_eos(make_codec, pieces, ignore_pad):
    used = pieces("a small green circle and the blue square")
    exact, long = len(used) + 1, len(used)
    fits = make_codec(length=exact, ignore_pad=ignore_pad).encode(["a small green circle and the blue square"])
    cut = make_codec(length=long, ignore_pad=ignore_pad).encode(["a small green circle and the blue square", "a"])
    assert fits.ids[0].tolist() == [*used, 1]
    assert cut.ids[0].tolist() == [*used[:-1], 1]
    assert (fits.cut.tolist(), cut.cut.tolist()) == ([False], [True, False])
    assert cut.loss[0].all()


def test_text_is_lower_cased(make_codec):
    codec = make_codec(length=12)
    np.testing.assert_array_equal(codec.encode(["A RED Circle"]).ids, codec.encode(["a red circle"]).ids)


@pytest.mark.parametrize("text", ["the blue square", "unseen words: naïve 東京 🚀", ""])
def test_decode_recovers_the_text(make_codec, text):
    codec = make_codec(length=64)
    assert codec.decode(codec.encode([text]).ids[0]) == text


def test_decode_stops_at_eos_and_passes_over_markers(make_codec, pieces, num_pieces):
    used = pieces("a red circle")
    assert make_codec().decode([num_pieces, *used, num_pieces + 2, 1, *used]) == "a red circle"


def test_an_empty_list_gives_no_rows(make_codec):
    assert make_codec(length=5).encode([]).ids.shape == (0, 5)
    assert LabelCodec(TextConfig(length=1, num_pieces=3)).encode([]).ids.shape == (0, 1)


def test_labels_take_one_scored_slot():
    encoded = LabelCodec(TextConfig(length=1, num_pieces=10)).encode(["7", " 0 "])
    assert encoded.ids.tolist() == [[7], [0]]
    assert encoded.mask.all()
    assert encoded.loss.all()
    assert LabelCodec(TextConfig(length=1, num_pieces=10)).decode([7]) == "7"


@pytest.mark.parametrize("text", ["10", "-1", "seven", "1.5", ""])
def test_a_label_that_is_no_class_is_refused(text):
    with pytest.raises(UserError, match="from 0 to 9"):
        LabelCodec(TextConfig(length=1, num_pieces=10)).encode([text])


def test_labels_need_a_single_slot():
    with pytest.raises(UserError, match="model.text.length=1"):
        build_codec(TextConfig(length=64), labels=True, tokenizer=None)


def test_another_models_tokenizer_is_refused(tokenizer_model, num_pieces):
    with pytest.raises(UserError, match=rf"(?s)got: {num_pieces} pieces.*expected: model.text.num_pieces=77"):
        CaptionCodec(TextConfig(num_pieces=77), tokenizer_model)
    with pytest.raises(UserError, match=r"(?s)got: EOS 1.*expected: model.text.eos_id=2"):
        CaptionCodec(TextConfig(num_pieces=num_pieces, eos_id=2), tokenizer_model)
    with pytest.raises(UserError, match="does not load"):
        CaptionCodec(TextConfig(num_pieces=num_pieces), b"no model at all")


def test_the_codec_of_a_data_set_reads_its_tokenizer(intact, num_pieces):
    dataset = open_dataset(str(intact.path))
    assert dataset_codec(TextConfig(num_pieces=num_pieces), dataset, labels=False).encode(["a red circle"]).ids.shape == (1, 64)
    assert isinstance(dataset_codec(TextConfig(length=1), dataset, labels=True), LabelCodec)
