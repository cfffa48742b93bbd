"""Text to batches: sources, a byte-level BPE, packing into a memory-map, samplers, the loader, few shapes.

Nothing here needs a process group: whoever comes first builds under a file lock, everybody else waits and reads.
"""

from neuron_lightning.data.bucket_sampler import BucketBatchSampler
from neuron_lightning.data.buckets import (
    PadToBuckets,
    bucket_length,
    check_buckets,
    powers_of_two_buckets,
)
from neuron_lightning.data.corpus import standard_library
from neuron_lightning.data.dataset import TokenDataset
from neuron_lightning.data.loader import create_pretraining_dataloader
from neuron_lightning.data.pack import TokenFile, pack_documents
from neuron_lightning.data.prepare import PreparedData, open_prepared, prepare_pretraining_data
from neuron_lightning.data.sampler import PositionalSampler
from neuron_lightning.data.sources import Document, TextSource, open_source
from neuron_lightning.data.tokenizer import BpeTokenizer

__all__ = [
    "BpeTokenizer",
    "BucketBatchSampler",
    "Document",
    "PadToBuckets",
    "PositionalSampler",
    "PreparedData",
    "TextSource",
    "TokenDataset",
    "TokenFile",
    "bucket_length",
    "check_buckets",
    "create_pretraining_dataloader",
    "open_prepared",
    "open_source",
    "pack_documents",
    "powers_of_two_buckets",
    "prepare_pretraining_data",
    "standard_library",
]
