"""The packed weights of a Llama-like decoder: products that read the same input are fused into one."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from app.worker.execution.native.packed_linear import NativeLinear


class LayerWeights(NamedTuple):
    """The linear layers of one decoder layer."""

    qkv: NativeLinear
    o: NativeLinear
    gate_up: NativeLinear
    down: NativeLinear


class DecoderWeights:
    """Packs a model's linear layers one after the other and frees their own weights: at no time are there two models.

    The model's own forward pass cannot run until `restore`.
    """

    def __init__(self, model: Any) -> None:
        """Args: model: a Llama-like model whose linear layers are ordinary ones."""
        self._model = model
        self._packed: list[tuple[NativeLinear, list[nn.Linear]]] = []
        self._users = 0
        self.layers: list[LayerWeights] = []

    @torch.inference_mode()
    def pack(self) -> None:
        """Pack all layers, once for all executors that share them; may raise anything, to be followed by `restore`."""
        self._users += 1
        if self._packed:
            return
        for layer in self._model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            self.layers.append(
                LayerWeights(
                    qkv=self._pack(attention.q_proj, attention.k_proj, attention.v_proj),
                    o=self._pack(attention.o_proj),
                    gate_up=self._pack(mlp.gate_proj, mlp.up_proj),
                    down=self._pack(mlp.down_proj),
                )
            )
        self.lm_head = self._pack(self._model.get_output_embeddings())

    @torch.inference_mode()
    def restore(self) -> None:
        """Give the model its weights back after the last `pack`, bit for bit unless float16 stored them."""
        self._users -= 1
        if self._users > 0:
            return
        while self._packed:
            packed, linears = self._packed.pop()
            weights = torch.split(packed.unpacked_weight(), [linear.out_features for linear in linears])
            for linear, weight in zip(linears, weights, strict=True):
                if linear.weight.numel() == 0:
                    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        self.layers.clear()

    def _pack(self, *linears: nn.Linear) -> NativeLinear:
        packed = NativeLinear(linears[0] if len(linears) == 1 else _concatenate(linears))
        self._packed.append((packed, list(linears)))
        for linear in linears:
            # A tied embedding still needs the weights, so that nothing would be freed.
            if linear.weight is not self._model.get_input_embeddings().weight:
                linear.weight = nn.Parameter(torch.empty(0, dtype=linear.weight.dtype), requires_grad=False)
        return packed


def _concatenate(linears: tuple[nn.Linear, ...]) -> nn.Linear:
    """Return one layer that computes the outputs of several, one after the other."""
    fused = nn.Linear(linears[0].in_features, sum(linear.out_features for linear in linears), device="meta")
    fused.weight = nn.Parameter(torch.cat([linear.weight for linear in linears]), requires_grad=False)
    fused.bias = _concatenated_bias(linears)
    return fused


def _concatenated_bias(linears: tuple[nn.Linear, ...]) -> Any:
    biases: list[Tensor | None] = [linear.bias for linear in linears]
    if all(bias is None for bias in biases):
        return None
    filled = [
        linear.weight.new_zeros(linear.out_features) if bias is None else bias
        for linear, bias in zip(linears, biases, strict=True)
    ]
    return nn.Parameter(torch.cat(filled), requires_grad=False)
