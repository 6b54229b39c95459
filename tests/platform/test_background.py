"""Work in the background: beside the caller, in order, and its errors where its results are wanted."""

from threading import Event, get_ident

import pytest
import torch

from emu2_megatron.platform.background import background


def test_work_goes_on_while_the_caller_does() -> None:
    """Two pieces of work, the first of which waits for something the caller does after starting both."""
    start, go_on, order = background(), Event(), []

    def first() -> list[torch.Tensor]:
        assert go_on.wait(timeout=60)
        order.append("first")
        return [torch.tensor(get_ident())]

    def second() -> list[torch.Tensor]:
        order.append("second")
        return [torch.tensor(2)]

    one, two = start(first), start(second)
    assert order == []
    go_on.set()
    assert int(two()[0]) == 2 and int(one()[0]) != get_ident()
    assert order == ["first", "second"]


def test_errors_come_out_with_the_result() -> None:
    start = background()

    def fail() -> list[torch.Tensor]:
        raise ValueError("no such picture")

    result = start(fail)
    with pytest.raises(ValueError, match="no such picture"):
        result()
    assert int(start(lambda: [torch.tensor(1)])()[0]) == 1
