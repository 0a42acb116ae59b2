# SPDX-License-Identifier: Apache-2.0
"""From a model to roles: what names and modules say about each parameter."""
