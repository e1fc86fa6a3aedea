"""The store's bookkeeping: nothing lost, nothing twice, caps kept, and a file that comes back whole."""

import random

import pytest

from transformers_minicpm4.rl.rollout_store import RolloutStore


def run(store: RolloutStore, chunk_length: int, batches: int, seed: int, drop_share: float = 0.0):
    """Drive a store with random lengths as the trainer does; yields after every iteration."""
    chooser = random.Random(seed)
    lengths = {}
    taken = []
    while len(taken) < batches:
        for _ in range(store.admission()):
            group = store.admit(store.admitted, [1, 2])
            for row in group.trajectories:
                # Long-tailed: most are short, some reach the limit.
                lengths[group.number, row.sample] = min(int(chooser.lognormvariate(1.5, 1.2)) + 1, 1000)
        for group, row in store.unfinished():
            want = lengths[group.number, row.sample]
            budget = store.budget(row, chunk_length)
            left = want - len(row.token_ids)
            store.extend(row, [7] * min(left, budget), [-1.0] * min(left, budget), store.batches, left <= budget)
        for group in store.waiting():
            if not group.scored:
                if chooser.random() < drop_share:
                    store.drop(group)
                    continue
                for row in group.trajectories:
                    row.rewards = [1.0]
        batch = store.take()
        if batch:
            taken.append(batch)
        yield taken, lengths


CAPS = [(None, None), (12, None), (None, 0), (None, 2), (9, 1), (4, 3)]


@pytest.mark.parametrize(("max_live_rows", "max_staleness"), CAPS)
@pytest.mark.parametrize("chunk_length", [2, 7, 40])
def test_every_group_is_trained_dropped_or_here_and_the_caps_hold(chunk_length, max_live_rows, max_staleness):
    for seed in range(5):
        store = RolloutStore(4, 40, 3, max_live_rows, max_staleness)
        for taken, lengths in run(store, chunk_length, 25, seed, drop_share=0.2):  # noqa: B007
            assert store.admitted == store.trained + store.dropped + len(store.groups)
            assert max_live_rows is None or len(store.unfinished()) <= max_live_rows
        numbers = [group.number for batch in taken for group in batch]
        assert len(numbers) == len(set(numbers)) == 75
        for place, batch in enumerate(taken):
            assert [group.number for group in batch] == sorted(group.number for group in batch)
            for group in batch:
                assert max_staleness is None or place - group.admitted <= max_staleness
                for row in group.trajectories:
                    assert len(row.token_ids) == min(lengths[group.number, row.sample], 40)
                    assert sum(length for _, length in row.chunks) == len(row.token_ids) == len(row.logprobs)
                    assert all(length <= chunk_length for _, length in row.chunks)


def test_without_a_staleness_cap_some_groups_are_staler():
    """The cap of the test above is one that binds."""
    store = RolloutStore(4, 40, 3)
    *_, (taken, _) = run(store, 2, 25, 0)
    assert max(place - group.admitted for place, batch in enumerate(taken) for group in batch) > 2


def test_chunks_of_the_full_length_are_ordinary_grpo():
    """Every batch is the prompts admitted in its own iteration."""
    store = RolloutStore(4, 40, 3)
    iterations = 0
    for taken, _ in run(store, 40, 10, 0):  # noqa: B007
        iterations += 1
        assert not store.groups
    assert iterations == 10
    assert [group.number for batch in taken for group in batch] == list(range(30))


def test_a_chunk_is_written_once_and_within_its_room():
    store = RolloutStore(2, 10, 1)
    row = store.admit(0, [1]).trajectories[0]
    with pytest.raises(ValueError, match="room for 10"):
        store.extend(row, [1] * 11, [0.0] * 11, 0, False)
    with pytest.raises(ValueError, match="2 tokens with 1 log-probabilities"):
        store.extend(row, [1, 2], [0.0], 0, False)
    with pytest.raises(ValueError, match="0 tokens"):
        store.extend(row, [], [], 0, False)
    store.extend(row, [1, 2], [0.0, 0.0], 0, True)
    with pytest.raises(ValueError, match="that is finished"):
        store.extend(row, [1], [0.0], 0, False)
    with pytest.raises(ValueError, match="no room for one group of 4"):
        RolloutStore(4, 10, 1, max_live_rows=3)
    with pytest.raises(ValueError, match="0 or more batches"):
        RolloutStore(4, 10, 1, max_staleness=-1)


def test_a_saved_store_goes_on_as_if_it_had_not_stopped(tmp_path):
    def fresh():
        return RolloutStore(4, 40, 3)

    store = fresh()
    schedule = run(store, 5, 12, 3, drop_share=0.1)
    for _ in range(7):
        next(schedule)
    store.groups[0].trajectories[0].extra = {"note": "x", "value": [1, None]}
    store.groups[0].trajectories[1].garbled = "repetition"
    store.save(tmp_path / "s.safetensors", cursor={"epoch": 1, "place": 2})
    other = fresh()
    assert other.load(tmp_path / "s.safetensors") == {"cursor": {"epoch": 1, "place": 2}}
    assert other.__dict__ == store.__dict__
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]


def test_damaged_and_foreign_files_are_refused(tmp_path, monkeypatch):
    store = RolloutStore(4, 40, 3)
    for _ in run(store, 5, 2, 0):
        pass
    path = tmp_path / "s.safetensors"
    store.save(path)
    whole = path.read_bytes()
    for piece in (b"", whole[:20], whole[: len(whole) // 2], b"{}" + whole):
        (tmp_path / "cut").write_bytes(piece)
        with pytest.raises(ValueError, match="no complete rollout store"):
            RolloutStore(4, 40, 3).load(tmp_path / "cut")
    with pytest.raises(ValueError, match="num_generations=4, the configuration now has 8"):
        RolloutStore(8, 40, 3).load(path)
    with pytest.raises(ValueError, match="max_completion_length=40"):
        RolloutStore(4, 50, 3).load(path)

    # A disk that is full in the middle leaves the old file.
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers_minicpm4.rl.rollout_store.os.replace", full)
    with pytest.raises(OSError, match="No space"):
        store.save(path)
    assert path.read_bytes() == whole
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cut", "s.safetensors"]
