# SPDX-License-Identifier: Apache-2.0
"""Other releases of the hosts, each in a folder of its own that goes before the environment's."""
