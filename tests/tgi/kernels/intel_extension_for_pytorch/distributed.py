"""Collectives of one machine: torch's own."""

from torch.distributed import all_gather, all_gather_into_tensor, all_reduce, init_process_group

__all__ = ["all_gather", "all_gather_into_tensor", "all_reduce", "init_process_group"]
