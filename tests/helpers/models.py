# SPDX-License-Identifier: Apache-2.0
"""Small models of every naming family, and a way to feed them known gradients.

Sizes are odd on purpose: a flat ZeRO partition for two or three ranks then ends inside a head and
inside a row. Feeding replaces the forward of every module that owns parameters by
``carry + sum(parameter * G)``, so the gradient that reaches the engine through its own hooks is
exactly ``G``: a parity test then compares optimizers and nothing else.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from types import MethodType

import torch
from torch import Tensor, nn

STD = 0.02  # small weights: rounding of a weight must not hide an error of its update


# ------------------------------------------------------------------------------------ the models


def llama(**changes: object) -> nn.Module:
    """HF LLaMA: separate q/k/v, GQA, heads that tile the hidden size, untied output."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**{**hf_sizes(**sizes), **changes}))


def qwen3() -> nn.Module:
    """HF Qwen3: GQA, head_dim that is not hidden / heads, q/k norms, biases, odd hidden size."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 15, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
    return Qwen3ForCausalLM(Qwen3Config(**hf_sizes(**sizes), attention_bias=True))


def slim() -> nn.Module:
    """One Qwen3 layer whose q/k norms have two elements: three ranks can't all hold a part."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 9, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 2}
    return Qwen3ForCausalLM(Qwen3Config(**{**hf_sizes(**sizes), "num_hidden_layers": 1}))


def gpt2_conv1d() -> nn.Module:
    """HF GPT-2: Conv1D weights [in, out] with concatenated q/k/v columns, tied output."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=23, n_positions=7, n_embd=10, n_layer=1, n_head=2)
    return GPT2LMHeadModel(config)


def hf_sizes(**sizes: int) -> dict[str, object]:
    common = {
        "vocab_size": 37,
        "intermediate_size": 21,
        "num_hidden_layers": 2,
        "max_position_embeddings": 32,
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
    }
    return {**common, **sizes}


@dataclass
class NanoConfig:
    vocab_size: int = 29
    block_size: int = 11
    n_layer: int = 2
    n_head: int = 3
    n_embd: int = 15
    bias: bool = True


class CausalSelfAttention(nn.Module):
    """Causal attention whose c_attn holds q, k, v one after the other."""

    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        self.n_head, self.n_embd = config.n_head, config.n_embd
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = [
            part.view(batch, length, self.n_head, width // self.n_head).transpose(1, 2)
            for part in self.c_attn(x).split(width, dim=2)
        ]
        mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        return self.c_proj(mixed.transpose(1, 2).reshape(batch, length, width))


class NanoMLP(nn.Module):
    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd + 1, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd + 1, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(nn.functional.gelu(self.c_fc(x)))


class NanoLayer(nn.Module):
    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = NanoMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """nanoGPT's names: transformer.{wte,wpe,h.N,ln_f}, lm_head tied to wte."""

    def __init__(self, config: NanoConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or NanoConfig()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList(NanoLayer(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Mean next-token loss of ``tokens`` [batch, length], int64."""
        positions = torch.arange(tokens.shape[1] - 1, device=tokens.device)
        x = self.transformer["wte"](tokens[:, :-1]) + self.transformer["wpe"](positions)
        for layer in self.transformer["h"]:
            x = layer(x)
        logits = self.lm_head(self.transformer["ln_f"](x)).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


# ----------------------------------------------------------------------------------- the weights


def _generator(*key: object) -> torch.Generator:
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def small_weight(name: str, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The starting value of a parameter: depends on its name and (unsharded) shape only."""
    return STD * torch.randn(tuple(shape), generator=_generator("weight", name))


@torch.no_grad()
def set_small_weights(model: nn.Module) -> nn.Module:
    """Give every parameter ``small_weight``, norm weights included."""
    for name, parameter in model.named_parameters():
        parameter.copy_(small_weight(name, parameter.shape))
    return model


# --------------------------------------------------------------------------------- the gradients


@dataclass(frozen=True)
class GradientPlan:
    """Gradients made of few significant bits, so that every mean over ranks is exact.

    A share is ``total * integer * power of two`` with ``total = dp_size * micro_batches``; the
    mean of the shares is the sum of the integers. No order of adding and dividing, in fp32 or
    bf16, can round it. Powers of two differ by row, column and step, so a block that ends one row
    too late has another second moment.
    """

    dp_size: int
    micro_batches: int = 1
    dtype: torch.dtype = torch.float32
    seed: int = 0

    @property
    def total(self) -> int:
        return self.dp_size * self.micro_batches

    def _integers(self, name: str, shape: tuple[int, ...], step: int) -> Tensor:
        # The engine may add all dp_size-fold shares before it divides: 8 bits (bf16) or 24 (fp32).
        bound = (256 if self.dtype == torch.bfloat16 else 1 << 16) // (self.total * self.dp_size)
        size = (self.total, *shape)
        generator = _generator("gradient", self.seed, name, step)
        return torch.randint(-bound, bound + 1, size, generator=generator).float()

    def _scale(self, shape: tuple[int, ...], step: int) -> Tensor:
        power = torch.full(shape, -(step * 2) % 3 - (10 if self.dtype == torch.bfloat16 else 18))
        for axis, size in enumerate(shape):
            along = (torch.arange(size) * 7) % (5 if axis == 0 else 3)
            power -= along.view(-1, *[1] * (len(shape) - 1 - axis))
        return torch.exp2(power.float())

    def share(self, name: str, shape: tuple[int, ...], step: int, index: int) -> Tensor:
        """Gradient of share ``index = rank * micro_batches + micro_batch``, fp32."""
        return self.total * self._integers(name, shape, step)[index] * self._scale(shape, step)

    def mean(self, name: str, shape: tuple[int, ...], step: int) -> Tensor:
        """The gradient that the optimizer must see, fp32, exact."""
        return self._integers(name, shape, step).sum(0) * self._scale(shape, step)


class Feed:
    """Makes ``model()`` return a loss whose gradient is ``self.gradients[name]`` exactly.

    A parameter that ``gradients`` lacks takes no part in the loss. A tied parameter gets equal
    shares (halves are exact) through each of its owners.
    """

    def __init__(self, model: nn.Module) -> None:
        self.gradients: dict[str, Tensor] = {}
        self.names = {id(p): name for name, p in model.named_parameters()}
        self._owners: list[nn.Module] = []
        count: dict[int, int] = {}
        for module in model.modules():
            owned = [p for p in module.parameters(recurse=False)]
            for parameter in owned:
                count[id(parameter)] = count.get(id(parameter), 0) + 1
            if owned:
                self._owners.append(module)
        self._count = {self.names[key]: value for key, value in count.items()}
        for module in self._owners:
            owned = {key: self.names[id(p)] for key, p in module.named_parameters(recurse=False)}
            module.forward = MethodType(self._leaf_forward(owned), module)  # type: ignore[method-assign]
        model.forward = MethodType(self._model_forward, model)  # type: ignore[method-assign]

    def leave_out(self, module: nn.Module) -> None:
        """Let a module take no part in the forward pass."""
        self._owners.remove(module)

    def _leaf_forward(self, owned: dict[str, str]):
        def forward(module: nn.Module, carry: Tensor) -> Tensor:
            for key, name in owned.items():
                parameter = getattr(module, key)
                if parameter.requires_grad and name in self.gradients:
                    gradient = (self.gradients[name] / self._count[name]).to(parameter)
                    carry = carry + (parameter * gradient).sum().float()
            return carry

        return forward

    def _model_forward(self, model: nn.Module) -> Tensor:
        carry = torch.zeros((), requires_grad=True)
        for module in self._owners:
            carry = module(carry)
        return carry
