# SPDX-License-Identifier: Apache-2.0
"""Releases of DeepSpeed that are known to fail are named, with the one to install."""

import pytest

from tests.helpers import ROOT

pytest.importorskip("deepspeed", reason="the check is made where DeepSpeed is imported")
from ds_blockwise.hosts.deepspeed.register import check_release


@pytest.mark.parametrize("version", ["0.16.9", "0.18.9", "0.19.6", "0.19.0+cpu"])
def test_an_old_release_is_refused(version):
    """The first error would name a constant of its checkpoints, or come when a run is resumed."""
    with pytest.raises(ImportError, match=r"DeepSpeed 0\.1\S+ is too old.*'deepspeed>=0\.19\.7,<0\.20'"):
        check_release(version)


@pytest.mark.parametrize("version", ["0.19.7", "0.19.8", "0.20.0", "1.0.0+abc"])
def test_a_later_release_is_taken(version):
    """What it lacks is looked for by name."""
    check_release(version)


def test_pip_is_told_the_same():
    assert '"deepspeed>=0.19.7,<0.20"' in (ROOT / "setup.py").read_text(encoding="utf-8")
