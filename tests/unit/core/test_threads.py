"""Torch's number of threads belongs to the whole process."""

import threading

import torch

from quantcli.core.threads import one_thread, thread_pool


def test_the_number_comes_back_whichever_block_ends_last():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    inside, leave = threading.Event(), threading.Event()
    seen = []

    def other():
        with thread_pool(2):
            inside.set()
            leave.wait(60)
            seen.append(torch.get_num_threads())
        seen.append(torch.get_num_threads())

    thread = threading.Thread(target=other)
    try:
        with one_thread():
            thread.start()
            inside.wait(60)
            with one_thread():
                pass
            assert torch.get_num_threads() == 1  # the outer block goes on
        leave.set()
        thread.join()
        assert seen == [1, 3]
        assert torch.get_num_threads() == 3
        news = []
        fresh = threading.Thread(target=lambda: news.append(torch.get_num_threads()))
        fresh.start()
        fresh.join()
        assert news == [3]
    finally:
        leave.set()
        torch.set_num_threads(before)
