"""Streaming safetensors checkpoints: read piece by piece, written whole or not at all."""

from lycoris.checkpoint.checkpoint import Checkpoint
from lycoris.checkpoint.discovery import ShardIndex
from lycoris.checkpoint.file import SafetensorsFile
from lycoris.checkpoint.header import TensorEntry
from lycoris.checkpoint.interrupt import interruptible
from lycoris.checkpoint.writer import CheckpointWriter

__all__ = ["Checkpoint", "CheckpointWriter", "SafetensorsFile", "ShardIndex", "TensorEntry", "interruptible"]
