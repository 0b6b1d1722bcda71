"""The official checkpoint layout (big_vision, models/proj/jetformer) to this project's names and back.

Official arrays are keyed by `/`-joined names; the layers of the flow and of the decoder are stacked on axis 0, kernels are
[in, out], heads have axes of their own, and permutations are 0/1 matrices W with W[p[j], j] = 1.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs.errors import UserError
from model.config import DecoderConfig, FlowConfig, GmmConfig, ImageConfig, JetFormerConfig, ObjectiveConfig, TextConfig

Arrays = Mapping[str, np.ndarray]

CHANNEL_MASKS = "params_adaptor/channel_coupling_masks-FREEZE_ME"
SPATIAL_MASKS = "params_adaptor/spatial_coupling_masks-FREEZE_ME"
_DNN = "params_adaptor/couplings/dnn"
_ATTENTION = "MultiHeadDotProductAttention_0"
_LAYERS = "decoder/layers"


def config_from_official(values: Mapping[str, Any]) -> JetFormerConfig:
    """The configuration of a model described in the reference's terms (the `config_json` of a parity fixture).

    Args:
        values: resolution, patch_size, soft_dim, num_mixtures, text_len, vocab_size, bos_id, boi_id, nolabel_id,
            text_loss_weight, stop_grad_flow_on_image_prefix, flow{depth, block_depth, emb_dim, num_heads, kinds},
            decoder{width, depth, mlp_dim, num_heads, num_kv_heads, head_dim, untie_output_vocab, num_vocab_repeats}.
    """
    flow, decoder = values["flow"], values["decoder"]
    return JetFormerConfig(
        image=ImageConfig(resolution=values["resolution"], channels=values.get("channels", 3), patch_size=values["patch_size"]),
        text=TextConfig(
            length=values["text_len"],
            num_pieces=values["vocab_size"] - 3,
            special_ids=(values["bos_id"], values["boi_id"], values["nolabel_id"]),
            num_repeats=decoder.get("num_vocab_repeats", 1),
            tie_logits=not decoder.get("untie_output_vocab", False),
        ),
        flow=FlowConfig(
            depth=flow["depth"],
            block_depth=flow["block_depth"],
            width=flow["emb_dim"],
            num_heads=flow["num_heads"],
            kinds=tuple(flow.get("kinds", ("channels",))),
        ),
        decoder=DecoderConfig(
            width=decoder["width"],
            depth=decoder["depth"],
            mlp_dim=decoder["mlp_dim"],
            num_heads=decoder["num_heads"],
            num_kv_heads=decoder.get("num_kv_heads", 1),
            head_dim=decoder["head_dim"],
            dropout=decoder.get("dropout", 0.0),
        ),
        gmm=GmmConfig(num_mixtures=values["num_mixtures"], soft_dim=values["soft_dim"]),
        objective=ObjectiveConfig(
            text_loss_weight=values.get("text_loss_weight", 0.0025),
            loss_on_prefix=values.get("loss_on_prefix", False),
            stop_grad_flow_on_image_prefix=values.get("stop_grad_flow_on_image_prefix", True),
        ),
    )


def from_official(arrays: Arrays, config: JetFormerConfig) -> dict[str, Tensor]:
    """Official arrays -> a state dict for `JetFormer(config)`, permutations included.

    Raises:
        UserError: an array is missing, or does not have the shape that the configuration says.
    """
    names = _OfficialArrays(arrays)
    state: dict[str, np.ndarray] = {}
    for index in range(config.flow.depth):
        layer = _coupling_from_official(names.layer(index, config.flow.depth), config)
        state |= {f"couplings.{index}.{name}": value for name, value in layer.items()}
        state[f"couplings.{index}.permutation"] = _permutation(names, index)
    for index in range(config.decoder.depth):
        layer = _block_from_official(names.layer(index, config.decoder.depth), config)
        state |= {f"blocks.{index}.{name}": value for name, value in layer.items()}
    state |= _ends_from_official(names, config)
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in state.items()}


def to_official(state: Mapping[str, Tensor], config: JetFormerConfig) -> dict[str, np.ndarray]:
    """The inverse of `from_official`; works on gradients too (without permutations, the masks are left out)."""
    arrays = {name: _to_numpy(value) for name, value in state.items()}
    couplings = [_coupling_to_official(_sub(arrays, f"couplings.{i}."), config) for i in range(config.flow.depth)]
    blocks = [_block_to_official(_sub(arrays, f"blocks.{i}."), config) for i in range(config.decoder.depth)]
    official = {name: np.stack([layer[name] for layer in layers]) for layers in (couplings, blocks) if layers for name in layers[0]}
    if config.flow.depth and "couplings.0.permutation" in arrays:
        official |= _masks([arrays[f"couplings.{i}.permutation"] for i in range(config.flow.depth)], config)
    return official | _ends_to_official(arrays, config)


def _to_numpy(value: Tensor) -> np.ndarray:
    value = value.detach().cpu()
    return (value if value.dtype == torch.int64 else value.float()).numpy()


class _OfficialArrays:
    """Named access with an error that says what is missing."""

    def __init__(self, arrays: Arrays, pick: Callable[[np.ndarray, str], np.ndarray] | None = None) -> None:
        self.arrays = arrays
        self.pick = pick or (lambda value, name: value)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.arrays:
            raise UserError(
                "the checkpoint lacks a parameter",
                got=f"no {name!r} among {len(self.arrays)} arrays",
                expected="the layout of big_vision's JetFormer",
                fix="check that the configuration describes this checkpoint",
            )
        return self.pick(np.asarray(self.arrays[name]), name)

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def layer(self, index: int, depth: int) -> "_OfficialArrays":
        """Entry `index` of arrays that stack `depth` layers."""

        def pick(value: np.ndarray, name: str) -> np.ndarray:
            if len(value) != depth:
                raise UserError(f"{name} stacks another number of layers", got=len(value), expected=depth, fix="correct the configured depth")
            return value[index]

        return _OfficialArrays(self.arrays, pick)


def _sub(arrays: Arrays, prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def _permutation(names: _OfficialArrays, index: int) -> np.ndarray:
    for masks in (CHANNEL_MASKS, SPATIAL_MASKS):
        if masks in names and names[masks][index].any():
            return names[masks][index].argmax(axis=0).astype(np.int64)
    raise UserError(f"coupling {index} of the checkpoint has no permutation", expected=f"a 0/1 matrix in {CHANNEL_MASKS} or {SPATIAL_MASKS}")


def _masks(permutations: list[np.ndarray], config: JetFormerConfig) -> dict[str, np.ndarray]:
    depth, channels, tokens = config.flow.depth, config.image.token_dim, config.image.num_tokens
    masks = {CHANNEL_MASKS: np.zeros((depth, channels, channels), np.float32), SPATIAL_MASKS: np.zeros((depth, tokens, tokens), np.float32)}
    for index, permutation in enumerate(permutations):
        spatial = config.flow.kinds[index % len(config.flow.kinds)] != "channels"
        masks[SPATIAL_MASKS if spatial else CHANNEL_MASKS][index, permutation, np.arange(len(permutation))] = 1
    return masks


def _coupling_from_official(names: _OfficialArrays, config: JetFormerConfig) -> dict[str, np.ndarray]:
    width = config.flow.width
    state = {"dnn.posemb": names[f"{_DNN}/posemb"]}
    for ours, official in _coupling_dense(config).items():
        state[f"{ours}.weight"], state[f"{ours}.bias"] = names[f"{official}/kernel"].T, names[f"{official}/bias"]
    for ours, official in _coupling_norms(config).items():
        state[f"{ours}.weight"], state[f"{ours}.bias"] = names[f"{official}/scale"], names[f"{official}/bias"]
    for block in range(config.flow.block_depth):
        official, ours = f"{_DNN}/vit/encoderblock_{block}/{_ATTENTION}", f"dnn.blocks.{block}.attention"
        parts = ("query", "key", "value")
        state[f"{ours}.qkv.weight"] = np.concatenate([names[f"{official}/{part}/kernel"].reshape(width, width).T for part in parts])
        state[f"{ours}.qkv.bias"] = np.concatenate([names[f"{official}/{part}/bias"].reshape(width) for part in parts])
        state[f"{ours}.out.weight"] = names[f"{official}/out/kernel"].reshape(width, width).T
        state[f"{ours}.out.bias"] = names[f"{official}/out/bias"]
    return state


def _coupling_to_official(state: Arrays, config: JetFormerConfig) -> dict[str, np.ndarray]:
    width, heads = config.flow.width, config.flow.num_heads
    official = {f"{_DNN}/posemb": state["dnn.posemb"]}
    for ours, name in _coupling_dense(config).items():
        official[f"{name}/kernel"], official[f"{name}/bias"] = state[f"{ours}.weight"].T, state[f"{ours}.bias"]
    for ours, name in _coupling_norms(config).items():
        official[f"{name}/scale"], official[f"{name}/bias"] = state[f"{ours}.weight"], state[f"{ours}.bias"]
    for block in range(config.flow.block_depth):
        name, ours = f"{_DNN}/vit/encoderblock_{block}/{_ATTENTION}", f"dnn.blocks.{block}.attention"
        weights, biases = np.split(state[f"{ours}.qkv.weight"], 3), np.split(state[f"{ours}.qkv.bias"], 3)
        for part, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            official[f"{name}/{part}/kernel"] = weight.T.reshape(width, heads, width // heads)
            official[f"{name}/{part}/bias"] = bias.reshape(heads, width // heads)
        official[f"{name}/out/kernel"] = state[f"{ours}.out.weight"].T.reshape(heads, width // heads, width)
        official[f"{name}/out/bias"] = state[f"{ours}.out.bias"]
    return official


def _coupling_dense(config: JetFormerConfig) -> dict[str, str]:
    """Dense layers with a plain [in, out] kernel: our name -> official name."""
    names = {"dnn.init_proj": f"{_DNN}/init_proj", "dnn.final_proj": f"{_DNN}/final_proj"}
    for block in range(config.flow.block_depth):
        for ours, official in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
            names[f"dnn.blocks.{block}.{ours}"] = f"{_DNN}/vit/encoderblock_{block}/MlpBlock_0/{official}"
    return names


def _coupling_norms(config: JetFormerConfig) -> dict[str, str]:
    names = {"dnn.norm": f"{_DNN}/vit/encoder_norm"}
    for block in range(config.flow.block_depth):
        for ours, official in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_1")):
            names[f"dnn.blocks.{block}.{ours}"] = f"{_DNN}/vit/encoderblock_{block}/{official}"
    return names


def _heads_to_rows(weight: np.ndarray) -> np.ndarray:
    """[heads, D, head_dim] -> [heads * head_dim, D]."""
    return weight.transpose(0, 2, 1).reshape(-1, weight.shape[1])


def _rows_to_heads(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """[heads * head_dim, D] -> [heads, D, head_dim]."""
    return weight.reshape(-1, head_dim, weight.shape[1]).transpose(0, 2, 1)


def _block_from_official(names: _OfficialArrays, config: JetFormerConfig) -> dict[str, np.ndarray]:
    if f"{_LAYERS}/attn/qkv_einsum/w" in names:  # as many key-value heads as query heads
        q, k, v = names[f"{_LAYERS}/attn/qkv_einsum/w"]
    else:
        q = names[f"{_LAYERS}/attn/q_einsum/w"]
        k, v = names[f"{_LAYERS}/attn/kv_einsum/w"]
    out = names[f"{_LAYERS}/attn/attn_vec_einsum/w"]
    gate, up = names[f"{_LAYERS}/mlp/gating_einsum"]
    return {
        "norm1.scale": names[f"{_LAYERS}/pre_attention_norm/scale"],
        "norm2.scale": names[f"{_LAYERS}/pre_ffw_norm/scale"],
        "attn.q.weight": _heads_to_rows(q),
        "attn.k.weight": _heads_to_rows(k),
        "attn.v.weight": _heads_to_rows(v),
        "attn.out.weight": out.reshape(-1, out.shape[-1]).T,
        "mlp.gate.weight": gate.T,
        "mlp.up.weight": up.T,
        "mlp.down.weight": names[f"{_LAYERS}/mlp/linear"].T,
    }


def _block_to_official(state: Arrays, config: JetFormerConfig) -> dict[str, np.ndarray]:
    head_dim = config.decoder.head_dim
    q, k, v = (_rows_to_heads(state[f"attn.{name}.weight"], head_dim) for name in "qkv")
    fused = config.decoder.num_kv_heads == config.decoder.num_heads
    attention = {"qkv_einsum/w": np.stack([q, k, v])} if fused else {"q_einsum/w": q, "kv_einsum/w": np.stack([k, v])}
    return {
        **{f"{_LAYERS}/attn/{name}": value for name, value in attention.items()},
        f"{_LAYERS}/attn/attn_vec_einsum/w": state["attn.out.weight"].T.reshape(-1, head_dim, config.decoder.width),
        f"{_LAYERS}/mlp/gating_einsum": np.stack([state["mlp.gate.weight"].T, state["mlp.up.weight"].T]),
        f"{_LAYERS}/mlp/linear": state["mlp.down.weight"].T,
        f"{_LAYERS}/pre_attention_norm/scale": state["norm1.scale"],
        f"{_LAYERS}/pre_ffw_norm/scale": state["norm2.scale"],
    }


def _ends_from_official(names: _OfficialArrays, config: JetFormerConfig) -> dict[str, np.ndarray]:
    mixtures, soft_dim = config.gmm.num_mixtures, config.gmm.soft_dim
    kernel, bias = names["LogitsImage/kernel"].T, names["LogitsImage/bias"]
    if len(bias) != mixtures * (1 + 2 * soft_dim):
        raise UserError(
            "the checkpoint's image head has another shape",
            got=f"{len(bias)} outputs",
            expected=f"{mixtures} mixtures * (1 + 2 * {soft_dim} soft channels)",
            fix="correct gmm.num_mixtures or gmm.soft_dim",
        )
    state = {
        "embed.text.weight": names["EmbedText/embedding"],
        "embed.image.weight": names["EmbedImage/kernel"].T,
        "embed.image.bias": names["EmbedImage/bias"],
        "head.norm.scale": names["decoder/final_norm/scale"],
        "head.gmm.logit_weight": kernel[:mixtures],
        "head.gmm.logit_bias": bias[:mixtures],
        "head.gmm.component_weight": kernel[mixtures:].reshape(mixtures, 2, soft_dim, -1),
        "head.gmm.component_bias": bias[mixtures:].reshape(mixtures, 2, soft_dim),
    }
    if not config.text.tie_logits:
        state["head.text.weight"], state["head.text.bias"] = names["LogitsText/kernel"].T, names["LogitsText/bias"]
    return state


def _ends_to_official(state: Arrays, config: JetFormerConfig) -> dict[str, np.ndarray]:
    width = config.decoder.width
    components, component_bias = state["head.gmm.component_weight"].reshape(-1, width), state["head.gmm.component_bias"].reshape(-1)
    official = {
        "EmbedText/embedding": state["embed.text.weight"],
        "EmbedImage/kernel": state["embed.image.weight"].T,
        "EmbedImage/bias": state["embed.image.bias"],
        "decoder/final_norm/scale": state["head.norm.scale"],
        "LogitsImage/kernel": np.concatenate([state["head.gmm.logit_weight"], components]).T,
        "LogitsImage/bias": np.concatenate([state["head.gmm.logit_bias"], component_bias]),
    }
    if not config.text.tie_logits:
        official |= {"LogitsText/kernel": state["head.text.weight"].T, "LogitsText/bias": state["head.text.bias"]}
    return official
