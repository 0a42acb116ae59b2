# SPDX-License-Identifier: Apache-2.0
"""``docs/support.md``: what is claimed, and whether the tests of a run bear it out."""
