# SPDX-License-Identifier: Apache-2.0
"""Which model families are known without a rule: the last part of what `docs/support.md` claims; see `rows`."""

from tests.helpers.support_page.claims import SAME, Row, works
from tests.helpers.tables.adapters import ADAPTERS
from tests.helpers.tables.tower_models import MODELS

FAMILIES = "Model families of transformers, known without a rule (roles and blocks against tables written by hand)"
_DECODERS = "unit/tagging/test_families.py::test_every_parameter_is_what_the_model_code_makes_of_it"
_TEXT = "unit/tagging/test_text_families.py::test_every_parameter_is_what_the_model_code_makes_of_it"
_TOWERS = "unit/tagging/test_towers.py"
PEFT = "PEFT's adapters, known without a rule (roles and blocks against tables written by hand, and values)"
_ADAPTERS = "unit/tagging/test_adapters.py::test"
FROZEN = "Models of which a part is frozen (DeepSpeed)"


def _text(layout: str, *models: str) -> Row:
    return _tags(layout, *(f"{_TEXT}[{model}]" for model in models))


def _tags(layout: str, *tests: str) -> Row:
    """What the tests compare is a model's tags, which are made before there is an optimizer."""
    return works(FAMILIES, layout, *tests, lion=SAME, muon=SAME)


FAMILY_ROWS: tuple[Row, ...] = (
    _tags(
        "decoders: Llama, Mistral, Qwen, Gemma, Phi, OLMo, GLM, Falcon, BLOOM, GPT-NeoX, GPT-2, MPT, OPT, Mixtral, "
        "DeepSeek, GPT-OSS, Llama 4 and others",
        f"{_DECODERS}[*",
    ),
    _text("BERT, with its heads", "BertFor*", "BertLMHeadModel"),
    _text("RoBERTa, ModernBERT, its decoder", "RobertaFor*", "ModernBert*"),
    _text("DeBERTa, DeBERTa-v2 and v3", "DebertaFor*", "DebertaV2For*"),
    _text("ELECTRA, DistilBERT, ALBERT, MPNet", "ElectraFor*", "DistilBertFor*", "AlbertFor*", "MPNetFor*"),
    _text("T5, mT5, UMT5, LongT5", "T5For*", "MT5For*", "UMT5For*", "LongT5For*"),
    _text("BART, Pegasus", "BartFor*", "PegasusFor*"),
    _text("LFM2, LFM2-MoE", "Lfm2*"),
    _text("Gemma 3n", "Gemma3nForCausalLM"),
    _text("Nemotron-H", "NemotronHForCausalLM"),
    _text("Cohere with `use_qk_norm`", "CohereForCausalLM"),
    _tags(
        "linear attention, state spaces, recurrences: Qwen3-Next, Kimi Linear, MiniMax, OLMo Hybrid, Mamba 2, Jamba, "
        "Bamba, Granite 4, RecurrentGemma, RWKV, xLSTM",
        "unit/tagging/test_text_families.py::test_layers_without_softmax_attention_train_at_one_multiplier*",
        *(f"{_TEXT}[{model}]" for model in ("BambaForCausalLM", "GraniteMoeHybridForCausalLM")),
    ),
    _tags(
        "heads: sequence and token classification, question answering, rewards, values (TRL)",
        "unit/tagging/test_text_families.py::test_policies_with_value_and_reward_heads",
        *(f"{_TEXT}[{model}]" for model in ("LlamaFor*", "GPT2DoubleHeadsModel")),
    ),
    _tags(
        "BLOOM under AutoTP (head counts and shards; values are not compared)",
        "unit/tagging/test_autotp_heads.py::test_bloom_under_autotp",
    ),
    _tags("PyTorch's own layers (`nn.TransformerEncoder`)", "unit/tagging/test_owner_class.py::*"),
    _tags(
        f"towers and multimodal models: {', '.join(MODELS)}",
        f"{_TOWERS}::test_every_parameter_is_what_the_model_code_makes_of_it*",
    ),
    works(FAMILIES, "order of rows in fused vision attention", f"{_TOWERS}::test_fused_attention_of_towers*"),
    works(
        PEFT,
        "; ".join(ADAPTERS),
        f"{_ADAPTERS}_every_trained_parameter*",
        f"{_ADAPTERS}_updates_of_an_adapter*{{O}}*",
    ),
    *(
        works(FROZEN, f"{what}, ZeRO-{stage}", f"hosts/huggingface/test_frozen_parts.py::*[{case}-z{stage}-{{o}}]")
        for case, what in (("dora", "a LLaMA with DoRA"), ("llava", "a LLaVA with its tower frozen"))
        for stage in (2, 3)
    ),
)
