"""The cached decoder is the plain one, piece by piece."""

import torch

from model.generate.cached import CachedDecoder


def pieces(x, sizes):
    return torch.split(x, sizes, dim=1)


def embedded(model, size, length):
    return torch.randn(size, length, model.config.decoder.width, generator=torch.Generator().manual_seed(3))


def test_any_split_into_pieces_gives_the_same_hidden_states(small_model):
    x = embedded(small_model, 3, 9)
    with torch.no_grad():
        whole = CachedDecoder(small_model, batch_size=3, length=9).extend(x)
        for sizes in ([1] * 9, [4, 1, 4], [1, 8], [3, 3, 3]):
            decoder = CachedDecoder(small_model, batch_size=3, length=9)
            parts = torch.cat([decoder.extend(part) for part in pieces(x, sizes)], dim=1)
            torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


def test_pads_are_neither_seen_nor_counted(small_model):
    x = embedded(small_model, 2, 8)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, 2:5] = False
    mask[1, 3:4] = False
    with torch.no_grad():
        decoder = CachedDecoder(small_model, batch_size=2, length=8)
        first, second = decoder.extend(x[:, :6], mask[:, :6]), decoder.extend(x[:, 6:])
        hidden = torch.cat([first, second], dim=1)
        for row in range(2):
            kept = x[row : row + 1, mask[row]]
            alone = CachedDecoder(small_model, batch_size=1, length=kept.shape[1]).extend(kept)
            torch.testing.assert_close(hidden[row, mask[row]], alone[0], rtol=1e-5, atol=1e-5)


def test_taken_rows_continue_from_the_same_past(small_model):
    prefix, ends = embedded(small_model, 2, 5), embedded(small_model, 4, 3)
    rows = torch.tensor([1, 0, 0, 1])
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 2] = False
    for given in (None, mask):
        with torch.no_grad():
            decoder = CachedDecoder(small_model, batch_size=2, length=5)
            decoder.extend(prefix, given)
            taken = decoder.take(rows, extra=3).extend(ends)
            plain = CachedDecoder(small_model, batch_size=4, length=8)
            plain.extend(prefix[rows], None if given is None else given[rows])
            torch.testing.assert_close(taken, plain.extend(ends), rtol=1e-5, atol=1e-5)
