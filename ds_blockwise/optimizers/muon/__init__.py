# SPDX-License-Identifier: Apache-2.0
"""Muon on the matrices that roles and heads make, whatever part of them a rank holds."""
