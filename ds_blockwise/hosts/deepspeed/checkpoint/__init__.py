# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of DeepSpeed engines: saved whole or not at all, verified before they are loaded, converted."""
