"""Which sample next? An append-only ledger of mixing decisions, and the dataset that follows it."""

from megatron_acodm.blending.adoption import adopt
from megatron_acodm.blending.dataset import OnlineBlendedDataset
from megatron_acodm.blending.ledger import Ledger
from megatron_acodm.blending.live import LedgerReader
from megatron_acodm.blending.quotas import DataExhausted

__all__ = ["DataExhausted", "Ledger", "LedgerReader", "OnlineBlendedDataset", "adopt"]
