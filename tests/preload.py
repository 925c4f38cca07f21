"""Imported once by the process that those of `helpers.Training` are forked from, which saves each seconds."""

import os

import pytest  # noqa: F401 (the test run's own main module is imported in each)
import torch._dynamo
import torch.distributed.checkpoint.state_dict  # noqa: F401

import fineweb  # noqa: F401
import train_gpt2  # noqa: F401
from lib import tokenizer

tokenizer.build_vocabulary_files()  # it remembers
os.fsync = lambda handle: None  # as in conftest.py
