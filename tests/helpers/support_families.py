# SPDX-License-Identifier: Apache-2.0
"""What `docs/support.md` claims of towers, multimodal models and PEFT's adapters; see `support`."""

from tests.helpers.support import Row, works
from tests.helpers.tables.adapters import ADAPTERS
from tests.helpers.tables.tower_models import MODELS

KNOWN = "Known without a rule: towers, multimodal models, PEFT (tags against tables by hand)"
_TOWERS = "unit/tagging/test_towers.py"
_ADAPTERS = "unit/tagging/test_adapters.py::test"

ROWS: tuple[Row, ...] = (
    works(KNOWN, "; ".join(MODELS), f"{_TOWERS}::test_every_parameter_is_what_the_model_code_makes_of_it*"),
    works(KNOWN, "order of rows in fused vision attention", f"{_TOWERS}::test_fused_attention_of_towers*"),
    works(
        KNOWN, "; ".join(ADAPTERS), f"{_ADAPTERS}_every_trained_parameter*", f"{_ADAPTERS}_updates_of_an_adapter*{{O}}*"
    ),
    *(
        works(KNOWN, f"{what}, ZeRO-{stage}", f"hosts/huggingface/test_frozen_parts.py::*[{case}-z{stage}-{{o}}]")
        for case, what in (("dora", "DoRA on a LLaMA"), ("llava", "LLaVA with its tower frozen"))
        for stage in (2, 3)
    ),
)
