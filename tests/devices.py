"""The devices of this machine, for tests that need them while they are collected; else there is the fixture."""

import torch

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
