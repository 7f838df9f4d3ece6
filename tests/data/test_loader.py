from itertools import islice

import pytest
import torch

from minillm.data.loader import IGNORED, Batch, Loader, evaluation_batches
from minillm.data.packing import segments
from minillm.data.shards import open_shards, write_shards


def take(loader: Loader, count: int) -> list[Batch]:
    return list(islice(loader, count))


def same(first: Batch, second: Batch) -> bool:
    return torch.equal(first.ids, second.ids) and torch.equal(first.targets, second.targets)


def test_a_target_is_the_next_token_and_windows_do_not_overlap(shards):
    stream = torch.from_numpy(shards[:])
    batches = take(Loader(shards, 4, 32, shuffle=False), 3)
    for number, batch in enumerate(batches):
        start = number * 4 * 32
        assert torch.equal(batch.ids, stream[start:start + 128].view(4, 32))
        assert torch.equal(batch.targets, stream[start + 1:start + 129].view(4, 32))
        assert batch.ids.dtype == batch.targets.dtype == torch.int64
        assert batch.count == 128
        assert batch.positions is None and batch.segment_ids is None


def rows(batches: list[Batch]) -> list[tuple[int, ...]]:
    return [tuple(row.tolist()) for batch in batches for row in batch.ids]


def test_an_epoch_takes_every_window_once_in_a_new_order(shards):
    loader = Loader(shards, 3, 40, seed=1)
    in_order = rows(take(Loader(shards, 1, 40, shuffle=False), loader.windows))
    first, second = (rows(take(loader, loader.batches_per_epoch)) for _ in range(2))
    assert first != second
    assert first != in_order[:len(first)]
    for epoch in (first, second):
        assert len(set(epoch)) == len(epoch) == loader.windows // 3 * 3
        assert set(epoch) <= set(in_order)
    assert loader.epoch == 1  # the second epoch is finished when the next batch is asked for


def test_a_seed_gives_its_order(shards):
    assert rows(take(Loader(shards, 3, 40, seed=1), 5)) == rows(take(Loader(shards, 3, 40, seed=1), 5))
    assert rows(take(Loader(shards, 3, 40, seed=1), 5)) != rows(take(Loader(shards, 3, 40, seed=2), 5))


@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_the_ranks_batches_side_by_side_are_the_batch_of_one(shards, ranks):
    alone = Loader(shards, 6, 64, seed=3)
    loaders = [Loader(shards, 6, 64, seed=3, rank=rank, ranks=ranks) for rank in range(ranks)]
    for _ in range(alone.batches_per_epoch + 2):  # into the second epoch
        whole, parts = next(alone), [next(loader) for loader in loaders]
        assert {len(part.ids) for part in parts} == {6 // ranks}
        assert torch.equal(torch.cat([part.ids for part in parts]), whole.ids)
        assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)


@pytest.mark.parametrize("taken", [0, 1, 7, "end of epoch", "into the next epoch"])
def test_going_on_from_a_saved_position_is_exact(shards, taken):
    loader = Loader(shards, 4, 64, seed=5)
    epoch = loader.batches_per_epoch
    taken = {"end of epoch": epoch, "into the next epoch": epoch + 2}.get(taken, taken)
    take(loader, taken)
    state = dict(loader.state_dict())
    expected = take(loader, loader.batches_per_epoch + 1)
    resumed = Loader(shards, 4, 64, seed=5)
    resumed.load_state_dict(state)
    assert all(map(same, expected, take(resumed, loader.batches_per_epoch + 1)))
    assert (resumed.epoch, resumed.taken) == (loader.epoch, loader.taken)


def test_a_position_does_not_depend_on_the_number_of_ranks(shards):
    alone = Loader(shards, 4, 64, seed=5)
    take(alone, 3)
    half = Loader(shards, 4, 64, seed=5, rank=1, ranks=2)
    half.load_state_dict(alone.state_dict())
    assert torch.equal(next(half).ids, next(alone).ids[2:])


@pytest.mark.parametrize("batch_size, context, name", [(2, 64, "batch_size"), (4, 63, "windows")])
def test_a_position_over_other_data_or_another_batch_is_refused(shards, batch_size, context, name):
    state = Loader(shards, 4, 64).state_dict()
    with pytest.raises(ValueError, match=f"saved with {name} = "):
        Loader(shards, batch_size, context).load_state_dict(state)


def test_a_context_longer_than_the_data_says_both_numbers(shards):
    with pytest.raises(ValueError, match=rf"{len(shards):,} tokens.*at most {len(shards) - 1:,}"):
        Loader(shards, 1, len(shards))
    assert next(Loader(shards, 1, len(shards) - 1)).ids.shape == (1, len(shards) - 1)


def test_wrong_sizes_are_refused(shards):
    windows = (len(shards) - 1) // 32
    with pytest.raises(ValueError, match=f"{windows:,} windows of 32, fewer than one batch of {windows + 1}"):
        Loader(shards, windows + 1, 32)
    with pytest.raises(ValueError, match="batch of 4 does not divide over 3 ranks"):
        Loader(shards, 4, 32, ranks=3)
    with pytest.raises(ValueError, match="rank 2 is not one"):
        Loader(shards, 4, 32, rank=2, ranks=2)
    with pytest.raises(ValueError, match="end_of_text"):
        Loader(shards, 4, 32, packed_mask=True)


def test_packed_mask_gives_segments_and_positions(shards, tokenizer):
    batch = next(Loader(shards, 8, 512, packed_mask=True, end_of_text=tokenizer.end_of_text))
    segment_ids, positions = segments(batch.ids, tokenizer.end_of_text)
    assert torch.equal(batch.segment_ids, segment_ids) and torch.equal(batch.positions, positions)
    assert batch.segment_ids.max() > 0  # or nothing would be tested


@pytest.mark.parametrize("batch_size, context", [(50, 1), (3, 50), (4, 64), (2, 100_000)])
def test_evaluation_counts_every_target_once(shards, batch_size, context):
    targets = [target for batch in evaluation_batches(shards, batch_size, context)
               for target in batch.targets.flatten().tolist() if target != IGNORED]
    assert targets == shards[1:len(shards)].tolist()


def test_evaluation_pads_only_the_end(shards):
    batches = list(evaluation_batches(shards, 4, 64))
    assert all(batch.ids.shape == (4, 64) and batch.count == 256 for batch in batches[:-1])
    assert sum(batch.count for batch in batches) == len(shards) - 1
    last = batches[-1]
    padded = (last.targets == IGNORED).flatten()
    assert not padded[:last.count].any() and padded[last.count:].all()
    assert last.count > 64 * (len(last.ids) - 1)  # no row of nothing but padding


def test_evaluation_of_a_single_whole_window(tmp_path, tokenizer, docs):
    write_shards(tmp_path, "val", docs[:1], tokenizer)
    shards = open_shards(tmp_path, "val")
    batch, = evaluation_batches(shards, 1, len(shards) - 1)
    assert batch.count == len(shards) - 1 == batch.ids.numel()


def test_split_gives_microbatches_and_to_keeps_the_rest():
    ids = torch.arange(20).view(5, 4)
    targets = torch.full((5, 4), IGNORED)
    targets[0, 0] = 7
    parts = Batch(ids, targets, positions=ids).split(2)
    assert [len(part.ids) for part in parts] == [2, 2, 1]
    assert [part.count for part in parts] == [1, 0, 0]
    assert torch.equal(torch.cat([part.positions for part in parts]), ids)
    assert parts[0].segment_ids is None
    moved = parts[0].to("meta")
    assert moved.ids.device.type == moved.positions.device.type == "meta" and moved.segment_ids is None


def test_rows_are_shared_as_evenly_as_they_go():
    whole = Batch(torch.arange(10).view(5, 2), torch.arange(10).view(5, 2) + 1)
    for ranks in (1, 2, 4, 7):
        parts = [whole.part(rank, ranks) for rank in range(ranks)]
        assert torch.equal(torch.cat([part.ids for part in parts]), whole.ids) and sum(part.count for part in parts) == 10
        assert {len(part.ids) for part in parts} <= {5 // ranks, -(-5 // ranks)}
