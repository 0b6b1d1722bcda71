"""Opening what training left behind."""

import dataclasses

import pytest
import torch

from configs.errors import UserError
from model.kernels.config import KernelsConfig
from pipeline import evaluate
from pipeline.checkpoint.folder import CheckpointFolder
from pipeline.export import main as export
from pipeline.trained import find_codec, open_trained, read_trained_config


def test_run_checkpoint_and_exported_file_are_the_same_model(tiny_run, tmp_path, capsys):
    exported = tmp_path / "model.safetensors"
    assert export([str(tiny_run), "--output", str(exported)]) == 0
    models = [open_trained(path).model for path in (tiny_run, tiny_run / "checkpoints" / "step_00000003", exported)]
    reference = models[0].state_dict()
    for model in models[1:]:
        assert model.state_dict().keys() == reference.keys()
        assert all(torch.equal(value, reference[name]) for name, value in model.state_dict().items())
    assert not models[0].training


def test_moving_average_is_taken_on_request(tiny_run):
    raw, ema = (open_trained(tiny_run, ema=ema).model.state_dict() for ema in (False, True))
    name = "head.gmm.logit_weight"
    assert torch.equal(ema[name], raw[name] * 0.5)


def test_tokenizer_comes_from_the_run_its_data_set_or_the_command_line(tiny_run, tiny_config, tmp_path):
    config, folder = read_trained_config(tiny_run)
    assert folder == tiny_run
    assert config.model == tiny_config.model
    text = "a red"
    assert find_codec(config, folder).decode(find_codec(config, folder).encode([text]).ids[0].tolist()) == text
    assert find_codec(config, tmp_path, tiny_run / "tokenizer.model").encode([text]).ids.shape == (1, 12)
    with pytest.raises(UserError, match="--tokenizer"):
        find_codec(config, tmp_path)
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        find_codec(config, tmp_path, tmp_path / "none.model")


def test_tokenizer_of_another_model_is_refused(tiny_run, tiny_config):
    text = dataclasses.replace(tiny_config.model.text, num_pieces=77)
    other = dataclasses.replace(tiny_config, model=dataclasses.replace(tiny_config.model, text=text))
    with pytest.raises(UserError, match="not the model's"):
        find_codec(other, tiny_run)


def test_kernels_forced_on_the_training_machine_are_chosen_anew(write_run, tiny_config, tmp_path):
    kernels = KernelsConfig(
        gmm_nll="triton", affine_coupling="triton", geglu="liger", rms_norm="apex", optimizer="apex", compile="layers", tf32=False
    )
    run = write_run(tmp_path / "run", dataclasses.replace(tiny_config, kernels=kernels))
    opened = open_trained(run, device="cpu")
    assert opened.config.kernels == kernels
    assert all(layer.kernels == KernelsConfig(tf32=False) for layer in opened.model.modules() if hasattr(layer, "kernels"))
    assert evaluate._run_config(run, []).kernels == KernelsConfig(tf32=False)
    assert evaluate._run_config(run, ["kernels.geglu=reference"]).kernels == KernelsConfig(tf32=False, geglu="reference")


def test_one_process_of_a_job_may_open_a_model_by_itself(tiny_run, monkeypatch):
    """Sampling during training runs on one rank: asking the others would hang the job."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None: 0)
    for name in ("broadcast_object_list", "gather_object", "all_gather_object"):
        monkeypatch.setattr(torch.distributed, name, lambda *args, name=name, **kwargs: pytest.fail(f"{name} was called"))
    assert open_trained(tiny_run).config == read_trained_config(tiny_run)[0]
    assert open_trained(tiny_run / "checkpoints" / "step_00000003").config.total_steps == 10_000


def test_a_checkpoint_of_this_moment_is_opened_without_reading_all_of_it(tiny_run, monkeypatch):
    checkpoint = CheckpointFolder(tiny_run).step_path(3)
    monkeypatch.setattr("pipeline.checkpoint.reader.hash_file", lambda path: pytest.fail(f"{path} was read whole"))
    assert open_trained(checkpoint, verify=False).origin.startswith("step 3")
    with pytest.raises(pytest.fail.Exception, match="read whole"):
        open_trained(checkpoint)


def test_configuration_is_read_without_the_weights_and_past_a_damaged_checkpoint(tiny_config, write_run, tmp_path):
    run = write_run(tmp_path / "run", tiny_config)
    write_run(run, dataclasses.replace(tiny_config, name="newer"), step=7)
    for file in (run / "checkpoints" / "step_00000007").glob("*.safetensors"):
        file.unlink()
    assert read_trained_config(run) == (dataclasses.replace(tiny_config, name="newer"), run)
    (run / "checkpoints" / "step_00000007" / "manifest.json").write_text("{")
    assert read_trained_config(run) == (tiny_config, run)
    assert "step 3" in open_trained(run).origin


def test_nothing_there_is_a_users_mistake(tmp_path):
    for path in (tmp_path / "no_run", tmp_path / "no.safetensors"):
        with pytest.raises(UserError):
            open_trained(path)
    (tmp_path / "text.safetensors").write_text("no")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        read_trained_config(tmp_path / "text.safetensors")
