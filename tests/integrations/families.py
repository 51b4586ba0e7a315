"""Small random models of transformers, one of each family of experts, and what goes into them."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", minversion="5.0")

VOCABULARY, EXPERTS, CHOICES = 31, 4, 2
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 12,
    "intermediate_size": 20,
    "moe_intermediate_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "num_experts_per_tok": CHOICES,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {
    "q_lora_rank": None,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 6,
    "num_key_value_heads": 2,
}
DEEPSEEK = LATENT | {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 4}
MAMBA = {"ssm_state_size": 4, "mamba_num_heads": 2, "mamba_head_dim": 6, "n_groups": 1, "chunk_size": 4}


class Family(NamedTuple):
    model: str  # the name of its class
    sizes: dict[str, Any]
    fused: bool  # whether one op does all of its experts' work


FAMILIES = {
    "mixtral": Family("MixtralForCausalLM", {"num_local_experts": EXPERTS}, True),
    "mixtral-gelu": Family("MixtralForCausalLM", {"num_local_experts": EXPERTS, "hidden_act": "gelu"}, True),
    "mixtral-tanh": Family(
        "MixtralForCausalLM", {"num_local_experts": EXPERTS, "hidden_act": "gelu_pytorch_tanh"}, False
    ),
    "qwen2-moe": Family(
        "Qwen2MoeForCausalLM", {"num_experts": EXPERTS, "shared_expert_intermediate_size": 8, "head_dim": None}, True
    ),
    "qwen3-moe": Family("Qwen3MoeForCausalLM", {"num_experts": EXPERTS, "norm_topk_prob": True}, True),
    "olmoe": Family("OlmoeForCausalLM", {"num_experts": EXPERTS}, True),
    "deepseek-v2": Family("DeepseekV2ForCausalLM", DEEPSEEK, True),
    "deepseek-v3": Family("DeepseekV3ForCausalLM", DEEPSEEK | {"n_group": 2, "topk_group": 2}, True),
    "gpt-oss": Family(
        "GptOssForCausalLM",
        {
            "num_local_experts": EXPERTS,
            "swiglu_limit": 0.5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        False,
    ),
    "nemotron-h": Family(
        "NemotronHForCausalLM",
        MAMBA
        | {
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
            "n_routed_experts": EXPERTS,
            "moe_shared_expert_intermediate_size": 8,
        },
        False,
    ),
    "aria": Family("AriaTextForCausalLM", {"moe_num_experts": EXPERTS, "moe_topk": CHOICES}, True),
    "muse-spark": Family("MuseSparkTextModel", {"num_local_experts": EXPERTS, "moe_hidden_size": 8}, False),
}


def make(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model in evaluation mode, with weights so large that the experts matter to its result."""
    torch.manual_seed(0)
    model_class = getattr(transformers, FAMILIES[name].model, None) or muse_spark()
    sizes = COMMON | FAMILIES[name].sizes
    model = model_class(model_class.config_class(**{k: v for k, v in sizes.items() if v is not None or "lora" in k}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def muse_spark() -> type[nn.Module]:
    """Which transformers exports as a part of a larger model alone."""
    from transformers.models.muse_spark import modeling_muse_spark

    return modeling_muse_spark.MuseSparkTextModel


def tokens(batch: int = 3, length: int = 7) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def experts_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "_is_expert_parallel")]
