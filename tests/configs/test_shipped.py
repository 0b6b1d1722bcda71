"""Every shipped YAML resolves, and the published sizes are the published sizes."""

from pathlib import Path

import pytest

from configs.errors import ConfigError
from configs.loader import CONFIG_DIR, load_config
from data_prep.config import PrepConfig
from model.flops import count_parameters
from pipeline.config import RunConfig

TRAIN = sorted((CONFIG_DIR / "train").glob("*.yaml"))
DATA = sorted((CONFIG_DIR / "data").glob("*.yaml"))


@pytest.mark.parametrize("path", TRAIN, ids=lambda path: path.stem)
def test_training_configuration_fits_its_own_processes(path: Path) -> None:
    config = load_config(RunConfig, path)
    assert config.name == path.stem
    assert config.output_dir == f"runs/{path.stem}"
    micro, num_micro = config.micro_batches(config.parallel.processes)
    assert micro * num_micro * config.data_parallel_degree(config.parallel.processes) == config.data.global_batch_size


@pytest.mark.parametrize(
    "override",
    [
        "model.text.length=0",
        "model.flow.width=0",
        "model.decoder.depth=0",
        "model.decoder.num_kv_heads=0",
        "model.gmm.num_mixtures=-1",
        "optimizer.learning_rate=-0.5",
        "optimizer.ema_decay=1.0",
    ],
)
def test_sizes_and_rates_that_are_none_are_refused(override: str) -> None:
    key, _, value = override.partition("=")
    with pytest.raises(ConfigError, match=f"{'.'.join(key.split('.')[-2:])}={value} must"):
        load_config(RunConfig, "train/digits", [override])


@pytest.mark.parametrize("path", DATA, ids=lambda path: path.stem)
def test_data_configuration_resolves(path: Path) -> None:
    load_config(PrepConfig, path)


@pytest.mark.parametrize("path", TRAIN + DATA, ids=lambda path: path.stem)
def test_header_says_what_how_where_and_at_what_cost(path: Path) -> None:
    header = [line for line in path.read_text().splitlines() if line.startswith("#")][:12]
    for word in ("# Purpose", "# Command", "# Hardware", "# Cost"):
        assert any(line.startswith(word) for line in header), f"{path.name} has no line {word!r}"


@pytest.mark.parametrize(
    ("name", "transformer", "flow"),
    [
        ("image_text_350m", 355_517_440 + 269_747_200 + 132_096 + 32_771_072 + 32_803_075, 426_647_552),
        ("image_text_750m", 799_876_608 + 404_489_216 + 198_144 + 49_156_608 + 49_188_611, 426_647_552),
        ("image_text_1p3b", 1_599_751_680 + 404_489_216 + 198_144 + 49_156_608 + 49_188_611, 628_400_128),
        ("class_conditional_350m", 355_517_440 + 269_747_200 + 132_096 + 16_433_152, 426_647_552),
        ("class_conditional_750m", 799_876_608 + 404_489_216 + 198_144 + 24_649_728, 426_647_552),
        ("class_conditional_1p3b", 1_599_751_680 + 404_489_216 + 198_144 + 24_649_728, 628_400_128),
    ],
)
def test_published_sizes_have_the_published_parameters(name: str, transformer: int, flow: int) -> None:
    counts = count_parameters(load_config(RunConfig, f"train/{name}").model)
    assert (counts.transformer, counts.flow) == (transformer, flow)


def test_largest_configuration_lists_its_own_parameters() -> None:
    path = CONFIG_DIR / "train" / "image_text_8b.yaml"
    total = count_parameters(load_config(RunConfig, path).model).total
    assert total >= 8_000_000_000
    assert f"{total:,} parameters" in path.read_text()
