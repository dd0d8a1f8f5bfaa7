import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from htsr_alloc.analysis.schedule import available_cores, run
from htsr_alloc.errors import HtsrError


@settings(max_examples=40, deadline=None)
@given(
    costs=st.lists(st.integers(1, 10), max_size=25),
    workers=st.integers(1, 6),
    spare=st.integers(0, 20),
)
def test_every_task_runs_once_within_the_bounds(costs, workers, spare):
    budget = max(costs, default=1) + spare
    lock, held, most, threads = threading.Lock(), [0], [0], set()

    def work(task):
        with lock:
            held[0] += task[1]
            most[0] = max(most[0], held[0])
            threads.add(threading.get_ident())
        time.sleep(0.0005)
        with lock:
            held[0] -= task[1]
        return task[0] * 2

    tasks = list(enumerate(costs))
    done = list(run(tasks, work, workers=workers, cost=lambda task: task[1], budget=budget))
    assert sorted(done) == [(task, 2 * task[0]) for task in tasks]
    assert most[0] <= budget
    assert len(threads) <= workers


def test_a_task_that_does_not_fit_lets_a_smaller_one_pass():
    """Budget 10: after 8 has started, 7 must wait and 2 may go."""
    started, gate = [], threading.Event()

    def work(task):
        started.append(task)
        if task == 2:
            gate.set()
        assert task == 7 or gate.wait(5)
        return task

    results = run([8, 7, 2], work, workers=3, cost=lambda task: task, budget=10)
    assert {task for task, _ in results} == {8, 7, 2}
    assert started[-1] == 7


def test_the_next_task_runs_while_a_result_is_being_written():
    second = threading.Event()

    def work(task):
        if task == 2:
            second.set()
        return task

    results = run([1, 2], work, workers=1, cost=lambda task: 1, budget=1)
    assert next(results) == (1, 1)  # and now the caller takes its time
    assert second.wait(10)
    assert list(results) == [(2, 2)]


def test_what_can_never_fit_is_refused_before_any_work():
    with pytest.raises(HtsrError, match=r"One matrix takes 11 MB, and .* leaves 10 MB") as caught:
        next(run([1, 11], print, workers=2, cost=lambda task: task * 10**6, budget=10**7))
    assert "max_memory by 2MB" in caught.value.hint


def test_an_error_ends_the_run_and_drops_what_has_not_started():
    ran = []

    def work(task):
        ran.append(task)
        if task == 0:
            raise ValueError("broken")
        return task

    with pytest.raises(ValueError, match="broken"):
        list(run(range(1000), work, workers=1, cost=lambda task: 1, budget=1))
    assert len(ran) < 10


def test_each_thread_is_started_once():
    started = []
    wanted = threading.Barrier(3, timeout=5)
    results = run(
        range(3),
        lambda task: wanted.wait() >= 0,
        workers=3,
        cost=lambda task: 1,
        budget=3,
        start_thread=lambda: started.append(threading.get_ident()),
    )
    assert all(ok for _, ok in results)
    assert len(set(started)) == len(started) == 3


def test_torchruns_processes_share_the_cores(monkeypatch):
    alone = available_cores()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert available_cores() == max(1, alone // 2)
