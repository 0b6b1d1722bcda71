"""Pooled features of images."""

import torch

from model.batch import NoiseSettings
from model.represent import image_representation


def test_features_equal_pooled_layer_outputs_of_the_full_forward_pass(small_model, build_batch):
    """An image-first example sees [BOI, image] before its text, and no position sees what follows it."""
    config = small_model.config
    batch = build_batch(config, 3, text_first=torch.zeros(3, dtype=torch.bool), noise=NoiseSettings(seed=2), score_all=True)
    features = image_representation(small_model, batch.image, seed=2)
    length = config.image.num_tokens + 1
    seen = {}
    hooks = [
        block.register_forward_hook(lambda m, a, out, i=i: seen.update({f"blocks.{i}": out.hidden})) for i, block in enumerate(small_model.blocks)
    ]
    with torch.no_grad():
        state = small_model(batch)
    for hook in hooks:
        hook.remove()
    assert set(features) == {"flow", "blocks.0", "blocks.1", "norm"}
    torch.testing.assert_close(features["flow"], state.outputs["z"].mean(1), rtol=1e-5, atol=1e-5)
    for name, hidden in seen.items():
        torch.testing.assert_close(features[name], hidden[:, :length].mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features["norm"], state.hidden[:, :length].mean(1), rtol=1e-5, atol=1e-5)


def test_features_of_an_image_do_not_depend_on_the_others(small_model, build_batch):
    images = build_batch(small_model.config, 4).image
    together = image_representation(small_model, images)
    index = torch.tensor([2, 0])
    for name, value in image_representation(small_model, images[index], positions=index).items():
        torch.testing.assert_close(value, together[name][index], rtol=1e-5, atol=1e-5)
