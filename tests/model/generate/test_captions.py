"""Caption writing against the full forward pass."""

import pytest
import torch

from configs.errors import UserError
from model.generate.captions import write_captions
from model.generate.draws import Purpose, TokenDraws, categorical
from model.generate.prefix import encode_images
from model.sequence import text_slice


def random_images(config, num):
    image = config.image
    shape = (num, image.resolution, image.resolution, image.channels)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(9), dtype=torch.uint8)


def after_first(pieces, eos_id):
    """bool [B, T], True behind the first EOS."""
    is_eos = pieces == eos_id
    return (is_eos.cumsum(1) - is_eos.int()) > 0


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("kind", ["small_config", "padded_config"])
def test_pieces_equal_those_of_the_full_forward_pass(kind, temperature, build_random, full_hidden, request):
    model = build_random(request.getfixturevalue(kind))
    config, images = model.config, random_images(model.config, 6)
    pieces = write_captions(model, images, temperature=temperature, seed=1)
    soft = encode_images(model, images, seed=1)[..., : config.gmm.soft_dim]
    everywhere = torch.ones_like(pieces, dtype=torch.bool)
    hidden = full_hidden(model, pieces, everywhere, soft, text_first=False)[:, text_slice(config, text_first=False)]
    with torch.no_grad():
        logits = model.head.text.logits(hidden)
    done = after_first(pieces, config.text.eos_id)
    for slot in range(config.text.length):
        if temperature:
            draws = TokenDraws(1, torch.arange(6), slot)
            expected = categorical(logits[:, slot] / temperature, draws.uniform(Purpose.PIECE))
        else:
            expected = logits[:, slot].argmax(-1)
        kept = ~done[:, slot]
        assert torch.equal(pieces[kept, slot], expected[kept])
    assert kept.any()
    assert len({tuple(row) for row in pieces.tolist()}) > 1


def test_slots_after_the_end_are_pads(padded_config, build_random):
    model = build_random(padded_config)
    with torch.no_grad():
        model.head.text.bias[padded_config.text.eos_id] += 1.0
    pieces = write_captions(model, random_images(padded_config, 30), temperature=2.0)
    behind = after_first(pieces, padded_config.text.eos_id)
    assert behind.any()
    assert (pieces[behind] == padded_config.text.pad_id).all()


def test_a_caption_does_not_depend_on_the_other_images(small_model):
    images = random_images(small_model.config, 5)
    together = write_captions(small_model, images, temperature=1.0, seed=4)
    index = torch.tensor([3, 1])
    assert torch.equal(write_captions(small_model, images[index], temperature=1.0, seed=4, positions=index), together[index])


def test_class_conditional_models_write_no_text(label_config, build_random):
    model = build_random(label_config)
    with pytest.raises(UserError, match="writes and scores no text"):
        write_captions(model, random_images(label_config, 1))


def test_images_of_another_shape_are_refused(small_model):
    with pytest.raises(ValueError, match=r"uint8 \[B, 8, 8, 3\]"):
        encode_images(small_model, torch.zeros(1, 8, 8, 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match="float32"):
        encode_images(small_model, torch.zeros(1, 8, 8, 3))
