# SPDX-License-Identifier: Apache-2.0
"""What older releases of DeepSpeed lack is taken as they do it, or refused with the release to install."""

import re
from types import SimpleNamespace

import pytest
from torch import nn

from tests.helpers import ROOT

pytest.importorskip("deepspeed", reason="the check is made where DeepSpeed is imported")
from deepspeed.checkpoint import constants

from ds_blockwise.hosts.deepspeed import releases
from ds_blockwise.hosts.deepspeed.autotp import AUTOTP_MARK, check_marks
from ds_blockwise.hosts.deepspeed.checkpoint import universal

OLDEST = ".".join(map(str, releases.OLDEST))


@pytest.mark.parametrize("version", ["0.9.5", "0.16.9", "0.18.5", "0.18.0+cpu"])
def test_an_old_release_is_refused(version):
    """The first error would name something in its source, or come when a run is resumed."""
    with pytest.raises(ImportError, match=rf"DeepSpeed 0\.\S+ is too old.*'deepspeed>={re.escape(OLDEST)},<0\.20'"):
        releases.check_release(version)


@pytest.mark.parametrize("version", [OLDEST, "0.19.8", "0.20.0", "1.0.0+abc"])
def test_a_later_release_is_taken(version):
    """What it lacks is looked for by name."""
    releases.check_release(version)


def test_pip_is_told_the_same():
    assert f'"deepspeed>={OLDEST},<0.20"' in (ROOT / "setup.py").read_text(encoding="utf-8")


def test_a_release_without_the_choice_computes_the_norm():
    """An engine without the method would stop every run, or the refusal be lost where there is one."""
    assert releases.computes_norm(SimpleNamespace())
    assert not releases.computes_norm(SimpleNamespace(zero_compute_grad_norm=lambda: False))


def model_with(mark: dict[str, object] | None) -> nn.Module:
    model = nn.Linear(2, 2)
    if mark is not None:
        setattr(model.weight, AUTOTP_MARK, mark)
    return model


def test_autotp_that_does_not_say_its_parts_is_refused():
    """Blocks would be cut at dim / ranks, which is wrong where heads do not divide, or a KeyError shown."""
    marked = {"partition_type": "row", "partition_dim": 1, "logical_shape": (2, 2), "replicated": False}  # 0.18.9
    refused = r'AutoTP of DeepSpeed 0\.18\.\d .*Install deepspeed>=0\.19\.6, or remove "tensor_parallel"'
    with pytest.raises(ValueError, match=refused):
        check_marks(model_with(marked), "0.18.9")
    parts = {"original_shape": None, "sub_param_shard_widths": None, "partition_sizes": (1, 1), "conversion": {}}
    check_marks(model_with(marked | parts), "0.19.6")
    check_marks(model_with(None), "0.18.9")
    layer = model_with(None)
    vars(layer)["tp_world_size"] = 2  # 0.18.8 marks nothing
    with pytest.raises(ValueError, match=refused):
        check_marks(nn.Sequential(layer), "0.18.8")


def test_a_converter_without_a_list_of_the_unsupported_stops(monkeypatch):
    """It would join wrongly without a word. Two patterns that match one name stop it, and are in its error."""
    monkeypatch.setattr(universal, "_UNSUPPORTED", None)
    reason = "its shards (of Q) differ; use ds-blockwise convert"
    info = universal._stopped({"replicated": 1}, {"layer.weight$": reason})
    patterns = info[constants.TP_REPLICATED_PARAMETER_PATTERNS]
    assert len(set(patterns)) == 2
    assert all(re.match(pattern, "model.layers.0.mlp.weight") for pattern in patterns)
    assert all("its shards (of Q] differ; use ds-blockwise convert" in pattern for pattern in patterns)
