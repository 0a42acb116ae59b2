# SPDX-License-Identifier: Apache-2.0
"""Releases of Megatron-core outside the supported range are named, with the range."""

import logging

import pytest

pytest.importorskip("megatron.core", reason="the guard looks at the installed release")
from megatron_patch import guard
from tests.helpers import ROOT


@pytest.mark.parametrize("version", ["0.15.3", "0.9.0", "0.15.0rc7"])
def test_an_old_release_is_refused(version):
    """Its optimizers take other arguments, and the first error would name one of those."""
    with pytest.raises(ImportError, match=rf"megatron-core {version} is too old.*'megatron-core>=0\.16,<0\.20'"):
        guard.check_release(version)


@pytest.mark.parametrize(("version", "warnings"), [("0.16.0", 0), ("0.19.2", 0), ("0.20.0", 1), ("1.0.0rc1", 1)])
def test_a_later_release_is_warned_of(version, warnings, caplog):
    """It may work; a user of it must hear that nobody tried."""
    with caplog.at_level(logging.WARNING, logger=guard.__name__):
        guard.check_release(version)
    assert len(caplog.records) == warnings
    assert all(version in record.getMessage() and ">=0.16,<0.20" in record.getMessage() for record in caplog.records)


def test_pip_is_told_the_same_range():
    """Errors would name releases that pip does not install with us."""
    assert f'"megatron-core{guard.SUPPORTED}"' in (ROOT / "setup.py").read_text(encoding="utf-8")
