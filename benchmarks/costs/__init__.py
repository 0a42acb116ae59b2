# SPDX-License-Identifier: Apache-2.0
"""What else a run pays: communication, telemetry, data preparation, the whole main job."""
