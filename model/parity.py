"""Compares this model with recorded outputs and gradients of the official code.

    python -m model.parity FIXTURE.npz ...

A fixture holds `config_json`, `params/*` (official names), `in/*`, `out/*`, `loss` and `grads/*` of one forward and backward
pass. Prints the relative error (norm of difference over norm) of the loss, of every output and of the worst gradients.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from configs.errors import UserError
from model.batch import Batch, NoiseSettings, make_batch
from model.config import JetFormerConfig
from model.convert.big_vision import CHANNEL_MASKS, config_from_official, from_official, to_official
from model.jetformer import JetFormer
from model.sequence import image_slice, text_slice
from model.state import State

OUTPUT_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
ZERO_GRADIENT_TOLERANCE = 1e-8
"""Absolute, for gradients that are zero in exact arithmetic: attention key biases, which softmax does not see."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One compared quantity."""

    name: str
    error: float
    tolerance: float
    absolute: bool = False

    @property
    def agrees(self) -> bool:
        """Within tolerance; a NaN is not."""
        return self.error <= self.tolerance


def build_official(config_values: Mapping[str, object], params: Mapping[str, np.ndarray]) -> JetFormer:
    """A model from the reference's configuration and parameters (`params/*` without the prefix)."""
    if "channels" not in config_values and CHANNEL_MASKS in params:
        # The reference's configuration does not name the image channels; its channel permutations are as wide as a patch.
        patch_size = cast(int, config_values["patch_size"])
        config_values = {**config_values, "channels": params[CHANNEL_MASKS].shape[-1] // patch_size**2}
    config = config_from_official(config_values)
    model = JetFormer(config)
    missing, unexpected = model.load_state_dict(from_official(params, config), strict=False)
    assert not missing, missing
    assert not unexpected, unexpected
    return model


def run_official(model: JetFormer, inputs: Mapping[str, np.ndarray]) -> tuple[dict[str, Tensor], Tensor]:
    """`in/*` (without the prefix) -> (`out/*`, differentiable `loss`), rows in the order given.

    Args:
        inputs: image_u8 [B, H, W, channels], dequant_u in [0, 1), text [B, T], text_mask, text_loss, text_first [B],
            drop_prefix [B], input_noise [B, I, d].
    """
    values = {name: torch.from_numpy(np.asarray(value)) for name, value in inputs.items()}
    text_first = values["text_first"].bool()
    batch = make_batch(
        model.config,
        positions=torch.arange(len(text_first)),
        text=values["text"].long(),
        text_mask=values["text_mask"].bool(),
        text_loss=values["text_loss"].bool(),
        text_first=text_first,
        drop_prefix=values["drop_prefix"].bool(),
        image=values["image_u8"],
        dequantisation=values["dequant_u"],
        input_noise=values["input_noise"],
        noise=NoiseSettings(seed=0),
        score_all=True,
        log_stats=False,
    )
    batch.valid_text_fraction = float((~batch.drop_prefix).float().mean())
    state = model(batch)
    unsort = torch.argsort(torch.argsort((~text_first).long(), stable=True))
    outputs = {name: value[unsort] for name, value in _official_outputs(model, batch, state).items()}
    return outputs, state.total_loss()


def _official_outputs(model: JetFormer, batch: Batch, state: State) -> dict[str, Tensor]:
    """Per-example results under the names and layouts of the fixtures, in the order of the batch."""
    config, outputs = model.config, state.outputs
    assert outputs is not None
    assert state.hidden is not None
    hidden, boundary = state.hidden, batch.num_text_first
    image_hidden, text_hidden = (
        torch.cat([hidden[:boundary, pick(config, text_first=True)], hidden[boundary:, pick(config, text_first=False)]])
        for pick in (image_slice, text_slice)
    )
    gmm = model.head.gmm
    components = functional.linear(image_hidden, gmm.component_weight.flatten(0, 2), gmm.component_bias.flatten())
    if model.head.text is None:
        text_logits = functional.linear(text_hidden, model.embed.text.weight)
    else:
        text_logits = model.head.text.logits(text_hidden)
    nll_text = functional.cross_entropy(text_logits.transpose(1, 2), batch.text, reduction="none")
    bits = (outputs["soft_nll"].sum(1) + outputs["rest_nll"] - outputs["logdet"]) / (config.image.num_subpixels * np.log(2))
    return {
        "z": outputs["z"],
        "logdet": outputs["logdet"],
        "rest_nll": outputs["rest_nll"],
        "soft_nll": outputs["soft_nll"],
        "text_logits": text_logits,
        "image_logits": torch.cat([gmm.mixture_logits(image_hidden), components], dim=-1),
        "nll_text": (nll_text * batch.text_loss).sum(1) / batch.text_loss.sum(1).clamp(min=1),
        "nll_image": bits + np.log2(127.5),
    }


def compare(path: Path) -> list[Comparison]:
    """Every comparison that a fixture allows: loss, outputs, round trip of the flow, gradients.

    Raises:
        UserError: the file is not a fixture.
    """
    try:
        with np.load(path) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the fixture {path}", got=str(error), expected="an .npz file") from None
    if "config_json" not in arrays or "loss" not in arrays:
        raise UserError(f"{path} is not a parity fixture", got=f"{len(arrays)} arrays", expected="config_json, loss, in/*, out/*, params/*, grads/*")

    def group(prefix: str) -> dict[str, np.ndarray]:
        return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}

    model = build_official(json.loads(str(arrays["config_json"])), group("params/"))
    outputs, loss = run_official(model, group("in/"))
    loss.backward()
    expected = group("out/")
    expected.pop("inverse_max_abs_err", None)  # the reference's own round-trip error; ours is measured below
    results = [Comparison("loss", relative_error(loss.detach().numpy(), arrays["loss"]), OUTPUT_TOLERANCE)]
    for name, value in sorted(expected.items()):
        results.append(Comparison(f"out/{name}", relative_error(outputs[name].detach().numpy(), value), OUTPUT_TOLERANCE))
    results.append(Comparison("flow inverse(forward(x)) - x", _round_trip_error(model, outputs["z"]), OUTPUT_TOLERANCE))
    return results + _compare_gradients(model, group("grads/"))


def _compare_gradients(model: JetFormer, expected: Mapping[str, np.ndarray]) -> list[Comparison]:
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    official = to_official(gradients, model.config)
    results = []
    for name, value in expected.items():
        if name.endswith("FREEZE_ME"):
            continue
        if name.endswith("key/bias") or not value.any():
            error = float(np.abs(official[name] - value).max())
            results.append(Comparison(f"grads/{name}", error, ZERO_GRADIENT_TOLERANCE, absolute=True))
        else:
            results.append(Comparison(f"grads/{name}", relative_error(official[name], value), GRADIENT_TOLERANCE))
    return results


def _round_trip_error(model: JetFormer, latents: Tensor) -> float:
    with torch.no_grad():
        pixels = model.decode(latents)
        return relative_error(model.encode(pixels)[0].numpy(), latents.detach().numpy())


def relative_error(value: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference over norm of the expectation, in float64; infinite where shapes differ."""
    if value.shape != expected.shape:
        return float("inf")
    difference = np.linalg.norm(value.astype(np.float64).ravel() - expected.astype(np.float64).ravel())
    return float(difference / max(np.linalg.norm(expected.astype(np.float64).ravel()), 1e-30))


def model_config(path: Path) -> JetFormerConfig:
    """The configuration that a fixture describes."""
    with np.load(path) as archive:
        return config_from_official(json.loads(str(archive["config_json"])))


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the comparison of each fixture; exit code 1 if anything is beyond tolerance."""
    parser = argparse.ArgumentParser(prog="python -m model.parity", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("fixtures", nargs="+", type=Path, metavar="FIXTURE.npz")
    agrees = True
    for path in parser.parse_args(argv).fixtures:
        try:
            results = compare(path)
        except UserError as error:
            sys.stderr.write(f"{error}\n")
            return 2
        gradients = sorted((r for r in results if r.name.startswith("grads/")), key=lambda r: r.error / r.tolerance, reverse=True)
        shown = [r for r in results if not r.name.startswith("grads/")] + gradients[:5]
        sys.stdout.write(f"{path} ({len(gradients)} gradients, the five worst shown)\n")
        for result in shown:
            verdict = "ok" if result.agrees else "BEYOND TOLERANCE"
            kind = "absolute" if result.absolute else "relative"
            sys.stdout.write(f"  {result.name:<78} {kind} {result.error:.2e}  tolerance {result.tolerance:.0e}  {verdict}\n")
        agrees = agrees and all(r.agrees for r in results)
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
