"""Helpers beside the tests say as much of a failed assertion as tests do."""

import pytest

pytest.register_assert_rewrite("engine", "frontend", "gpu", "unit", "engine_session", "service")
