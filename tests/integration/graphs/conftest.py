"""Graphs on a CPU, for the tests of this folder: see `recording.py`."""

import pytest
from recording import OperatorRecording

from sparse_patch.integration.graphs import captured, inputs


@pytest.fixture(autouse=True)
def _graphs_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "can_record", lambda x: True)
    monkeypatch.setattr(captured, "Recording", OperatorRecording)
