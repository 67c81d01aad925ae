"""The measurement of the client: its server is as slow as it says, and what is counted is what came."""

from __future__ import annotations

import socket
import time
from itertools import islice

from instruct_data.llm.pace import BODY, delays, in_order, measure, paced


def test_one_in_twenty_is_late_and_batches_of_ten_meet_as_many_as_by_chance():
    first, second = (list(islice(made, 400)) for made in [delays(0.2, 20, 10)] for _ in range(2))
    assert first == second
    assert first.count(2.0) == 20
    assert first.count(0.2) == 380
    tens = [first[start : start + 10] for start in range(0, 400, 10)]
    assert sum(2.0 in ten for ten in tens) == round(40 * (1 - 0.95**10))
    assert list(islice(delays(0.2), 3)) == [0.2] * 3


def test_a_request_in_pieces_is_answered_once_and_no_earlier_than_said():
    with paced(0.1) as url:
        port = int(url.split(":")[2].partition("/")[0])
        with socket.create_connection(("127.0.0.1", port)) as connection:
            for _ in range(2):
                for piece in (b"POST /v1/chat/completions HTTP/1.1\r\ncontent-", b"Length: 4\r\n\r\n{}"):
                    connection.sendall(piece)
                    time.sleep(0.02)
                sent = time.monotonic()
                connection.sendall(b"  ")
                reply = b""
                while not reply.endswith(BODY):
                    reply += connection.recv(1 << 16)
                assert time.monotonic() - sent >= 0.1
                assert reply.count(b"HTTP/1.1 200") == 1


def test_the_midst_leaves_out_start_and_end():
    def way(client, requests):
        time.sleep(0.5)
        in_order(client, requests)
        time.sleep(0.5)

    with paced(0.05) as url:
        pace = measure(url, 4, 40, way)
    assert pace.rate < 40 / 1.5
    assert 1.5 * pace.rate < pace.midst < 1.25 * 4 / 0.05  # four come together, and the midst begins with the first
    assert 0 < pace.cpu < 50
