"""Image sampling against the full forward pass, and what a sample may depend on."""

import dataclasses

import pytest
import torch

from model.generate.draws import Purpose, TokenDraws, categorical
from model.generate.guidance import Gaussian, analytic, clipped, rejection_sample
from model.generate.images import ImageSampling, decode_images, draw_token, sample_images, sample_soft_tokens
from model.kernels.config import KernelsConfig
from model.kernels.dispatch import is_interpreting
from model.patchify import patchify, to_uint8, unpatchify
from model.sequence import image_slice

GUIDED = ImageSampling(cfg_scale=2.0, temperature=0.9, seed=3)
PLAIN = ImageSampling(temperature=0.9, temperature_probs=1.3, seed=3)


def captions(config, lengths):
    """Random captions, `lengths` pieces of them attended; all if pads are not ignored."""
    text = torch.randint(0, config.text.num_pieces, (len(lengths), config.text.length), generator=torch.Generator().manual_seed(2))
    slots = torch.arange(config.text.length)
    mask = slots < torch.tensor(lengths)[:, None] if config.text.ignore_pad else torch.ones_like(text, dtype=torch.bool)
    return text, mask


def drawn_from_full_forward(model, text, mask, soft, settings, full_hidden):
    """Every soft token drawn again, from the mixtures of one pass over the whole sequence, by the formulas of spec 1.10."""
    size, where = len(text), image_slice(model.config, text_first=True)
    conditional = model.head.gmm.mixture(full_hidden(model, text, mask, soft, text_first=True)[:, where])
    dropped = torch.ones(size, dtype=torch.bool)
    unconditional = model.head.gmm.mixture(full_hidden(model, text, mask, soft, text_first=True, drop=dropped)[:, where])
    tokens = []
    for index in range(soft.shape[1]):
        draws = TokenDraws(settings.seed, torch.arange(size), index)
        component = categorical(conditional.logits[:, index] * settings.temperature_probs, draws.uniform(Purpose.COMPONENT))
        rows = torch.arange(size)

        def chosen(mixture, rows=rows, index=index, component=component):
            return Gaussian(mixture.loc[rows, index, component], mixture.scale[rows, index, component] * settings.temperature)

        gaussian = chosen(conditional)
        if settings.cfg_scale:
            gaussian = analytic(gaussian, chosen(unconditional), settings.cfg_scale)
        tokens.append(gaussian.at(draws.normal(Purpose.NOISE, (soft.shape[-1],))))
    return torch.stack(tokens, dim=1)


@pytest.mark.parametrize("settings", [PLAIN, GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize("kind", ["small_config", "padded_config", "label_config"])
def test_cached_sampling_equals_the_full_forward_pass(kind, settings, build_random, full_hidden, request):
    model = build_random(request.getfixturevalue(kind))
    text, mask = captions(model.config, [0, 2, 5])
    soft = sample_soft_tokens(model, text, mask, settings=settings, positions=torch.arange(3))
    assert soft.shape == (3, model.config.image.num_tokens, model.config.gmm.soft_dim)
    expected = drawn_from_full_forward(model, text, mask, soft, settings, full_hidden)
    torch.testing.assert_close(soft, expected, rtol=1e-5, atol=1e-5)


RULES = [PLAIN, *(dataclasses.replace(GUIDED, cfg_rule=rule) for rule in ("analytic", "clipped", "rejection"))]


@pytest.mark.parametrize("settings", RULES, ids=["plain", "analytic", "clipped", "rejection"])
def test_sample_depends_on_its_position_and_caption_only(settings, padded_config, build_random):
    """Captions of different lengths, alone or together, in any order."""
    model = build_random(padded_config)
    text, mask = captions(padded_config, [0, 3, 5, 1])
    together = sample_soft_tokens(model, text, mask, settings=settings, positions=torch.arange(4))
    for rows in ([2], [3, 0]):
        index = torch.tensor(rows)
        some = sample_soft_tokens(model, text[index], mask[index], settings=settings, positions=index)
        torch.testing.assert_close(some, together[index], rtol=1e-4, atol=1e-4)
    images = sample_images(model, text, mask, settings=settings)
    alone = sample_images(model, text[2:3], mask[2:3], settings=settings, positions=torch.tensor([2]))
    assert (images[2:3] != alone).float().mean() < 0.02  # a rounding error may cross a grey level


def test_same_seed_same_image_another_seed_another(small_model):
    text, mask = captions(small_model.config, [5, 5])
    first, second = (sample_images(small_model, text, mask, settings=GUIDED) for _ in range(2))
    assert torch.equal(first, second)
    assert first.dtype == torch.uint8
    assert first.shape == (2, 8, 8, 3)
    assert not torch.equal(first, sample_images(small_model, text, mask, settings=dataclasses.replace(GUIDED, seed=4)))
    assert not torch.equal(first[0], sample_images(small_model, text, mask, settings=GUIDED, positions=torch.tensor([7, 8]))[0])


def test_captions_steer_the_image_and_no_guidance_runs_no_unconditional_rows(small_model, monkeypatch):
    text, mask = captions(small_model.config, [5, 5])
    rows = []
    original = small_model.block(0).decode
    monkeypatch.setattr(small_model.block(0), "decode", lambda x, context, cache: rows.append(len(x)) or original(x, context, cache))
    plain = sample_soft_tokens(small_model, text, mask, settings=PLAIN, positions=torch.arange(2))
    assert set(rows) == {2}
    rows.clear()
    sample_soft_tokens(small_model, text, mask, settings=GUIDED, positions=torch.arange(2))
    assert rows[0] == 3  # two captions, and one prefix without
    assert set(rows[1:]) == {4}
    swapped = sample_soft_tokens(small_model, text.flip(0), mask, settings=PLAIN, positions=torch.arange(2))
    assert not torch.allclose(plain, swapped)


@pytest.mark.parametrize("rule", ["analytic", "clipped", "rejection"])
def test_guidance_at_temperature_0_takes_the_guided_mean(rule, small_model):
    hidden = torch.randn(6, small_model.config.decoder.width, generator=torch.Generator().manual_seed(0))
    settings = dataclasses.replace(GUIDED, cfg_rule=rule, temperature=0.0)
    draws = TokenDraws(0, torch.arange(3))
    cold = draw_token(small_model.head.gmm, hidden, settings, draws).detach()
    assert cold.isfinite().all()
    if rule == "rejection":
        return
    component = categorical(small_model.head.gmm.mixture_logits(hidden[::2]), draws.uniform(Purpose.COMPONENT))
    mixture, rows = small_model.head.gmm.mixture(hidden), torch.arange(3)
    pair = [Gaussian(mixture.loc[i::2][rows, component], mixture.scale[i::2][rows, component]) for i in (0, 1)]
    expected = (analytic if rule == "analytic" else clipped)(*pair, settings.cfg_scale).loc
    torch.testing.assert_close(cold, expected.detach(), rtol=1e-4, atol=1e-4)


def test_temperature_scales_the_noise_of_the_chosen_component(small_model):
    hidden = torch.randn(3, small_model.config.decoder.width, generator=torch.Generator().manual_seed(0))
    draws = TokenDraws(0, torch.arange(3))
    cold, warm, hot = (
        draw_token(small_model.head.gmm, hidden, ImageSampling(temperature=temperature), draws).detach() for temperature in (0.0, 0.5, 1.0)
    )
    torch.testing.assert_close(warm - cold, (hot - cold) / 2)
    assert (hot - cold).abs().min() > 1e-4


def test_probability_temperature_multiplies_the_mixture_logits(small_model):
    """At a large one, the likeliest component is always taken."""
    hidden = torch.randn(40, small_model.config.decoder.width, generator=torch.Generator().manual_seed(0))
    settings = ImageSampling(temperature=0.0, temperature_probs=1e4)
    with torch.no_grad():
        token = draw_token(small_model.head.gmm, hidden, settings, TokenDraws(0, torch.arange(40)))
        mixture = small_model.head.gmm.mixture(hidden)
    torch.testing.assert_close(token, mixture.loc[torch.arange(40), mixture.logits.argmax(-1)])


def test_factored_out_dims_are_standard_normal_whatever_the_temperature(small_model, monkeypatch):
    config, seen = small_model.config, []
    monkeypatch.setattr(small_model, "decode", lambda z: seen.append(z) or z)
    soft = torch.zeros(200, config.image.num_tokens, config.gmm.soft_dim)
    decode_images(small_model, soft, seed=0, positions=torch.arange(200))
    rest = seen[0][..., config.gmm.soft_dim :]
    assert rest.shape[-1] == config.image.token_dim - config.gmm.soft_dim
    assert rest.mean().abs() < 0.02
    assert rest.std().item() == pytest.approx(1, abs=0.02)


def test_decoding_inverts_encoding_to_the_same_grey_levels(small_model):
    """uint8 -> dequantised -> latents -> uint8, the floor undoing U[0, 1)."""
    config = small_model.config
    image = torch.randint(0, 256, (2, 8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    noise = 0.05 + 0.9 * torch.rand(image.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        latents = small_model.encode(patchify((image + noise) / 127.5 - 1, config.image.patch_size))[0]
        assert torch.equal(to_uint8(unpatchify(small_model.decode(latents), config.image)), image)


def test_progress_is_reported_once_per_token(small_model):
    text, mask = captions(small_model.config, [5])
    calls = []
    sample_images(small_model, text, mask, settings=PLAIN, on_token=calls.append)
    assert sum(calls) == small_model.config.image.num_tokens


@pytest.mark.parametrize("settings", RULES, ids=["plain", "analytic", "clipped", "rejection"])
def test_a_token_is_what_the_whole_mixture_holds_at_the_drawn_component(settings, small_model):
    """The kernel draws what plain torch does, from 2d rows of the head in place of all."""
    head = small_model.head.gmm
    hidden = torch.randn(12, small_model.config.decoder.width, generator=torch.Generator().manual_seed(0))
    copies = 2 if settings.cfg_scale else 1
    draws = TokenDraws(1, torch.arange(12 // copies), 7)
    with torch.no_grad():
        mixture = head.mixture(hidden)
        rows, logits = torch.arange(12 // copies), mixture.logits[::copies] * settings.temperature_probs
        component = categorical(logits, draws.uniform(Purpose.COMPONENT))
        pair = [Gaussian(mixture.loc[i::copies][rows, component], mixture.scale[i::copies][rows, component] * 0.9) for i in range(copies)]
        if settings.cfg_rule == "rejection":
            expected = rejection_sample(*pair, settings.cfg_scale, draws)
        else:
            rule = clipped if settings.cfg_rule == "clipped" else analytic
            gaussian = rule(*pair, settings.cfg_scale) if copies == 2 else pair[0]
            expected = gaussian.at(draws.normal(Purpose.NOISE, (small_model.config.gmm.soft_dim,)))
        for impl in ("reference", "triton") if is_interpreting() else ("reference",):
            head.kernels = KernelsConfig(mixture_sample=impl)
            torch.testing.assert_close(draw_token(head, hidden, settings, draws), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("field", "value"), [("cfg_scale", -1.0), ("temperature", -0.1), ("cfg_rule", "magic")])
def test_settings_that_mean_nothing_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        ImageSampling(**{field: value})
