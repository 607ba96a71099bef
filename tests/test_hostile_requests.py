"""Hostile requests at the guard: it refuses what it is there for, and lets by what is for the application to judge."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from collections.abc import Iterator

import pytest

from guarded import Running, running
from hostile_requests import CASES, CLOSED, Case, right, send

PATIENCE = 1


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(settings={"body_seconds": PATIENCE}, patience={"headers": PATIENCE}) as there:
        yield there
        there.signal()
        assert there.ended() == 0  # it has outlived them all


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES if case.by == "guard"])
def test_the_guard_refuses_and_says_why(server: Running, case: Case) -> None:
    status, message = send(server.url, case, timeout=20)
    assert right(case, status, message), (status, message)


def test_what_is_for_the_application_to_judge_reaches_it(server: Running) -> None:
    # The application here answers anything, or with an error that is not in OpenAI's form.
    answers = {case.name: send(server.url, case, timeout=20) for case in CASES if case.by == "application"}
    stopped = {name: answer for name, answer in answers.items() if answer[0] not in (200, 404, 405) or answer[1]}
    assert not stopped


def test_there_are_many_cases_each_with_a_name_of_its_own_and_an_answer() -> None:
    assert len(CASES) > 150
    twice = [name for name, count in Counter(case.name for case in CASES).items() if count > 1]
    assert not twice
    for case in CASES:
        assert case.statuses
        assert all(status == CLOSED or 200 <= status < 500 or status in (501, 505) for status in case.statuses)
        assert 422 not in case.statuses
        assert case.by == "application" or 200 not in case.statuses or len(case.statuses) > 1


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"", (CLOSED, "")),
        (b"HTTP/1.1 200 OK\r\n\r\n{}", (200, "")),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 413 \r\n\r\nno", (413, "")),
        (b'HTTP/1.1 400 B\r\n\r\n{"detail": "no"}', (400, "")),
        (b'HTTP/1.1 400 B\r\n\r\n{"error": "no"}', (400, "")),
        (b'HTTP/1.1 400 B\r\n\r\n{"error": {"message": "no"}}', (400, "")),
        (b'HTTP/1.1 400 B\r\n\r\n{"error": {"message": "no", "type": "t", "param": null, "code": null}}', (400, "no")),
    ],
)
def test_what_a_server_answers_is_read(answer: bytes, expected: tuple[int, str]) -> None:
    case = next(case for case in CASES if case.name == "nothing at all")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def reply() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(2**16)
                connection.sendall(answer)

        thread = threading.Thread(target=reply)
        thread.start()
        found = send(f"http://127.0.0.1:{listener.getsockname()[1]}", case, timeout=5)
        thread.join()
    assert found == expected
    assert right(case, *found) is (expected == (400, "no"))
