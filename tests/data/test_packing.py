import torch

from minillm.data.packing import segments

E = 9


def test_the_example_of_the_docstring():
    ids = torch.tensor([[1, 2, E, 3, 4, E, 5]])
    segment_ids, positions = segments(ids, E)
    assert segment_ids.tolist() == [[0, 0, 0, 1, 1, 1, 2]]
    assert positions.tolist() == [[0, 1, 2, 0, 1, 2, 0]]


def test_rows_are_apart_and_ends_in_a_row_are_documents_of_one_token():
    ids = torch.tensor([[E, E, 1, E], [1, 1, 1, 1]])
    segment_ids, positions = segments(ids, E)
    assert segment_ids.tolist() == [[0, 1, 2, 2], [0, 0, 0, 0]]
    assert positions.tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert segment_ids.dtype == positions.dtype == torch.int64


def test_random_rows_against_a_loop():
    ids = torch.randint(0, 12, (8, 60), generator=torch.Generator().manual_seed(0))
    segment_ids, positions = segments(ids, E)
    for row in range(8):
        segment = place = 0
        for column in range(60):
            assert (segment_ids[row, column], positions[row, column]) == (segment, place)
            place += 1
            if ids[row, column] == E:
                segment, place = segment + 1, 0
