"""What the processes of `helpers.Training` have in memory from the start: the one that they are forked from
imports this file once, instead of each of them for seconds."""

import pytest  # noqa: F401 (the test run's own main module is imported in each)
import torch._dynamo
import torch.distributed.checkpoint.state_dict  # noqa: F401

import train_gpt2  # noqa: F401
from lib import tokenizer

tokenizer.build_tokenizer_json()  # it remembers
