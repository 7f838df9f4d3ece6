"""Checkpoints that every rank writes its part of, and that another number of ranks, another ZeRO stage or one process reads.

train/checkpoint.py brings everything together on the first rank; here nothing is gathered. torch.distributed.checkpoint (DCP)
finds which ranges of the files a rank needs: each tensor is stored as one row of numbers, cut where the ranks cut, so pieces
that end inside a row of a matrix are ranges, too. The files are safetensors; nothing is ever unpickled.
Names are "master/embed.weight" for weights (the float32 copies of those in 16 bits), then the optimizer's, such as
"exp_avg/embed.weight", as in the engine's dense state. Left out: frozen weights under ZeRO 1 and 2, which have no pieces.
"""

import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from jaxtyping import Shaped
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from minillm.parallel.agreement import on_first
from minillm.parallel.data_parallel import Group
from minillm.parallel.zero1 import Zero1


class Piece(NamedTuple):
    """A range of a stored row of numbers: what is written from, or read to; where it begins; and how long the row is."""

    numbers: Shaped[Tensor, "n"]
    first: int
    total: int

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """The range, as DCP says it."""
        return ChunkStorageMetadata(torch.Size([self.first]), torch.Size([len(self.numbers)]))


class SavePieces(dcp.DefaultSavePlanner):
    """Tells DCP what this rank could write; of equal ranges, it lets one rank write."""

    def create_local_plan(self) -> dcp.SavePlan:
        """All pieces."""
        self.plan = dcp.SavePlan([self._item(name, piece) for name, piece in self.state_dict.items()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """Where the numbers are."""
        return self.state_dict[index.fqn].numbers

    def _item(self, name: str, piece: Piece) -> dcp.WriteItem:
        about = TensorWriteData(piece.chunk, TensorProperties.create_from_tensor(piece.numbers), torch.Size([piece.total]))
        return dcp.WriteItem(MetadataIndex(name, piece.chunk.offsets), WriteItemType.SHARD, tensor_data=about)


class LoadPieces(dcp.DefaultLoadPlanner):
    """Tells DCP which ranges of the stored ones this rank needs."""

    def set_up_planner(self, state_dict: dict[str, Piece], metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """Begin."""
        self.state_dict, self.metadata = state_dict, metadata

    def create_local_plan(self) -> dcp.LoadPlan:
        """Whatever overlaps with a piece."""
        there = self.metadata.state_dict_metadata
        return dcp.LoadPlan([item for name, piece in self.state_dict.items()
                             for item in create_read_items_for_chunk_list(name, there[name], [piece.chunk])])

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Where the numbers go."""
        return self.state_dict[index.fqn].numbers


def dense_pieces(tensors: Mapping[str, Tensor]) -> dict[str, Piece]:
    """Whole tensors, which every rank has alike; one of them writes. They must be contiguous, to be read into."""
    return {name: Piece(tensor.detach().view(-1), 0, tensor.numel()) for name, tensor in tensors.items()}


def zero_pieces(zero: Zero1, optimizer: torch.optim.Optimizer) -> dict[str, Piece]:
    """This rank's pieces of weights and of the optimizer's states, without those that are empty."""
    pieces = {}
    for flat in zero.flats:
        for name, piece in flat.pieces.items():
            first = max(0, flat.rank * flat.length - flat.spans[name][0])
            for slot, tensor in {"master": piece, **optimizer.state.get(piece, {})}.items():
                if slot == "step":
                    pieces |= dense_pieces({f"step/{name}": tensor})
                elif tensor.numel():
                    pieces[f"{slot}/{name}"] = Piece(tensor.detach().view(-1), first, flat.parameters[name].numel())
    return pieces


def save_sharded(folder: Path, pieces: Mapping[str, Piece], group: Group | None = None) -> None:
    """Write a folder of one file a rank, or nothing: it is filled under another name, and renamed when all are done."""
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.tmp")
    on_first(lambda: shutil.rmtree(temporary, ignore_errors=True), group)
    writer = dcp.HuggingFaceStorageWriter(str(temporary), save_distributed=True)
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that one process is one process
        dcp.save(dict(pieces), storage_writer=writer, planner=SavePieces(flatten_state_dict=False), process_group=group,
                 no_dist=group is None)

    def finish() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(temporary, folder)
    on_first(finish, group)


def stored(folder: Path) -> dict[str, int]:
    """Name -> numbers of what a folder holds."""
    return {name: about.size[0] for name, about in dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata.items()}


def load_sharded(folder: Path, pieces: Mapping[str, Piece], group: Group | None = None) -> None:
    """Read these pieces, in place, whatever pieces they were written in.

    Raises: ValueError for a name or a size that the folder does not have.
    """
    there = stored(folder)
    for name, piece in pieces.items():
        if there.get(name) != piece.total:
            raise ValueError(f"{folder} has {there.get(name, 'no')} numbers as {name}, and the model {piece.total}: it belongs to "
                             f"another model, or its ranks did not all write.")
    reader = dcp.HuggingFaceStorageReader(str(folder))
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        dcp.load(dict(pieces), storage_reader=reader, planner=LoadPieces(), process_group=group, no_dist=group is None)


@torch.no_grad()
def load_zero(folder: Path, zero: Zero1, optimizer: torch.optim.Optimizer) -> None:
    """Take weights and the optimizer's states from a folder. Raises: as `load_sharded`."""
    for key in stored(folder):
        slot, _, name = key.partition("/")
        if name in zero.pieces and slot != "master":
            piece = zero.pieces[name]
            optimizer.state[piece][slot] = torch.zeros((), device=piece.device) if slot == "step" else torch.zeros_like(piece)
    load_sharded(folder, zero_pieces(zero, optimizer), zero.group)
    zero.publish()
