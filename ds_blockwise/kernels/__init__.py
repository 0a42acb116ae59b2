# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of a step: one interface, a readable definition, and the backends that equal it."""
