# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as files: folders, manifests, the portable form, and the record in a state dict."""
