# SPDX-License-Identifier: Apache-2.0
"""What the fork server of the checkpoint matrix imports once: the hosts take ten seconds a process otherwise."""

import deepspeed.checkpoint.ds_to_universal  # noqa: F401
import megatron.core.models.gpt  # noqa: F401
import torch

from tests.helpers.deepspeed.reshard import prepare

torch.set_num_threads(1)  # a process with more threads must not be forked
prepare()
