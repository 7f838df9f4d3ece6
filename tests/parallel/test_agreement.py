from minillm.parallel.agreement import FirstRankError, any_rank, on_first
from minillm.parallel.launch import launch


def agreed(me):
    acted = []
    result = on_first(lambda: acted.append(me.rank) or {"rank": me.rank}, me.group)
    flags = [any_rank(flag, me.group) for flag in (False, me.rank == me.size - 1, True)]
    try:
        on_first(lambda: 1 / 0, me.group)
    except (ZeroDivisionError, FirstRankError) as error:
        said = f"{type(error).__name__}: {error}"
    return result, acted, flags, said, on_first(lambda: me.rank, me.group)  # an error leaves nothing behind


def test_one_acts_and_all_know():
    elsewhere = "FirstRankError: the first rank of the group could not go on: ZeroDivisionError: division by zero"
    first, *others = launch(agreed, 3)
    assert first == ({"rank": 0}, [0], [False, True, True], "ZeroDivisionError: division by zero", 0)
    assert others == [({"rank": 0}, [], [False, True, True], elsewhere, 0)] * 2


def test_alone_nothing_is_sent():
    result, acted, flags, said, _ = launch(agreed, 1)[0]
    assert (result, acted, flags, said) == ({"rank": 0}, [0], [False, True, True], "ZeroDivisionError: division by zero")
    assert any_rank(True, None) and not any_rank(False, None) and on_first(lambda: 3, None) == 3
